"""The state of a run: saving it, resuming from it, and keeping the best weights.

``last.pt`` is the authoritative state of a run, including its history. It is written before the first step, whenever a
checkpoint is due, after the steps of each epoch, and after each evaluation. ``best.pt`` and the ``epoch-N.pt`` files of
``--checkpoint-hist`` are written before it; the CSV files are truncated and written after it. A run that is killed at
any moment therefore resumes from its last checkpoint, and its files become the same as without the interruption.
"""

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from crsam_ext import CRSAM

from . import checkpoint
from .errors import TrainingError
from .measure import Epoch
from .options import run_config
from .ranks import Ranks
from .steps import Objective

FILES = ("last.pt", "best.pt", "log.csv", "steps.csv", "curves.png", "config.json")
PROFILE = "profile.json"  # not part of a run: it may exist before the run starts, and is kept


@dataclass
class Run:
    """The state of a run: everything that training changes."""

    device: torch.device
    ranks: Ranks
    objective: Objective
    optimizer: CRSAM
    ema: ModelEmaV3 | None
    trained: nn.Module  #: the objective, or the DistributedDataParallel around it
    epoch: Epoch  #: sums over the current epoch
    steps_of_epoch: int
    step: int = 0  #: steps taken
    history: list[dict[str, Any]] = field(default_factory=list)  #: the rows of log.csv
    bad: set[str] = field(default_factory=set)  #: files that could not be read in the whole run

    @property
    def model(self) -> nn.Module:
        return self.objective.model

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module


def claim(options: Namespace) -> None:
    """Create the output folder. With ``--overwrite``, delete the files of an earlier run in it.

    Raises:
        TrainingError: the folder is not empty and ``--overwrite`` is not set, or it cannot be created.
    """
    output = options.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        used = any(path.suffix != checkpoint.PARTIAL and path.name != PROFILE for path in output.iterdir())
        if used and not options.overwrite:
            raise TrainingError(f"{output} is not empty: use --resume, --overwrite or another --output")
        for path in (*(output / name for name in FILES), *_files_of_epochs(output).values()):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise TrainingError(f"--output {output}: {error.strerror}") from error


def save(run: Run, options: Namespace) -> None:
    """Write last.pt. Collective."""
    run.epoch.fold()
    buffers = run.ranks.gather([_buffers(model) for model in _models(run)])
    if not run.ranks.is_first:
        return
    state = {
        "config": run_config(options),
        "step": run.step,
        "steps_of_epoch": run.steps_of_epoch,
        "history": run.history,
        "epoch": run.epoch.state(),
        "bad": sorted(run.bad),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "ema": None if run.ema is None else run.ema.module.state_dict(),
        "buffers": buffers if run.ranks.size > 1 else None,
    }
    checkpoint.save(options.output / "last.pt", state)


def save_best(run: Run, options: Namespace) -> None:
    """Write the weights of the last evaluation if they are among the best, and delete those that no longer are."""
    if not run.ranks.is_first or run.history[-1].get("test_accuracy") is None:
        return
    row, kept = run.history[-1], _best_epochs(run.history, options.checkpoint_hist)
    content = {"config": run_config(options), "model": run.evaluated.state_dict()}
    content |= {name: row[name] for name in ("epoch", "test_accuracy")}
    if kept[0] == row["epoch"]:
        checkpoint.save(options.output / "best.pt", content)
    if options.checkpoint_hist > 1:
        if row["epoch"] in kept:
            checkpoint.save(options.output / f"epoch-{row['epoch']}.pt", content)
        for epoch, path in _files_of_epochs(options.output).items():
            if epoch not in kept:
                path.unlink(missing_ok=True)


def _files_of_epochs(output: Path) -> dict[int, Path]:
    names = {path: path.stem.partition("-")[2] for path in output.glob("epoch-*.pt")}
    return {int(name): path for path, name in names.items() if name.isdecimal()}


def _best_epochs(history: list[dict[str, Any]], count: int) -> list[int]:
    """Return the epochs with the highest test accuracy, best first; among equal ones, the earlier first."""
    tested = [row for row in history if row.get("test_accuracy") is not None]
    return [row["epoch"] for row in sorted(tested, key=lambda row: -row["test_accuracy"])[:count]]


def restore(run: Run, options: Namespace) -> None:
    """Restore a run from last.pt.

    Raises:
        TrainingError: last.pt is missing, or belongs to a run with other options or data.
    """
    path = options.output / "last.pt"
    saved = run.ranks.first(lambda: checkpoint.load(path))
    for name, value in run_config(options).items():
        before = saved["config"].get(name)
        if before != value:
            flag = "--" + name.replace("_", "-")
            raise TrainingError(f"cannot resume with {flag} {value}: {options.output} was started with {flag} {before}")
    if saved["steps_of_epoch"] != run.steps_of_epoch:
        raise TrainingError(
            f"cannot resume with {run.steps_of_epoch} steps per epoch: {options.output} was started with "
            f"{saved['steps_of_epoch']}; check --data, and the number of processes if the last batch is small"
        )
    try:
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        if run.ema is not None:
            run.ema.module.load_state_dict(saved["ema"])
        run.step, run.history, run.bad = saved["step"], saved["history"], set(saved["bad"])
        run.epoch.load(saved["epoch"])
        _restore_buffers(run, saved["buffers"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} does not fit this model and optimizer") from error


def _models(run: Run) -> list[nn.Module]:
    return [run.model] if run.ema is None else [run.model, run.ema.module]


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.cpu() for name, buffer in model.named_buffers()}


def _restore_buffers(run: Run, saved: list[list[dict[str, torch.Tensor]]] | None) -> None:
    """Restore this rank's running statistics, or their means if the number of ranks has changed."""
    if saved is None:
        return
    for index, model in enumerate(_models(run)):
        of_ranks = [buffers[index] for buffers in saved]
        if len(of_ranks) == run.ranks.size:
            of_ranks = [of_ranks[run.ranks.rank]]
        for name, buffer in model.named_buffers():
            values = torch.stack([buffers[name] for buffers in of_ranks])
            buffer.copy_(values.mean(0) if buffer.is_floating_point() else values[0])
