"""Augmentation of images in the workers and of batches on the device.

A worker crops, resizes, flips and augments pixels, uint8 (height, width, 3). Batches are normalized, randomly erased
and mixed on the device. Random numbers depend only on the seed of the run and on the sample and epoch, or on the
step and the position in the global batch.
"""

import math
import random
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.nn import functional as F

from .errors import TrainingError
from .randomness import reseed, seed_of

RATIO = (3 / 4, 4 / 3)  # aspect ratios of random crops, as in timm and torchvision
PADDING = 4  # pixels around CIFAR images


class Augmentation:
    """Crop a training image, flip it with probability 1/2, and apply an augmentation policy of timm.

    Args:
        crop: takes pixels (height, width, 3) and a size, returns pixels (size, size, 3), and draws from ``random``.
        policy: a policy of timm, such as ``rand-m9-mstd0.5``, or None.
        mean: mean of each channel in [0, 1]; policies fill empty areas with it.
        interpolation: used by the policy for rotations and other transforms.

    Raises:
        TrainingError: timm has no such policy.
    """

    def __init__(
        self,
        crop: Callable[[Tensor, int], Tensor],
        policy: str | None,
        mean: Sequence[float],
        interpolation: str,
    ) -> None:
        self._crop = crop
        self._policy = None if policy is None else partial(_policy, policy, tuple(mean), interpolation)
        if self._policy is not None:
            try:
                self._policy(224)
            except (AssertionError, KeyError, ValueError) as error:
                raise TrainingError(f"--auto-augment {policy}: timm has no such policy") from error

    def __call__(self, pixels: Tensor, size: int) -> Tensor:
        """Return the augmented image, uint8 (size, size, 3)."""
        pixels = self._crop(pixels, size)
        if random.random() < 0.5:
            pixels = pixels.flip(1)
        if self._policy is not None:
            image = self._policy(size)(Image.fromarray(pixels.numpy()))
            pixels = torch.from_numpy(np.array(image))
        return pixels


@lru_cache
def _policy(name: str, mean: tuple[float, ...], interpolation: str, size: int) -> Callable[[Image.Image], Image.Image]:
    """Return the second of the three parts of timm's transform. Its translations depend on the image size."""
    parts: Any = create_transform(
        size, is_training=True, color_jitter=None, auto_augment=name, mean=mean, interpolation=interpolation,
        separate=True,
    )  # fmt: skip
    policy: Callable[[Image.Image], Image.Image] = parts[1]
    return policy


def random_resized_crop(pixels: Tensor, size: int, scale: tuple[float, float], interpolation: str) -> Tensor:
    """Crop a random area and aspect ratio and resize it, as timm's ``RandomResizedCropAndInterpolation`` does.

    Args:
        pixels: uint8 (height, width, 3).
        size: size of the result, uint8 (size, size, 3).
        scale: the smallest and the largest area, relative to the area of the image.
        interpolation: ``bilinear`` or ``bicubic``, antialiased.
    """
    top, left, height, width = RandomResizedCropAndInterpolation.get_params(pixels.permute(2, 0, 1), scale, RATIO)
    return _resize(pixels[top : top + height, left : left + width], size, size, interpolation)


def random_shift(pixels: Tensor, size: int) -> Tensor:
    """Pad the image with 4 black pixels on each side, and return a random crop, (size, size, 3)."""
    padded = F.pad(pixels, (0, 0, PADDING, PADDING, PADDING, PADDING))
    return _cut(padded, random.randint(0, padded.shape[0] - size), random.randint(0, padded.shape[1] - size), size)


def centre_crop(pixels: Tensor, size: int, crop_pct: float, interpolation: str) -> Tensor:
    """Resize the shorter side to ``size / crop_pct`` and return the center crop, (size, size, 3), as timm does.

    Args:
        pixels: uint8 (height, width, 3).
        size: size of the result, uint8 (size, size, 3).
        crop_pct: size of the crop relative to the resized shorter side, at most 1.
        interpolation: ``bilinear`` or ``bicubic``, antialiased.
    """
    short, (height, width) = math.floor(size / crop_pct), pixels.shape[:2]
    if height < width:
        pixels = _resize(pixels, short, int(short * width / height), interpolation)
    else:
        pixels = _resize(pixels, int(short * height / width), short, interpolation)
    return _cut(pixels, round((pixels.shape[0] - size) / 2), round((pixels.shape[1] - size) / 2), size)


def _cut(pixels: Tensor, top: int, left: int, size: int) -> Tensor:
    return pixels[top : top + size, left : left + size]


def _resize(pixels: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    if pixels.shape[:2] == (height, width):
        return pixels
    batch = pixels.permute(2, 0, 1)[None]
    return F.interpolate(batch, (height, width), mode=interpolation, antialias=True)[0].permute(1, 2, 0)


class Normalization:
    """Normalizes batches on the device, and erases random parts of training images.

    Args:
        options: the options of the run.
        mean: mean of each channel in [0, 1].
        std: standard deviation of each channel.
        device: the device of the batches.
        position: position of this rank's first image in the global batch.
    """

    def __init__(
        self, options: Namespace, mean: Sequence[float], std: Sequence[float], device: torch.device, position: int = 0
    ) -> None:
        # As in timm: scaled for pixels from 0 to 255.
        self._mean, self._std = (torch.tensor(v, device=device).mul(255).view(3, 1, 1) for v in (mean, std))
        self._device, self._seed, self._position = device, options.seed, position
        self._layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self._erasing = RandomErasing(options.reprob, mode="pixel", device=device) if options.reprob else None

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return (pixels / 255 - mean) / std.

        Args:
            pixels: uint8 (N, height, width, 3).

        Returns:
            float32 (N, 3, height, width) on the device. The copy from pinned memory is asynchronous.
        """
        pixels = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        return pixels.contiguous(memory_format=self._layout).float().sub_(self._mean).div_(self._std)

    def erase(self, x: Tensor, epoch: int, step: int) -> Tensor:
        """Apply timm's ``RandomErasing`` with probability ``--reprob``, in place."""
        if self._erasing is not None:
            for index, image in enumerate(x):
                reseed(seed_of(self._seed, epoch, step, self._position + index), self._device)
                self._erasing(image)
        return x


class Mixing:
    """Mixes the samples 2i and 2i + 1 of a batch with timm's mixup and cutmix; each step draws its own ratio.

    Args:
        options: the options of the run.
        classes: number of classes.
    """

    def __init__(self, options: Namespace, classes: int) -> None:
        self._seed, self._batch_size = options.seed, options.batch_size
        self._mixup = Mixup(options.mixup, options.cutmix, label_smoothing=0.0, num_classes=classes)

    def __call__(self, x: Tensor, y: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Return the mixed samples, with the shape of x, and their labels, float32 (N, classes)."""
        # No sample has the batch size as its position, so this seed differs from all seeds of samples.
        np.random.seed(seed_of(self._seed, epoch, step, self._batch_size) % 2**32)
        # timm mixes the first sample with the last, the second with the second to last, and so on.
        order = torch.tensor([*range(0, len(x), 2), *reversed(range(1, len(x), 2))], device=x.device)
        back = order.argsort()
        x_mixed, y_mixed = self._mixup(x[order], y[order])
        return x_mixed[back], y_mixed[back]
