"""The tests of every backend with interpreted Triton kernels, in a separate process with TRITON_INTERPRET=1.

The variable must be set when kernels are defined; other tests need them compiled. An interpreted step of a
small network takes half a second, so this file runs all tests of single operators, and of the others those
that call operators in distinct ways. It omits other base optimizers, options and dtypes of the same tests,
which only differ in Python, and training a network. Run all tests in about half an hour with

    TRITON_INTERPRET=1 python -m pytest -k triton_interpreted --ignore tests/test_triton_interpreted.py
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import missing

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
OPTIMIZER = (
    "points_of_the_passes",
    "low_precision",
    "terms_without_a_logarithm",
    "two_groups and adamw-log-everything",
    "test_bad_gradient and linear-momentum and nan",  # skipped steps
    "several_dtypes",
    "tensor_learning_rate",
    "empty_and_scalar_parameters",
    "gradient_in_some_passes and momentum",
    "momentum_that_is_switched",
    "scale_cancels and clip-sgd",
    "scale_cancels and log-sgd",
    "overflow_skips_the_step and 2-closure-log-sgd",
)
PARTS = {
    # Files, an expression that selects tests, and the number of selected tests.
    "operators": (["test_ops.py"], "triton_interpreted", 246),
    "triton_operators": (["test_triton_operators.py"], "", 98),
    "trajectories": (
        ["test_golden.py"],
        "given_gradients and triton_interpreted and float32 and (adamw or momentum)",
        4,
    ),
    "optimizer": (
        ["test_optimizer.py", "test_invariants.py", "test_hard_inputs.py", "test_amp.py"],
        f"triton_interpreted and ({' or '.join(f'({name})' for name in OPTIMIZER)})",
        35,
    ),
    "reuse": (
        ["test_reuse.py"],
        "triton_interpreted and (test_formula and (linear-sgd or clipped-adamw or asam-sgd or sam-radam)"
        " or test_dtypes and sgd-bfloat16 or scale_that_changes and closure-clipped or that_is_skipped and sgd)",
        9,
    ),
    "rows_in_place": (
        ["test_rows_in_place.py"],
        "triton_interpreted and trained_in_place and 0.5 and float32 and sgd and (twin or columns)",
        2,
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_interpreted_kernels_pass(part):
    if importlib.util.find_spec("triton") is None:
        missing("Triton was not found")
    files, chosen, count = PARTS[part]
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-k", chosen, *(f"tests/{file}" for file in files)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = {outcome: int(n) for n, outcome in re.findall(r"(\d+) (passed|skipped)", done.stdout)}
    assert outcomes.get("passed", 0) + outcomes.get("skipped", 0) == count, done.stdout
    assert outcomes.get("skipped", 0) <= 1, done.stdout  # in test_ops.py, an interrupt in the middle of a launch
