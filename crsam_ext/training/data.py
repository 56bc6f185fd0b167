"""Data sets, and the batches of an epoch.

The small sets are kept whole on the device, in tensors that batches are cut from. Images come from processes that read,
decode and augment them. Nothing is ever downloaded.

An epoch of training is a permutation of the samples, cut into batches; of each, a process takes the part that its rank
stands for. What is random in a batch is a function of the seed and its place. So an epoch can begin at any step, with
any number of processes and workers, and its batches are the same.
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
    """Samples of one step, on the device."""

    x: Tensor  #: float32 (N, *shape)
    y: Tensor  #: int64 (N,), or, in training with mixup or cutmix, float32 (N, classes)
    bad: tuple[str, ...] = ()  #: training files among them that could not be read, and were replaced


class Data(NamedTuple):
    """A classification problem."""

    shape: tuple[int, ...]  #: of a sample to test, without the batch dimension
    classes: int
    steps: int  #: batches in an epoch of training
    train: Callable[[int, int], Iterable[Batch]]  #: of an epoch, from a step on, both from 0; this process's part
    test: Callable[[], Iterable[Batch]]  #: the test samples that are this process's, in order


def load(options: Namespace, device: torch.device, ranks: Ranks = ALONE) -> Data:
    """Load the data set of ``--data`` and lay its batches out on ``device``, of which ``ranks`` take parts.

    Sets ``options.decoder`` to the decoder that is used, where there is one.

    Raises:
        TrainingError: there is no such data at the path given, or it cannot be used.
    """
    part = ranks.part(options.batch_size)
    if (options.mixup or options.cutmix) and part % 2:
        flag = "--mixup" if options.mixup else "--cutmix"
        raise TrainingError(f"{flag} pairs samples: {part} of --batch-size {options.batch_size} in each process is odd")
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
        raise TrainingError(f"--batch-size {options.batch_size} is more than there are training samples")
    return _with_mixing(data, options) if options.mixup or options.cutmix else data


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The permutation of ``size`` samples in an epoch: int64 (size,), a function of the arguments and nothing else.

    Epochs are a large prime apart, so that runs whose seeds are neighbours share no permutation.
    """
    return torch.randperm(size, generator=torch.Generator().manual_seed((seed + 1_000_003 * epoch) % 2**32))


def _parts(order: Tensor, batch_size: int, ranks: Ranks, first: int = 0) -> Iterator[Tensor]:
    """This process's parts of the batches that an order is cut into, from batch ``first`` on. The last may be smaller,
    and a part of it empty: that is left out."""
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
        warn("the last batch of an epoch would be a single sample, which batch norm cannot take: it is left out")
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
    """scikit-learn's 1797 handwritten digits in [0, 1], (N, 1, 8, 8): 1437 to train with, 360 to test."""
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
    """MNIST-1D as its package makes it by default, (N, 40), not normalized: 4000 to train with, 1000 to test."""
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
    """Images that are in memory, as torchvision's CIFAR has them."""

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

    # Read by one process: another might see a file more, and number what comes after it differently.
    train, val, classes = ranks.first(lambda: find(root, f"--data {options.data}", is_tar, options.decoder))
    return _augmented_data(train, val, classes, options, device, ranks)


def _jpeg_data(classes: int, options: Namespace, device: torch.device, ranks: Ranks) -> Data:
    from .synthetic import PER_CLASS, Jpegs

    train, val = (Jpegs(classes, PER_CLASS[split], options.decoder) for split in ("train", "val"))
    return _augmented_data(train, val, classes, options, device, ranks)


def _augmented_data(
    train: Source, val: Source, classes: int, options: Namespace, device: torch.device, ranks: Ranks
) -> Data:
    """Images of any size, augmented as ImageNet's are."""
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
    """The side of training images in an epoch."""
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
    """The indices of the validation images that can be read. Before hours of training, and not after the first epoch.

    Raises:
        TrainingError: there are others, and they are not to be left out.
    """
    from .images import named

    order = torch.arange(len(val))
    if options.data.partition(":")[0] not in ("folder", "tar"):
        return order  # it has been read already, or made
    bad = ranks.union(name for answer in to_test(order) for name in answer.bad)
    if options.skip_bad_val and 0 < len(bad) < len(val):
        warn(f"{len(bad)} of {len(val)} validation images cannot be read and are left out: {named(bad)}")
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
            + ("" if options.skip_bad_val else "; --skip-bad-val leaves them out")
        )


_SYNTHETIC_BATCHES = 4  # that are on the device, and used in turn


def _synthetic_data(classes: int, options: Namespace, device: torch.device, ranks: Ranks) -> Data:
    """Random pixels on the device: what a step costs if images cost nothing."""
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
