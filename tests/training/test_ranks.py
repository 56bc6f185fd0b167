"""The program in several processes, as torchrun starts them."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.slow

SHORT = ["--data", "digits", "--epochs", "3", "--batch-size", "64", "--model", "mlp"]


def start(processes, *arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    if processes == 1:
        command = [sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "200"}
    return subprocess.run(
        [*command, "-m", "crsam_ext.training", *SHORT, *map(str, arguments)],
        capture_output=True, text=True, timeout=240, env=environment, **options,
    )  # fmt: skip


def log_of(folder):
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three epochs in two processes."""
    folder = tmp_path_factory.mktemp("run") / "two"
    done = start(2, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_one_process_speaks_and_writes(trained):
    folder, done = trained
    assert done.stdout.count("epoch 3/3") == 1
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.pt", "config.json", "curves.png", "last.pt", "log.csv",
    ]  # fmt: skip
    assert [row["epoch"] for row in log_of(folder)] == ["1", "2", "3"]
    assert float(log_of(folder)[-1]["test_accuracy"]) > 0.8
    assert "processes" not in json.loads((folder / "config.json").read_text())


def check_evaluation(folder, arguments):
    """The last one is that of one process: every sample is in it once."""
    from crsam_ext.training.data import load
    from crsam_ext.training.loop import evaluate
    from crsam_ext.training.models import create_model
    from crsam_ext.training.options import parse

    cpu, options = torch.device("cpu"), parse(arguments)
    data = load(options, cpu)
    model = create_model(options.model, data.shape, data.classes)
    model.load_state_dict(torch.load(folder / "last.pt", weights_only=True)["model"])
    alone, row = evaluate(model, data.test(), cpu, False), log_of(folder)[-1]
    assert alone["test_accuracy"] == float(row["test_accuracy"])
    assert alone["test_loss"] == pytest.approx(float(row["test_loss"]), rel=1e-5)


def test_the_evaluation_is_that_of_one_process(trained):
    folder, _ = trained
    check_evaluation(folder, SHORT)


def test_stopped_and_resumed_it_is_the_same_run(trained, tmp_path):
    whole, _ = trained
    folder = tmp_path / "stopped"
    stop = tmp_path / "stop.py"
    # Ends after two epochs as a kill does.
    stop.write_text(
        "import os, sys\n"
        "from crsam_ext.training import loop\n"
        "from crsam_ext.training.__main__ import main\n"
        "save = loop._save\n"
        "def stopping(state, options, row):\n"
        "    save(state, options, row)\n"
        "    if row['epoch'] == 2:\n"
        "        os._exit(9)\n"
        "loop._save = stopping\n"
        "sys.exit(main())\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(stop), *SHORT]
    done = subprocess.run([*command, "--output", str(folder)], capture_output=True, timeout=240, env=environment)
    assert done.returncode != 0
    assert len(log_of(folder)) == 2
    done = start(2, "--output", folder, "--resume")
    assert done.returncode == 0, done.stderr
    for name, value in torch.load(folder / "last.pt", weights_only=True)["model"].items():
        assert torch.equal(value, torch.load(whole / "last.pt", weights_only=True)["model"][name]), name


def test_resumed_with_another_number_of_processes(tmp_path):
    folder = tmp_path / "run"
    for processes, resume in ((2, []), (1, ["--resume"])):
        done = start(processes, "--output", folder, "--optimizer", "sam", *resume)
        assert done.returncode == 0, done.stderr
        assert [row["epoch"] for row in log_of(folder)] == ["1", "2", "3"]
        state = torch.load(folder / "last.pt", weights_only=True)
        state["history"].pop()  # one epoch is to be taken again
        torch.save(state, folder / "last.pt")
    done = start(2, "--output", folder, "--optimizer", "sam", "--resume")
    assert done.returncode == 0, done.stderr
    assert [row["epoch"] for row in log_of(folder)] == ["1", "2", "3"]


def test_one_line_for_a_mistake(trained, tmp_path):
    folder, _ = trained
    for arguments, message in (
        (["--output", folder], "is not empty"),
        (["--output", tmp_path / "new", "--batch-size", "65"], "cannot be divided among 2 processes"),
    ):
        done = start(2, *arguments)
        assert done.returncode != 0
        lines = [line for line in done.stderr.splitlines() if line.startswith("crsam-train: ")]
        assert len(lines) == 1
        assert message in lines[0]


def test_images_in_a_folder(image_folder, tmp_path):
    """Every rank takes its part of each batch from timm's loader, and evaluates its share of five validation images."""
    options = ["--data", f"folder:{image_folder}", "--model", "resnet18", "--image-size", "32", "--batch-size", "4"]
    options += ["--epochs", "1", "--workers", "0"]
    folder = tmp_path / "run"
    done = start(2, *options, "--output", folder)
    assert done.returncode == 0, done.stderr
    assert [row["bad_files"] for row in log_of(folder)] == ["0"]
    check_evaluation(folder, options)
