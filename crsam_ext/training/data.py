"""Data sets, and the batches of an epoch.

The small data sets are stored as tensors on the device and sliced into batches. Images are read, decoded and augmented
by worker processes. Nothing is ever downloaded.

An epoch of training is a permutation of the samples, split into global batches; each rank takes its part of each batch.
The random numbers of a batch depend only on the seed and its position. So an epoch can start at any step, with any
number of ranks and workers, and its batches are the same.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .augment import Augmentation, Mixing, Normalization, centre_crop, random_resized_crop, random_shift
from .errors import TrainingError
from .loader import Answer, Images, Pool, Request, Source
from .options import image_sizes
from .progress import warn
from .randomness import seed_of
from .ranks import ALONE, Ranks


class Batch(NamedTuple):
    """The samples of one step, on the device."""

    x: Tensor  #: float32 (N, *shape)
    y: Tensor  #: int64 (N,), or, in training with mixup or cutmix, float32 (N, classes)
    bad: tuple[str, ...] = ()  #: training files that could not be read and were replaced


class Data(NamedTuple):
    """A classification problem."""

    shape: tuple[int, ...]  #: shape of a validation sample, without the batch dimension
    classes: int
    steps: int  #: steps in an epoch of training
    train: Callable[[int, int], Iterable[Batch]]  #: (epoch, first step), both from 0, to this rank's batches
    test: Callable[[], Iterable[Batch]]  #: this rank's validation samples, in order


def load(options: Namespace, device: torch.device, ranks: Ranks = ALONE) -> Data:
    """Load the data set of ``--data``, with batches on ``device``, split among ``ranks``.

    Sets ``options.decoder`` to the decoder in use, if the data set needs one.

    Raises:
        TrainingError: the data set is missing or cannot be used.
    """
    part = ranks.part(options.batch_size)
    if (options.mixup or options.cutmix) and part % 2:
        flag = "--mixup" if options.mixup else "--cutmix"
        raise TrainingError(f"{flag} pairs samples: the number of samples of each process must be even, but is {part}")
    kind, _, rest = options.data.partition(":")
    if options.decoder:
        from .decoding import choose

        options.decoder = choose(options.decoder)
    if kind == "digits":
        data = _tensor_data(_digits(), options, device, ranks)
    elif kind == "mnist1d":
        data = _tensor_data(_mnist1d(), options, device, ranks)
    elif kind in CIFAR:
        data = _cifar_data(Path(rest), kind, options, device, ranks)
    elif kind == "synthetic":
        data = _synthetic_data(int(rest), options, device, ranks)
    elif kind == "synthetic-jpeg":
        data = _jpeg_data(int(rest), options, device, ranks)
    else:
        data = _file_data(Path(rest), kind == "tar", options, device, ranks)
    if not data.steps:
        raise TrainingError(f"--batch-size {options.batch_size} is larger than the number of training samples")
    return _with_mixing(data, options) if options.mixup or options.cutmix else data


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of ``size`` samples in an epoch, int64 (size,), as a function of the arguments alone.

    The seeds of successive epochs differ by a large prime, so that runs with adjacent seeds share no permutation.
    """
    return torch.randperm(size, generator=torch.Generator().manual_seed((seed + 1_000_003 * epoch) % 2**32))


def _parts(order: Tensor, batch_size: int, ranks: Ranks, first: int = 0) -> Iterator[Tensor]:
    """Split an order into global batches and yield this rank's parts, starting with batch ``first``.

    The last batch may be smaller; if this rank's part of it is empty, nothing is yielded.
    """
    for indices in order[first * batch_size :].split(batch_size):
        own = ranks.share(indices)
        if len(own):
            yield own


def _tensor_data(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], options: Namespace, device: torch.device, ranks: Ranks
) -> Data:
    x, y, x_test, y_test = (tensor.to(device) for tensor in tensors)
    size, batch_size = len(x), options.batch_size
    alone = size % batch_size == 1 < batch_size and ranks.size == 1
    if alone:
        warn("the last batch of each epoch is dropped: it would hold one sample, which batch norm cannot train on")
    drop_last = alone or options.mixup > 0 or options.cutmix > 0 or ranks.size > 1
    used = size - size % batch_size if drop_last else size

    def train(epoch: int, first: int) -> Iterator[Batch]:
        order = epoch_order(size, options.seed, epoch)[:used].to(device)
        for own in _parts(order, batch_size, ranks, first):
            yield Batch(x[own], y[own])

    def test() -> Iterator[Batch]:
        for own in _parts(torch.arange(len(x_test), device=device), batch_size, ranks):
            yield Batch(x_test[own], y_test[own])

    return Data(tuple(x.shape[1:]), 10, -(-used // batch_size), train, test)


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits in [0, 1], (N, 1, 8, 8): 1437 for training, 360 for validation."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    return (
        torch.tensor(x, dtype=torch.float32).div(16).reshape(-1, 1, 8, 8),
        torch.tensor(y),
        torch.tensor(x_test, dtype=torch.float32).div(16).reshape(-1, 1, 8, 8),
        torch.tensor(y_test),
    )


def _mnist1d() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MNIST-1D with its default settings, (N, 40), not normalized: 4000 for training, 1000 for validation."""
    from mnist1d.data import get_dataset_args, make_dataset

    raw = make_dataset(get_dataset_args())
    return (
        torch.tensor(raw["x"], dtype=torch.float32),
        torch.tensor(raw["y"]),
        torch.tensor(raw["x_test"], dtype=torch.float32),
        torch.tensor(raw["y_test"]),
    )


# Folder, mean and standard deviation.
CIFAR = {
    "cifar10": ("cifar-10-batches-py", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ("cifar-100-python", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


class _Pixels:
    """Images in memory, from torchvision's CIFAR data sets."""

    def __init__(self, dataset: Any) -> None:
        self._pixels, self._labels = torch.from_numpy(dataset.data), torch.tensor(dataset.targets)

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def name(self, index: int) -> str:
        return f"image {index}"

    def pixels(self, index: int) -> Tensor | None:
        return self._pixels[index]


def _cifar_data(root: Path, kind: str, options: Namespace, device: torch.device, ranks: Ranks) -> Data:
    from timm.data.dataset_factory import create_dataset

    folder, mean, std = CIFAR[kind]
    try:
        train_set, test_set = (create_dataset(f"torch/{kind}", str(root), split) for split in ("train", "val"))
    except (RuntimeError, OSError) as error:
        raise TrainingError(
            f"--data {options.data}: the folder {root / folder} is missing, incomplete or damaged"
        ) from error
    sources = _Pixels(train_set), _Pixels(test_set)
    augment = Augmentation(random_shift, options.auto_augment, mean, "bilinear")
    images = Images(*sources, augment, _whole, options.seed)
    normalization = _normalization(options, mean, std, device, ranks)
    return _image_data(images, len(train_set.classes), options, normalization, device, ranks)


def _whole(pixels: Tensor, size: int) -> Tensor:
    return pixels


def _file_data(root: Path, is_tar: bool, options: Namespace, device: torch.device, ranks: Ranks) -> Data:
    from .images import find

    # Only one process lists the files: another might see an additional file and number the rest differently.
    train, val, classes = ranks.first(lambda: find(root, f"--data {options.data}", is_tar, options.decoder))
    return _augmented_data(train, val, classes, options, device, ranks)


def _jpeg_data(classes: int, options: Namespace, device: torch.device, ranks: Ranks) -> Data:
    from .synthetic import PER_CLASS, Jpegs

    train, val = (Jpegs(classes, PER_CLASS[split], options.decoder) for split in ("train", "val"))
    return _augmented_data(train, val, classes, options, device, ranks)


def _augmented_data(
    train: Source, val: Source, classes: int, options: Namespace, device: torch.device, ranks: Ranks
) -> Data:
    """Return images of any size, with the augmentation that is usual for ImageNet."""
    crop = partial(random_resized_crop, scale=tuple(options.scale), interpolation=options.interpolation)
    augment = Augmentation(crop, options.auto_augment, options.mean, options.interpolation)
    to_test = partial(centre_crop, crop_pct=options.crop_pct, interpolation=options.interpolation)
    images = Images(train, val, augment, to_test, options.seed)
    normalization = _normalization(options, options.mean, options.std, device, ranks)
    return _image_data(images, classes, options, normalization, device, ranks)


def _normalization(
    options: Namespace, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, ranks: Ranks
) -> Normalization:
    return Normalization(options, mean, std, device, ranks.rank * ranks.part(options.batch_size))


def _size_of(options: Namespace, epoch: int) -> int:
    """Return the training image size of an epoch, in pixels."""
    sizes = image_sizes(options.image_size)
    return [size for fraction, size in sizes if fraction <= epoch / options.epochs][-1]


def _image_data(
    images: Images, classes: int, options: Namespace, normalization: Normalization, device: torch.device, ranks: Ranks
) -> Data:
    pool = Pool(images, options.workers, options.data_timeout, device.type == "cuda")
    size, batch_size = len(images.train), options.batch_size
    steps = size // batch_size
    test_size = options.val_image_size or int(options.image_size)

    def train(epoch: int, first: int) -> Iterator[Batch]:
        order, side = epoch_order(size, options.seed, epoch)[: steps * batch_size], _size_of(options, epoch)
        requests = (Request(epoch, side, own.tolist()) for own in _parts(order, batch_size, ranks, first))
        for step, answer in enumerate(pool.answers(requests), first):
            x = normalization.erase(normalization(answer.pixels), epoch, step)
            yield Batch(x, answer.labels.to(device, non_blocking=True), tuple(answer.bad))

    def to_test(order: Tensor) -> Iterator[Answer]:
        return pool.answers(Request(None, test_size, own.tolist()) for own in _parts(order, batch_size, ranks))

    readable = _readable(to_test, images.val, options, ranks)

    def test() -> Iterator[Batch]:
        bad: list[str] = []
        for answer in to_test(readable):
            bad += answer.bad
            yield Batch(normalization(answer.pixels), answer.labels.to(device, non_blocking=True))
        _refuse(ranks.union(bad), len(readable), options)

    return Data((3, test_size, test_size), classes, steps, train, test)


def _readable(to_test: Callable[[Tensor], Iterator[Answer]], val: Source, options: Namespace, ranks: Ranks) -> Tensor:
    """Return the indices of the validation images that can be read.

    All are read before the training, so that an error appears now and not after the first epoch.

    Raises:
        TrainingError: some cannot be read, and ``--skip-bad-val`` is not set.
    """
    from .images import named

    order = torch.arange(len(val))
    if options.data.partition(":")[0] not in ("folder", "tar"):
        return order  # the images are already in memory, or generated
    bad = ranks.union(name for answer in to_test(order) for name in answer.bad)
    if options.skip_bad_val and 0 < len(bad) < len(val):
        warn(f"{len(bad)} of {len(val)} validation images cannot be read and are ignored: {named(bad)}")
        gone = set(bad)
        return torch.tensor([index for index in order.tolist() if val.name(index) not in gone])
    _refuse(bad, len(val), options)
    return order


def _refuse(bad: list[str], count: int, options: Namespace) -> None:
    """Raise a TrainingError if validation images are bad."""
    from .images import named

    if bad:
        raise TrainingError(
            f"{len(bad)} of {count} validation images cannot be read: {named(bad)}"
            + ("" if options.skip_bad_val else "; use --skip-bad-val to ignore them")
        )


_SYNTHETIC_BATCHES = 4  # batches kept on the device and used in turn


def _synthetic_data(classes: int, options: Namespace, device: torch.device, ranks: Ranks) -> Data:
    """Return random pixels on the device, to measure steps without the cost of loading images."""
    from .synthetic import PER_CLASS

    batch_size = options.batch_size
    steps = classes * PER_CLASS["train"] // batch_size
    normalization = _normalization(options, options.mean, options.std, device, ranks)
    kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def pixels(size: int) -> list[tuple[Tensor, Tensor]]:
        if size not in kept:
            generator = torch.Generator().manual_seed(seed_of(options.seed, size))
            shape = (batch_size, size, size, 3)
            kept[size] = []
            for _ in range(min(steps, _SYNTHETIC_BATCHES)):
                x = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
                y = torch.randint(classes, (batch_size,), generator=generator)
                kept[size].append((ranks.share(x).to(device), ranks.share(y).to(device)))
        return kept[size]

    def train(epoch: int, first: int) -> Iterator[Batch]:
        for step in range(first, steps):
            x, y = pixels(_size_of(options, epoch))[step % _SYNTHETIC_BATCHES]
            yield Batch(normalization.erase(normalization(x), epoch, step), y)

    def test() -> Iterator[Batch]:
        for number, own in enumerate(_parts(torch.arange(classes * PER_CLASS["val"]), batch_size, ranks)):
            x, y = pixels(options.val_image_size)[number % min(steps, _SYNTHETIC_BATCHES)]
            yield Batch(normalization(x[: len(own)]), y[: len(own)])

    return Data((3, options.val_image_size, options.val_image_size), classes, steps, train, test)


def _with_mixing(data: Data, options: Namespace) -> Data:
    mixing = Mixing(options, data.classes)

    def train(epoch: int, first: int) -> Iterator[Batch]:
        for step, batch in enumerate(data.train(epoch, first), first):
            x, y = mixing(batch.x, batch.y, epoch, step)
            yield batch._replace(x=x, y=y)

    return data._replace(train=train)
