"""Fixtures: runs of the program, and very small image folders."""

import csv
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
import torch
from PIL import Image

from crsam_ext.training.__main__ import main
from crsam_ext.training.logs import TIMES


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Create an empty working folder, and return its path."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def crsam_train(here, monkeypatch):
    """Return a function that runs the program with a command line in one string and returns its exit code.

    The program uses one thread, because for models this small a second thread only waits, especially if other programs
    run. It draws no curves, because that takes longer than most of these runs; `finished` draws them.
    """
    monkeypatch.setattr("crsam_ext.training.logs.draw", lambda file, history, title: file.write(title.encode()))
    threads = torch.get_num_threads()
    yield lambda command: main([*command.split(), "--threads", "1"])
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return the folder of a finished run of one epoch."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["--model", "mlp", "--epochs", "1", "--threads", "1", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def read_log():
    """Return a function that reads the rows of log.csv, or of another CSV file, without the columns that differ between
    runs."""

    def read(folder, name="log.csv"):
        with open(folder / name, newline="") as file:
            return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]

    return read


@pytest.fixture
def read_state():
    """Return a function that reads a checkpoint as a flat dictionary with hashes of the tensors, for bit-for-bit
    comparison."""

    def flatten(value, name):
        if isinstance(value, torch.Tensor):
            return {name: (value.dtype, value.shape, sha256(value.cpu().contiguous().numpy()).hexdigest())}
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        else:
            return {name: "nan" if value != value else value}
        return {key: leaf for k, v in items if k not in TIMES for key, leaf in flatten(v, f"{name}.{k}").items()}

    return lambda path: flatten(torch.load(path, weights_only=True), "")


# This process imports the packages once. For each input line, it runs the program in one fork or, with ranks, in
# several connected forks, and replies with their exit codes. Each fork arranges its own signals and failures.
FORKS = """
import json, os, signal, sys, time
import crsam_ext.training.loop, sklearn.datasets, sklearn.model_selection
from crsam_ext.training import loop, logs
from crsam_ext.training.__main__ import main
from crsam_ext.training.errors import TrainingError

replace, take, evaluate = os.replace, loop.Training.take, loop.evaluate

def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)

def arrange(left, file=None, moment=None, step=None, test=None, rank=None, signals=(), error=None, bad=None):
    def counted_replace(source, target):
        nonlocal left
        left -= os.path.basename(target) == file
        if left == 0 and moment == "before":
            die()
        replace(source, target)
        if left == 0:
            die()

    def counted_take(training, batch):
        if bad is not None:
            batch = batch._replace(bad=tuple(bad.get(str(training.state.step + 1), ())))
        take(training, batch)
        if training.state.step == step and rank in (None, training.state.ranks.rank):
            for number in signals:
                die(number)
            if error:
                raise TrainingError(error)

    def counted_evaluate(*args):
        nonlocal left
        left -= 1
        if left == 0:
            die()
        return evaluate(*args)

    if file:
        os.replace = counted_replace
    loop.Training.take = counted_take
    if test:
        loop.evaluate = counted_evaluate

def run(folder, command, environment, plan, log):
    signal.alarm(200)  # in case the run hangs
    os.chdir(folder)
    os.environ |= environment
    for name in ("stdout", "stderr"):
        setattr(sys, name, open(log + "." + name, "w", buffering=1))
    logs.draw = lambda file, history, title: file.write(title.encode())
    arrange(**plan)
    return main(command.split())

def start(*task):
    process = os.fork()
    if process == 0:
        code = 1
        try:
            code = run(*task)
        finally:
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(code)
    return process

for line in sys.stdin:
    processes = [start(*task) for task in json.loads(line)]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]), flush=True)
"""


@pytest.fixture(scope="module")
def forks():
    """Start and return the process that runs FORKS."""
    # Libraries that start threads at import would leave locked locks in the forks.
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **one, "GLOO_SOCKET_IFNAME": "lo"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKS], env=environment, **pipes) as process:
        yield process
        process.kill()


@pytest.fixture
def forked_train(here, forks):
    """Return a function that runs the program in other processes.

    Its arguments are the command, the number of ranks, and what happens, as arguments of `arrange` in FORKS. It returns
    the exit statuses, negative for a signal, and what all ranks wrote to stdout and to stderr.
    """

    def run(command, ranks=1, left=1, **plan):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        tasks, logs = [], [here.parent / f"rank{rank}" for rank in range(ranks)]
        for rank, log in enumerate(logs):
            environment = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            tasks.append([str(here), f"{command} --threads 1", environment, {"left": left, **plan}, str(log)])
        print(json.dumps(tasks), file=forks.stdin, flush=True)
        statuses = json.loads(forks.stdout.readline())
        return statuses, *(
            "".join(log.with_suffix(f".{name}").read_text() for log in logs) for name in ("stdout", "stderr")
        )

    return run


@pytest.fixture
def assert_same_run(here, read_log, read_state):
    """Return a function that asserts that two folders contain the same run, bit for bit."""

    def check(first, second):
        for name in ("log.csv", "steps.csv"):
            assert read_log(here / first, name) == read_log(here / second, name)
        for name in ("last.pt", "best.pt"):
            assert read_state(here / first / name) == read_state(here / second / name)
        assert {path.name for path in (here / first).iterdir()} == {path.name for path in (here / second).iterdir()}

    return check


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Return a folder in the layout of CIFAR-10, with 20 random images instead of 10 000 in each of its six files."""
    # torchvision checks the checksums of the real files.
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
    """Return a folder in the layout of ImageNet: eight training images of each of three classes, validation images of
    two."""
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
    """Return photographs shipped with packages, by name: RGB, 640×427 twice and 512×600."""
    from matplotlib import get_data_path
    from sklearn.datasets import load_sample_image

    images = {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
    with Image.open(f"{get_data_path()}/sample_data/grace_hopper.jpg") as image:
        return images | {"hopper": image.convert("RGB")}


@pytest.fixture(scope="session")
def write_crops(photographs):
    """Return a function that writes crops of 200×160 of the three photographs as JPEG in the layout of ImageNet, one
    class per photograph."""

    def write(root, counts, size=(200, 160)):
        generator = np.random.default_rng(0)
        for split, count in counts.items():
            for name, image in photographs.items():
                folder = root / split / name
                folder.mkdir(parents=True)
                for index in range(count):
                    left, top = (
                        int(generator.integers(side - part)) for side, part in zip(image.size, (200, 160), strict=True)
                    )
                    crop = image.crop((left, top, left + 200, top + 160))
                    crop.resize(size).save(folder / f"{index}.JPEG", quality=92)
        return root

    return write


@pytest.fixture(scope="session")
def photograph_crops(write_crops, tmp_path_factory):
    """Return a small folder of such crops, which tests may not change."""
    return write_crops(tmp_path_factory.mktemp("crops"), {"train": 16, "val": 5})


@pytest.fixture
def jpeg_folder(photograph_crops, tmp_path):
    """Return a copy of the folder that tests may change."""
    return shutil.copytree(photograph_crops, tmp_path / "jpegs")
