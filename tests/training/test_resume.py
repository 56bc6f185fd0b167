"""A run that is stopped at any moment and resumed is the run that was never stopped."""

import signal
import subprocess
import sys

import pytest
import torch

from crsam_ext.training import checkpoint, loop

# Runs the program until the n-th time that a file is put in place, and kills it right before or right after.
KILLED_RUN = """
import os, signal, sys
from crsam_ext.training.__main__ import main

name, count, moment = sys.argv[1], int(sys.argv[2]), sys.argv[3]
replace = os.replace

def replace_or_die(source, target):
    global count
    count -= os.path.basename(target) == name
    if count == 0 and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace_or_die
sys.exit(main(sys.argv[4:]))
"""


@pytest.fixture
def kill_at(here):
    def run(name, count, moment, command):
        arguments = [sys.executable, "-c", KILLED_RUN, name, str(count), moment, *command.split(), "--threads", "1"]
        assert subprocess.run(arguments, check=False, capture_output=True).returncode == -signal.SIGKILL

    return run


@pytest.fixture
def interrupt_epoch(monkeypatch):
    """Makes Ctrl-C arrive in the third step of an epoch, counted from 1."""

    def interrupt(epoch):
        step, calls = loop.step, {"epoch": 0, "step": 0}

        def counted_epoch(*args):
            calls.update(epoch=calls["epoch"] + 1, step=0)
            return train_epoch(*args)

        def counted_step(*args):
            calls["step"] += 1
            if calls["epoch"] == epoch and calls["step"] == 3:
                raise KeyboardInterrupt
            return step(*args)

        train_epoch = loop.train_epoch
        monkeypatch.setattr(loop, "train_epoch", counted_epoch)
        monkeypatch.setattr(loop, "step", counted_step)

    return interrupt


@pytest.fixture
def assert_same_run(here, read_log, read_state):
    def check(first, second):
        assert read_log(here / first) == read_log(here / second)
        for name in ("last.pt", "best.pt"):
            assert read_state(here / first / name) == read_state(here / second / name)
        assert (here / first / "config.json").read_text() == (here / second / "config.json").read_text()
        assert {path.name for path in (here / first).iterdir()} == {path.name for path in (here / second).iterdir()}

    return check


def test_killed_three_times(crsam_train, here, kill_at, assert_same_run, read_log):
    command = "--epochs 5 --mixup 0.3 --ema 0.9 --batch-size 128 --output"
    assert crsam_train(f"{command} straight") == 0

    kill_at("last.pt", 1, "after", f"{command} killed")
    assert [path.name for path in (here / "killed").iterdir()] == ["last.pt"]
    kill_at("last.pt", 2, "before", f"{command} killed --resume")
    assert (here / "killed" / "last.pt.partial").exists()
    assert len(read_log(here / "killed")) == 1
    kill_at("last.pt", 2, "after", f"{command} killed --resume")
    assert len(read_log(here / "killed")) == 2  # of the three epochs in last.pt
    assert crsam_train(f"{command} killed --resume") == 0

    assert_same_run("straight", "killed")


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("cifar10", "--model cnn --base adamw --regularizer log"),
        ("folder", "--model test_resnet --image-size 32 --batch-size 8 --workers 0 --optimizer sam"),
        ("folder", "--model test_resnet --image-size 32 --batch-size 8 --workers 2 --optimizer sgd --nesterov"),
    ],
    ids=["cifar10", "folder", "folder-workers"],
)
def test_interrupted_with_augmentation(
    crsam_train, here, interrupt_epoch, monkeypatch, assert_same_run, request, capsys, data, options
):
    path = request.getfixturevalue("cifar10" if data == "cifar10" else "image_folder")
    command = f"--data {data}:{path} {options} --batch-size 8 --epochs 3 --output"
    assert crsam_train(f"{command} straight") == 0
    capsys.readouterr()

    with monkeypatch.context():
        interrupt_epoch(2)
        assert crsam_train(f"{command} stopped") == 130
        assert capsys.readouterr().err.splitlines() == [
            "crsam-train: interrupted; with --resume it goes on after the last complete epoch"
        ]
        monkeypatch.undo()
    monkeypatch.chdir(here)
    if data == "cifar10":
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    assert crsam_train(f"{command} stopped --resume") == 0

    assert_same_run("straight", "stopped")


def test_finished_run_stays_as_it_is(crsam_train, here, read_log, read_state):
    assert crsam_train("--epochs 1 --output out") == 0
    log, state = read_log(here / "out"), read_state(here / "out" / "last.pt")
    assert crsam_train("--epochs 1 --output out --resume") == 0

    assert read_log(here / "out") == log
    assert read_state(here / "out" / "last.pt") == state


def test_random_states_come_back():
    import random

    import numpy as np

    device = torch.device("cpu")
    state = checkpoint.random_state(device)

    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    first = draw()
    assert draw() != first
    checkpoint.set_random_state(state, device)
    assert draw() == first


def test_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file"
    checkpoint.write(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(checkpoint.TrainingError, match=r"cannot write .*file: No space left on device"):
        checkpoint.write(path, fail)
    assert path.read_bytes() == b"old"
