"""Data sets, and the batches of an epoch.

The small sets are kept whole on the device, in tensors that batches are cut from. CIFAR and folders of images go
through timm's loaders. Nothing is ever downloaded.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import TrainingError
from .progress import warn
from .ranks import ALONE, Ranks, Share

Batch = tuple[Tensor, Tensor]


class Data(NamedTuple):
    """A classification problem.

    Samples are float32 (N, *shape), labels int64 (N,), or, in training with mixup, float32 (N, classes).
    """

    shape: tuple[int, ...]
    classes: int
    steps: int  #: batches in an epoch of training
    train: Callable[[int], Iterable[Batch]]  #: the training batches of an epoch, counted from 0; this process's part
    test: Callable[[], Iterable[Batch]]  #: the test samples that are this process's, in order
    broken: Callable[[], list[Path]] = list  #: the training files that the last epoch could not read


def load(options: Namespace, device: torch.device, ranks: Ranks = ALONE) -> Data:
    """Load the data set of ``--data`` and lay its batches out on ``device``, of which ``ranks`` take parts.

    Raises:
        TrainingError: there is no such data at the path given, or it cannot be used.
    """
    ranks.part(options.batch_size)
    kind, _, path = options.data.partition(":")
    if kind == "digits":
        data = _tensor_data(_digits(), options, device, ranks)
    elif kind == "mnist1d":
        data = _tensor_data(_mnist1d(), options, device, ranks)
    elif kind == "folder":
        data = _folder_data(Path(path), options, device, ranks)
    else:
        data = _cifar_data(Path(path), kind, options, device, ranks)
    if not data.steps:
        raise TrainingError(f"--batch-size {options.batch_size} is more than there are training samples")
    return _with_mixup(data, options.mixup) if options.mixup else data


def batches(
    x: Tensor, y: Tensor, batch_size: int, order: Tensor, drop_last: bool = False, ranks: Ranks = ALONE
) -> Iterator[Batch]:
    """Cut (x, y) into batches in ``order``, an int64 tensor of indices; the last may be smaller, or is dropped.

    Of each, this process gets its share.
    """
    stop = len(order) - len(order) % batch_size if drop_last else len(order)
    for indices in order[:stop].to(x.device).split(batch_size):
        own = ranks.share(indices)
        yield x[own], y[own]


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The permutation of ``size`` samples in an epoch: int64 (size,), a function of the arguments and nothing else.

    Epochs are a large prime apart, so that runs whose seeds are neighbours share no permutation.
    """
    return torch.randperm(size, generator=torch.Generator().manual_seed((seed + 1_000_003 * epoch) % 2**32))


def _tensor_data(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], options: Namespace, device: torch.device, ranks: Ranks
) -> Data:
    x, y, x_test, y_test = (tensor.to(device) for tensor in tensors)
    size, batch_size = len(x), options.batch_size
    alone = size % batch_size == 1 < batch_size and ranks.size == 1
    if alone:
        warn("the last batch of an epoch would be a single sample, which batch norm cannot take: it is left out")
    drop_last = alone or options.mixup > 0 or ranks.size > 1

    def train(epoch: int) -> Iterator[Batch]:
        return batches(x, y, batch_size, epoch_order(size, options.seed, epoch), drop_last, ranks)

    test = partial(batches, x_test, y_test, batch_size, torch.arange(len(x_test)), ranks=ranks)
    steps = size // batch_size if drop_last else -(-size // batch_size)
    return Data(tuple(x.shape[1:]), 10, steps, train, test)


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


def _cifar_data(root: Path, kind: str, options: Namespace, device: torch.device, ranks: Ranks) -> Data:
    from timm.data.dataset_factory import create_dataset
    from torchvision.transforms import RandomCrop

    folder, mean, std = CIFAR[kind]
    try:
        train_set, test_set = (create_dataset(f"torch/{kind}", str(root), split) for split in ("train", "val"))
    except (RuntimeError, OSError) as error:
        raise TrainingError(
            f"--data {options.data}: the folder {root / folder} is missing, incomplete or damaged"
        ) from error
    classes, preprocessing = len(train_set.classes), {"mean": mean, "std": std, "crop_pct": 1.0}
    data = _image_data(train_set, test_set, classes, options, device, ranks, **preprocessing)
    # In place of timm's crop of random size, which comes first: CIFAR's images are padded and cropped, never scaled.
    train_set.transform.transforms[0] = RandomCrop(options.image_size, padding=4)
    return data


def _folder_data(root: Path, options: Namespace, device: torch.device, ranks: Ranks) -> Data:
    from .images import ImageFiles, find, named

    train_files, val_files, classes = find(root, f"--data {options.data}")
    train_set, test_set = ImageFiles(train_files, replaces=True), ImageFiles(val_files, replaces=False)
    data = _image_data(train_set, test_set, classes, options, device, ranks)

    def refuse_broken() -> None:
        broken = ranks.union(test_set.broken())
        if broken:
            raise TrainingError(
                f"{len(broken)} of {len(test_set)} validation images cannot be read: {named(broken)}"
                + ("" if options.skip_bad_val else "; --skip-bad-val leaves them out")
            )

    def train(epoch: int) -> Iterator[Batch]:
        train_set.forget()
        yield from _from_workers(data.train(epoch))

    def test() -> Iterator[Batch]:
        yield from _from_workers(data.test())
        refuse_broken()

    # Before hours of training, and not after the first epoch.
    for _ in _from_workers(data.test()):
        pass
    broken = ranks.union(test_set.broken())
    if options.skip_bad_val and 0 < len(broken) < len(test_set):
        warn(f"{len(broken)} of {len(test_set)} validation images cannot be read and are left out: {named(broken)}")
        test_set.leave_out(broken)
        data = _image_data(train_set, test_set, classes, options, device, ranks)
    refuse_broken()
    return data._replace(train=train, test=test, broken=lambda: ranks.union(train_set.broken()))


def _from_workers(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a loader, and the errors of its workers without their tracebacks."""
    try:
        yield from batches
    except TrainingError as error:
        raise TrainingError(str(error).strip().splitlines()[-1].rpartition("TrainingError: ")[2]) from error


def _image_data(
    train_set: Dataset[Any],
    test_set: Dataset[Any],
    classes: int,
    options: Namespace,
    device: torch.device,
    ranks: Ranks,
    **preprocessing: Any,
) -> Data:
    from timm.data.loader import create_loader

    shape = (3, options.image_size, options.image_size)
    make: Callable[..., DataLoader[Batch]] = partial(
        create_loader,
        input_size=shape,
        batch_size=ranks.part(options.batch_size),
        num_workers=options.workers,
        # Workers that outlive an epoch would carry random states that no checkpoint holds.
        persistent_workers=False,
        pin_memory=device.type == "cuda",
        device=device,
        **preprocessing,
    )
    try:
        train_loader = make(
            train_set,
            is_training=True,
            color_jitter=None,
            auto_augment=options.auto_augment,
            distributed=ranks.size > 1,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise TrainingError(f"--auto-augment {options.auto_augment}: timm has no such policy") from error
    test_loader = make(test_set if ranks.size == 1 else Share(test_set, ranks))

    def train(epoch: int) -> Iterable[Batch]:
        if ranks.size > 1:  # the order is a function of seed and epoch, and each process takes its part
            sampler: Any = train_loader.sampler
            sampler.seed = options.seed
            sampler.set_epoch(epoch)
        return train_loader

    return Data(shape, classes, len(train_loader), train, lambda: test_loader)


def _with_mixup(data: Data, alpha: float) -> Data:
    from timm.data.mixup import Mixup

    mixup = Mixup(mixup_alpha=alpha, label_smoothing=0.0, num_classes=data.classes)

    def train(epoch: int) -> Iterator[Batch]:
        for x, y in data.train(epoch):
            yield mixup(x, y)

    return data._replace(train=train)
