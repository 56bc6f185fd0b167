"""Random numbers of a step: every pass draws the same ones from each global generator."""

import random
import sys

import numpy as np
import pytest
import torch

from crsam_ext import CRSAM

pytestmark = pytest.mark.on_cpu

DRAWS = {
    "torch": lambda: torch.rand(16),
    "numpy": lambda: torch.from_numpy(np.random.rand(16)),
    "numpy-gauss": lambda: torch.tensor([np.random.normal() for _ in range(15)] + [0.0]),  # stores one for later
    "random": lambda: torch.tensor([random.random() for _ in range(16)]),
    "random-gauss": lambda: torch.tensor([random.gauss(0, 1) for _ in range(15)] + [0.0]),
}
# A single number: the second of two normal variates is stored for later.
ONE = {
    "torch": lambda: torch.rand(()).item(),
    "numpy": np.random.rand,
    "numpy-gauss": np.random.normal,
    "random": random.random,
    "random-gauss": lambda: random.gauss(0, 1),
}
draws = pytest.mark.parametrize("draw", DRAWS)


def steps(draw, backend_options, passes=3, count=2, **options):
    """Return the numbers drawn in each pass of some steps."""
    param = torch.nn.Parameter(torch.linspace(-1, 1, 16))
    weights = {"alpha": 0, "beta": 0} if passes == 2 else {"rho": 0} if passes == 1 else {}
    optimizer, drawn = CRSAM([param], lr=0.1, **weights, **options, **backend_options), []

    def closure():
        drawn.append(DRAWS[draw]().tolist())
        (param * torch.tensor(drawn[-1])).square().sum().backward()

    for _ in range(count):
        optimizer.step(closure)
    return drawn


@draws
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_all_passes_draw_the_same_numbers(passes, draw, backend_options, device):
    """The next step continues as if there had been one pass."""
    drawn = steps(draw, backend_options, passes)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    expected = [DRAWS[draw]().tolist() for _ in range(2)]
    assert drawn == [expected[0]] * passes + [expected[1]] * passes
    after = [DRAWS[draw]().tolist()]
    assert after[0] not in expected


@draws
def test_without_replay_passes_draw_different_numbers(draw):
    """Without this, the test above could pass because all draws are equal."""
    first, second, third = steps(draw, {"backend": "torch"}, count=1, replay_rng=False)
    assert first != second != third != first


@draws
def test_an_error_does_not_restore_the_generators(draw):
    """torch's optimizers do not either: the purpose of the draws is unknown."""
    param = torch.nn.Parameter(torch.ones(16))
    optimizer = CRSAM([param], lr=0.1)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: (DRAWS[draw](), 1 / 0))
    expected = DRAWS[draw]()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    DRAWS[draw]()
    assert torch.equal(expected, DRAWS[draw]())


def test_another_bit_generator_of_numpy_is_replayed():
    """numpy.random may use another generator than Mersenne Twister."""
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        drawn = steps("numpy", {"backend": "torch"}, count=1)
    finally:
        np.random.set_bit_generator(before)
    assert drawn[0] == drawn[1] == drawn[2]


@draws
@pytest.mark.parametrize("skip", [0, 1])
def test_draws_between_steps_are_noticed(skip, draw):
    """A state is only read if it has changed, so draws between two steps must be detected."""
    param, seen = torch.nn.Parameter(torch.ones(16)), []
    optimizer = CRSAM([param], lr=0.1)

    def closure():
        seen.append(ONE[draw]())
        param.square().sum().backward()

    for step in range(4):
        for _ in range(skip + step % 2):
            ONE[draw]()
        optimizer.step(closure)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    expected = []
    for step in range(4):
        for _ in range(skip + step % 2):
            ONE[draw]()
        expected += [ONE[draw]()] * 3
    assert seen == expected


def test_numpy_random_may_be_imported_within_a_step(monkeypatch):
    """The generators to replay are those that exist at the start of the step."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = CRSAM([param], lr=0.1)
    monkeypatch.delitem(sys.modules, "numpy.random")

    def closure():
        monkeypatch.setitem(sys.modules, "numpy.random", np.random)
        param.square().sum().backward()

    optimizer.step(closure)
    optimizer.step(closure)
    assert optimizer.stats.steps == 2
