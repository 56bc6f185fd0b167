"""Whole runs of crsam-train."""

import json
import shutil

import pytest
import torch
from torch.nn import functional as F

from crsam_ext.training.data import load
from crsam_ext.training.models import create_model
from crsam_ext.training.options import parse
from crsam_ext.training.steps import create_optimizer

pytestmark = pytest.mark.slow

RESULTS = {"config.json", "log.csv", "steps.csv", "curves.png", "last.pt", "best.pt"}


def test_digits_are_learned(crsam_train, here, read_log, capsys):
    assert crsam_train("--epochs 5") == 0

    output = here / "runs" / "digits-cnn-crsam-seed0"
    log = read_log(output)
    best = torch.load(output / "best.pt", weights_only=True)
    printed = capsys.readouterr().out.splitlines()
    assert {path.name for path in output.iterdir()} == RESULTS
    assert [row["epoch"] for row in log] == [str(epoch) for epoch in range(1, 6)]
    assert float(log[-1]["test_accuracy"]) > 0.96
    assert float(log[-1]["grad_norm"]) > 0
    assert best["test_accuracy"] == max(float(row["test_accuracy"]) for row in log)
    assert json.loads((output / "config.json").read_text())["optimizer"] == "crsam"
    assert len(printed) == 6  # an epoch has fewer batches than --log-interval
    assert printed[-1].startswith(f"test accuracy {float(log[-1]['test_accuracy']):.2%}")
    assert printed[-1].endswith("runs/digits-cnn-crsam-seed0/curves.png")

    # The saved weights reach the recorded accuracy.
    model = create_model("cnn", (1, 8, 8), 10)
    model.load_state_dict(best["model"])
    (x, y, _), *_ = load(parse(["--batch-size", "360"]), torch.device("cpu")).test()
    assert (model.eval()(x).argmax(1) == y).float().mean().item() == pytest.approx(best["test_accuracy"])


def test_curves_are_drawn(finished):
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_run(crsam_train, here, finished, read_log):
    for seed in (0, 1):
        assert crsam_train(f"--model mlp --epochs 1 --seed {seed} --output seed{seed}") == 0

    assert read_log(here / "seed0") == read_log(finished)
    assert read_log(here / "seed1") != read_log(finished)


def test_sgd_equals_torch_sgd(crsam_train, here):
    command = "--model mlp --optimizer sgd --epochs 2 --nesterov --device cpu --output out"
    options = parse(command.split())
    data = load(options, torch.device("cpu"))
    torch.manual_seed(0)
    model = create_model("mlp", data.shape, data.classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * data.steps)
    for epoch in range(2):
        for x, y, _ in data.train(epoch, 0):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()

    assert crsam_train(command) == 0
    trained = torch.load(here / "out" / "last.pt", weights_only=True)["model"]
    for name, weights in model.state_dict().items():
        torch.testing.assert_close(trained[name], weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("command", "passes", "base"),
    [
        ("--optimizer sgd", 1, torch.optim.SGD),
        ("--optimizer adamw", 1, torch.optim.AdamW),
        ("--optimizer sam --rho 0.3 --adaptive", 2, torch.optim.SGD),
        ("--optimizer crsam", 3, torch.optim.SGD),
        ("--optimizer crsam --regularizer log --estimator loss --base adamw", 3, torch.optim.AdamW),
    ],
)
def test_options_select_the_optimizer(command, passes, base):
    options = parse(command.split())
    optimizer = create_optimizer(torch.nn.Linear(2, 2), options)

    assert optimizer.passes == passes
    assert type(optimizer.base_optimizer) is base
    assert optimizer.param_groups[0]["lr"] == options.lr
    assert optimizer.param_groups[0]["rho"] == (options.rho if passes > 1 else 0)


def test_the_moving_average_is_evaluated(crsam_train, here):
    assert crsam_train("--model mlp --epochs 1 --ema 0.99 --output out") == 0

    last = torch.load(here / "out" / "last.pt", weights_only=True)
    best = torch.load(here / "out" / "best.pt", weights_only=True)
    assert all(best["model"][name].equal(weights) for name, weights in last["ema"].items())
    assert not last["ema"]["1.weight"].equal(last["model"]["1.weight"])


def test_bfloat16_and_label_smoothing_take_effect(crsam_train, here, finished, read_log):
    for output, options in (("amp", "--amp"), ("smooth", "--label-smoothing 0.1")):
        assert crsam_train(f"--model mlp --epochs 1 --output {output} {options}") == 0
    plain, amp, smooth = (float(read_log(path)[0]["train_loss"]) for path in (finished, here / "amp", here / "smooth"))

    assert amp != plain
    assert amp == pytest.approx(plain, rel=0.05)
    assert smooth > plain + 0.005
    weights = torch.load(here / "amp" / "last.pt", weights_only=True)["model"]
    assert weights["1.weight"].dtype == torch.float32


def test_cifar_trains(crsam_train, here, cifar10, read_log):
    assert crsam_train(f"--data cifar10:{cifar10} --model mlp --epochs 1 --batch-size 32 --workers 0") == 0
    assert len(read_log(here / "runs" / "cifar10-mlp-crsam-seed0")) == 1


def test_image_folder_trains_with_workers_and_augmentation(crsam_train, here, image_folder, read_log):
    shutil.copytree(image_folder / "train" / "ape", image_folder / "val" / "ape")
    command = f"--data folder:{image_folder} --model test_resnet --image-size 32 --batch-size 8 --epochs 1 --workers 1"
    assert crsam_train(f"{command} --auto-augment rand-m5 --mixup 0.2") == 0
    assert len(read_log(here / "runs" / "folder-test_resnet-crsam-seed0")) == 1


def test_overwrite_replaces_a_run_and_leaves_other_files(crsam_train, here, finished, read_log):
    shutil.copytree(finished, here / "out")
    (here / "out" / "notes.txt").write_text("mine")
    assert crsam_train("--model mlp --lr 0.01 --epochs 1 --output out --overwrite") == 0

    assert len(read_log(here / "out")) == 1
    assert float(read_log(here / "out", "steps.csv")[0]["lr"]) < 0.01
    assert {path.name for path in (here / "out").iterdir()} == RESULTS | {"notes.txt"}


def test_the_host_does_not_wait_for_the_device_between_log_lines(crsam_train, monkeypatch):
    """No Python code of a step reads a number from the device. On a CPU, the optimizer itself may."""
    from crsam_ext import CRSAM
    from crsam_ext.training.loop import Training
    from crsam_ext.training.steps import Objective

    fetched, inside = [], [False]

    def watched(name):
        original = getattr(torch.Tensor, name)

        def fetch(tensor, *args, **kwargs):
            if inside[0]:
                fetched.append(name)
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, fetch)

    def within(owner, name, value):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            before, inside[0] = inside[0], value
            try:
                return original(*args, **kwargs)
            finally:
                inside[0] = before

        monkeypatch.setattr(owner, name, call)

    for name in ("item", "__bool__", "__float__", "__int__", "__index__", "cpu", "tolist", "numpy", "nonzero"):
        watched(name)
    within(Training, "take", True)
    within(CRSAM, "step", False)
    within(Objective, "forward", True)
    command = "--model cnn --epochs 1 --ema 0.9 --mixup 0.1 --max-grad-norm 1 --rho-schedule proportional --output out"
    assert crsam_train(command) == 0
    assert fetched == []

    within(Training, "_counters", True)  # this one does read a number, so the check works
    assert crsam_train(f"{command} --overwrite") == 0
    assert fetched != []
