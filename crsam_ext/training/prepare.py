"""``crsam-train prepare``: shrink the images of a data set once, so that every epoch reads and decodes less.

=======================  ===========================================================================================
``train.tar``,           the images as ``CLASS/NAME.jpg``, in the order of the source; or folders ``train`` and ``val``
``val.tar``
``manifest-train.csv``,  the list of a split: for each image its name, its bytes before and after, and the SHA-256 of
``manifest-val.csv``     its content; for an image that could not be read, only the name of the source
``manifest.json``        options, versions, classes in order, and for each split the counts, the bytes, and the SHA-256
                         of its list. It is written last: if it exists, the folder is complete
``options.json``         options of the command; exists only until the folder is complete
=======================  ===========================================================================================

A list contains the name and the hash of each image, so the hash of the list identifies all names and contents; it is
the same for tar files and folders. A list is also the journal: an image is listed after it is stored, and a resumed
command discards images that are not listed. Its result has the same bytes as that of an uninterrupted command.
"""

import csv
import io
import json
import os
import shutil
import signal
import tarfile
import time
import warnings
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import PIL
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, features
from torch.utils.data import DataLoader, Dataset

from .checkpoint import PARTIAL, as_json, write
from .decoding import opened
from .errors import TrainingError
from .images import find, named
from .loader import ignore_signals
from .options import Parser, integer
from .progress import new_bar, say, warn
from .ranks import started

FORMAT = "crsam-train prepare 1"
SPLITS = ("train", "val")

_BATCH = 16  # images in a batch of a worker
_COMMIT = 1.0  # seconds between writes to the list: the maximum work lost if the command is killed
_METADATA = 4096  # maximum bytes of metadata in a JPEG that is copied: an sRGB profile has 3 kB, a thumbnail more
_COLUMNS = ("name", "source_bytes", "bytes", "sha256")
# In messages: the keys of the manifest that are not options.
_IN_WORDS = {
    "classes": "list of classes",
    "source_sha256": "list of source files",
    "pillow": "version of Pillow",
    "libjpeg": "version of libjpeg",
}


def main(argv: Sequence[str]) -> int:
    """Run ``crsam-train prepare``.

    Args:
        argv: the arguments that follow ``prepare``.

    Returns:
        The exit code: 0, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        TrainingError: the options, the source or the target are invalid, or too many files cannot be read.
    """
    options = _parse(argv)
    if started()[1] > 1:
        raise TrainingError("prepare starts its own worker processes (--workers): run it without torchrun")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        line = _prepare(options)
    except KeyboardInterrupt as interrupt:
        warn("interrupted; run the same command again to continue")
        return 128 + (signal.SIGTERM if isinstance(interrupt, _Terminated) else signal.SIGINT)
    except OSError as error:
        raise TrainingError(f"cannot write {error.filename or options.target}: {error.strerror or error}") from error
    finally:
        signal.signal(signal.SIGTERM, before)
    say(line)
    return 0


def shrink(path: Path, size: int, quality: int) -> tuple[int, bytes | None]:
    """Return the size of an image file in bytes, and the image as JPEG with a short side of at most ``size`` pixels.

    The JPEG is None if the image is broken. A JPEG file that is small, upright, RGB or gray, and has little metadata is
    copied. All other images become RGB without metadata, rotated according to EXIF. Transparency and color profiles are
    ignored, as they are when images are read for training.

    Args:
        path: the image file.
        size: limit of the short side in pixels; smaller images keep their size.
        quality: JPEG quality, from 1 to 100.

    Raises:
        TrainingError: the image has more than 8 bits per channel, or too many pixels.
        MemoryError: the pixels do not fit in memory.
    """
    content = b""
    try:
        content = path.read_bytes()
        with opened(content, str(path)) as image:
            if _fits(image, size):
                image.load()  # fails if the file is truncated
                return len(content), content
            return len(content), _jpeg(image, size, quality)
    except (TrainingError, MemoryError):
        raise
    except Exception:  # the exception depends on the format and on the damage
        return len(content), None


def member_names(names: Iterable[str]) -> dict[str, str]:
    """Return the names of the prepared files of a class: NAME.png becomes NAME.jpg.

    Files that would get the same name keep their full name and get .jpg at the end: a.png and a.gif become a.png.jpg
    and a.gif.jpg. The same holds for a file whose name would collide with one of these.
    """
    names, whole = set(names), set[str]()
    while True:
        members = {name: f"{name if name in whole else Path(name).stem}.jpg" for name in names}
        taken = Counter(members.values())
        shared = {name for name, member in members.items() if taken[member] > 1} - whole
        if not shared:
            return members
        whole |= shared


def _parse(argv: Sequence[str]) -> Namespace:
    parser = Parser(
        prog="crsam-train prepare",
        description="Shrink the images of a data set once, for faster training: JPEG files, rotated upright, without "
        "metadata. An interrupted command continues when it is run again; the result has the same bytes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder with train/ and val/, each with one folder per class")
    add("target", type=Path, metavar="TARGET", help="new folder, for --data tar:TARGET or --data folder:TARGET")
    add(
        "--size",
        type=integer(1),
        default=256,
        help="short side in pixels; smaller images keep their size (default: 256)",
    )
    add("--quality", type=integer(1, 100), default=90, help="JPEG quality (default: 90)")
    add("--to", choices=("tar", "folder"), default="tar", help="write train.tar and val.tar, or folders (default: tar)")
    add(
        "--workers",
        type=integer(0),
        default=os.cpu_count() or 1,
        help="worker processes; 0 for none (default: number of CPUs)",
    )
    add(
        "--max-bad-files",
        type=integer(0),
        default=100,
        help="stop with an error if more files of train and val together cannot be read; such files are left out "
        "(default: 100)",
    )
    add("--overwrite", action="store_true", help="replace a TARGET that is complete or was made with different options")
    return parser.parse_args(argv)


def _prepare(options: Namespace) -> str:
    """Prepare both splits, and return a one-line summary."""
    target = options.target.resolve()
    for folder in (options.source, *(options.source / split for split in SPLITS)):  # each may be a symbolic link
        source = folder.resolve()
        if source.is_relative_to(target) or target.is_relative_to(source):
            raise TrainingError(f"SOURCE {options.source} and TARGET {options.target} must not contain each other")
    found = find(options.source, "SOURCE")
    samples = [[(Path(files.name(index)), files.label(index)) for index in range(len(files))] for files in found[:2]]
    splits = dict(zip(SPLITS, map(_with_members, samples), strict=True))
    classes = {label: path.parent.name for path, label in samples[0]}
    names = sha256()
    for split in SPLITS:
        for path, _ in splits[split]:
            names.update(os.fsencode(f"{split}/{path.parent.name}/{path.name}") + b"\0")
    identity = {
        "format": FORMAT,
        "size": options.size,
        "quality": options.quality,
        "to": options.to,
        "classes": list(classes.values()),
        "source_sha256": names.hexdigest(),  # of the file names
        "pillow": PIL.__version__,
        "libjpeg": features.version("jpg"),
    }
    if _claim(target, identity, options.overwrite):
        return f"{options.target} is complete; nothing to do"

    begin, results, read, bad = time.perf_counter(), {}, 0, 0
    for split in SPLITS:
        results[split], done = _prepare_split(split, splits[split], target, options, bad)
        read, bad = read + done, bad + len(results[split]["bad_files"])
    rate = read / (time.perf_counter() - begin)
    _write_json(target / "manifest.json", identity | {"splits": results})
    (target / "options.json").unlink()

    counts, before, after = (
        sum(split[key] for split in results.values()) for key in ("images", "source_bytes", "bytes")
    )
    line = (
        f"{counts} images, {_gigabytes(before)} before, {_gigabytes(after)} after, {rate:.0f} images/s, {bad} bad files"
    )
    missing = len(results["val"]["bad_files"])
    return f"{line}, {missing} of them in val, so every evaluation lacks them" if missing else line


def _with_members(samples: Sequence[tuple[Path, int]]) -> list[tuple[Path, str]]:
    """Return the files, each with its new name CLASS/NAME.jpg."""
    classes = defaultdict(list)
    for path, _ in samples:
        classes[path.parent].append(path.name)
    members = {folder: member_names(names) for folder, names in classes.items()}
    return [(path, f"{path.parent.name}/{members[path.parent][path.name]}") for path, _ in samples]


def _claim(target: Path, identity: dict[str, Any], overwrite: bool) -> bool:
    """Prepare the folder for a new or a resumed command, and return whether it is already complete."""
    manifest, begun = target / "manifest.json", target / "options.json"
    target.mkdir(parents=True, exist_ok=True)
    others = {path.name for path in target.iterdir()} - {begun.name + PARTIAL}
    complete = manifest.exists()
    made = _read_json(manifest if complete else begun) if complete or begun.exists() else {}
    if made.get("format") == FORMAT:
        # Another version of Pillow may write other bytes: it cannot continue a folder, but a complete one can be used.
        keys = identity.keys() - ({"pillow", "libjpeg"} if complete else set())
        changed = sorted(key for key in keys if made.get(key) != identity[key])
        if changed and not overwrite:
            told = ", ".join(_IN_WORDS.get(key, f"--{key}") for key in changed)
            raise TrainingError(
                f"{target} was made with a different {told}: use another TARGET, or --overwrite to replace it"
            )
        if complete and not overwrite:
            begun.unlink(missing_ok=True)  # an earlier command was killed after it wrote manifest.json
            return True
        if not changed and not complete:
            return False
        _write_json(begun, {"format": FORMAT})  # if killed from here on, the folder does not match any options
        manifest.unlink(missing_ok=True)
        for split in SPLITS:
            _list_of(target, split).unlink(missing_ok=True)
            for name in (split, f"{split}.tar"):
                for path in (target / name, target / (name + PARTIAL)):
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif others:
        raise TrainingError(f"TARGET {target} contains files that prepare did not write: use a new folder")
    _write_json(begun, identity)
    return False


def _prepare_split(
    split: str, files: Sequence[tuple[Path, str]], target: Path, options: Namespace, bad_before: int
) -> tuple[dict[str, Any], int]:
    """Prepare the rest of a split. Return its part of the manifest, and the number of files read now."""
    final = target / (f"{split}.tar" if options.to == "tar" else split)
    partial = final.with_name(final.name + PARTIAL)
    if final.exists():  # an earlier command was killed in the next split: only check the list
        os.replace(final, partial)
    listing, header = _list_of(target, split), _row(_COLUMNS)
    result: dict[str, Any] = {"images": 0, "source_bytes": 0, "bytes": 0, "bad_files": []}
    classes: set[str] = set()  # classes with an image

    def count(name: str, source_bytes: int | str, size: int | str, digest: str) -> None:
        if digest:
            result["images"] += 1
            result["source_bytes"] += int(source_bytes)
            result["bytes"] += int(size)
            classes.add(name.partition("/")[0])
        else:
            result["bad_files"].append(name)

    with open(listing, "a+b") as entries, (_Tar if options.to == "tar" else _Folder)(partial) as storage:
        entries.seek(0)
        if entries.read(len(header)) != header:
            entries.truncate(0)
            entries.write(header)
            entries.flush()
        done, position = 0, len(header)
        for row in _listed(listing, files, storage):
            done, position = done + 1, position + len(_row(row))
            count(*row)
        entries.truncate(position)
        storage.begin()

        rows: list[bytes] = []
        left, committed = files[done:], time.monotonic()
        with closing(_shrunk(split, len(files), [path for path, _ in left], options)) as shrunk:
            for (path, member), (source_bytes, image) in zip(left, shrunk, strict=True):
                if isinstance(image, TrainingError):
                    raise image
                if image is None:
                    warn(f"{path} cannot be read and is left out")
                    entry: tuple[str, int | str, int | str, str] = (_source_name(path), "", "", "")
                else:
                    storage.add(member, image)
                    entry = (member, source_bytes, len(image), sha256(image).hexdigest())
                count(*entry)
                bad = bad_before + len(result["bad_files"])
                if bad > options.max_bad_files:
                    raise TrainingError(
                        f"{bad} files cannot be read, more than --max-bad-files {options.max_bad_files}: raise the "
                        f"limit to continue, or repair them, delete {options.target} and start again"
                    )
                rows.append(_row(entry))
                if time.monotonic() - committed >= _COMMIT:
                    _commit(storage, entries, rows)
                    committed = time.monotonic()
        _commit(storage, entries, rows)
    lost = sorted({member.partition("/")[0] for _, member in files} - classes) if split == "train" else []
    if lost:
        raise TrainingError(f"no training image of class {named(lost)} can be read")
    os.replace(partial, final)
    hashed = sha256()
    with open(listing, "rb") as content:
        while part := content.read(2**20):
            hashed.update(part)
    return result | {"sha256": hashed.hexdigest()}, len(left)


def _shrunk(
    split: str, total: int, left: list[Path], options: Namespace
) -> Generator[tuple[int, bytes | TrainingError | None], None, None]:
    """Yield the result of :func:`shrink` for each remaining file, in order, from worker processes."""
    bar = new_bar()
    task = bar.add_task(split, total=total, completed=total - len(left))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the warning about more workers than CPUs
            # The workers are forked here, before the progress bar starts a thread.
            batches = iter(
                DataLoader(
                    _Shrink(options.size, options.quality),
                    batch_size=_BATCH,
                    sampler=left,  # a map-style data set may have any keys
                    num_workers=min(options.workers, -(-len(left) // _BATCH)),
                    collate_fn=list,
                    worker_init_fn=ignore_signals,
                )
            )
        with bar:
            for batch in batches:
                yield from batch
                bar.advance(task, len(batch))
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"a worker process died, perhaps because memory is full: use fewer --workers ({error})"
        ) from error


class _Shrink(Dataset[Any]):
    """Applies :func:`shrink` to a path. It stores no list of files, because each worker would get a copy."""

    def __init__(self, size: int, quality: int) -> None:
        self._size, self._quality = size, quality

    def __getitem__(self, path: Any) -> tuple[int, bytes | TrainingError | None]:
        try:
            return shrink(path, self._size, self._quality)
        except TrainingError as error:  # if raised here, it would arrive with a traceback in its message
            return 0, error
        except MemoryError:
            return 0, TrainingError(f"out of memory for {path}: use fewer --workers")


def _fits(image: Image.Image, size: int) -> bool:
    return (
        isinstance(image, JpegImagePlugin.JpegImageFile)
        and image.format == "JPEG"  # not MPO, which holds several pictures
        and image.mode in ("RGB", "L")
        and min(image.size) <= size
        and sum(len(content) for _, content in image.applist) <= _METADATA
        and _orientation(image) == 1
    )


def _jpeg(image: Image.Image, size: int, quality: int) -> bytes:
    width, height = image.size
    box, short = None, min(width, height)
    if short > size:
        width, height = (max(1, round(side * size / short)) for side in (width, height))
        # The decoder shrinks by 2, 4 or 8, and a box filter by any integer; both alias. They leave a factor of at least
        # 2 to Lanczos, which removes the upper half of the remaining frequencies, and with it most of the aliases.
        drafted = image.draft(None, (2 * width, 2 * height))
        box = drafted[1] if drafted else None
    shrunk = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=2.0)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = _orientation(image)
    shrunk.info = {"exif": exif.tobytes()}  # no other metadata, such as a comment
    content = io.BytesIO()
    ImageOps.exif_transpose(shrunk).save(content, "JPEG", quality=quality)
    return content.getvalue()


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, from 1 to 8; 1 if it is missing, 0 if it is invalid, which means no rotation."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 0
    return value if value in range(1, 9) else 0


class _Tar:
    """An uncompressed tar file in GNU format. Its bytes depend only on names and contents."""

    def __init__(self, path: Path) -> None:
        self._file, self._end = open(path, "a+b"), 0  # noqa: SIM115, closed by __exit__
        self._size = path.stat().st_size

    def __enter__(self) -> "_Tar":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            # End of archive: two blocks of zeros, padded to a full record.
            self._file.write(bytes(1024 + -(self._end + 1024) % tarfile.RECORDSIZE))
            self.flush()
        self._file.close()

    def holds(self, name: str, size: int) -> bool:
        """Return whether the next member, with this name and size, is complete; if so, move past it."""
        end = self._end + len(_tar_header(name, size)) + size + -size % tarfile.BLOCKSIZE
        if end > self._size:
            return False
        self._end = end
        return True

    def begin(self) -> None:
        """Truncate the file after the members confirmed by :meth:`holds`."""
        self._file.truncate(self._end)

    def add(self, name: str, content: bytes) -> None:
        """Append a member."""
        member = _tar_header(name, len(content)) + content + bytes(-len(content) % tarfile.BLOCKSIZE)
        self._end += len(member)
        self._file.write(member)

    def flush(self) -> None:
        """Flush all members to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())


class _Folder:
    """A folder with the methods of :class:`_Tar`. Files are not fsynced one by one, which would take hours."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(exist_ok=True)

    def __enter__(self) -> "_Folder":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def holds(self, name: str, size: int) -> bool:
        """Return whether the file exists with this size; after a power failure, some files may be empty."""
        path = self._path / name
        return path.is_file() and path.stat().st_size == size

    def begin(self) -> None:
        """Do nothing: files that exist but are not listed will be overwritten."""

    def add(self, name: str, content: bytes) -> None:
        """Write a file."""
        path = self._path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    def flush(self) -> None:
        """Do nothing: each file has already been written."""


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)  # with time, user and group 0
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _listed(
    listing: Path, files: Sequence[tuple[Path, str]], storage: _Tar | _Folder
) -> Iterator[tuple[str, str, str, str]]:
    """Yield the entries of a list up to the first that is incomplete or whose image is missing."""
    size = listing.stat().st_size
    with open(listing, newline="", encoding="utf-8", errors="surrogateescape") as text, suppress(csv.Error, ValueError):
        rows = csv.reader(text)
        position = len(_row(next(rows)))
        for (path, member), row in zip(files, rows, strict=False):
            name, source_bytes, length, digest = row
            position += len(_row(row))
            expected = member if digest else _source_name(path)
            if position > size or name != expected or (digest and not storage.holds(name, int(length))):
                return
            yield name, source_bytes, length, digest


def _commit(storage: _Tar | _Folder, entries: IO[bytes], rows: list[bytes]) -> None:
    """Flush the images, then add them to the list."""
    storage.flush()
    entries.write(b"".join(rows))
    entries.flush()
    os.fsync(entries.fileno())
    rows.clear()


def _row(values: Iterable[object]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerow(values)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _source_name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _list_of(target: Path, split: str) -> Path:
    return target / f"manifest-{split}.csv"


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; an empty dictionary if it is not a JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write(path, lambda file: file.write(as_json(content)))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


class _Terminated(KeyboardInterrupt):
    pass


def _terminate(*_: object) -> None:
    raise _Terminated
