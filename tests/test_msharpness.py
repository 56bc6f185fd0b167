"""A list of closures with a separate perturbation for each micro-batch (m-sharpness)."""

import pytest
import torch

from crsam_ext import CRSAM, GradScaler

from .reference import EXACT, assert_close, batch, network_loss, network_params

PARTS = 3


def problem(base=torch.optim.SGD, dtype=torch.float64, device="cpu", **options):
    torch.manual_seed(0)
    params, (x, y) = network_params(dtype, device), batch(dtype, device)
    parts = list(zip(x.chunk(PARTS), y.chunk(PARTS), strict=True))
    return params, CRSAM(params, base, lr=0.1, **options), parts


def closure_of(params, part, scale=lambda loss: loss):
    def closure():
        loss = network_loss(params, part) / PARTS
        scale(loss).backward()
        return loss

    return closure


@pytest.mark.parametrize("options", [{}, {"alpha": 0.0, "beta": 0.0}, {"regularizer": "log"}, {"adaptive": True}])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_the_step_uses_the_sum_of_regularized_gradients(options, base, backend_options, device):
    options = {"rho": 0.1, **options}
    params, optimizer, parts = problem(base, device=device, **options, **backend_options)
    others, plain, _ = problem(base, device=device, rho=0.0, **backend_options)
    for step in range(3):
        loss = optimizer.step([closure_of(params, part) for part in parts], sync_perturbation=False)
        total, losses = [torch.zeros_like(p) for p in others], 0.0
        for part in parts:
            twins = [p.detach().clone().requires_grad_() for p in others]
            alone = CRSAM(twins, lr=0.0, **options, **backend_options)
            closure = closure_of(twins, part)
            losses += closure().detach()
            alone.first_step(zero_grad=True)
            for call in (alone.second_step,) * (alone.passes - 2):
                closure(), call(zero_grad=True)
            closure(), alone.combine()
            total = [t + twin.grad for t, twin in zip(total, twins, strict=True)]
        for param, g in zip(others, total, strict=True):
            param.grad = g
        plain.step()
        assert optimizer.stats.steps == step + 1
        assert_close(loss, losses, EXACT)
        for p, q in zip(params, others, strict=True):
            assert_close(p, q, EXACT)


def test_one_step_is_counted_and_measured():
    params, optimizer, parts = problem(max_grad_norm=0.01)
    loss = optimizer.step([closure_of(params, part) for part in parts], sync_perturbation=False)
    stats = optimizer.stats.as_dict()
    assert (stats["steps"], stats["skipped"], stats["loss"]) == (1, 0, float(loss))
    assert stats["grad_norm"] is None
    assert stats["clip_factor"] == pytest.approx(0.01 / stats["regularized_norm"], rel=1e-3)


@pytest.mark.parametrize("index", range(3 * PARTS))
def test_a_nonfinite_gradient_skips_the_step(index):
    """It may occur in any pass of any micro-batch; the step is skipped and counted once."""
    params, optimizer, parts = problem()
    before, calls = [p.detach().clone() for p in params], []
    params[0].register_hook(lambda g: g * torch.nan if len(calls) == index else g)

    def counted(closure):
        def call():
            loss = closure()
            calls.append(0)
            return loss

        return call

    optimizer.step([counted(closure_of(params, part)) for part in parts], sync_perturbation=False)
    assert optimizer.stats.skipped == 1
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


@pytest.mark.parametrize("regularizer", ["linear", "log"])
def test_grad_scaler_does_not_change_the_step(regularizer):
    params, optimizer, parts = problem(regularizer=regularizer)
    others, scaled, _ = problem(regularizer=regularizer)
    scaler = GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):
        optimizer.step([closure_of(params, part) for part in parts], sync_perturbation=False)
        closures = [closure_of(others, part, scaler.scale) for part in parts]
        scaler.step(scaled, closures, sync_perturbation=False)
        scaler.update()
    for p, q in zip(params, others, strict=True):
        assert_close(p, q, EXACT)


def test_an_exception_restores_w():
    params, optimizer, parts = problem()
    before = [p.detach().clone() for p in params]
    calls = []

    def failing():
        calls.append(0)
        if len(calls) == 3:
            raise MemoryError
        return closure_of(params, parts[1])()

    with pytest.raises(MemoryError):
        optimizer.step([closure_of(params, parts[0]), failing], sync_perturbation=False)
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    optimizer.step([closure_of(params, part) for part in parts], sync_perturbation=False)


def test_invalid_combinations_are_refused():
    params, optimizer, parts = problem(curvature_interval=2)
    closures = [closure_of(params, part) for part in parts]
    with pytest.raises(ValueError, match="curvature_interval"):
        optimizer.step(closures, sync_perturbation=False)
    with pytest.raises(TypeError, match="a list of closures"):
        optimizer.step(closures[0], sync_perturbation=False)


def test_a_step_of_one_pass_equals_accumulation():
    params, optimizer, parts = problem(rho=0.0)
    others, plain, _ = problem(rho=0.0)
    optimizer.step([closure_of(params, part) for part in parts], sync_perturbation=False)
    plain.step([closure_of(others, part) for part in parts])
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
