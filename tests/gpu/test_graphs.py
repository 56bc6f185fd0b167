"""Steps replayed from a CUDA graph equal eager steps, bit for bit."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from crsam_ext import CRSAM, GraphedStep, Scheduled

pytestmark = pytest.mark.require_cuda

STEPS = 10


def train(fused, graphed, base=torch.optim.SGD, bad_step=None, **options):
    torch.manual_seed(0)
    layers = (nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 5))
    model = nn.Sequential(*layers).cuda()
    optimizer = CRSAM(model.parameters(), base, lr=0.05, rho=0.1, backend=fused, model=model, **options)
    schedulers = [
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        torch.optim.lr_scheduler.LinearLR(Scheduled(optimizer, "rho"), total_iters=STEPS),
    ]
    x, y = torch.empty(32, 20, device="cuda"), torch.empty(32, dtype=torch.long, device="cuda")

    def closure():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    step = GraphedStep(optimizer, closure) if graphed else lambda: optimizer.step(closure)
    losses = []
    for index in range(STEPS):
        x.copy_(torch.randn(32, 20) * (torch.nan if index == bad_step else 1.0))
        y.copy_(torch.randint(5, (32,)))
        losses.append(step().detach().clone())
        for scheduler in schedulers:
            scheduler.step()
    return copy.deepcopy(model.state_dict()), torch.stack(losses), torch.cuda.get_rng_state(), optimizer.stats.as_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"base": torch.optim.AdamW},
        {"regularizer": "log", "max_grad_norm": 0.5},
        {"momentum": 0.9, "interval": 2},
        {"momentum": 0.9, "interval": 2, "reuse": True},
        {"base": torch.optim.AdamW, "interval": 2, "reuse": True, "max_grad_norm": 0.5},
        {"momentum": 0.9, "curvature_interval": 2},
        {"momentum": 0.9, "bad_step": STEPS - 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_graphed_steps_equal_eager_steps(fused, options):
    """This includes dropout masks, running statistics, schedules, skipped steps and statistics."""
    weights, losses, random, stats = train(fused, False, **options)
    graphed_weights, graphed_losses, graphed_random, graphed_stats = train(fused, True, **options)
    # The running statistics of a batch with NaN are NaN.
    torch.testing.assert_close(weights, graphed_weights, rtol=0, atol=0, equal_nan=True)
    assert all(w.isfinite().all() for name, w in weights.items() if "running" not in name)
    torch.testing.assert_close(losses, graphed_losses, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(random, graphed_random)
    assert str(stats) == str(graphed_stats)  # NaN is not equal to itself


ZEROS = {
    "alpha": ({"alpha": 0.0}, {}),
    "beta": ({"beta": 0.0}, {"beta": 0.3}),
    "rho": ({"rho": 0.0}, {"rho": 0.2}),
    "lr": ({"lr": 0.0}, {"lr": 0.1}),
    "one-pass": ({"alpha": 0.0, "beta": 0.0}, {"alpha": 0.0, "beta": 0.0}),
    "maximize": ({"maximize": True, "alpha": 0.0}, {}),
}


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("groups", ZEROS.values(), ids=ZEROS)
def test_options_may_be_zero_in_one_group(groups, base, fused):
    """A captured step copies no number from the host if only some groups have a tensor for an option. Schedules
    may reach 0 and leave it."""
    trained = []
    for graphed in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(n, device="cuda")) for n in (5, 700)]
        given = [{"params": [p]} | dict(options) for p, options in zip(params, groups, strict=True)]
        optimizer = CRSAM(given, base, lr=0.05, rho=0.1, backend=fused)

        def closure(params=params):
            loss = sum(p.sin().square().mean() for p in params)
            loss.backward()
            return loss

        step = GraphedStep(optimizer, closure) if graphed else lambda o=optimizer, c=closure: o.step(c)
        for index in range(STEPS):
            step()
            if index == STEPS // 2:  # some options become 0, others nonzero
                for group in optimizer.param_groups:
                    for name in ("alpha", "rho"):
                        value = group[name].item() if isinstance(group[name], torch.Tensor) else group[name]
                        group[name] = 0.0 if value else 0.15
        trained.append([p.detach().clone() for p in params])
    for p, q in zip(*trained, strict=True):
        assert p.isfinite().all()
        assert torch.equal(p, q)


def test_draws_between_replays_do_not_change_the_masks(fused):
    """The passes of a step draw the same masks, also after other draws from the generator. The loss contains no
    parameters, so its three values are the same noise."""
    weight = nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = CRSAM([weight], lr=0.0, rho=0.1, backend=fused)

    def closure():
        loss = 0 * weight.sum() + torch.rand((), device="cuda")
        loss.backward()
        return loss

    step, seen = GraphedStep(optimizer, closure, warmup=1), []
    for _ in range(6):
        step()
        stats = optimizer.stats.as_dict()
        assert stats["loss"] == stats["loss_ascent"] == stats["loss_descent"]
        seen.append(stats["loss"])
        torch.rand(5, device="cuda")
    assert len(set(seen)) == 6


def test_steps_that_cannot_be_captured_are_refused():
    weight = nn.Parameter(torch.ones(3, device="cuda"))
    for options, why in (
        ({"backend": "torch"}, "backend 'torch' reads numbers on the host"),
        ({"base_optimizer": torch.optim.RMSprop}, "the host decides whether RMSprop takes its step"),
    ):
        with pytest.raises(ValueError, match=why):
            GraphedStep(CRSAM([weight], lr=0.1, **options), lambda: None)
