"""A training run with its measurements, and a runner that computes many in parallel and caches the results."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crsam_ext import CRSAM, curvature
from crsam_ext.training import checkpoint
from crsam_ext.training.data import epoch_order

from .methods import METHODS
from .tasks import TASKS, Samples, batches

#: Part of the name of a cached run. Increment it when a change of the code changes the result of a run.
VERSION = 1
ASCENT_RHO = 0.2  # radius for the ascent gap, the same for all methods


@dataclass(frozen=True)
class Config:
    """All parameters that determine the result of a run."""

    task: str
    method: str
    rho: float
    seed: int
    epochs: int
    checkpoints: tuple[int, ...]  #: epochs after which losses and curvature are measured
    probes: int = 8
    samples: int = 500  #: samples of each set on which curvature is measured, in one batch
    tuning: bool = False  #: exclude the validation samples from training, and measure only accuracy, on them alone

    @property
    def key(self) -> str:
        return key_of(self, VERSION)


def key_of(config: Any, version: int) -> str:
    """Return the name of a cached run; it depends on the configuration and on the versions of the code and torch."""
    text = json.dumps([version, torch.__version__, asdict(config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def run(config: Config) -> dict[str, Any]:
    """Train and measure. Return the configuration, a row of numbers per checkpoint, skipped steps, and seconds."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    task = TASKS[config.task]
    splits = task.load()
    train, test = splits.train, splits.validation
    if not config.tuning:
        train = (torch.cat([train[0], splits.validation[0]]), torch.cat([train[1], splits.validation[1]]))
        test = splits.test
    checkpoint.seed_everything(config.seed)
    model = task.model()
    optimizer = CRSAM(
        model.parameters(), task.base, rho=config.rho, model=model, **METHODS[config.method], **task.base_options
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    rows = []
    for epoch in range(config.epochs):
        model.train()
        for x, y in batches(*train, task.batch_size, epoch_order(len(train[0]), config.seed, epoch)):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
        schedule.step()
        if epoch + 1 in config.checkpoints:
            row = {"epoch": epoch + 1} | evaluate(model, test, "test")
            if not config.tuning:
                row |= evaluate(model, train, "train") | measure(model, train, test, config)
            rows.append({name: value if math.isfinite(value) else None for name, value in row.items()})
    skipped = int(optimizer.stats.skipped)
    return {
        "config": asdict(config),
        "rows": rows,
        "skipped": skipped,
        "seconds": round(time.perf_counter() - start, 1),
    }


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples, name: str) -> dict[str, float]:
    """Return mean cross-entropy and accuracy over all labels: one per sample, or one per character."""
    model.eval()
    loss = correct = 0.0
    for x, y in zip(samples[0].split(500), samples[1].split(500), strict=True):
        output = model(x)
        loss += F.cross_entropy(output, y, reduction="sum").item()
        correct += (output.argmax(1) == y).sum().item()
    labels = samples[1].numel()
    return {f"{name}_loss": loss / labels, f"{name}_accuracy": correct / labels}


def measure(model: nn.Module, train: Samples, test: Samples, config: Config) -> dict[str, float]:
    """Measure curvature on the first samples of both sets, in evaluation mode."""
    row = {}
    count = math.ceil(config.samples * TASKS[config.task].share)
    for name, (x, y) in (("train", train), ("test", test)):
        loader = [(x[:count], y[:count])]
        c = curvature.normalized_trace(model, F.cross_entropy, loader, probes=config.probes)
        row |= {f"{name}_c": c.value, f"{name}_c_error": c.standard_error}
        row |= {f"{name}_trace": c.trace.value, f"{name}_gradient_norm": c.gradient_norm.value}
    loader = [(train[0][:count], train[1][:count])]
    try:
        top = curvature.top_eigenvalues(model, F.cross_entropy, loader, tolerance=0.02).values[0]
    except RuntimeError:  # the run has diverged
        top = math.nan
    gap = curvature.ascent_gap(model, F.cross_entropy, loader, rho=ASCENT_RHO, steps=10)
    return row | {"train_top_eigenvalue": top, "train_ascent_gap": gap.ratio}


def run_all(
    configs: Sequence[Any], cache: Path, workers: int, progress: Any = None, run_one: Any = None
) -> list[dict[str, Any]]:
    """Return the results of all configurations, in their order, from the cache if possible.

    Args:
        cache: folder with one JSON file per run, written when the run is complete.
        workers: number of processes, with one thread each; 0 computes in this process.
        progress: called with the number of complete runs and the result of the latest one.
        run_one: computes the result of one configuration, :func:`run` by default.
    """
    cache.mkdir(parents=True, exist_ok=True)
    missing = list(dict.fromkeys(c for c in configs if load(c, cache) is None))
    done = len(set(configs)) - len(missing)
    for config, result in _computed(missing, workers, run_one or run):
        checkpoint.write(cache / f"{config.key}.json", lambda file, result=result: file.write(_encoded(result)))
        done += 1
        if progress is not None:
            progress(done, result)
    results = [load(config, cache) for config in configs]
    assert all(result is not None for result in results)
    return results


def load(config: Any, cache: Path) -> dict[str, Any] | None:
    """Return the cached result, or None if it does not exist or cannot be read."""
    try:
        return json.loads((cache / f"{config.key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _computed(configs: Sequence[Any], workers: int, run_one: Any) -> Iterable[tuple[Any, dict[str, Any]]]:
    if not workers or not configs:
        yield from ((config, run_one(config)) for config in configs)
        return
    # Spawn, because a forked process would inherit the state of this process's threads.
    with ProcessPoolExecutor(min(workers, len(configs)), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run_one, config): config for config in configs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _encoded(result: dict[str, Any]) -> bytes:
    return json.dumps(result, allow_nan=False).encode()
