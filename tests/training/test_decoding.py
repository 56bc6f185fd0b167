"""Both decoders return the same pixels, for every kind of file in ImageNet and for some others."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from crsam_ext.training.decoding import choose, decode
from crsam_ext.training.errors import TrainingError
from crsam_ext.training.options import parse

try:
    import torchcodec.decoders  # noqa: F401
except (ImportError, OSError, RuntimeError) as error:
    missing = f"torchcodec does not import: {error}"
else:
    missing = ""
with_torchcodec = pytest.mark.skipif(bool(missing), reason=missing)
decoders = pytest.mark.parametrize("decoder", ["pillow", pytest.param("torchcodec", marks=with_torchcodec)])


@pytest.fixture
def picture(photographs):
    """Return an RGB image whose sides are not multiples of a JPEG block."""
    return photographs["flower"].crop((200, 100, 305, 183))


def encode(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags


def with_segment(data, content):
    """Return a JPEG that starts with an APP1 segment."""
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + data[2:]


@decoders
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2, "quality": 30}], ids=str
)
def test_jpegs_decode_to_the_pixels_of_pillow(mode, options, decoder, picture):
    data = encode(picture.convert(mode), quality=options.pop("quality", 92), **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.array(image.convert("RGB"))
    pixels = decode(data, "x", decoder)
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (83, 105, 3))
    assert np.array_equal(pixels.numpy(), expected)


def with_transform(data, transform):
    """Return a CMYK JPEG with this color transform: 2 is YCCK."""
    at = data.index(b"Adobe") + 11
    return data[:at] + bytes([transform]) + data[at + 1 :]


@decoders
@pytest.mark.parametrize("transform", [0, 2])
def test_adobe_cmyk_jpegs_decode_to_the_pixels_of_pillow(transform, decoder, picture):
    data = with_transform(encode(picture.convert("CMYK")), transform)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.array(image.convert("RGB"))
    assert np.array_equal(decode(data, "x", decoder).numpy(), expected)


@decoders
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_all_orientations_are_rotated_upright(mode, orientation, decoder, picture):
    stored = np.array(picture.convert(mode).convert("RGB"))
    turns = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
             6: lambda x: np.rot90(x, 3), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}  # fmt: skip
    data = encode(picture.convert(mode), exif=exif(orientation), quality=100, subsampling=0)
    pixels = decode(data, "x", decoder).numpy().astype(int)
    expected = turns[orientation](stored)
    assert pixels.shape == expected.shape
    assert (
        np.abs(pixels - expected).max() <= 6
    )  # the loss of JPEG at quality 100; a wrong rotation differs by 100 or more


_TAG = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12" + b"%s" + b"\0\0\0\0"
ODD_TAGS = {
    "a long number": _TAG % b"\0\x04\0\0\0\x01\0\0\0\x06",
    "no number": _TAG % b"\0\x03\0\0\0\0\0\x06\0\0",
    "a byte": _TAG % b"\0\x01\0\0\0\x01\x06\0\0\0",
    "an undefined value": _TAG % b"\0\x03\0\0\0\x01\0\x09\0\0",
    "truncated": (_TAG % b"\0\x03\0\0\0\x01\0\x06\0\0")[:20],
    "XMP": b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="3"/>',
}


@decoders
@pytest.mark.parametrize("tag", ODD_TAGS.values(), ids=ODD_TAGS)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_malformed_orientations_are_handled_as_in_pillow(tag, decoder, picture):
    data = with_segment(encode(picture), tag)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    assert np.array_equal(decode(data, "x", decoder).numpy(), expected)


@decoders
@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_other_formats_are_recognized_under_any_name(format, decoder, picture):
    """n02105855_2933.JPEG of ImageNet is a PNG."""
    options = {"lossless": True} if format == "WEBP" else {}
    stored = picture.quantize(200) if format == "GIF" else picture
    pixels = decode(encode(stored, format, **options), "n02105855_2933.JPEG", decoder)
    assert np.array_equal(pixels.numpy(), np.array(stored.convert("RGB")))


@decoders
@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "transparent P"])
def test_png_modes_are_converted_to_rgb(mode, decoder, picture):
    image = picture.quantize(50) if "P" in mode else picture.convert(mode)
    options = {"transparency": 3} if mode == "transparent P" else {}
    pixels = decode(encode(image, "PNG", **options), "x", decoder)
    assert np.array_equal(pixels.numpy(), np.array(image.convert("RGB")))
    assert len(pixels.unique()) > (1 if mode == "1" else 40)


@decoders
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (17, 1), (3, 40)])
def test_tiny_images_are_decoded(size, decoder, picture):
    assert decode(encode(picture.resize(size)), "x", decoder).shape == (size[1], size[0], 3)


@decoders
@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused(mode, decoder):
    numbers = np.arange(64).reshape(8, 8).astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    with pytest.raises(TrainingError, match=r"^here has more than 8 bits per channel \(mode"):
        decode(encode(Image.fromarray(numbers), "TIFF"), "here", decoder)


@decoders
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_too_many_pixels_are_refused(format, decoder, monkeypatch, picture):
    data = encode(picture, format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(TrainingError, match=r"^here: Image size \(8715 pixels\) exceeds limit of 2000 pixels"):
        decode(data, "here", decoder)


@decoders
@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\xff\xd8\xff\xe0" + bytes(range(256))], ids=len)
def test_data_that_are_not_an_image_are_broken(data, decoder):
    assert decode(data, "x", decoder) is None


@decoders
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_truncated_anywhere_is_broken(progressive, decoder, picture):
    data = encode(picture, progressive=progressive)
    for length in (*range(0, len(data) - 2, 97), len(data) - 2):
        assert decode(data[:length], "x", decoder) is None, length
    assert decode(data, "x", decoder) is not None
    assert decode(data + b"and more", "x", decoder) is not None


@with_torchcodec
def test_damaged_jpegs_give_the_same_result_in_both_decoders(picture):
    data = encode(picture)
    generator = np.random.default_rng(0)
    broken = 0
    for _ in range(200):
        damaged = bytearray(data)
        at = int(generator.integers(2, len(data) - 8))
        damaged[at : at + 4] = generator.bytes(4)
        results = [decode(bytes(damaged), "x", decoder) for decoder in ("pillow", "torchcodec")]
        assert (results[0] is None) == (results[1] is None), at
        assert results[0] is None or results[0].equal(results[1]), at
        broken += results[0] is None
    assert 0 < broken < 200


@pytest.mark.parametrize(
    "error", [RuntimeError, NotImplementedError, AttributeError, KeyError, struct.error, zlib.error]
)
def test_any_exception_of_pillow_means_a_broken_file(error, monkeypatch, picture):
    """AVIF raises RuntimeError, BLP NotImplementedError, SPIDER AttributeError, and so on."""

    def fails(*_):
        raise error

    monkeypatch.setattr(Image.Image, "convert", fails)
    assert decode(encode(picture), "x") is None


@decoders
def test_lack_of_memory_does_not_mean_a_broken_file(decoder, monkeypatch, picture):
    def fails(*_, **__):
        raise MemoryError

    data = encode(picture)
    monkeypatch.setattr(Image.Image, "convert", fails)
    monkeypatch.setattr("crsam_ext.training.decoding._torchcodec", lambda: fails)
    with pytest.raises(MemoryError):
        decode(data, "x", decoder)


@with_torchcodec
def test_auto_uses_torchcodec_if_it_can_be_imported():
    assert (choose("auto"), choose("torchcodec"), choose("pillow")) == ("torchcodec", "torchcodec", "pillow")


@pytest.fixture(params=["ImportError('No module named torchcodec')", "OSError('libnvrtc.so.13: cannot open\\nmore')",
                        "RuntimeError('no libavutil')", "OSError()"])  # fmt: skip
def without_torchcodec(request, tmp_path, monkeypatch):
    """Install a torchcodec whose import fails, and return the first line of the error."""
    from crsam_ext.training import decoding

    (tmp_path / "torchcodec.py").write_text(f"raise {request.param}")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    decoding._torchcodec.cache_clear()
    yield request.param.partition("'")[2].partition("\\n")[0].partition("'")[0] or "OSError"
    decoding._torchcodec.cache_clear()


def test_auto_uses_pillow_without_torchcodec(without_torchcodec):
    from crsam_ext.training.data import load

    assert choose("auto") == "pillow"
    with pytest.raises(
        TrainingError, match=f"^--decoder torchcodec: torchcodec cannot be imported: {without_torchcodec}$"
    ):
        choose("torchcodec")
    options = parse(["--data", "synthetic-jpeg:2", "--image-size", "32", "--batch-size", "8", "--workers", "0"])
    load(options, torch.device("cpu"))
    assert options.decoder == "pillow"
