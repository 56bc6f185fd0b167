"""Folders of images: which files are the data, and what happens to those that cannot be read.

==============================  ====================================================================================
``train/CLASS/FILE``            an image, if Pillow opens files with its ending; sorted, the folders number the classes
other files, hidden folders     are left out, and named on stderr
folders within a class          are refused: which of the two levels is the class?
a class of ``val/`` alone       is refused; one of ``train/`` alone is named on stderr
more than 8 bits a channel,     is refused when it is read: nothing says which range of values is black to white
more pixels than Pillow allows
broken training files           the next readable file takes their place; named on stderr, counted in ``log.csv``
broken validation files         are refused before the training begins, or left out with ``--skip-bad-val``
==============================  ====================================================================================
"""

import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from .errors import TrainingError
from .progress import warn

Sample = tuple[Path, int]  # file and class

_NAMED = 5  # files that a line names; of more it gives the number


class ImageFiles(Dataset[Any]):
    """Images and their classes. What its workers find broken, the process that reads the batches knows too.

    Args:
        samples: the files.
        replaces: whether the next readable file takes the place of one that is broken.

    Attributes:
        transform: of an image, set by timm's ``create_loader``.
    """

    transform: Callable[[Image.Image], Any]

    def __init__(self, samples: Sequence[Sample], replaces: bool) -> None:
        self.samples, self._replaces = list(samples), replaces
        self._broken = torch.zeros(len(samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for offset in range(len(self)):
            here = (index + offset) % len(self)
            path, label = self.samples[here]
            image = read(path)
            if image is not None:
                return self.transform(image), label
            self._broken[here] = True
            if not self._replaces:
                return self.transform(Image.new("RGB", (256, 256))), label
        raise TrainingError(f"none of the {len(self)} training images can be read")

    def forget(self) -> None:
        """Forget what was found broken."""
        self._broken.zero_()

    def broken(self) -> list[Path]:
        """The files that were found broken since."""
        return [self.samples[index][0] for index in self._broken.nonzero().flatten().tolist()]

    def leave_out(self, paths: Iterable[Path]) -> None:
        """Leave files out from now on."""
        gone = set(paths)
        self.samples = [sample for sample in self.samples if sample[0] not in gone]
        self._broken = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()


def read(path: Path) -> Image.Image | None:
    """The image in a file, as RGB; None if it is broken.

    Raises:
        TrainingError: it has more than 8 bits a channel, or too many pixels.
        MemoryError: there is not enough for its pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, of palettes with transparency
            with Image.open(path) as image:
                if image.mode[0] in "IF":
                    raise TrainingError(f"{path} has more than 8 bits a channel (mode {image.mode}): convert it to 8")
                return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise TrainingError(f"{path}: {error}") from error
    except (TrainingError, MemoryError):
        raise
    except Exception:  # what Pillow raises depends on the format, and on where it breaks
        return None


def find(root: Path, option: str) -> tuple[list[Sample], list[Sample], int]:
    """Training and validation files below ``root``, and the number of classes.

    Raises:
        TrainingError: beginning with ``option``, that there is no such data, or that it cannot be used.
    """
    try:
        train, val = (_classes(root / split, option) for split in ("train", "val"))
    except OSError as error:
        raise TrainingError(f"{option}: cannot read {error.filename}: {error.strerror}") from error
    empty = [name for name, files in train.items() if not files]
    if empty or not train:
        raise TrainingError(f"{option}: 0 images in {root / 'train'}, class {named(empty) if empty else 'none'}")
    unknown = [name for name, files in val.items() if name not in train and files]
    if unknown:
        raise TrainingError(f"{option}: {root / 'val'} has classes that {root / 'train'} lacks: {named(unknown)}")
    if not any(val.values()):
        raise TrainingError(f"{option}: 0 images in {root / 'val'}")
    lacking = [name for name in train if not val.get(name)]
    if lacking:
        warn(f"{root / 'val'} has no images of {named(lacking)}")
    numbers = {name: number for number, name in enumerate(train)}
    samples = [[(file, numbers[name]) for name in numbers for file in split.get(name, ())] for split in (train, val)]
    return samples[0], samples[1], len(numbers)


def named(things: Sequence[Any]) -> str:
    """The first few names of a list, and how many there are."""
    names = ", ".join(map(str, things[:_NAMED]))
    return names if len(things) <= _NAMED else f"{names} and {len(things) - _NAMED} more"


def _classes(folder: Path, option: str) -> dict[str, list[Path]]:
    """The images in each class folder, both in natural order."""
    if not folder.is_dir():
        raise TrainingError(f"{option}: there is no folder {folder}")
    endings = {ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN}
    classes: dict[str, list[Path]] = {}
    ignored: list[str] = []
    for entry in _sorted(folder):
        if not entry.is_dir() or _is_hidden(entry.name):
            ignored.append(entry.name)
            continue
        files = classes[entry.name] = []
        for inner in _sorted(entry.path):
            if _is_hidden(inner.name):
                ignored.append(f"{entry.name}/{inner.name}")
            elif inner.is_dir():
                raise TrainingError(
                    f"{option}: {inner.path} is a folder within a class: images belong into the folder of their class"
                )
            elif Path(inner.name).suffix.lower() in endings:
                files.append(Path(inner.path))
            else:
                ignored.append(f"{entry.name}/{inner.name}")
    if ignored:
        warn(f"left out of {folder}: {named(ignored)}")
    return classes


def _sorted(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: _natural(entry.name))


def _natural(name: str) -> tuple[list[str | int], str]:
    """A key that sorts 9 before 10, and no two names alike; timm's takes 01 for 1, and fails at 5²."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
