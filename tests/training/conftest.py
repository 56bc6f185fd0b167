"""Runs of the program, and image folders as small as can be."""

import csv
import pickle
import shutil
from hashlib import sha256

import numpy as np
import pytest
import torch
from PIL import Image

from crsam_ext.training.__main__ import main


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def crsam_train(here, monkeypatch):
    """Runs the program with a command line in one string, and returns its exit code.

    One thread: for models this small a second one only waits, the more so where other programs run. And no picture,
    which takes longer than most of these runs; that of `finished` is genuine.
    """
    monkeypatch.setattr("crsam_ext.training.loop.draw", lambda file, history, title: file.write(title.encode()))
    threads = torch.get_num_threads()
    yield lambda command: main([*command.split(), "--threads", "1"])
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The results of a run of one epoch."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["--model", "mlp", "--epochs", "1", "--threads", "1", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def read_log():
    """The rows of a log.csv without the one column that no two runs share."""

    def read(folder):
        with open(folder / "log.csv", newline="") as file:
            return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]

    return read


@pytest.fixture
def read_state():
    """A checkpoint as a flat dictionary, tensors as their hashes, to be compared bit for bit."""

    def flatten(value, name):
        if isinstance(value, torch.Tensor):
            return {name: (value.dtype, value.shape, sha256(value.cpu().contiguous().numpy()).hexdigest())}
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        else:
            return {name: value}
        return {key: leaf for k, v in items if k != "seconds" for key, leaf in flatten(v, f"{name}.{k}").items()}

    return lambda path: flatten(torch.load(path, weights_only=True), "")


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A folder in the layout of CIFAR-10, with 20 random images instead of 10 000 in each of its six files."""
    # The genuine files are recognised by their checksums.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    folder = tmp_path / "cifar" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images = generator.integers(256, size=(20, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": images, "labels": [i % 10 for i in range(20)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return folder.parent


@pytest.fixture
def image_folder(tmp_path):
    """A folder in the layout of ImageNet: eight training images of each of three classes, validation images of two."""
    root = tmp_path / "images"
    generator = np.random.default_rng(0)
    for split, label, count in (
        ("train", "ape", 8),
        ("train", "bee", 8),
        ("train", "cat", 8),
        ("val", "bee", 2),
        ("val", "cat", 3),
    ):
        folder = root / split / label
        folder.mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(256, size=(40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def photographs():
    """Photographs that packages ship, by name: RGB, 640×427 twice and 512×600."""
    from matplotlib import get_data_path
    from sklearn.datasets import load_sample_image

    images = {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
    with Image.open(f"{get_data_path()}/sample_data/grace_hopper.jpg") as image:
        return images | {"hopper": image.convert("RGB")}


@pytest.fixture(scope="session")
def photograph_crops(photographs, tmp_path_factory):
    """A folder in the layout of ImageNet: JPEGs of 200×160, parts of three photographs, which are the classes."""
    root = tmp_path_factory.mktemp("crops")
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 5)):
        for name, image in photographs.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                left, top = (
                    int(generator.integers(side - part)) for side, part in zip(image.size, (200, 160), strict=True)
                )
                image.crop((left, top, left + 200, top + 160)).save(folder / f"{index}.JPEG", quality=92)
    return root


@pytest.fixture
def jpeg_folder(photograph_crops, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(photograph_crops, tmp_path / "jpegs")
