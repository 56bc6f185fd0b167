"""A run that is stopped at any moment and resumed equals an uninterrupted run."""

import random
import shutil
import signal

import pytest
import torch

from crsam_ext.training import checkpoint

pytestmark = pytest.mark.slow

KILLED = [-signal.SIGKILL]


@pytest.fixture
def kill_at(forked_train):
    """Return a function that runs a command and kills it right before or after a file is replaced for the n-th time."""

    def run(name, count, moment, command):
        assert forked_train(command, file=name, left=count, moment=moment)[0] == KILLED

    return run


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
def test_training_resumes_in_mid_epoch_with_augmentation(
    crsam_train, monkeypatch, assert_same_run, request, capsys, data, options
):
    path = request.getfixturevalue("cifar10" if data == "cifar10" else "image_folder")
    if data == "folder":
        shutil.copytree(path / "train" / "ape", path / "val" / "ape")
        (path / "train" / "bee" / "3.png").write_text("broken, and counted in log.csv")
    command = f"--data {data}:{path} {options} --epochs 2 --log-interval 2 --output"
    assert crsam_train(f"{command} straight") == 0
    capsys.readouterr()

    with monkeypatch.context() as patch:
        stop_after(patch, 2 if data == "folder" else 7, signal.SIGTERM)
        assert crsam_train(f"{command} stopped") == 75
    assert "crsam-train: stopped after step" in capsys.readouterr().err
    assert crsam_train(f"{command} stopped --resume") == 0

    assert_same_run("straight", "stopped")


def stop_after(monkeypatch, step, *signals):
    """Send signals during a step."""
    from crsam_ext.training.loop import Training

    take = Training.take

    def interrupted_take(training, batch):
        take(training, batch)
        if training.state.step == step:
            for number in signals:
                signal.raise_signal(number)

    monkeypatch.setattr(Training, "take", interrupted_take)


def test_training_resumes_after_a_kill_while_files_are_replaced(kill_at, crsam_train, here, assert_same_run, read_log):
    command = "--model mlp --epochs 3 --mixup 0.3 --ema 0.9 --batch-size 128 --output"
    assert crsam_train(f"{command} straight") == 0

    kill_at("last.pt", 1, "after", f"{command} killed")
    assert [path.name for path in (here / "killed").iterdir()] == ["last.pt"]
    kill_at("last.pt", 1, "before", f"{command} killed --resume")  # before the first evaluation
    assert (here / "killed" / "last.pt.partial").exists()
    kill_at("last.pt", 2, "before", f"{command} killed --resume")  # after the evaluation
    assert len(read_log(here / "killed")) == 0
    assert (here / "killed" / "best.pt").exists()
    kill_at("last.pt", 1, "after", f"{command} killed --resume")
    assert len(read_log(here / "killed")) == 0  # the row of the epoch in last.pt is missing
    kill_at("log.csv", 2, "before", f"{command} killed --resume")  # the first one writes one epoch
    assert len(read_log(here / "killed")) == 1
    kill_at("steps.csv", 1, "before", f"{command} killed --resume")
    kill_at("steps.csv", 1, "after", f"{command} killed --resume")
    kill_at("config.json", 1, "before", f"{command} killed --resume")
    kill_at("best.pt", 1, "before", f"{command} killed --resume")
    kill_at("best.pt", 1, "after", f"{command} killed --resume")
    assert crsam_train(f"{command} killed --resume") == 0

    assert_same_run("straight", "killed")
    assert (here / "straight" / "config.json").read_text() == (here / "killed" / "config.json").read_text()


@pytest.mark.parametrize(
    "options",
    [
        "--model cnn --ema 0.99 --interval 2 --reuse --curvature-interval 2 --warmup-steps 15 --rho-schedule "
        "proportional --min-rho 0.02 --save-steps 4",
        "--model cnn --base adamw --alpha-schedule linear --regularizer log --max-grad-norm 1 --save-steps 7",
    ],
    ids=["ema-intervals", "adamw-log"],
)
def test_training_resumes_after_kills_at_random_steps(forked_train, assert_same_run, here, options):
    """The run is killed twenty or ten times, at any step, also before the first checkpoint after the last kill."""
    command = f"{options} --epochs 3 --batch-size 128 --log-interval 5 --checkpoint-hist 2 --output"
    assert forked_train(f"{command} straight")[0] == [0]

    steps = 3 * 12  # of 1437 samples
    at = sorted(random.Random(0).choices(range(1, steps + 1), k=20 if "--ema" in options else 10))
    resume = ""
    for step in at:
        assert forked_train(f"{command} killed {resume}", step=step, signals=KILL)[0] == KILLED
        resume = "--resume"
    assert forked_train(f"{command} killed --resume")[0] == [0]

    assert_same_run("straight", "killed")


KILL = [signal.SIGKILL]


def test_stochastic_depth_draws_the_same_numbers_after_resuming(forked_train, assert_same_run):
    """A checkpoint holds no state of a generator: the numbers of a step depend on the seed and the step."""
    command = (
        "--data synthetic:2 --model test_resnet --image-size 32 --drop-path 0.5 --batch-size 20 --epochs 1 --output"
    )
    assert forked_train(f"{command} straight")[0] == [0]
    assert forked_train(f"{command} stopped", step=5, signals=[signal.SIGTERM])[0] == [75]
    assert forked_train(f"{command} stopped --resume")[0] == [0]

    assert_same_run("straight", "stopped")


def test_the_decay_of_the_moving_average_continues(forked_train, here):
    """The decay grows with the steps, so a counter that restarts would give another average."""
    from timm.utils.model_ema import ModelEmaV3

    ema = ModelEmaV3(torch.nn.Linear(1, 1), decay=0.9999, use_warmup=True)
    assert [ema.get_decay(step) for step in (1, 2, 8)] == pytest.approx([0, 1 - 2 ** (-2 / 3), 0.75])
    command = "--model mlp --epochs 1 --ema 0.9999 --batch-size 128 --output"
    assert forked_train(f"{command} straight")[0] == [0]
    assert forked_train(f"{command} stopped", step=6, signals=[signal.SIGTERM])[0] == [75]
    assert torch.load(here / "stopped" / "last.pt", weights_only=True)["step"] == 6
    assert forked_train(f"{command} stopped --resume")[0] == [0]

    straight, stopped = (torch.load(here / f"{name}/last.pt", weights_only=True) for name in ("straight", "stopped"))
    assert all(stopped["ema"][name].equal(weights) for name, weights in straight["ema"].items())
    assert not straight["ema"]["1.weight"].equal(straight["model"]["1.weight"])


def test_training_resumes_after_a_kill_during_the_evaluation(forked_train, assert_same_run, here, read_log):
    command = "--model cnn --epochs 2 --batch-size 256 --log-interval 2 --ema 0.9 --output"
    assert forked_train(f"{command} straight")[0] == [0]

    assert forked_train(f"{command} killed", test=True, left=2)[0] == KILLED
    state = torch.load(here / "killed" / "last.pt", weights_only=True)
    assert (state["step"], len(state["history"]), len(state["epoch"]["steps"])) == (12, 1, 6)
    assert forked_train(f"{command} killed --resume")[0] == [0]

    assert_same_run("straight", "killed")


@pytest.mark.parametrize(
    ("signals", "status", "line"),
    [
        ([signal.SIGTERM], 75, "stopped after step 7 on request; --resume continues from there"),
        ([signal.SIGUSR1], 75, "stopped after step 7 on request; --resume continues from there"),
        ([signal.SIGINT], 130, "stopped after step 7 on request; --resume continues from there"),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGTERM], 130, "stopped after step 7 on request; --resume"),
        ([signal.SIGINT, signal.SIGINT], 130, "interrupted; --resume continues from the last checkpoint"),
    ],
    ids=["SIGTERM", "SIGUSR1", "SIGINT", "both", "twice"],
)
def test_signals_stop_the_run_with_one_line(forked_train, assert_same_run, here, finished_cnn, signals, status, line):
    statuses, _, err = forked_train(f"{CNN} stopped", step=7, signals=signals)

    assert statuses == [status]
    assert err.count("\n") == 1
    assert err.startswith(f"crsam-train: {line}")
    assert torch.load(here / "stopped" / "last.pt", weights_only=True)["step"] == (6 if "interrupted" in line else 7)
    shutil.copytree(finished_cnn, here / "straight")
    assert forked_train(f"{CNN} stopped --resume")[0] == [0]
    assert_same_run("straight", "stopped")


CNN = "--model cnn --epochs 2 --batch-size 256 --log-interval 2 --output"


@pytest.fixture(scope="module")
def finished_cnn(forks, tmp_path_factory):
    """Return the folder of the finished run of CNN."""
    from crsam_ext.training.__main__ import main

    folder = tmp_path_factory.mktemp("cnn") / "run"
    assert main([*CNN.split(), str(folder), "--threads", "1"]) == 0
    return folder


def test_signal_handlers_are_restored(crsam_train, monkeypatch, here):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with monkeypatch.context() as patch:
        stop_after(patch, 3, signal.SIGINT)
        assert crsam_train("--model mlp --epochs 1 --output out") == 130

    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def tear_last_line(path):
    path.write_text(path.read_text()[:-20])


def tear_and_add_later_steps(path):
    *rows, last = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*rows, last, last.replace("6,", "8,", 1), "10,2,0.1"]))


def remove(path):
    path.unlink()


@pytest.mark.parametrize("harm", [tear_last_line, tear_and_add_later_steps, remove])
def test_resuming_accepts_a_damaged_steps_csv(
    crsam_train, assert_same_run, here, finished_cnn, read_log, monkeypatch, harm
):
    """Rows of repeated steps are rewritten; other rows stay, and missing rows stay missing."""
    with monkeypatch.context() as patch:
        stop_after(patch, 7, signal.SIGTERM)
        assert crsam_train(f"{CNN} stopped") == 75
    harm(here / "stopped" / "steps.csv")
    assert crsam_train(f"{CNN} stopped --resume") == 0

    lost = {tear_last_line: {"6"}, tear_and_add_later_steps: set(), remove: {"2", "4", "6"}}[harm]
    expected = [row for row in read_log(finished_cnn, "steps.csv") if row["step"] not in lost]
    assert read_log(here / "stopped", "steps.csv") == expected
    assert read_log(here / "stopped") == read_log(finished_cnn)


def test_resuming_a_finished_run_changes_nothing(crsam_train, here, finished, read_log, read_state):
    shutil.copytree(finished, here / "out")
    log, state = read_log(here / "out"), read_state(here / "out" / "last.pt")
    assert crsam_train("--model mlp --epochs 1 --output out --resume") == 0

    assert read_log(here / "out") == log
    assert read_state(here / "out" / "last.pt") == state


def test_bad_files_are_counted_once_and_limited(forked_train, assert_same_run, here, read_log):
    """A fake loader reports unreadable files with its batches."""
    command = "--data digits --model mlp --epochs 2 --batch-size 256 --log-interval 2 --output"
    bad = {"1": ["a.jpg"], "3": ["b.jpg", "a.jpg"], "8": ["c.jpg"], "9": ["a.jpg"]}
    statuses, out, err = forked_train(f"{command} straight", bad=bad)
    assert statuses == [0]
    assert err.splitlines() == [
        "crsam-train: 1 training images cannot be read and were replaced: a.jpg",
        "crsam-train: 1 training images cannot be read and were replaced: b.jpg",
        "crsam-train: 1 training images cannot be read and were replaced: c.jpg",
    ]
    assert [row["bad_files"] for row in read_log(here / "straight")] == ["2", "2"]
    assert [row["bad_files"] for row in read_log(here / "straight", "steps.csv")] == ["1", "2", "2", "1", "2", "2"]
    assert out.endswith("; 3 training images could not be read\n")

    statuses, _, err = forked_train(f"{command} stopped", bad=bad, step=8, signals=[signal.SIGTERM])
    assert (statuses, err.count("\n")) == ([75], 4)
    statuses, out, err = forked_train(f"{command} stopped --resume", bad=bad)
    assert (statuses, err) == ([0], "")
    assert out.endswith("; 3 training images could not be read\n")
    assert_same_run("straight", "stopped")


def test_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file"
    checkpoint.write(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(checkpoint.TrainingError, match=r"cannot write .*file: No space left on device"):
        checkpoint.write(path, fail)
    assert path.read_bytes() == b"old"
