"""The logs of a run, and --evaluate."""

import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.slow

RUN = "--model mlp --epochs 2 --batch-size 256 --log-interval 2 --output"


def scalars(folder):
    """Return what TensorBoard shows: pairs of step and value by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.fixture
def stop_after(monkeypatch):
    """Return a function that makes a given step raise KeyboardInterrupt."""

    def arrange(step):
        from crsam_ext.training.loop import Training

        take = Training.take

        def failing_take(training, batch):
            take(training, batch)
            if training.state.step == step:
                monkeypatch.setattr(Training, "take", take)
                raise KeyboardInterrupt

        monkeypatch.setattr(Training, "take", failing_take)

    return arrange


def test_tensorboard_shows_the_log_once(crsam_train, here, read_log, stop_after):
    """Steps that are repeated appear once, and an overwritten folder shows nothing of the earlier run."""
    pytest.importorskip("tensorboard")
    assert crsam_train(f"{RUN} out --tensorboard --lr 0.3") == 0
    stop_after(9)
    assert crsam_train(f"{RUN} out --tensorboard --overwrite") == 130  # two rows after the last checkpoint
    assert crsam_train(f"{RUN} out --tensorboard --resume") == 0

    shown, rows, epochs = (
        scalars(here / "out" / "tensorboard"),
        read_log(here / "out", "steps.csv"),
        read_log(here / "out"),
    )
    assert [step for step, _ in shown["step/loss"]] == [int(row["step"]) for row in rows]
    for name in ("loss", "accuracy", "lr", "rho", "grad_norm"):
        assert [value for _, value in shown[f"step/{name}"]] == pytest.approx([float(row[name]) for row in rows])
    assert [step for step, _ in shown["epoch/test_accuracy"]] == [6, 12]
    for name in ("test_accuracy", "test_top5", "train_loss"):
        assert [value for _, value in shown[f"epoch/{name}"]] == pytest.approx([float(row[name]) for row in epochs])


def test_weights_and_biases_receives_the_log(crsam_train, here, monkeypatch, read_log):
    runs, logged, finished = [], [], []

    def init(**arguments):
        runs.append(arguments)
        return SimpleNamespace(
            log=lambda values, step: logged.append((step, values)), finish=lambda: finished.append(1)
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    assert crsam_train(f"{RUN} out --wandb digits") == 0
    assert crsam_train(f"{RUN} out --wandb digits --resume") == 0
    assert crsam_train(f"{RUN} out --wandb digits --overwrite") == 0

    assert [run["project"] for run in runs] == ["digits"] * 3
    assert runs[0]["name"] == "out"
    assert runs[0]["config"]["optimizer"] == "crsam"
    assert runs[0]["id"] == runs[1]["id"] != runs[2]["id"]
    assert finished == [1, 1, 1]
    rows = [(step, values) for step, values in logged if "step/loss" in values][:6]
    assert [step for step, _ in rows] == [2, 4, 6, 8, 10, 12]
    assert rows[-1][1]["step/loss"] == pytest.approx(float(read_log(here / "out", "steps.csv")[-1]["loss"]))
    assert "step/mfu_percent" not in rows[0][1]  # unknown
    assert [step for step, values in logged if "epoch/test_loss" in values][:2] == [6, 12]


@pytest.mark.parametrize(("flag", "package"), [("--wandb project", "wandb"), ("--tensorboard", "tensorboard")])
def test_missing_package_is_named(crsam_train, here, monkeypatch, capsys, flag, package):
    for name in (package, *(["torch.utils.tensorboard"] if package == "tensorboard" else [])):
        monkeypatch.setitem(sys.modules, name, None)
    assert crsam_train(f"{RUN} out {flag}") == 2

    assert capsys.readouterr().err == f"crsam-train: --{package} needs the package {package}: pip install {package}\n"
    assert list(here.iterdir()) == []


def test_the_best_epochs_are_kept(crsam_train, here, monkeypatch):
    """Files that are not from the run stay, and so do those of the three best epochs."""
    accuracies = iter([0.2, 0.5, 0.1, 0.4, 0.5, 0.3])
    monkeypatch.setattr(
        "crsam_ext.training.loop.evaluate",
        lambda *args: {"test_loss": 1.0, "test_accuracy": next(accuracies), "test_top5": 1.0},
    )
    folder = here / "out"
    folder.mkdir()
    (folder / "epoch-mine.pt").write_text("mine")
    (folder / "epoch-9.pt").write_text("of an earlier run")
    assert crsam_train("--model mlp --epochs 6 --batch-size 512 --checkpoint-hist 3 --output out --overwrite") == 0

    assert sorted(path.name for path in folder.glob("epoch-*")) == [
        "epoch-2.pt", "epoch-4.pt", "epoch-5.pt", "epoch-mine.pt",
    ]  # fmt: skip
    best, second = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("best", "epoch-2"))
    assert (best["epoch"], best["test_accuracy"]) == (2, 0.5)  # the first of equally good epochs
    assert all(best["model"][name].equal(weights) for name, weights in second["model"].items())


def test_evaluation_after_every_second_epoch_and_the_last(crsam_train, here, read_log, capsys):
    assert crsam_train("--model mlp --epochs 5 --batch-size 512 --val-interval 2 --output out") == 0

    assert [row["test_accuracy"] != "" for row in read_log(here / "out")] == [False, True, False, True, True]
    lines = capsys.readouterr().out.splitlines()
    assert ["test loss" in line for line in lines[:5]] == [False, True, False, True, True]
    assert lines[5].startswith("test accuracy")


def test_log_lines_are_plain_without_a_terminal(crsam_train, here, capsys):
    assert crsam_train(f"{RUN} out --peak-tflops 0.001") == 0

    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert len(lines) == 2 * 4 + 1
    assert re.fullmatch(
        r"epoch 1/2  batch 2/6  loss \d\.\d{4}  lr 0\.\d+  rho 0\.1  \d+ images/s  \d+ gradients/s  "
        r"data \d+ %  optimizer \d+ %  MFU \d+ %  0:00:\d\d left",
        lines[0],
    )
    assert re.fullmatch(
        r"epoch 1/2  lr 0\.\d+  train loss \d\.\d{4}  accuracy \d+\.\d\d%  test loss \d\.\d{4}  "
        r"accuracy \d+\.\d\d%  top-5 \d+\.\d\d%  \d\.\d s",
        lines[3],
    )


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """Return the folder of a run with a moving average whose best epoch should not be its last."""
    from crsam_ext.training.__main__ import main

    folder = tmp_path_factory.mktemp("averaged") / "run"
    command = "--model cnn --epochs 2 --batch-size 128 --ema 0.9 --bce-loss --head-init-bias -2 --optimizer sam"
    assert main([*command.split(), "--rho-schedule", "linear", "--threads", "1", "--output", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_checkpoint_is_evaluated(crsam_train, here, averaged, read_log, capsys, name):
    rows = read_log(averaged)
    row = max(rows, key=lambda row: float(row["test_accuracy"])) if name == "best.pt" else rows[-1]
    assert crsam_train(f"--evaluate {averaged / name}") == 0

    assert capsys.readouterr().out == (
        f"test loss {float(row['test_loss']):.4f}  accuracy {float(row['test_accuracy']):.2%}  "
        f"top-5 {float(row['test_top5']):.2%}  of {averaged / name}\n"
    )
    assert list(here.iterdir()) == []


def test_checkpoint_is_not_evaluated_on_data_of_another_shape(crsam_train, averaged, capsys):
    """Options on the command line override those of the checkpoint."""
    assert crsam_train(f"--evaluate {averaged / 'best.pt'} --data mnist1d") == 2
    assert capsys.readouterr().err == (f"crsam-train: {averaged / 'best.pt'} does not fit the model cnn on this data\n")
    assert crsam_train(f"--evaluate {averaged / 'best.pt'} --data nothing") == 2
    assert "--data nothing is not valid: use digits" in capsys.readouterr().err


def test_file_that_is_not_a_checkpoint_is_not_evaluated(crsam_train, here, averaged, capsys):
    shutil.copy(averaged / "best.pt", here / "cut.pt")
    (here / "cut.pt").write_bytes((here / "cut.pt").read_bytes()[:-1000])
    torch.save({"model": torch.zeros(3)}, here / "foreign.pt")
    for name, message in (
        ("cut.pt", "cut.pt is damaged or not a checkpoint"),
        ("foreign.pt", "foreign.pt is not a checkpoint of this version of crsam-train"),
        ("missing.pt", "there is no checkpoint missing.pt"),
    ):
        assert crsam_train(f"--evaluate {name}") == 2
        assert capsys.readouterr().err == f"crsam-train: {message}\n"
