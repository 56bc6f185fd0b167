"""Steps with fewer passes: interval and curvature_interval."""

import copy

import pytest
import torch

from crsam_ext import CRSAM

from .reference import batch, closure_of, network_loss, network_params, run_three_calls

PASSES = {
    (1, 1): [3] * 6,
    (2, 1): [3, 1, 3, 1, 3, 1],
    (1, 2): [3, 2, 3, 2, 3, 2],
    (1, 3): [3, 2, 2, 3, 2, 2],
    (2, 2): [3, 1, 2, 1, 3, 1],
}
intervals = pytest.mark.parametrize(("interval", "curvature_interval"), PASSES)


def problem(backend_options=None, device="cpu", **options):
    torch.manual_seed(0)
    params, data = network_params(torch.float64, device), batch(torch.float64, device)
    optimizer = CRSAM(params, lr=0.1, momentum=0.9, **options, **(backend_options or {}))
    return params, optimizer, closure_of(lambda p: network_loss(p, data), params)


@intervals
def test_passes(interval, curvature_interval, backend_options, device):
    """The steps between are, to the bit, those of rho = 0 and of alpha = beta = 0."""
    params, optimizer, closure = problem(
        backend_options, device, interval=interval, curvature_interval=curvature_interval
    )
    others, by_hand, closure_by_hand = problem(backend_options, device)
    group = by_hand.param_groups[0]
    given = {name: group[name] for name in ("rho", "alpha", "beta")}
    for passes in PASSES[interval, curvature_interval]:
        assert optimizer.passes == passes
        calls = 0

        def counting():
            nonlocal calls
            calls += 1
            return closure()

        optimizer.step(counting)
        assert calls == passes
        group.update(given)
        group.update({3: {}, 2: {"alpha": 0, "beta": 0}, 1: {"rho": 0}}[passes])
        by_hand.step(closure_by_hand)
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_calls():
    """The form of calls asks the optimizer how many there are."""
    params, optimizer, closure = problem(curvature_interval=2)
    others, by_closure, closure_of_others = problem(curvature_interval=2)
    for passes in (3, 2, 3):
        assert optimizer.passes == passes
        run_three_calls(optimizer, lambda _: closure(), calls=optimizer.passes)
        by_closure.step(closure_of_others)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("copied", ["state_dict", "deepcopy"])
def test_resume(copied):
    """A checkpoint knows which step is the next."""
    options = {"interval": 2, "curvature_interval": 2}
    params, optimizer, closure = problem(**options)
    for _ in range(3):
        optimizer.step(closure)
    if copied == "deepcopy":
        assert copy.deepcopy(optimizer).passes == optimizer.passes == 1
        return
    others, resumed, closure_of_others = problem(**options)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(4):
        assert resumed.passes == optimizer.passes
        optimizer.step(closure)
        resumed.step(closure_of_others)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("name", ["interval", "curvature_interval"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_values_without_sense(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
        problem(**{name: value})
