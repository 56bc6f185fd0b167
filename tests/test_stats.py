"""Statistics for a quadratic function, whose curvature is known."""

import pytest
import torch
from torch.nn import Parameter

from crsam_ext import CRSAM, GradScaler

from .reference import EXACT, assert_close

ALWAYS = {"max_regularizer_ratio": 1e9}  # a cap that never applies, but needs the Gram matrix


def after_a_step(device, scaled=False, **options):
    """Minimize L = w.Hw / 2 over two parameters, in two groups with their own rho; return stats, H, g0 and e."""
    torch.manual_seed(0)
    w = torch.randn(7, dtype=torch.float64)
    a = torch.randn(7, 7, dtype=torch.float64)
    hessian = (a @ a.T).to(device)
    params = [Parameter(w[:3].to(device, copy=True)), Parameter(w[3:].to(device, copy=True))]
    groups = [{"params": params[:1]}, {"params": params[1:], "rho": 0.3}]
    optimizer = CRSAM(groups, lr=1e-3, alpha=0.4, beta=0.2, rho=0.1, **options)
    scaler = GradScaler(torch.device(device).type, init_scale=2.0**10, enabled=scaled)

    def closure():
        x = torch.cat(params)
        loss = x @ hessian @ x / 2
        scaler.scale(loss).backward()
        return loss

    scaler.step(optimizer, closure)
    g = hessian @ w.to(device)
    e = torch.cat([0.1 * g[:3], 0.3 * g[3:]]) / g.norm()
    return optimizer.stats, hessian, g, e


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_curvature_is_exact(scaled, backend_options, device):
    stats, hessian, g, e = after_a_step(device, scaled, **ALWAYS, **backend_options)
    along = e @ hessian @ e / (e @ e)
    # from differences, which are smaller than the gradients
    assert_close(stats.directional_curvature, along, 1e3 * EXACT)
    assert_close(stats.grad_norm, g.norm(), EXACT)
    assert_close(stats.normalized_curvature, along / g.norm(), 1e3 * EXACT)
    regularized = g + hessian @ e + 0.2 * 2 * hessian @ e  # d2 is 0, d1 = 2 H e
    assert_close(stats.regularized_norm, regularized.norm(), EXACT)


def test_curvature_is_computed_on_demand(backend_options, device):
    """The torch backend computes it on demand, other backends always."""
    stats, *_ = after_a_step(device, **backend_options)
    assert (stats.directional_curvature is None) == (backend_options["backend"] == "torch")


def test_adaptive_perturbation_has_no_curvature(backend_options, device):
    stats, *_ = after_a_step(device, adaptive=True, **ALWAYS, **backend_options)
    assert stats.directional_curvature is stats.normalized_curvature is None
    assert stats.regularized_norm > 0


def test_statistics_are_none_before_the_first_step():
    stats = CRSAM([Parameter(torch.ones(1))], lr=1.0).stats
    assert stats.directional_curvature is stats.regularized_norm is stats.grad_norm is None
