import pytest
import torch

from crsam_ext.training.data import crop_and_flip, epoch_order, load
from crsam_ext.training.options import parse

CPU = torch.device("cpu")


def load_data(command):
    return load(parse(command.split()), CPU)


def test_mnist1d_is_4000_and_1000_samples_in_a_repeatable_order():
    data = load_data("--data mnist1d --seed 3")
    (x, y), *rest = data.train(5)
    x_again, y_again = next(iter(data.train(5)))
    x_next, _ = next(iter(data.train(6)))

    assert x.equal(x_again)
    assert y.equal(y_again)
    assert not x.equal(x_next)
    assert (x.shape, x.dtype, y.dtype) == ((128, 40), torch.float32, torch.int64)
    assert [len(y)] + [len(labels) for _, labels in rest] == [128] * 31 + [32]
    assert sum(len(labels) for _, labels in data.test()) == 1000
    assert data.steps == 32


def test_epoch_order_is_a_permutation_of_its_seed_and_epoch():
    orders = [tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)]

    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == 16


def test_digits_split_covers_all_classes_without_overlap():
    data = load_data("--data digits")
    x, y = map(torch.cat, zip(*data.train(0), strict=True))
    x_test, y_test = map(torch.cat, zip(*data.test(), strict=True))

    assert x.shape == (1437, 1, 8, 8)
    assert x_test.shape == (360, 1, 8, 8)
    assert set(y.tolist()) == set(y_test.tolist()) == set(range(10))
    assert not set(map(tuple, x.flatten(1).tolist())) & set(map(tuple, x_test.flatten(1).tolist()))


def test_crop_and_flip_shows_shifted_and_mirrored_originals():
    image = torch.arange(1, 37).view(1, 1, 6, 6)
    x = crop_and_flip(image.expand(200, 1, 6, 6), padding=2)
    padded = torch.nn.functional.pad(image, (2,) * 4)[0, 0]
    crops = [padded[i : i + 6, j : j + 6] for i in range(5) for j in range(5)]
    possible = {tuple(crop.flatten().tolist()) for crop in crops} | {
        tuple(crop.fliplr().flatten().tolist()) for crop in crops
    }
    seen = {tuple(sample.flatten().tolist()) for sample in x}

    assert seen <= possible
    assert len(seen) > 40  # of 50


def test_cifar_is_normalized_and_augmented_in_training_only(cifar10):
    data = load_data(f"--data cifar10:{cifar10} --batch-size 40")
    x, y = map(torch.cat, zip(*data.train(0), strict=True))
    x_again = torch.cat([samples for samples, _ in data.train(0)])
    ((x_test, _),) = data.test()
    ((x_test_again, _),) = data.test()

    assert (x.shape, x_test.shape, data.steps, data.classes) == ((100, 3, 32, 32), (20, 3, 32, 32), 3, 10)
    assert not x.equal(x_again)
    assert x_test.equal(x_test_again)
    assert x_test.mean().abs() < 0.3  # uniform noise, not quite the statistics of CIFAR
    assert y.bincount().tolist() == [10] * 10


def test_class_that_validation_lacks_does_not_shift_the_others(image_folder):
    data = load_data(f"--data folder:{image_folder} --image-size 32 --batch-size 8 --workers 0")
    ((x, y),) = data.test()

    assert y.tolist() == [1, 1, 2, 2, 2]
    assert (x.shape, data.classes, data.steps) == ((5, 3, 32, 32), 3, 3)


def test_mixup_gives_probabilities():
    data = load_data("--data digits --mixup 0.5 --batch-size 100")
    labels = [y for _, y in data.train(0)]

    assert len(labels) == data.steps == 14
    assert all(y.shape == (100, 10) for y in labels)
    torch.testing.assert_close(torch.cat(labels).sum(1), torch.ones(1400))
    assert any(((y > 0.01) & (y < 0.99)).any() for y in labels)


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_half_of_a_folder(image_folder, split):
    from crsam_ext.training.errors import TrainingError

    (image_folder / split).rename(image_folder / "elsewhere")

    with pytest.raises(TrainingError, match=f"there is no folder .*{split}"):
        load_data(f"--data folder:{image_folder}")
