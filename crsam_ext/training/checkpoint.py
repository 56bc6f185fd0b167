"""Atomic file writes, and checkpoint loading with checks."""

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
    """Write a file atomically: if the process is killed, the old file or the complete new one remains.

    Args:
        path: the file. The content is first written to a file next to it with the suffix ``.partial``.
        content: called with a binary file to write to.

    Raises:
        TrainingError: the file cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError whose context is the OSError of the file.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        with suppress(OSError):
            partial.unlink()  # free the space of a full disk
        raise TrainingError(f"cannot write {path}: {cause.strerror or cause}") from error


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint that ``torch.load(path, weights_only=True)`` can read."""
    write(path, lambda file: torch.save({"format": FORMAT} | state, file))


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint written by :func:`save`, with its tensors on the CPU.

    Raises:
        TrainingError: the file is missing, damaged, or not a checkpoint of this program.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise TrainingError(f"there is no checkpoint {path}") from error
    except OSError as error:
        raise TrainingError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # the unpickler may raise any exception on a damaged file
        raise TrainingError(f"{path} is damaged or not a checkpoint") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainingError(f"{path} is not a checkpoint of this version of crsam-train")
    return state


def as_json(content: Any) -> bytes:
    """Return the content as indented JSON."""
    return (json.dumps(content, indent=2) + "\n").encode()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, and PyTorch on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
