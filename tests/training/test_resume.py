"""A run that is stopped at any moment and resumed is the run that was never stopped."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from crsam_ext.training import checkpoint, loop

pytestmark = pytest.mark.slow

# Runs the program with each command that comes in until the n-th time that a file is put in place, kills it right
# before or right after, and answers with the signal. Forks, so that the packages are imported once.
KILLED_RUNS = """
import os, signal, sys
import crsam_ext.training.loop, sklearn.datasets, sklearn.model_selection
from crsam_ext.training.__main__ import main

replace = os.replace

def run(folder, name, count, moment, *command):
    os.chdir(folder)
    left = int(count)

    def replace_or_die(source, target):
        nonlocal left
        left -= os.path.basename(target) == name
        if left == 0 and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_or_die
    with open(os.devnull, "w") as sys.stdout:
        main(command)

for line in sys.stdin:
    process = os.fork()
    if process == 0:
        try:
            run(*line.split())
        finally:
            os._exit(1)
    print(os.WTERMSIG(os.waitpid(process, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def killed_runs():
    """The process that runs KILLED_RUNS; from the start of the module, to import while other tests run."""
    arguments = [sys.executable, "-c", KILLED_RUNS]
    # Libraries that start threads when they are imported would leave their locks to the forks.
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, env={**os.environ, **one}, **pipes) as process:
        yield process
        process.kill()


@pytest.fixture
def kill_at(here, killed_runs):
    def run(name, count, moment, command):
        print(here, name, count, moment, command, "--threads 1", file=killed_runs.stdin, flush=True)
        assert int(killed_runs.stdout.readline()) == signal.SIGKILL

    return run


@pytest.fixture
def interrupt_second_epoch(monkeypatch):
    """Makes Ctrl-C arrive in the third step of the second epoch, inside a `with` statement."""

    @contextmanager
    def interrupt():
        train_epoch, step, calls = loop.train_epoch, loop.step, {"epoch": 0, "step": 0}

        def counted_epoch(*args):
            calls.update(epoch=calls["epoch"] + 1, step=0)
            return train_epoch(*args)

        def counted_step(*args):
            calls["step"] += 1
            if calls == {"epoch": 2, "step": 3}:
                raise KeyboardInterrupt
            return step(*args)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_epoch", counted_epoch)
            patch.setattr(loop, "step", counted_step)
            yield

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


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (
            "cifar10",
            "--model mlp --batch-size 20 --base adamw --regularizer log --workers 0 --auto-augment rand-m9-mstd0.5",
        ),
        ("cifar10", "--model mlp --batch-size 20 --workers 2 --mixup 0.2 --optimizer sgd"),
        ("folder", "--model test_resnet --image-size 32 --batch-size 8 --workers 0 --optimizer sam"),
        ("folder", "--model test_resnet --image-size 32 --batch-size 8 --workers 2 --optimizer sgd --nesterov"),
    ],
    ids=["cifar10", "cifar10-workers", "folder", "folder-workers"],
)
def test_interrupted_with_augmentation(
    crsam_train, interrupt_second_epoch, assert_same_run, request, capsys, data, options
):
    path = request.getfixturevalue("cifar10" if data == "cifar10" else "image_folder")
    if data == "folder":
        (path / "train" / "bee" / "3.png").write_text("broken, and counted in log.csv")
    command = f"--data {data}:{path} {options} --epochs 2 --output"
    assert crsam_train(f"{command} straight") == 0
    capsys.readouterr()

    with interrupt_second_epoch():
        assert crsam_train(f"{command} stopped") == 130
    *_, line = capsys.readouterr().err.splitlines()
    assert line == "crsam-train: interrupted; with --resume it goes on after the last complete epoch"
    assert crsam_train(f"{command} stopped --resume") == 0

    assert_same_run("straight", "stopped")


def test_killed_three_times(kill_at, crsam_train, here, assert_same_run, read_log):
    command = "--model mlp --epochs 4 --mixup 0.3 --ema 0.9 --batch-size 128 --output"
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


def test_finished_run_stays_as_it_is(crsam_train, here, finished, read_log, read_state):
    shutil.copytree(finished, here / "out")
    log, state = read_log(here / "out"), read_state(here / "out" / "last.pt")
    assert crsam_train("--model mlp --epochs 1 --output out --resume") == 0

    assert read_log(here / "out") == log
    assert read_state(here / "out" / "last.pt") == state


def test_checkpoint_from_before_bad_files_were_counted(crsam_train, here, finished, read_log):
    shutil.copytree(finished, here / "out")
    state = torch.load(here / "out" / "last.pt", weights_only=True)
    del state["config"]["skip_bad_val"]
    for row in state["history"]:
        del row["bad_files"]
    torch.save(state, here / "out" / "last.pt")
    assert crsam_train("--model mlp --epochs 1 --output out --resume") == 0
    assert [row["bad_files"] for row in read_log(here / "out")] == [""]


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
