"""The program in several processes: with torchrun, and in connected forks."""

import csv
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

pytestmark = pytest.mark.slow

SHORT = "--data digits --model mlp --epochs 3 --batch-size 64 --log-interval 5 --output"
NORMED = "--data digits --model cnn --epochs 2 --batch-size 128 --log-interval 4 --ema 0.99 --output"  # batch norm
TERM = [signal.SIGTERM]


@contextmanager
def torchrun(*arguments):
    """Start the program in two processes, in a separate process group."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "300"}
    with subprocess.Popen(
        [*command, "-m", "crsam_ext.training", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def log_of(folder):
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


def lines_of(stderr):
    return [line for line in stderr.splitlines() if line.startswith("crsam-train: ")]


@pytest.fixture
def two(forked_train):
    """Return a function that runs a command in two processes and returns their statuses and what they wrote to
    stderr."""

    def run(command, **plan):
        statuses, _, err = forked_train(command, ranks=2, **plan)
        return statuses, err

    return run


def test_training_under_torchrun_works(tmp_path):
    folder = tmp_path / "run"
    with torchrun(*SHORT.split(), folder) as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.count("epoch 3/3  lr") == 1
    assert {path.name for path in folder.iterdir()} == {
        "best.pt", "config.json", "curves.png", "last.pt", "log.csv", "steps.csv",
    }  # fmt: skip
    assert [row["epoch"] for row in log_of(folder)] == ["1", "2", "3"]
    assert float(log_of(folder)[-1]["test_accuracy"]) > 0.8
    assert "processes" not in json.loads((folder / "config.json").read_text())
    check_evaluation(folder)


def check_evaluation(folder):
    """Check that the last evaluation equals that of one process: it counts every sample once."""
    from crsam_ext.training.data import load
    from crsam_ext.training.loop import evaluate
    from crsam_ext.training.models import create_model
    from crsam_ext.training.options import parse
    from crsam_ext.training.steps import Objective

    options = parse(["--evaluate", str(folder / "last.pt")])
    data = load(options, torch.device("cpu"))
    model = create_model(options.model, data.shape, data.classes)
    model.load_state_dict(torch.load(folder / "last.pt", weights_only=True)["model"])
    alone, row = evaluate(model, Objective(model, options), data.test()), log_of(folder)[-1]
    assert alone["test_accuracy"] == float(row["test_accuracy"])
    assert alone["test_top5"] == float(row["test_top5"])
    # The batches differ, and so does the rounding of their float32 means.
    assert alone["test_loss"] == pytest.approx(float(row["test_loss"]), rel=1e-5)


def test_sigterm_to_torchrun_stops_all_processes(tmp_path):
    """It forwards the signal to all processes; they end with a complete checkpoint of the same step."""
    folder = tmp_path / "run"
    with torchrun(*SHORT.split(), folder, "--epochs", "100000") as process:
        for line in process.stdout:
            if "batch" in line:
                process.send_signal(signal.SIGTERM)
                break
        _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    (line,) = lines_of(err)
    step = torch.load(folder / "last.pt", weights_only=True)["step"]
    assert line == f"crsam-train: stopped after step {step} on request; --resume continues from there"
    assert "exitcode: -" not in err.replace(" ", "")  # no process was killed by a signal


def test_signal_to_one_process_stops_both(two, assert_same_run, here):
    """Both stop after the same step, and each resumes with its own running statistics."""
    assert two(f"{NORMED} straight") == ([0, 0], "")

    for step, rank, number, status in ((5, 1, signal.SIGTERM, 75), (9, 0, signal.SIGINT, 130)):
        resume = "--resume" if step > 5 else ""
        statuses, err = two(f"{NORMED} stopped {resume}", step=step, rank=rank, signals=[number])
        assert statuses == [status, status]
        state = torch.load(here / "stopped" / "last.pt", weights_only=True)
        assert state["step"] in (step, step + 1)  # the request may have been sent with the next step
        assert err == f"crsam-train: stopped after step {state['step']} on request; --resume continues from there\n"
        assert not state["buffers"][0][0]["2.running_mean"].equal(state["buffers"][1][0]["2.running_mean"])
    assert two(f"{NORMED} stopped --resume") == ([0, 0], "")

    assert_same_run("straight", "stopped")


def test_killing_one_process_ends_both(two, assert_same_run):
    """The other process ends by itself, with one line from rank 0 if it is still alive."""
    command = f"{NORMED.replace('--output', '--save-steps 3 --optimizer sam --output')}"
    assert two(f"{command} straight") == ([0, 0], "")

    statuses, err = two(f"{command} killed", step=8, rank=1, signals=[signal.SIGKILL])
    assert statuses == [2, -signal.SIGKILL]
    assert err == ("crsam-train: another process of the run has ended; --resume continues from the last checkpoint\n")
    assert two(f"{command} killed --resume", step=13, rank=0, signals=[signal.SIGKILL]) == ([-signal.SIGKILL, 2], "")
    assert two(f"{command} killed --resume") == ([0, 0], "")

    assert_same_run("straight", "killed")


@pytest.mark.parametrize("rank", [0, 1])
def test_error_of_one_process_ends_both(two, rank):
    assert two(f"{SHORT} run", step=7, rank=rank, error="the disk is full") == (
        [2, 2], "crsam-train: the disk is full\n",
    )  # fmt: skip


def test_bad_files_of_all_are_counted(two, here, read_log):
    """Both ranks report the same files: each is counted and named once. The limit covers both ranks."""
    bad = {"1": ["a.jpg"], "3": ["b.jpg", "a.jpg"], "7": ["c.jpg"]}
    command = SHORT.replace("--epochs 3", "--epochs 1")
    statuses, err = two(f"{command} run", bad=bad)
    assert statuses == [0, 0]
    assert [line.rpartition(" ")[2] for line in lines_of(err)] == ["b.jpg", "c.jpg"]
    assert "2 training images cannot be read and were replaced: a.jpg, b.jpg" in err
    assert [row["bad_files"] for row in read_log(here / "run")] == ["3"]


@pytest.mark.parametrize("options", ["--optimizer sgd", "--optimizer sam --sync-perturbation"])
def test_training_resumes_with_another_number_of_processes(two, forked_train, here, read_log, options):
    """The batches are the same, and the steps up to rounding, if the perturbation comes from the global batch.

    Bounds: sums of a batch are made in another order, which in float32 changes a gradient by about 1e-7 of its size.
    Over 33 steps with momentum, that grows to less than 1e-6 here.
    """
    # With mixup, the smaller last batch is always dropped; otherwise the number of steps would differ.
    command = f"{SHORT.replace('64', '128')} {{}} --mixup 0.2 {options}"
    assert forked_train(command.format("straight"))[0] == [0]

    folder, command = here / "changing", command.format("changing")
    assert two(command, step=8, signals=TERM)[0] == [75, 75]
    assert forked_train(f"{command} --resume", step=19, signals=TERM)[0] == [75]
    assert two(f"{command} --resume")[0] == [0, 0]

    first, second = (torch.load(here / name / "last.pt", weights_only=True) for name in ("straight", "changing"))
    for name, weights in first["model"].items():
        torch.testing.assert_close(second["model"][name], weights, rtol=1e-5, atol=1e-5)
    assert (first["step"], second["step"]) == (33, 33)
    for one, other in zip(read_log(here / "straight", "steps.csv"), read_log(folder, "steps.csv"), strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
        assert (one["step"], one["lr"]) == (other["step"], other["lr"])


def test_running_statistics_of_two_processes_become_their_mean_for_one(two, here):
    from crsam_ext.training import state
    from crsam_ext.training.data import load
    from crsam_ext.training.loop import start
    from crsam_ext.training.options import parse
    from crsam_ext.training.ranks import ALONE

    command = f"{NORMED.replace('--output', '--mixup 0.1 --output')} run"
    assert two(command, step=5, signals=TERM)[0] == [75, 75]
    saved = torch.load(here / "run" / "last.pt", weights_only=True)
    options = parse([*command.split(), "--resume"])
    run = start(options, load(options, torch.device("cpu")), torch.device("cpu"), ALONE)
    state.restore(run, options)

    for index, model in enumerate((run.model, run.ema.module)):
        for name, buffer in model.named_buffers():
            first, second = (of_rank[index][name] for of_rank in saved["buffers"])
            torch.testing.assert_close(buffer, (first + second) / 2 if buffer.is_floating_point() else first)
    assert run.model[2].num_batches_tracked == saved["step"]


def test_another_number_of_steps_per_epoch_is_refused(two, forked_train, here):
    assert two(f"{SHORT} run", step=5, signals=TERM)[0] == [75, 75]
    statuses, _, err = forked_train(f"{SHORT} run --resume")
    assert statuses == [2]
    assert err.startswith(
        "crsam-train: cannot resume with 23 steps per epoch: run was started with 22; check --data, and"
    )


def test_an_error_is_one_line(two, here):
    (here / "full").mkdir()
    (here / "full" / "file").write_text("mine")
    for command, message in (
        (f"{SHORT} full", "full is not empty: use --resume, --overwrite or another --output"),
        (f"{SHORT} new --batch-size 65", "--batch-size 65 cannot be divided equally among 2 processes"),
        (f"{SHORT} new --resume", "there is no checkpoint new/last.pt"),
    ):
        assert two(command) == ([2, 2], f"crsam-train: {message}\n")
    assert [path.name for path in here.iterdir()] == ["full"]


def test_images_are_split_among_the_ranks(two, image_folder, here):
    """Every rank takes its part of each batch, and evaluates its share of seven validation images."""
    (image_folder / "val" / "ape").mkdir()
    for index in range(2):
        (image_folder / "train" / "ape" / f"{index}.png").rename(image_folder / "val" / "ape" / f"{index}.png")
    options = f"--data folder:{image_folder} --model resnet18 --image-size 32 --batch-size 4 --epochs 1 --workers 0"
    assert two(f"{options} --output run")[0] == [0, 0]
    assert [row["bad_files"] for row in log_of(here / "run")] == ["0"]
    check_evaluation(here / "run")
