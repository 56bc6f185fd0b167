"""Finds the images of a data set, in folders or in tar files of such folders.

==============================  ====================================================================================
``train/CLASS/FILE``            an image, if Pillow can open its file type; classes are numbered in sorted order
``train.tar``                   members CLASS/FILE; a common parent folder or a leading ./ is allowed
other files, hidden folders     ignored, with a warning
folders inside a class folder   an error: either level could be the class
a class only in ``val/``        an error; a class only in ``train/`` is a warning
more than 8 bits per channel,   an error when the image is read; for the first, the range from black to white is not
more pixels than Pillow allows  known
broken training files           replaced by the next readable file, with a warning; counted as ``bad_files``
broken validation files         an error before the training, or ignored with ``--skip-bad-val``
==============================  ====================================================================================
"""

import errno
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .decoding import decode
from .errors import TrainingError
from .progress import warn

_Array = NDArray[np.integer[Any]]

_NAMED = 5  # maximum number of files that a message names; it counts the others
# These are errors of the system, not of the file.
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


class Entry(NamedTuple):
    """An entry of a folder. ``place`` is the offset and the size of the content of a tar member."""

    name: str
    is_folder: bool = False
    place: tuple[int, int] = (0, 0)


class Files:
    """The image files of a split, and their classes.

    Names and places are stored in a few arrays. One Python object per file would be copied into every worker, because
    reading it changes its reference count.

    Args:
        root: the folder that the names are relative to, or the tar file.
        classes: name and files of each class, in the order of the class numbers.
        decoder: ``pillow`` or ``torchcodec``.
    """

    def __init__(self, root: Path, classes: Iterable[tuple[str, Sequence[Entry]]], decoder: str = "pillow") -> None:
        self.root, self.decoder = str(root), decoder
        self.in_tar = not root.is_dir()
        names = bytearray()
        ends: list[_Array] = [np.zeros(1, np.int64)]
        labels: list[_Array] = []
        places: list[_Array] = []
        for label, (folder, files) in enumerate(classes):
            paths = [os.fsencode(f"{folder}/{file.name}") for file in files]
            ends.append(np.cumsum([len(path) for path in paths], dtype=np.int64) + len(names))
            names += b"".join(paths)
            labels.append(np.full(len(paths), label, np.int32))
            places.append(np.array([file.place for file in files if self.in_tar], np.int64).reshape(-1, 2))
        self._names = np.frombuffer(bytes(names), np.uint8)
        self._ends, self._labels, self._places = (np.concatenate(arrays) for arrays in (ends, labels, places))

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def nbytes(self) -> int:
        """Memory of the names, classes and places, in bytes."""
        return sum(array.nbytes for array in (self._names, self._ends, self._labels, self._places))

    def label(self, index: int) -> int:
        """Return the class number of a file."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """Return the path of a file; for a tar member, the path of the tar file followed by the member name."""
        start, end = self._ends[index : index + 2]
        return f"{self.root}/{os.fsdecode(self._names[start:end].tobytes())}"

    def pixels(self, index: int) -> Tensor | None:
        """Return the pixels of a file, uint8 (height, width, 3); None if it is broken or missing.

        Raises:
            TrainingError: the image is not supported, or the system lacks memory or file descriptors.
        """
        name = self.name(index)
        try:
            data = self._read(index, name)
        except OSError as error:
            if error.errno in _SHORTAGES:
                raise TrainingError(f"cannot read {name}: {error.strerror}") from error
            return None
        return decode(data, name, self.decoder)

    def _read(self, index: int, name: str) -> bytes:
        if self.in_tar:
            offset, size = self._places[index].tolist()
            return os.pread(_opened(self.root), size, offset)
        with open(name, "rb") as file:
            return file.read()


@lru_cache
def _opened(path: str) -> int:
    """Open a file and keep it open. Processes may share the descriptor: ``pread`` does not move its position."""
    return os.open(path, os.O_RDONLY)


def find(root: Path, option: str, is_tar: bool = False, decoder: str = "pillow") -> tuple[Files, Files, int]:
    """Return the training files, the validation files and the number of classes below ``root``, or in its tar files.

    Raises:
        TrainingError: the data are missing or cannot be used; the message starts with ``option``.
    """
    places = [root / (f"{split}.tar" if is_tar else split) for split in ("train", "val")]
    try:
        train, val = (_classes(place, _members(place, option) if is_tar else _folder(place, option), option)
                      for place in places)  # fmt: skip
    except OSError as error:
        raise TrainingError(f"{option}: cannot read {error.filename}: {error.strerror}") from error
    empty = [name for name, files in train.items() if not files]
    if empty or not train:
        of_class = f", class {named(empty)}" if empty else ": it has no class folders"
        raise TrainingError(f"{option}: no images in {places[0]}{of_class}")
    unknown = [name for name, files in val.items() if name not in train and files]
    if unknown:
        raise TrainingError(f"{option}: {places[1]} has classes that {places[0]} lacks: {named(unknown)}")
    if not any(val.values()):
        raise TrainingError(f"{option}: no images in {places[1]}")
    lacking = [name for name in train if not val.get(name)]
    if lacking:
        warn(f"{places[1]} has no images of {named(lacking)}")
    splits = [
        Files(place, ((name, split.get(name, ())) for name in train), decoder)
        for place, split in zip(places, (train, val), strict=True)
    ]
    return splits[0], splits[1], len(train)


def named(things: Sequence[Any]) -> str:
    """Return the first few names of a list, and the number of the others."""
    names = ", ".join(map(str, things[:_NAMED]))
    return names if len(things) <= _NAMED else f"{names} and {len(things) - _NAMED} more"


Tree = Iterable[tuple[str, Iterable[Entry] | None]]  # top-level names, with the entries of those that are folders


def _classes(place: Path, tree: Tree, option: str) -> dict[str, list[Entry]]:
    """Return the images of each class; classes and images are in natural order."""
    endings = {ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN}
    classes: dict[str, list[Entry]] = {}
    ignored: list[str] = []
    for name, inside in sorted(tree, key=lambda item: _natural(item[0])):
        if inside is None or _is_hidden(name):
            ignored.append(name)
            continue
        files = classes[name] = []
        for entry in sorted(inside, key=lambda entry: _natural(entry.name)):
            if _is_hidden(entry.name):
                ignored.append(f"{name}/{entry.name}")
            elif entry.is_folder:
                raise TrainingError(
                    f"{option}: {place}/{name}/{entry.name} is a folder inside a class folder: images must lie "
                    "directly in the folder of their class"
                )
            elif os.path.splitext(entry.name)[1].lower() in endings:
                files.append(entry)
            else:
                ignored.append(f"{name}/{entry.name}")
    if ignored:
        warn(f"ignored in {place}: {named(ignored)}")
    return classes


def _folder(folder: Path, option: str) -> Tree:
    if not folder.is_dir():
        raise TrainingError(f"{option}: there is no folder {folder}")
    with os.scandir(folder) as entries:
        return [(entry.name, _inside(entry.path) if entry.is_dir() else None) for entry in entries]


def _inside(folder: str) -> Iterator[Entry]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield Entry(entry.name, entry.is_dir())


def _members(path: Path, option: str) -> Tree:
    """Return the files of a tar file, as ``_folder`` does for the folder that it unpacks to."""
    if not path.is_file():
        raise TrainingError(f"{option}: there is no file {path}")
    with path.open("rb") as file:
        if file.read(6).startswith(_COMPRESSED):
            raise TrainingError(f"{option}: {path} is compressed, but images are read in place: decompress it")
    tree: dict[str, Any] = {}  # a folder is a dictionary, a file is the place of its content
    ignored: list[str] = []
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise tarfile keeps every member
                *folders, name = [part for part in member.name.split("/") if part != "."] or [""]
                is_file = member.isreg() and not member.issparse()
                if not (is_file or member.isdir()):
                    ignored.append(member.name)
                    continue
                inside = tree
                for folder in folders:
                    inside = inside.setdefault(folder, {})
                if is_file:
                    inside[name] = (member.offset_data, member.size)
                elif name:
                    inside.setdefault(name, {})
    except (
        tarfile.TarError,
        TypeError,
        AttributeError,
    ) as error:  # the latter two if a path is both a file and a folder
        raise TrainingError(f"{option}: {path} is not a tar file or is damaged: {error}") from error
    if ignored:
        warn(f"ignored in {path} (links and special files): {named(ignored)}")
    shown = [name for name in tree if not _is_hidden(name)]
    around = tree[shown[0]] if len(shown) == 1 else None
    if isinstance(around, dict) and any(isinstance(inside, dict) for inside in around.values()):
        tree.pop(shown[0])
        tree |= around
    return [(name, _listed(inside) if isinstance(inside, dict) else None) for name, inside in tree.items()]


def _listed(folder: dict[str, Any]) -> list[Entry]:
    return [
        Entry(name, True) if isinstance(inside, dict) else Entry(name, False, inside) for name, inside in folder.items()
    ]


def _natural(name: str) -> tuple[list[str | int], str]:
    """Return a sort key that puts 9 before 10 and is unique; timm's treats 01 like 1, and fails for 5²."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
