"""``crsam-train --profile``: measures the data alone, the step alone, and both together.

The three measurements alternate in short rounds, so that other load on the machine affects all of them equally. Nothing
is trained: the learning rate is 0, so that the loss cannot diverge and no step is skipped for that reason.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from crsam_ext import CRSAM, bench

from . import checkpoint
from .data import Batch, Data
from .errors import TrainingError
from .loader import PREFETCH
from .measure import flops_of_pass, mfu_percent
from .options import full_config
from .progress import say, warn
from .ranks import ALONE, Ranks
from .schedules import Schedules
from .state import PROFILE

if TYPE_CHECKING:
    from .loop import Training

ROUNDS = 5
PACKAGES = ("torch", "timm", "torchcodec", "pillow")  # packages whose versions are recorded


def profile(training: Training, seconds: float) -> None:
    """Measure each part for about ``seconds``, print a table, and write ``profile.json`` to the output folder.

    Args:
        training: a run that has taken no step. It cannot be trained afterwards.
        seconds: duration of each measurement.

    Raises:
        TrainingError: profile.json exists and ``--overwrite`` is not set, or the folder cannot be created.
    """
    options, state = training.options, training.state
    path: Path = options.output / PROFILE
    state.ranks.first(lambda: _claim(path, options.overwrite))
    say(f"measuring data alone, compute alone, and both: about {seconds:g} s each, after a warm-up")
    records = measure(training, seconds)
    report = {
        **bench.machine(state.device, PACKAGES),
        "command": f"crsam-train --profile {seconds:g}",
        "options": full_config(options),
        "training": records,
    }
    say(bench.table(report))
    if state.ranks.is_first:
        checkpoint.write(path, lambda file: file.write(checkpoint.as_json(report)))
        say(f"results written to {path}")
    state.ranks.leave()


def _claim(path: Path, overwrite: bool) -> None:
    """Create the output folder. It may contain a run, but not an earlier profile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not overwrite:
            raise TrainingError(f"{path} already exists: use --overwrite or another --output")
    except OSError as error:
        raise TrainingError(f"--output {path.parent}: {error.strerror}") from error


def measure(training: Training, seconds: float, data_alone: bool = True) -> list[dict[str, Any]]:
    """Measure the images per second of training. Collective.

    Args:
        training: a run that has taken no step.
        seconds: duration of each measurement, after a warm-up, in up to :data:`ROUNDS` rounds.
        data_alone: whether to measure the data alone, too.

    Returns:
        A record for each part, "data", "compute" and "both", with ``images_per_second`` of all ranks for each round,
        and the other values that :func:`crsam_ext.bench.table` shows.
    """
    meter = _Meter(training)
    loader, plan = meter.loader, meter.plan(seconds)
    sections: dict[str, list[_Section]] = {"data": [], "compute": [], "both": []}
    for _ in range(plan.rounds):
        sections["compute"].append(meter.steps(itertools.repeat(meter.batch, plan.compute)))
        loader.drain()
        if data_alone:
            sections["data"].append(loader.load(plan.data))
        meter.steps(islice(loader.batches, 1))  # only this step waits for the first batch
        sections["both"].append(meter.steps(islice(loader.batches, plan.both)))
    skipped = int(training.state.optimizer.stats.skipped)
    if skipped:
        warn(
            f"{skipped} steps were skipped because of a NaN or Inf; a skipped step takes less time, so the rates are "
            "too high"
        )
    return _records(training, meter.batch, sections)


def measure_data(
    data: Data, options: Namespace, device: torch.device, seconds: float, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Return the record of the data alone, as :func:`measure` does, but without a model. Collective."""
    loader = _Loader(data, options, device, ranks)
    batch = next(loader.batches)
    each = loader.seconds_each(seconds / ROUNDS / 4)
    count = _multiple(seconds / ROUNDS / each, loader.workers)
    rounds = _rounds(seconds, count * each)
    sections = [loader.load(count) for _ in range(rounds)]
    rates = _rates(ranks.gather(sections))
    return _data_record(_common(options, batch, ranks) | {"model": None, "method": None}, rates)


def method(options: Namespace) -> str:
    """Return the name of the optimizer in results, such as ``crsam sgd, interval 5, reuse``."""
    optimizer, base = options.optimizer, options.base
    words = [optimizer if optimizer == base else f"{optimizer} {base}"]
    words += [f"interval {options.interval}"] if (options.interval or 1) > 1 else []
    words += ["reuse"] if options.reuse else []
    words += [f"curvature interval {options.curvature_interval}"] if (options.curvature_interval or 1) > 1 else []
    return ", ".join(words)


class _Plan(NamedTuple):
    """The number of rounds, and the number of batches of each part in a round."""

    rounds: int
    data: int
    compute: int
    both: int


class _Section(NamedTuple):
    """The measurement of a part in one round, on this rank."""

    images: int
    seconds: float
    passes: int = 0
    parts: dict[str, float] = {}  # noqa: RUF012, the default is never mutated


class _Held(Schedules):
    """Schedules fixed at the middle of the run, after warm-up and before rho reaches 0, with a learning rate of 0."""

    def __init__(self, schedules: Schedules, optimizer: CRSAM, step: int) -> None:
        self._schedules, self._optimizer, self._middle = schedules, optimizer, step

    def set(self, step: int) -> None:
        self._schedules.set(self._middle)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0


class _Loader:
    """This rank's batches of the first epoch, repeated; their size is the first of --image-size."""

    def __init__(self, data: Data, options: Namespace, device: torch.device, ranks: Ranks) -> None:
        self._device, self._ranks, self._ahead = device, ranks, PREFETCH * (options.workers or 0)
        self.workers = max(options.workers or 0, 1)
        self.batches: Iterator[Batch] = itertools.chain.from_iterable(data.train(0, 0) for _ in itertools.count())

    def drain(self) -> None:
        """Discard the batches that the workers prepared ahead."""
        self.load(self._ahead)

    def load(self, count: int) -> _Section:
        """Load batches without using them."""
        self.wait()
        began = time.perf_counter()
        images = sum(len(batch.x) for batch in islice(self.batches, count))
        self.wait()
        return _Section(images, time.perf_counter() - began)

    def seconds_each(self, enough: float) -> float:
        """Return the seconds per batch on the slowest rank, measured for ``enough`` seconds."""
        self.drain()
        return _seconds_each(lambda count: max(self._ranks.gather(self.load(count).seconds)), self.workers, enough)

    def wait(self) -> None:
        """Synchronize the device."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


class _Meter:
    """Measures steps."""

    def __init__(self, training: Training) -> None:
        self._training, self._state, options = training, training.state, training.options
        self.loader = _Loader(training.data, options, self._state.device, self._state.ranks)
        self.batch = next(self.loader.batches)
        middle = options.epochs * training.data.steps // 2
        training.schedules = _Held(training.schedules, self._state.optimizer, middle)
        self._state.trained.train()

    def plan(self, seconds: float) -> _Plan:
        """Warm up, and plan rounds that measure each part for ``seconds``.

        A round consists of whole cycles. For steps, a cycle covers all kinds of steps of --interval and
        --curvature-interval, or of --interval alone if the full cycle would take longer than ``seconds``. For data, a
        cycle is one batch of each worker, since these batches arrive together. If cycles are long, there are fewer
        rounds, at least one.
        """
        optimizer, target = self._state.optimizer, seconds / ROUNDS
        cycle, workers = optimizer.interval * optimizer.curvature_interval, self.loader.workers
        # Enough steps to run each number of passes; a graph is captured at the fourth step of its kind.
        first = 5 * cycle if self._training.options.cuda_graph else max(optimizer.interval + 1, 3)
        self.steps(itertools.repeat(self.batch, first))
        step = _seconds_each(self._seconds_of_slowest, optimizer.interval, target / 4)
        batch = self.loader.seconds_each(target / 4)
        both = max(step, batch)
        if cycle * both > seconds:
            cycle = optimizer.interval
        # If steps wait for data, their rounds also consist of whole cycles of the workers.
        cycle_of_both = cycle if step > batch else math.ceil(workers / cycle) * cycle
        data, compute = _multiple(target / batch, workers), _multiple(target / step, cycle)
        count = _multiple(target / both, cycle_of_both)
        return _Plan(_rounds(seconds, max(data * batch, compute * step, count * both)), data, compute, count)

    def steps(self, batches: Iterable[Batch]) -> _Section:
        """Take steps as a training run does, and measure them."""
        training, parts, images, passes = self._training, self._training.parts, 0, 0
        self.loader.wait()
        parts.mark("other")
        parts.seconds()  # discard the time before this section
        began = time.perf_counter()
        for batch in batches:
            parts.mark("data")
            training.requests.begin_step()
            passes += self._state.optimizer.passes * len(batch.x)
            training.take(batch)
            training.requests.end_step()
            images += len(batch.x)
            parts.mark("other")
        of_parts = parts.seconds()
        seconds = time.perf_counter() - began
        self._state.epoch.fold()
        return _Section(images, seconds, passes, of_parts)

    def _seconds_of_slowest(self, count: int) -> float:
        """Return the seconds of some steps on the slowest rank, so that all ranks plan the same number."""
        return max(self._state.ranks.gather(self.steps(itertools.repeat(self.batch, count)).seconds))


def _seconds_each(measure: Callable[[int], float], count: int, enough: float) -> float:
    """Return the seconds of one item. ``count`` is doubled until all of them take at least ``enough`` seconds."""
    while (taken := measure(count)) < enough:
        count *= 2
    return taken / count


def _multiple(number: float, of: int) -> int:
    """Return the positive multiple of ``of`` that is nearest to a number."""
    return max(round(number / of), 1) * of


def _rounds(seconds: float, of_round: float) -> int:
    return min(max(int(seconds / of_round), 1), ROUNDS)


def _records(training: Training, batch: Batch, sections: dict[str, list[_Section]]) -> list[dict[str, Any]]:
    ranks, peak = training.state.ranks, training.peak
    of_ranks = ranks.gather(sections)
    common = _common(training.options, batch, ranks)
    flops = None if peak is None else flops_of_pass(training.state.model, common["shape"])
    records = []
    for part in ("compute", "both"):
        rounds = [own[part] for own in of_ranks]
        rates = _rates(rounds)
        passes = sum(s.passes for s in sections[part]) / sum(s.images for s in sections[part])
        record = {**common, "part": part, "images_per_second": rates, "passes": passes}
        if flops is not None and peak is not None:
            record["mfu_percent"] = [mfu_percent(flops, passes * rate / ranks.size, peak) for rate in rates]
        record["parts_percent"] = [_shares(of_round) for of_round in zip(*rounds, strict=True)]
        records.append(record)
    if sections["data"]:
        data = _data_record(common, _rates([own["data"] for own in of_ranks]))
        records[0]["cores_per_device"] = bench.cores_per_device(records[0], data)
        records.insert(0, data)
    return records


def _common(options: Namespace, batch: Batch, ranks: Ranks) -> dict[str, Any]:
    return {
        "model": options.model, "method": method(options), "data": options.data, "decoder": options.decoder,
        "shape": list(batch.x.shape[1:]), "batch_size": options.batch_size, "devices": ranks.size,
        "workers": options.workers or 0,
    }  # fmt: skip


def _data_record(common: dict[str, Any], rates: list[float]) -> dict[str, Any]:
    record = {**common, "part": "data", "images_per_second": rates}
    return record | {"images_per_second_per_core": bench.rate_of_core(record)}


def _rates(of_ranks: list[list[_Section]]) -> list[float]:
    """Return the images per second of all ranks together, for each round."""
    rounds = zip(*of_ranks, strict=True)
    return [sum(section.images / section.seconds for section in of_round) for of_round in rounds]


def _shares(of_round: Iterable[_Section]) -> dict[str, float]:
    """Return the percentage of the time of each part, averaged over ranks."""
    sections = list(of_round)
    return {
        part: statistics.fmean(100 * section.parts[part] / section.seconds for section in sections)
        for part in sections[0].parts
    }
