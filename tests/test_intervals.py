"""Steps with fewer passes: interval and curvature_interval."""

import copy

import pytest
import torch

from crsam_ext import CRSAM, GradScaler

from .reference import EXACT, assert_close, batch, closure_of, network_loss, network_params, run_three_calls

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
def test_steps_take_the_passes_of_their_intervals(interval, curvature_interval, backend_options, device):
    """Steps without a perturbation equal those with rho = 0; others may construct the third gradient from the last
    d2."""
    params, optimizer, closure = problem(
        backend_options, device, interval=interval, curvature_interval=curvature_interval
    )
    others, by_hand, closure_by_hand = problem(backend_options, device)
    group, d2 = by_hand.param_groups[0], None
    for passes in PASSES[interval, curvature_interval]:
        assert optimizer.passes == passes
        calls = []
        optimizer.step(lambda calls=calls: calls.append(0) or closure())
        assert len(calls) == passes
        group["rho"] = 0 if passes == 1 else 0.1
        seen = []

        def collecting(passes=passes, seen=seen, d2=d2):
            if passes == 2 and len(seen) == 2:
                for p, g0, gp, d in zip(others, *seen, d2, strict=True):
                    p.grad = 2 * g0 - gp + d
            else:
                closure_by_hand()
                seen.append([p.grad.clone() for p in others])

        by_hand.step(collecting)
        if passes == 3:
            d2 = [gp + gm - 2 * g0 for g0, gp, gm in zip(*seen, strict=True)]
        for p, q in zip(params, others, strict=True):
            assert_close(p, q, EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extrapolated_gradient_of_a_quadratic_function_is_exact(dtype):
    """d2 is 0, so nothing is lost; it is stored in the compute dtype."""
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=dtype))
    optimizer = CRSAM([param], lr=0.0625, rho=0.5, curvature_interval=2)
    twin = torch.nn.Parameter(param.detach().clone())
    every = CRSAM([twin], lr=0.0625, rho=0.5)
    for _ in range(4):
        optimizer.step(closure_of(lambda p: (p[0] ** 2).sum(), [param]))
        every.step(closure_of(lambda p: (p[0] ** 2).sum(), [twin]))
    assert_close(param, twin, 1e-6 if dtype == torch.float32 else 2**-7)
    assert optimizer.state_dict()["state"][0]["second_difference"].dtype == torch.float32


def test_a_skipped_step_stores_no_difference():
    """A NaN in the third gradient skips that step, but not the following ones."""
    params, optimizer, closure = problem(curvature_interval=2)
    bad = [0, 0, 1, 0, 0, 0, 0]

    def failing():
        loss = closure()
        if bad.pop(0):
            params[0].grad.fill_(torch.nan)
        return loss

    optimizer.step(failing)
    optimizer.step(failing)
    assert optimizer.stats.skipped == 1
    assert all(p.isfinite().all() for p in params)


def test_parameters_without_a_gradient_do_not_change():
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    optimizer = CRSAM([used, unused], lr=0.1, curvature_interval=2, weight_decay=0.1)
    for _ in range(4):
        optimizer.step(closure_of(lambda p: (p[0] ** 3).sum(), [used]))
    assert torch.equal(unused, torch.ones(3))
    assert not torch.equal(used, torch.ones(2))


@pytest.mark.parametrize("form", ["closure", "calls"])
def test_a_scale_that_changes_does_not_affect_the_difference(form):
    """The difference is stored for unscaled losses."""
    params, optimizer, closure = problem(curvature_interval=2)
    others, scaled, _ = problem(curvature_interval=2)
    scaler = (GradScaler if form == "closure" else torch.amp.GradScaler)("cpu", init_scale=1024.0, growth_interval=1)
    torch.manual_seed(0)  # for the data of problem()
    _, data = network_params(torch.float64), batch(torch.float64)

    def scaled_closure():
        loss = network_loss(others, data)
        scaler.scale(loss).backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
        if form == "closure":
            scaler.step(scaled, scaled_closure)
        else:
            calls = (scaled.first_step, scaled.second_step)[: scaled.passes - 1]
            for call in calls:
                scaled_closure()
                call(zero_grad=True)
            scaled_closure()
            scaler.step(scaled)
            scaled.zero_grad()  # contains g0
        scaler.update()
    for p, q in zip(params, others, strict=True):
        assert_close(p, q, EXACT)


def test_calls_follow_the_number_of_passes():
    """With separate calls, the user reads the number of passes from the optimizer."""
    params, optimizer, closure = problem(curvature_interval=2)
    others, by_closure, closure_of_others = problem(curvature_interval=2)
    for passes in (3, 2, 3):
        assert optimizer.passes == passes
        run_three_calls(optimizer, lambda _: closure(), calls=optimizer.passes)
        by_closure.step(closure_of_others)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("copied", ["state_dict", "deepcopy"])
def test_interval_counters_resume(copied):
    """A checkpoint contains the position in the intervals."""
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


def test_the_loss_estimator_needs_every_loss():
    with pytest.raises(ValueError, match="leaves out losses"):
        problem(curvature_interval=2, regularizer="log", estimator="loss")


@pytest.mark.parametrize("name", ["interval", "curvature_interval"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_invalid_values_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
        problem(**{name: value})
