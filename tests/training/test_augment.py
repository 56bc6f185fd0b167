"""Augmentation of images in the workers and of batches on the device."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import create_transform

from crsam_ext.training.augment import (
    Augmentation,
    Mixing,
    Normalization,
    centre_crop,
    random_resized_crop,
    random_shift,
)
from crsam_ext.training.errors import TrainingError
from crsam_ext.training.options import parse

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.fixture
def pixels(photographs):
    return torch.from_numpy(np.array(photographs["china"].crop((40, 50, 240, 210))))


def difference(tensor, image):
    """Return the largest difference between pixels."""
    return (tensor.int() - torch.from_numpy(np.array(image)).int()).abs().max().item()


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("size", [64, 224])
def test_random_crops_match_timm_and_pillow(size, interpolation, pixels):
    image = Image.fromarray(pixels.numpy())
    for seed in range(20):
        random.seed(seed)
        cropped = random_resized_crop(pixels, size, (0.08, 1.0), interpolation)
        random.seed(seed)
        crop = RandomResizedCropAndInterpolation(size, (0.08, 1.0), interpolation=interpolation)
        assert (cropped.shape, cropped.dtype) == ((size, size, 3), torch.uint8)
        # Both round after each direction, and their weights have 8 more bits than a pixel.
        assert difference(cropped, crop(image)) <= 2


@pytest.mark.parametrize("scale", [(0.25, 0.25), (0.5, 1.0)])
def test_scale_is_the_relative_area_of_crops(scale, pixels, monkeypatch):
    areas = []
    monkeypatch.setattr(
        "crsam_ext.training.augment._resize", lambda part, *_: areas.append(part.shape[0] * part.shape[1] / 32000)
    )
    for _ in range(100):
        random_resized_crop(pixels, 64, scale, "bilinear")
    assert scale[0] - 0.01 < min(areas)
    assert max(areas) < scale[1] + 0.01


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize(("size", "crop_pct"), [(64, 0.875), (96, 1.0), (224, 0.9), (33, 0.875)])
@pytest.mark.parametrize("upright", [False, True])
def test_center_crop_matches_timm(upright, size, crop_pct, interpolation, pixels):
    pixels = pixels.swapaxes(0, 1) if upright else pixels
    transform = create_transform(size, crop_pct=crop_pct, interpolation=interpolation, use_prefetcher=True)
    expected = transform(Image.fromarray(pixels.contiguous().numpy()))
    cropped = centre_crop(pixels, size, crop_pct, interpolation)
    assert cropped.shape == (size, size, 3)
    assert (cropped.permute(2, 0, 1).int() - torch.as_tensor(expected).int()).abs().max() <= 2


def test_shifts_are_at_most_the_padding(pixels):
    pixels = pixels[:32, :32]
    padded = torch.nn.functional.pad(pixels, (0, 0, 4, 4, 4, 4))
    possible = {padded[i : i + 32, j : j + 32].numpy().tobytes() for i in range(9) for j in range(9)}
    seen = {random_shift(pixels, 32).numpy().tobytes() for _ in range(1000)}
    assert seen == possible


def test_half_of_the_images_are_flipped(pixels):
    augment = Augmentation(lambda pixels, size: pixels, None, MEAN, "bilinear")
    results = [augment(pixels, 160) for _ in range(200)]
    assert 60 < sum(result.equal(pixels) for result in results) < 140
    assert all(result.equal(pixels) or result.equal(pixels.flip(1)) for result in results)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5", "original", "v0", "3a", "augmix-m3-w3"])
def test_policies_match_timm(policy, pixels):
    augment = Augmentation(lambda pixels, size: pixels[:size, :size], policy, MEAN, "bilinear")
    results = []
    for seed in range(10):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        results.append(augment(pixels, 96))
    assert all((x.shape, x.dtype) == ((96, 96, 3), torch.uint8) for x in results)
    assert len({x.numpy().tobytes() for x in results}) > 2


@pytest.mark.parametrize("policy", ["rand-x9", "nonsense"])
def test_unknown_policy_is_an_error(policy):
    with pytest.raises(TrainingError, match=f"--auto-augment {policy}: timm has no such policy"):
        Augmentation(random_shift, policy, MEAN, "bilinear")


@pytest.mark.parametrize("flag", ["", "--channels-last"])
def test_pixels_are_normalized(flag):
    normalization = Normalization(parse(flag.split()), MEAN, STD, CPU)
    pixels = torch.randint(256, (4, 8, 10, 3), dtype=torch.uint8)
    x = normalization(pixels)
    expected = (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(x, expected)
    layout = torch.channels_last if flag else torch.contiguous_format
    assert x.is_contiguous(memory_format=layout)


def options(more):
    return parse(f"--data synthetic:2 --image-size 16 --batch-size 16 {more}".split())


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_erasing_does_not_depend_on_the_number_of_processes(layout):
    x = torch.zeros(16, 3, 16, 16).contiguous(memory_format=layout)
    whole = Normalization(options("--reprob 0.5"), MEAN, STD, CPU).erase(x.clone(), 3, 7)
    halves = [
        Normalization(options("--reprob 0.5"), MEAN, STD, CPU, position).erase(x[position : position + 8].clone(), 3, 7)
        for position in (0, 8)
    ]
    other = Normalization(options("--reprob 0.5"), MEAN, STD, CPU).erase(x.clone(), 3, 8)
    assert whole.equal(torch.cat(halves))
    assert not whole.equal(other)
    erased = whole.flatten(1).count_nonzero(1)
    assert 2 < (erased > 0).sum() < 14
    assert erased.max() <= 3 * 16 * 16 / 2  # a third of the area, rounded up to pixels


@pytest.mark.parametrize("more", ["--mixup 0.5", "--cutmix 1", "--mixup 0.5 --cutmix 1"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_adjacent_samples_are_mixed(more, layout):
    mixing = Mixing(options(more), 4)
    x = torch.rand(16, 3, 16, 16).contiguous(memory_format=layout)
    y = torch.arange(16) % 4
    kinds = set()
    for step in range(20):
        x_mixed, y_mixed = mixing(x, y, 2, step)
        halves = [mixing(x[part], y[part], 2, step) for part in (slice(0, 4), slice(4, 16))]
        assert x_mixed.equal(torch.cat([x for x, _ in halves]))
        assert y_mixed.equal(torch.cat([y for _, y in halves]))
        assert x_mixed.is_contiguous(memory_format=layout)
        partner = x.view(8, 2, 3, 16, 16).flip(1).reshape(16, 3, 16, 16)
        part = y_mixed[0, 0].item()
        assert y_mixed[0, 1].item() == pytest.approx(1 - part, abs=1e-6)  # float32
        if ((x_mixed == x) | (x_mixed == partner)).all():
            assert (x_mixed == x).float().mean().item() == pytest.approx(part, abs=1e-6)
            kinds.add("cutmix")
        else:
            torch.testing.assert_close(x_mixed, part * x + (1 - part) * partner)
            kinds.add("mixup")
    assert kinds == {word.removeprefix("--") for word in more.split() if word.startswith("--")}


def test_vectors_can_be_mixed():
    x, y = torch.rand(8, 40), torch.arange(8)
    mixed, _ = Mixing(options("--mixup 0.5"), 8)(x, y, 0, 0)
    assert (mixed.shape, mixed.equal(x)) == ((8, 40), False)
    torch.testing.assert_close(mixed.sum(), x.sum())
