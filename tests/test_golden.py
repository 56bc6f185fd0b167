"""Repeat the trajectories in tests/golden through the public API; the README there describes the arrays.

Tolerance. One step rounds a parameter, and each term of its update, at most 20 times: the gradients on entry (1), the
two differences (3), their weights (2), their sum (2), weight decay (2), momentum or the two moments (4), nesterov or
the denominator (4), learning rate (1), the parameter itself (1). No rounding exceeds u = eps/2 times the largest norm
that the tensor reaches, so after T steps the error stays below 20 T u times that norm. That is 1e-13 at worst in
float64 and 5e-5 in float32; errors of random sign add up to far less, 7 u in these files.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from crsam_ext import CRSAM

GOLDEN = Path(__file__).parent / "golden"
GIVEN_GRADIENTS = [
    "crsam_sgd_plain",
    "crsam_sgd_momentum",
    "crsam_sgd_nesterov",
    "crsam_adamw",
    "sam_sgd_momentum",
    "asam_sgd_momentum",
]
BASE = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
ROUNDINGS_PER_STEP = 20

float32_and_float64 = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


class Trajectory:
    """One golden file as tensors of one dtype on one device."""

    def __init__(self, name, dtype, device):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            self.arrays = dict(arrays)
        self.config = json.loads(str(self.arrays["config"]))
        self.steps = self.config["steps"]
        self.dtype, self.device = dtype, device
        self.params = [torch.nn.Parameter(w) for w in self.tensors("w0")]
        self.tolerance = ROUNDINGS_PER_STEP * self.steps * torch.finfo(dtype).eps / 2

    def optimizer(self, backend, compile=False):
        return CRSAM(
            self.params,
            BASE[self.config["base"]],
            rho=self.config["rho"],
            alpha=self.config.get("gamma", 0.0),
            beta=self.config.get("beta", 0.0),
            adaptive=self.config.get("adaptive", False),
            backend=backend,
            compile=compile,
            **self.config["base_kwargs"],
        )

    def tensor(self, name):
        return torch.tensor(self.arrays[name], dtype=self.dtype, device=self.device)

    def tensors(self, name):
        return [self.tensor(f"{name}_{i}") for i in range(sum(key.startswith("w0_") for key in self.arrays))]

    def largest_norm(self, i):
        """Return the scale of tensor i: its largest norm among all recorded points."""
        points = [key for key in self.arrays if key.startswith(("w0_", "w_", "ascent_")) and key.endswith(f"_{i}")]
        return max(np.linalg.norm(self.arrays[key]) for key in points)

    def set_gradients(self, name):
        for param, grad in zip(self.params, self.tensors(name), strict=True):
            param.grad = grad

    def assert_close(self, actual, name, scale=None):
        expected = self.arrays[name]
        error = np.linalg.norm(actual.detach().double().cpu().numpy() - expected)
        scale = np.linalg.norm(expected) if scale is None else scale
        assert error <= self.tolerance * scale, f"{name}: off by {error / scale:.1e}, allowed {self.tolerance:.1e}"

    def assert_params(self, name):
        for i, param in enumerate(self.params):
            self.assert_close(param, f"{name}_{i}", self.largest_norm(i))

    def assert_state(self, optimizer):
        expected = {key for key in self.arrays if key.startswith("state_")}
        actual = {
            f"state_{name}_{i}": value
            for i, param in enumerate(self.params)
            for name, value in optimizer.state[param].items()
            if value is not None
        }
        assert actual.keys() == expected
        for name, value in actual.items():
            self.assert_close(value, name)


def repeat_given_gradients(trajectory, optimizer):
    second_pass_updates = trajectory.config["kind"] == "sam"
    for step in range(trajectory.steps):
        trajectory.set_gradients(f"g0_{step}")
        optimizer.first_step()
        trajectory.assert_params(f"ascent_{step}")
        trajectory.set_gradients(f"g1_{step}")
        optimizer.second_step()
        if not second_pass_updates:
            trajectory.set_gradients(f"g2_{step}")
            optimizer.third_step()
        trajectory.assert_params(f"w_{step + 1}")
    trajectory.assert_state(optimizer)


@float32_and_float64
@pytest.mark.parametrize("name", GIVEN_GRADIENTS)
def test_given_gradients_repeat_the_trajectory(name, dtype, backend, device):
    trajectory = Trajectory(name, dtype, device)
    repeat_given_gradients(trajectory, trajectory.optimizer(backend))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("crsam_sgd_momentum", torch.float32), ("crsam_adamw", torch.float64)],
    ids=["crsam_sgd_momentum-float32", "crsam_adamw-float64"],
)
def test_given_gradients_repeat_the_trajectory_in_compiled_steps(name, dtype):
    trajectory = Trajectory(name, dtype, torch.device("cpu"))
    repeat_given_gradients(trajectory, trajectory.optimizer("torch", compile=True))


@float32_and_float64
def test_network_repeats_the_trajectory(dtype, backend, device):
    trajectory = Trajectory("crsam_mlp", dtype, device)
    optimizer = trajectory.optimizer(backend)
    w0, b0, w1, b1 = trajectory.params
    inputs, targets = trajectory.tensor("X"), trajectory.tensor("y").long()
    losses = []

    def closure():
        logits = torch.tanh(inputs @ w0.T + b0) @ w1.T + b1
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        losses.append(loss.detach())
        return loss

    returned = [optimizer.step(closure).detach() for _ in range(trajectory.steps)]

    trajectory.assert_close(torch.stack(losses).reshape(-1, 3), "losses")
    assert torch.equal(torch.stack(returned), torch.stack(losses[::3]))
    trajectory.assert_params(f"w_{trajectory.steps}")
