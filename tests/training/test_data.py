import pytest
import torch
from torchvision.datasets import CIFAR10

from crsam_ext.training.data import CIFAR, epoch_order, load
from crsam_ext.training.errors import TrainingError
from crsam_ext.training.options import parse
from crsam_ext.training.ranks import Ranks

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def load_data(command):
    return load(parse(command.split()), CPU)


def test_mnist1d_is_4000_and_1000_samples_in_a_repeatable_order():
    data = load_data("--data mnist1d --seed 3")
    (x, y, _), *rest = data.train(5, 0)
    x_again, y_again, _ = next(iter(data.train(5, 0)))
    x_next, _, _ = next(iter(data.train(6, 0)))

    assert x.equal(x_again)
    assert y.equal(y_again)
    assert not x.equal(x_next)
    assert (x.shape, x.dtype, y.dtype) == ((128, 40), torch.float32, torch.int64)
    assert [len(y)] + [len(batch.y) for batch in rest] == [128] * 31 + [32]
    assert sum(len(batch.y) for batch in data.test()) == 1000
    assert data.steps == 32


def test_epoch_order_is_a_permutation_of_its_seed_and_epoch():
    orders = [tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)]

    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == 16


def test_digits_split_covers_all_classes_without_overlap():
    data = load_data("--data digits")
    (x, y), (x_test, y_test) = (
        (torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches]))
        for batches in (list(data.train(0, 0)), list(data.test()))
    )

    assert x.shape == (1437, 1, 8, 8)
    assert x_test.shape == (360, 1, 8, 8)
    assert set(y.tolist()) == set(y_test.tolist()) == set(range(10))
    assert not set(map(tuple, x.flatten(1).tolist())) & set(map(tuple, x_test.flatten(1).tolist()))


def test_cifar_is_normalized_with_its_own_statistics(cifar10):
    data = load_data(f"--data cifar10:{cifar10} --batch-size 40 --workers 0")
    ((x, y, _),) = data.test()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in CIFAR["cifar10"][1:])
    pixels = torch.from_numpy(CIFAR10(cifar10, train=False).data).permute(0, 3, 1, 2)

    assert (x.shape, data.shape, data.steps, data.classes) == ((20, 3, 32, 32), (3, 32, 32), 2, 10)
    assert y.tolist() == 2 * list(range(10))
    torch.testing.assert_close(x, (pixels / 255 - mean) / std, rtol=1e-4, atol=1e-4)


def test_cifar_is_shifted_and_flipped_in_training(cifar10):
    data = load_data(f"--data cifar10:{cifar10} --batch-size 50 --workers 0")
    originals = torch.from_numpy(CIFAR10(cifar10).data).permute(0, 3, 1, 2)
    padded = torch.nn.functional.pad(originals, (4,) * 4)
    possible = {}
    for top in range(9):
        for left in range(9):
            crops = padded[:, :, top : top + 32, left : left + 32]
            possible |= {crop.numpy().tobytes(): (top, left, False) for crop in crops}
            possible |= {crop.numpy().tobytes(): (top, left, True) for crop in crops.flip(3)}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in CIFAR["cifar10"][1:])
    seen = []
    for epoch in range(2):
        x = torch.cat([batch.x for batch in data.train(epoch, 0)])
        pixels = ((x * std + mean) * 255).round().to(torch.uint8)
        seen += [possible[image.numpy().tobytes()] for image in pixels]

    assert len(seen) == 200
    assert len(set(seen)) > 90  # of 162 combinations
    assert 60 < sum(mirrored for *_, mirrored in seen) < 140


def test_auto_augment_applies_to_cifar(cifar10):
    command = f"--data cifar10:{cifar10} --batch-size 100 --workers 0"
    plain, augmented = load_data(command), load_data(f"{command} --auto-augment rand-m9-n4")
    ((x, _, _),) = plain.train(0, 0)
    ((x_augmented, _, _),) = augmented.train(0, 0)

    # Shifting and mirroring keep the mean of noise; changes of color and contrast do not.
    assert x_augmented.mean((1, 2, 3)).std() > 2 * x.mean((1, 2, 3)).std()


def test_cifar_can_be_mixed_and_erased(cifar10):
    data = load_data(f"--data cifar10:{cifar10} --batch-size 50 --workers 0 --cutmix 1 --reprob 1")
    assert [(batch.x.shape, batch.y.shape) for batch in data.train(0, 0)] == [((50, 3, 32, 32), (50, 10))] * 2


def test_class_without_validation_images_does_not_renumber_the_others(image_folder):
    data = load_data(f"--data folder:{image_folder} --image-size 32 --batch-size 8 --workers 0")
    ((x, y, _),) = data.test()

    assert y.tolist() == [1, 1, 2, 2, 2]
    assert (x.shape, data.classes, data.steps) == ((5, 3, 32, 32), 3, 3)


def test_mixup_gives_probabilities():
    data = load_data("--data digits --mixup 0.5 --batch-size 100")
    labels = [batch.y for batch in data.train(0, 0)]

    assert len(labels) == data.steps == 14
    assert all(y.shape == (100, 10) for y in labels)
    torch.testing.assert_close(torch.cat(labels).sum(1), torch.ones(1400))
    assert any(((y > 0.01) & (y < 0.99)).any() for y in labels)


@pytest.mark.parametrize("more", ["--mixup 0.5", "--cutmix 1"])
def test_mixing_digits_does_not_depend_on_the_number_of_processes(more):
    command = f"--data digits --batch-size 100 {more}"
    whole = list(load_data(command).train(3, 5))
    parts = [load(parse(command.split()), CPU, Ranks(rank, 2)).train(3, 5) for rank in range(2)]
    assert len(whole) == 9
    for batch, first, second in zip(whole, *parts, strict=True):
        assert batch.x.equal(torch.cat([first.x, second.x]))
        assert batch.y.equal(torch.cat([first.y, second.y]))


def test_synthetic_tensors_are_fixed_by_the_seed():
    data = load_data("--data synthetic:3 --image-size 16,24@0.5 --epochs 2 --batch-size 32 --channels-last")
    batches = [list(data.train(epoch, 0)) for epoch in range(2)]
    assert (data.shape, data.classes, data.steps) == ((3, 24, 24), 3, 9)
    assert [{batch.x.shape for batch in epoch} for epoch in batches] == [{(32, 3, 16, 16)}, {(32, 3, 24, 24)}]
    assert batches[0][0].x.is_contiguous(memory_format=torch.channels_last)
    assert len({batch.x.numpy().tobytes() for batch in batches[0]}) == 4
    assert {label for batch in batches[0] for label in batch.y.tolist()} == {0, 1, 2}
    assert sum(len(batch.y) for batch in data.test()) == 30
    again = load_data("--data synthetic:3 --image-size 16,24@0.5 --epochs 2 --batch-size 32")
    assert next(iter(again.train(0, 0))).x.equal(batches[0][0].x)
    with pytest.raises(TrainingError, match="larger than the number of training samples"):
        load_data("--data synthetic:3 --batch-size 301")


def test_synthetic_jpegs_have_the_size_of_imagenet_files():
    from crsam_ext.training.synthetic import Jpegs, picture

    source = Jpegs(10, 100)
    picture.cache_clear()
    assert (len(source), source.label(0), source.label(999)) == (1000, 0, 9)
    assert {source.pixels(index).shape for index in range(0, 1000, 7)} == {(375, 500, 3)}
    assert picture.cache_info().misses <= 32
    assert all(40_000 < len(picture(palette, 0)) < 90_000 for palette in range(8))
    assert source.pixels(3).equal(Jpegs(2, 10).pixels(3))


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_split_is_an_error(image_folder, split):
    (image_folder / split).rename(image_folder / "elsewhere")

    with pytest.raises(TrainingError, match=f"there is no folder .*{split}"):
        load_data(f"--data folder:{image_folder}")
