"""Encoded images to pixels, with the same pixels from every decoder.

Pillow opens every file, and reads its header only, in some 0.05 ms: so what is an image, what is refused and which way
is up is decided in one place. torchcodec then decodes what it is faster at and gives the very pixels of Pillow for:
JPEG, RGB, grey or CMYK, baseline or progressive, that needs no rotation. Pillow decodes the rest.
"""

import io
import warnings
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from .errors import TrainingError


def choose(decoder: str) -> str:
    """The decoder that ``auto``, ``torchcodec`` or ``pillow`` stands for here: ``torchcodec`` or ``pillow``.

    Raises:
        TrainingError: torchcodec is asked for and does not import.
    """
    if decoder == "pillow":
        return decoder
    try:
        _torchcodec()
    # Libraries that torchcodec needs and does not find are an OSError or a RuntimeError.
    except (ImportError, OSError, RuntimeError) as error:
        if decoder == "auto":
            return "pillow"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"--decoder torchcodec: it cannot be imported: {reason}") from error
    return "torchcodec"


@lru_cache(1)
def _torchcodec() -> Callable[[bytes], Tensor]:
    from torchcodec.decoders import decode_jpeg

    return decode_jpeg


def decode(data: bytes, name: str, decoder: str = "pillow") -> Tensor | None:
    """The pixels of an encoded image as RGB, uint8 (height, width, 3), turned as EXIF says; None if it is broken.

    Args:
        data: the file.
        name: of the file, for messages.
        decoder: ``pillow`` or ``torchcodec``.

    Raises:
        TrainingError: it has more than 8 bits a channel, or too many pixels.
        MemoryError: there is not enough for its pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, of palettes with transparency, of damaged EXIF
            with Image.open(io.BytesIO(data)) as image:
                if image.mode[0] in "IF":
                    raise TrainingError(f"{name} has more than 8 bits a channel (mode {image.mode}): convert it to 8")
                if decoder == "torchcodec" and image.format == "JPEG" and _is_upright(image):
                    try:
                        return _torchcodec()(data).permute(1, 2, 0)
                    except (RuntimeError, ValueError):
                        pass  # Pillow decides whether it is broken
                return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB")))
    except Image.DecompressionBombError as error:
        raise TrainingError(f"{name}: {error}") from error
    except (TrainingError, MemoryError):
        raise
    except Exception:  # what Pillow raises depends on the format, and on where it breaks
        return None


def _is_upright(image: Image.Image) -> bool:
    """Whether every reader of EXIF leaves the image as it is; readers differ where a tag is malformed, or in XMP."""
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    return orientation == 1 or (orientation is None and "exif" not in image.info)
