"""Training metrics and timing. The host does not wait for the device between two log lines."""

import copy
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .ranks import ALONE, Ranks

#: Peak TFLOPS of dense bfloat16, by words of the device name (from NVIDIA data sheets).
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
    """Divides the time of training into parts. Every moment belongs to exactly one part.

    On a CUDA device, times are measured on the device with events: "data" is the time in which the device waits for a
    batch, copies it and prepares it. On other devices, times are measured on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self._last = self._now()

    def mark(self, part: str) -> None:
        """Assign the time since the last mark to a part."""
        self._marks.append((part, self._now()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part since the last call. This waits for the device."""
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
    """Sums over the steps of an epoch and over all ranks; every rank has the same numbers.

    New steps stay on the device until :meth:`fold` fetches them. The sums do not depend on when that happens.

    Args:
        ranks: the ranks to sum over.
    """

    NAMES = ("loss", "correct", "samples", "grad_norm", "ranks_with_norm")

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._pending: list[Tensor] = []
        self.steps = torch.zeros(0, len(self.NAMES), dtype=torch.float64)  #: a row of sums for each step
        self.bad: set[str] = set()  #: files that could not be read
        self.counts = {"skipped": 0, "curvature_dropped": 0}

    def add(self, loss: Tensor, logits: Tensor, y: Tensor, grad_norm: Tensor | None) -> None:
        """Add a step. A loss that is not finite (a skipped step) and an unknown gradient norm are not counted."""
        labels = y if y.ndim == 1 else y.argmax(1)
        sound = torch.isfinite(loss)  # otherwise the step was skipped, and would turn the mean into NaN
        norm = loss.new_zeros((), dtype=torch.float64) if grad_norm is None else grad_norm.double()
        known = torch.isfinite(norm) if grad_norm is not None else torch.zeros_like(norm)
        row = [
            torch.where(sound, loss.double(), 0.0) * len(y), sound * (logits.argmax(1) == labels).sum(), sound * len(y),
            torch.where(known.bool(), norm, 0.0), known,
        ]  # fmt: skip
        self._pending.append(torch.stack([number.to(norm.device, torch.float64) for number in row]))

    def fold(self) -> None:
        """Fetch the steps added since the last call, from all ranks. Collective; the host waits for the device."""
        if not self._pending:
            return
        own = torch.stack(self._pending).cpu()
        self._pending.clear()
        total = torch.zeros_like(own)
        for of_rank in self._ranks.gather(own):
            total += of_rank
        self.steps = torch.cat([self.steps, total])

    def means(self, first: int = 0) -> dict[str, float]:
        """Return mean loss, accuracy (0 to 1) and gradient norm of the steps from ``first``; NaN if unknown."""
        sums = [math.fsum(column) for column in self.steps[first:].T.tolist()]
        loss, correct, samples, norm, norms = sums
        return {
            "loss": loss / samples if samples else math.nan,
            "accuracy": correct / samples if samples else math.nan,
            "grad_norm": norm / norms if norms else math.nan,
        }

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"steps": self.steps, "bad": sorted(self.bad), "counts": dict(self.counts)}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state of :meth:`state`."""
        self.steps, self.bad = state["steps"], set(state["bad"])
        self.counts = dict(state["counts"])


def correct_in_top(logits: Tensor, y: Tensor, k: int) -> Tensor:
    """Count the labels (N,) that are among the k largest logits (N, classes) of their row; 0-dim."""
    return (logits.topk(min(k, logits.shape[1]), dim=1).indices == y[:, None]).any(1).sum()


def flops_of_pass(model: nn.Module, shape: Sequence[int]) -> float | None:
    """Count the floating-point operations of one forward and backward of one sample, on the meta device.

    Returns:
        The number, or None if an operator of the model does not support the meta device.
    """
    try:
        copied = copy.deepcopy(model).to("meta").train()
        x = torch.empty(2, *shape, device="meta")
        with FlopCounterMode(display=False) as counter:
            copied(x).sum().backward()
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    return counter.get_total_flops() / 2


def mfu_percent(flops: float, passes_per_second: float, peak: float) -> float:
    """Return the model FLOPs utilization in percent (Chowdhery et al. 2022).

    Args:
        flops: floating-point operations of one pass of one sample.
        passes_per_second: passes of single samples, per device.
        peak: peak speed of the device, in TFLOPS.
    """
    return 100 * flops * passes_per_second / (peak * 1e12)


def peak_tflops(device: torch.device, given: float | None, amp: bool) -> float | None:
    """Return the peak TFLOPS of a device: as given, or for bfloat16 by its name; None if unknown."""
    if given is not None:
        return given
    if device.type != "cuda" or not amp:
        return None
    name = torch.cuda.get_device_name(device)
    # Match whole words, because an L40 is not an L4. Variants of a card have other peaks.
    if re.search(r"\b(NVL|Laptop|D|MIG)\b", name):
        return None
    return next((peak for words, peak in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", name)), None)
