"""The programs in examples/ run, learn and print the expected output; an example whose library is missing is
skipped."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # other libraries' warnings are not errors
]

NEEDS = {
    "digits": ["sklearn"],
    "ddp_digits": ["sklearn"],
    "fully_shard_digits": ["sklearn"],
    "tensor_parallel_digits": ["sklearn"],
    "lightning_digits": ["lightning", "sklearn"],
    "accelerate_digits": ["accelerate", "sklearn"],
    "transformers_digits": ["accelerate", "sklearn", "transformers"],
    "timm_digits": ["sklearn", "tensorboard", "timm", "torchmetrics"],
}


def load(name):
    """Return the example as a module, or skip the test."""
    for library in NEEDS[name]:
        pytest.importorskip(library)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def forget_accelerator():
    """Reset Accelerate, which keeps its first settings for the whole process."""
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


def accuracy(capsys):
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("test accuracy ")
    return float(last.split()[-1].rstrip("%"))


def test_all_examples_are_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == NEEDS.keys()


@pytest.mark.parametrize(
    ("name", "percent", "processes"),
    [
        ("ddp_digits", 95, 2),
        ("fully_shard_digits", 95, 2),
        ("tensor_parallel_digits", 95, 4),
        ("accelerate_digits", 80, 2),
    ],
)
def test_examples_run_in_several_processes(name, percent, processes):
    """The commands are those in the examples' docstrings."""
    load(name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, EXAMPLES / f"{name}.py"], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = done.stdout.splitlines()
    assert float(line.removeprefix("test accuracy ").rstrip("%")) > percent


def test_digits_example_runs(capsys):
    pytest.importorskip("sklearn")
    runpy.run_path(str(EXAMPLES / "digits.py"))
    assert accuracy(capsys) > 95


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_lightning_example_runs(precision, capsys):
    trainer, model = load("lightning_digits").main(precision, epochs=4)
    assert accuracy(capsys) > 93
    steps = 4 * (1438 // 64)
    assert trainer.global_step == steps
    assert model.optimizers().stats.steps == steps // 2, "the second Trainer took half of the steps"
    assert trainer.callback_metrics["crsam/grad_norm"] > 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_example_runs(precision, capsys):
    model, optimizer = load("accelerate_digits").main(precision, epochs=6)
    assert accuracy(capsys) > 85
    assert optimizer.stats.steps == 6 * -(-1438 // 64)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_transformers_example_runs(capsys):
    trainer = load("transformers_digits").main(epochs=2, disable_tqdm=True)
    assert accuracy(capsys) > 80
    assert trainer.state.global_step == trainer.optimizer.optimizer.stats.steps == 2 * -(-1438 // 64)


def test_transformers_example_runs_in_bfloat16():
    """It runs only a few steps, because bfloat16 is slow on some CPUs."""
    trainer = load("transformers_digits").main(bf16=True, max_steps=3, disable_tqdm=True)
    assert trainer.optimizer.optimizer.stats.as_dict()["steps"] == 3
    assert trainer.optimizer.optimizer.stats.skipped == 0


def test_transformers_example_resumes(tmp_path):
    """It resumes after two of three epochs from the Trainer's checkpoint, to the same bits."""
    example = load("transformers_digits")
    straight = example.main(epochs=3, folder=tmp_path, disable_tqdm=True)
    checkpoint = tmp_path / "checkpoint-46"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["epoch"] == 2
    resumed = example.main(epochs=3, folder=tmp_path / "resumed", resume=str(checkpoint), disable_tqdm=True)
    for p, q in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_timm_example_runs(tmp_path, capsys):
    model, average, optimizer = load("timm_digits").main(epochs=3, folder=tmp_path)
    assert accuracy(capsys) > 85
    assert optimizer.stats.steps == 3 * -(-1437 // 64)
    assert list(tmp_path.glob("events.*"))
    assert not torch.equal(next(model.parameters()), next(average.module.parameters()))
