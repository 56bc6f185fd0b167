"""Atomic files, and loading checkpoints with checks."""

import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from .errors import TrainingError

FORMAT = "crsam-train 2"
PARTIAL = ".partial"


def write(path: Path, content: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that it is either complete or as it was, whenever the process is killed.

    Args:
        path: of the file; while it is being written, a file next to it has the suffix ``.partial``.
        content: is given a binary file to write to.

    Raises:
        TrainingError: the folder or the disk does not take the file.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        # torch.save hides an OSError of the file behind a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        with suppress(OSError):
            partial.unlink()  # on a disk that is full
        raise TrainingError(f"cannot write {path}: {cause.strerror or cause}") from error


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint that ``torch.load(path, weights_only=True)`` reads."""
    write(path, lambda file: torch.save({"format": FORMAT} | state, file))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint written by :func:`save`, its tensors on the CPU.

    Raises:
        TrainingError: there is none, it is damaged, or another program wrote it.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise TrainingError(f"there is no checkpoint {path}") from error
    except OSError as error:
        raise TrainingError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file raises whatever the bytes lead the unpickler to
        raise TrainingError(f"{path} is damaged or not a checkpoint") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainingError(f"{path} is not a checkpoint of crsam-train, or of another version")
    return state


def as_json(content: Any) -> bytes:
    """As an indented JSON file."""
    return (json.dumps(content, indent=2) + "\n").encode()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, and PyTorch on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
