"""The logs of a run: CSV files, the figure, TensorBoard, Weights & Biases.

``steps.csv`` gets a new row with each log line. ``log.csv`` has one row per epoch; it is rewritten from the history in
the checkpoint. A resumed run first removes the rows of ``steps.csv`` that are newer than its checkpoint.
"""

import csv
import importlib
import io
import math
import os
import secrets
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from . import checkpoint
from .errors import TrainingError
from .options import full_config
from .plot import draw

#: Columns that differ between two runs with the same options.
TIMES = (
    "seconds", "images_per_second", "images_per_second_per_device", "gradients_per_second", "data_percent",
    "optimizer_percent", "mfu_percent", "remaining_seconds",
)  # fmt: skip
STEP_COLUMNS = (
    "step", "epoch", "loss", "accuracy", "lr", "rho", "grad_norm", "skipped", "bad_files", "images_per_second",
    "images_per_second_per_device", "gradients_per_second", "data_percent", "optimizer_percent", "mfu_percent",
    "remaining_seconds",
)  # fmt: skip
EPOCH_COLUMNS = (
    "epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "test_top5", "seconds",
    "images_per_second", "grad_norm", "skipped", "curvature_dropped", "bad_files",
)  # fmt: skip


class Logs:
    """The log files of a run; only rank 0 writes them.

    Args:
        options: the options of the run; ``output`` is the folder.
        step: steps taken so far; rows of later steps are removed.
    """

    def __init__(self, options: Namespace, step: int) -> None:
        self._options, self._path = options, options.output / "steps.csv"
        rows = [] if step == 0 else _rows_until(self._path, step)
        write_csv(self._path, STEP_COLUMNS, rows)
        self._file: IO[str] = open(self._path, "a", newline="", encoding="utf-8")  # noqa: SIM115, stays open
        self._writer = csv.DictWriter(self._file, STEP_COLUMNS, lineterminator="\n")
        text = checkpoint.as_json(full_config(options))
        checkpoint.write(options.output / "config.json", lambda file: file.write(text))
        self._board, self._wandb = _tensorboard(options, step), _wandb(options, step)

    def add_step(self, row: Mapping[str, Any]) -> None:
        """Append a row to steps.csv."""
        try:
            self._writer.writerow(row)
            self._file.flush()
        except OSError as error:
            raise TrainingError(f"cannot write {self._path}: {error.strerror}") from error
        self._send("step", row, int(row["step"]))

    def add_epoch(self, history: Sequence[Mapping[str, Any]], step: int) -> None:
        """Write log.csv after an epoch, whose row is the last."""
        self.write_history(history)
        self._send("epoch", history[-1], step)

    def write_history(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write log.csv."""
        write_csv(self._options.output / "log.csv", EPOCH_COLUMNS, history)

    def sync(self) -> None:
        """Flush steps.csv to disk, before a checkpoint that relies on it is written."""
        os.fsync(self._file.fileno())

    def draw(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Draw curves.png."""
        o = self._options
        title = f"{o.model} on {o.data.partition(':')[0]}, {o.optimizer}, seed {o.seed}"
        checkpoint.write(o.output / "curves.png", lambda file: draw(file, history, title))

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _send(self, prefix: str, row: Mapping[str, Any], step: int) -> None:
        values = {f"{prefix}/{k}": float(v) for k, v in row.items() if v not in ("", None) and math.isfinite(float(v))}
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)


def check_packages(options: Namespace) -> None:
    """Raise a TrainingError if a package that the logs need is missing."""
    for package, module, asked in (
        ("tensorboard", "torch.utils.tensorboard", options.tensorboard),
        ("wandb", "wandb", options.wandb is not None),
    ):
        if asked:
            try:
                importlib.import_module(module)
            except ImportError as error:
                message = f"--{package} needs the package {package}: pip install {package}"
                raise TrainingError(message) from error


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file atomically."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    checkpoint.write(path, lambda file: file.write(text.getvalue().encode()))


def _rows_until(path: Path, step: int) -> list[dict[str, str]]:
    """Return the complete rows up to ``step``; the last line of the file may be incomplete."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:  # the user may have removed the file
        return []
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [{name: row.get(name, "") for name in STEP_COLUMNS} for row in rows if int(row["step"]) <= step]


def _tensorboard(options: Namespace, step: int) -> Any:
    if not options.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    # Purge the events of an overwritten run, and those after the checkpoint of a resumed one.
    return SummaryWriter(str(options.output / "tensorboard"), purge_step=step + 1)


def _wandb(options: Namespace, step: int) -> Any:
    if options.wandb is None:
        return None
    import wandb

    path = options.output / "wandb-id.txt"  # folder names are not unique
    if step == 0 or not path.exists():
        name = secrets.token_hex(8).encode()
        checkpoint.write(path, lambda file: file.write(name))
    return wandb.init(
        project=options.wandb, name=options.output.name, id=path.read_text(), resume="allow", dir=options.output,
        config=full_config(options),
    )  # fmt: skip
