"""Generated images, for measurements without a data set: JPEG files that workers decode."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image
from torch import Tensor

from .decoding import decode

PER_CLASS = {"train": 100, "val": 10}  # images per class
_VARIANTS = 4  # different pictures per class
_PALETTES = 8  # number of classes with different pictures


class Jpegs:
    """JPEG files of 500×375 pixels and about 60 kB, like typical ImageNet files, in the memory of each process.

    Each class has four pictures, and every eighth class has the same ones. So a process encodes only 32 pictures.

    Args:
        classes: number of classes.
        per_class: images per class.
        decoder: ``pillow`` or ``torchcodec``.
    """

    def __init__(self, classes: int, per_class: int, decoder: str = "pillow") -> None:
        self._size, self._per_class, self._decoder = classes * per_class, per_class, decoder

    def __len__(self) -> int:
        return self._size

    def label(self, index: int) -> int:
        """Return the class number of an image."""
        return index // self._per_class

    def name(self, index: int) -> str:
        """Return the name of an image, for messages."""
        return f"synthetic image {index}"

    def pixels(self, index: int) -> Tensor | None:
        """Return the pixels of an image, uint8 (375, 500, 3)."""
        data = picture(self.label(index) % _PALETTES, index % self._per_class % _VARIANTS)
        return decode(data, self.name(index), self._decoder)


@lru_cache(_PALETTES * _VARIANTS)
def picture(palette: int, variant: int) -> bytes:
    """Return a JPEG of smooth colors with fine grain, as a function of the arguments alone."""
    generator = np.random.default_rng((palette, variant))
    colours = Image.fromarray(generator.integers(256, size=(6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(colours.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
    grain = generator.normal(0, 6, size=(375, 500, 1))
    file = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()
