"""The benchmark of kappa's finite differences measures the right errors."""

import json

import numpy as np
import pytest
import torch

from benchmarks import finite_differences
from benchmarks.finite_differences import RHOS, errors_of, fit, good_range, modeled

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("power", [1, 2])
def test_fit_recovers_the_model(power):
    truth = [0.3, 1e-6, 1e-3]
    assert fit(RHOS, list(modeled(truth, np.array(RHOS), power)), power) == pytest.approx(truth, rel=1e-3)


def test_good_range_is_the_longest_one():
    errors = [[0.05], [0.3], [0.05], [-0.09], [0.01], [0.2]]
    assert good_range([1, 2, 3, 4, 5, 6], errors) == [3, 5]
    assert good_range([1, 2], [[0.3], [0.3]]) is None


def test_errors_of_a_smooth_network_are_truncation_errors():
    """float64 leaves only truncation: the error from gradients is twice that from losses (f''''/6 against f''''/12)."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    batch = (torch.randn(32, 4), torch.randint(3, (32,)))
    errors = errors_of(model, [batch], [0.01, 0.1], "fp64", 3.0)
    gradient, loss = (np.array(errors[name])[:, 0] for name in ("gradient", "loss"))

    assert gradient[1] / gradient[0] == pytest.approx(100, rel=0.03)
    assert gradient[1] / loss[1] == pytest.approx(2, rel=0.03)


def test_program_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(finite_differences, "NETWORKS", {"MLP, GELU": ("--data digits --model mlp", 1)})
    monkeypatch.setattr(finite_differences, "SETTINGS", [(64, 1.0)])
    monkeypatch.setattr("sys.argv", ["", "--batches", "1", "--output", str(tmp_path)])
    finite_differences.main()

    rows = json.loads((tmp_path / "finite-differences.json").read_text())["rows"]
    assert [(row["precision"], row["estimator"]) for row in rows] == [
        (precision, estimator) for precision in finite_differences.PRECISIONS for estimator in ("gradient", "loss")
    ]
    assert rows[2]["median"][8] < 0.01  # fp32, from gradients, at rho = 0.05
    assert (tmp_path / "finite-differences.md").read_text().count("MLP, GELU") == 6
    assert (tmp_path / "finite-differences.png").stat().st_size > 10_000
