"""What is measured while a network trains, without waiting for the device between two log lines."""

import copy
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .ranks import ALONE, Ranks

#: Peak of dense bfloat16 in TFLOPS, by a part of the device's name (data sheets of NVIDIA).
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


class Parts:
    """Where the time goes: every moment belongs to one part, and the parts add up to the whole.

    On a CUDA device these are times of the device, taken with events: "data" is how long it waits for a batch, copies
    and prepares it. Elsewhere they are times of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self._last = self._now()

    def mark(self, part: str) -> None:
        """Say that the time since the last mark was spent on this part."""
        self._marks.append((part, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part since the last call; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        sums: dict[str, float] = {}
        for part, now in self._marks:
            spent = self._last.elapsed_time(now) / 1000 if self._cuda else now - self._last
            sums[part] = sums.get(part, 0.0) + spent
            self._last = now
        self._marks.clear()
        return sums

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Epoch:
    """Sums over the steps of an epoch, of all ranks, on every rank the same numbers.

    They stay on the device until :meth:`fold` fetches them, and do not depend on when that is.

    Args:
        ranks: whose samples are added up.
    """

    NAMES = ("loss", "correct", "samples", "grad_norm", "ranks_with_norm")

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._pending: list[Tensor] = []
        self.steps = torch.zeros(0, len(self.NAMES), dtype=torch.float64)  #: a row of sums for each step
        self.bad: set[str] = set()  #: files that could not be read
        self.counts = {"skipped": 0, "curvature_dropped": 0}

    def add(self, loss: Tensor, logits: Tensor, y: Tensor, grad_norm: Tensor | None) -> None:
        """Enter a step: its mean loss, if finite, the logits, and the norm of the gradient, if known and finite."""
        labels = y if y.ndim == 1 else y.argmax(1)
        sound = torch.isfinite(loss)  # else the step was skipped, and would make the mean of the epoch a NaN
        norm = loss.new_zeros((), dtype=torch.float64) if grad_norm is None else grad_norm.double()
        known = torch.isfinite(norm) if grad_norm is not None else torch.zeros_like(norm)
        row = [
            torch.where(sound, loss.double(), 0.0) * len(y), sound * (logits.argmax(1) == labels).sum(), sound * len(y),
            torch.where(known.bool(), norm, 0.0), known,
        ]  # fmt: skip
        self._pending.append(torch.stack([number.to(norm.device, torch.float64) for number in row]))

    def fold(self) -> None:
        """Fetch what was added since, from all ranks: a collective call, for which the host waits."""
        if not self._pending:
            return
        own = torch.stack(self._pending).cpu()
        self._pending.clear()
        total = torch.zeros_like(own)
        for of_rank in self._ranks.gather(own):
            total += of_rank
        self.steps = torch.cat([self.steps, total])

    def means(self, first: int = 0) -> dict[str, float]:
        """Loss and accuracy (0 to 1) over the samples, and the mean grad_norm, from a step on; NaN if unknown."""
        sums = [math.fsum(column) for column in self.steps[first:].T.tolist()]
        loss, correct, samples, norm, norms = sums
        return {
            "loss": loss / samples if samples else math.nan,
            "accuracy": correct / samples if samples else math.nan,
            "grad_norm": norm / norms if norms else math.nan,
        }

    def state(self) -> dict[str, Any]:
        """What a run goes on from."""
        return {"steps": self.steps, "bad": sorted(self.bad), "counts": dict(self.counts)}

    def load(self, state: dict[str, Any]) -> None:
        self.steps, self.bad = state["steps"], set(state["bad"])
        self.counts = dict(state["counts"])


def correct_in_top(logits: Tensor, y: Tensor, k: int) -> Tensor:
    """How many of the labels (N,) are among the k largest logits of their row (N, classes); 0-dim."""
    return (logits.topk(min(k, logits.shape[1]), dim=1).indices == y[:, None]).any(1).sum()


def flops_of_pass(model: nn.Module, shape: Sequence[int]) -> float | None:
    """Floating-point operations of forward and backward pass of one sample, counted on the meta device.

    Returns:
        The number, or None where an operator of the model does not run there.
    """
    try:
        copied = copy.deepcopy(model).to("meta").train()
        x = torch.empty(2, *shape, device="meta")
        with FlopCounterMode(display=False) as counter:
            copied(x).sum().backward()
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    return counter.get_total_flops() / 2


def peak_tflops(device: torch.device, given: float | None, amp: bool) -> float | None:
    """Peak of a device in TFLOPS: as given, else in bfloat16 by its name; None where it is unknown."""
    if given is not None:
        return given
    if device.type != "cuda" or not amp:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
