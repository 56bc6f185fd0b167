"""Decodes images. Every decoder returns the same pixels.

Pillow opens every file and reads only its header, in about 0.05 ms. This decides in one place which files are images,
which are refused, and how they are rotated. torchcodec then decodes the files for which it is faster, and returns
exactly Pillow's pixels: JPEGs (RGB, gray or CMYK, baseline or progressive) that need no rotation. Pillow decodes the
rest.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from .errors import TrainingError


def choose(decoder: str) -> str:
    """Resolve ``auto``, ``torchcodec`` or ``pillow`` to the decoder to use: ``torchcodec`` or ``pillow``.

    Raises:
        TrainingError: torchcodec was requested and cannot be imported.
    """
    if decoder == "pillow":
        return decoder
    try:
        _torchcodec()
    # If a shared library is missing, importing torchcodec raises OSError or RuntimeError.
    except (ImportError, OSError, RuntimeError) as error:
        if decoder == "auto":
            return "pillow"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"--decoder torchcodec: torchcodec cannot be imported: {reason}") from error
    return "torchcodec"


@lru_cache(1)
def _torchcodec() -> Callable[[bytes], Tensor]:
    from torchcodec.decoders import decode_jpeg

    return decode_jpeg


def decode(data: bytes, name: str, decoder: str = "pillow") -> Tensor | None:
    """Decode an image to RGB, uint8 (height, width, 3), rotated according to EXIF; return None if it is broken.

    Args:
        data: content of the file.
        name: name of the file, for messages.
        decoder: ``pillow`` or ``torchcodec``.

    Raises:
        TrainingError: the image has more than 8 bits per channel, or too many pixels.
        MemoryError: the pixels do not fit in memory.
    """
    try:
        with opened(data, name) as image:
            if decoder == "torchcodec" and image.format == "JPEG" and _is_upright(image):
                try:
                    return _torchcodec()(data).permute(1, 2, 0)
                except (RuntimeError, ValueError):
                    pass  # Pillow decides whether the image is broken
            return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB")))
    except (TrainingError, MemoryError):
        raise
    except Exception:  # the exception depends on the format and on the damage
        return None


@contextmanager
def opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """Open an image with Pillow, whose warnings are ignored.

    Args:
        data: content of the file.
        name: name of the file, for messages.

    Raises:
        TrainingError: the image has more than 8 bits per channel, or too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about many pixels, transparent palettes, damaged EXIF
            with Image.open(io.BytesIO(data)) as image:
                if image.mode[0] in "IF":
                    raise TrainingError(f"{name} has more than 8 bits per channel (mode {image.mode}): convert it to 8")
                yield image
    except Image.DecompressionBombError as error:
        raise TrainingError(f"{name}: {error}") from error


def _is_upright(image: Image.Image) -> bool:
    """Return whether no EXIF reader rotates the image; readers disagree on malformed tags and on XMP."""
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    return orientation == 1 or (orientation is None and "exif" not in image.info)
