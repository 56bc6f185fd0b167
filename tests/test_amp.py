"""Scaled gradients, accumulated gradients, and changes of the gradient between the passes and the step."""

import math

import pytest
import torch
from torch.nn import Parameter

from crsam_ext import CRSAM, GradScaler

from .reference import EXACT, assert_close, batch, closure_of, network_loss, network_params

SCALE = 2.0**12
SETTINGS = {
    "linear": {},
    "sam": {"alpha": 0, "beta": 0},
    "base": {"rho": 0},
    "clip": {"max_grad_norm": 0.1},
    "log": {"regularizer": "log"},
    "log-loss-asam": {"regularizer": "log", "estimator": "loss", "adaptive": True, "max_grad_norm": 0.1},
}
settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "wrapped": (torch.optim.RMSprop, {"lr": 0.01}),
}
bases = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


def scaler_of(device, cls=GradScaler):
    return cls(torch.device(device).type, init_scale=SCALE, growth_interval=1000)


class Problem:
    """A small network with optimizer and scaler; the gradient of pass ``overflow`` contains an infinity."""

    def __init__(self, base, device="cpu", scaler=None, dtype=torch.float64, **options):
        torch.manual_seed(0)
        self.params, self.data = network_params(dtype, device), batch(dtype, device)
        cls, base_options = base
        self.optimizer = CRSAM(self.params, cls, **base_options, **options)
        self.scaler, self.overflow, self.calls = scaler, None, 0

    def closure(self):
        loss = network_loss(self.params, self.data)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.calls += 1
        if self.calls == self.overflow:
            self.params[1].grad[2] = math.inf
        return loss.detach()

    def step(self):
        self.calls = 0
        if self.scaler is None:
            return self.optimizer.step(self.closure)
        loss = self.scaler.step(self.optimizer, self.closure)
        self.scaler.update()
        return loss

    def step_in_calls(self):
        """Make a step as torch's documentation does: the scaler makes the last call."""
        self.calls = 0
        calls = (self.optimizer.first_step, self.optimizer.second_step)[: self.optimizer.passes - 1]
        for call in calls:
            call(zero_grad=True, loss=self.closure())
        self.closure()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def everything(self):
        state = [v for s in self.optimizer.state.values() for _, v in sorted(s.items()) if isinstance(v, torch.Tensor)]
        return [x.detach().clone() for x in (*self.params, *state)]


# The result does not depend on the scale -----------------------------------------------------------------------------


@bases
@settings
def test_scale_cancels(settings, base, backend_options, device):
    plain = Problem(base, device, **settings, **backend_options)
    scaled = Problem(base, device, scaler_of(device), **settings, **backend_options)
    for _ in range(3):
        assert_close(scaled.step(), plain.step(), EXACT, "loss")
    for x, y in zip(scaled.everything(), plain.everything(), strict=True):
        assert_close(x, y, EXACT)
    found, expected = scaled.optimizer.stats.as_dict(), plain.optimizer.stats.as_dict()
    names = {"grad_norm", "a", "b"} | ({"kappa", "sigma"} if settings.get("regularizer") == "log" else set())
    if "max_grad_norm" in settings:
        names |= {"clip_factor"}
    else:  # the factor of the update, which unscales the gradient, exists only with a scale
        assert expected["clip_factor"] is None
        assert_close(found["clip_factor"], 1.0, EXACT)
    for name in names:
        assert_close(found[name], expected[name], 100 * EXACT, name)  # kappa loses digits to cancellation
    assert (found["regularizer_ratio"] is None) == (expected["regularizer_ratio"] is None)
    if found["regularizer_ratio"] is not None:
        assert_close(found["regularizer_ratio"], expected["regularizer_ratio"], 100 * EXACT)
    assert scaled.scaler.get_scale() == SCALE


@settings
def test_scale_cancels_with_separate_calls(settings, backend_options, device):
    if settings.get("estimator") == "loss":
        settings = settings | {"estimator": "gradient"}  # the scaler's call has no loss argument
    plain = Problem(BASES["sgd"], device, **settings, **backend_options)
    scaled = Problem(BASES["sgd"], device, scaler_of(device, torch.amp.GradScaler), **settings, **backend_options)
    for _ in range(3):
        plain.step()
        scaled.step_in_calls()
    for x, y in zip(scaled.everything(), plain.everything(), strict=True):
        assert_close(x, y, EXACT)


def test_autocast_trains_in_float16():
    """The documented recipe trains, and every pass runs in float16."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
    x = torch.randn(64, 8)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    optimizer, scaler, dtypes = CRSAM(model.parameters(), lr=0.2, momentum=0.9), GradScaler("cpu"), []

    def closure():
        with torch.autocast("cpu", torch.float16):
            logits = model(x)
            loss = torch.nn.functional.cross_entropy(logits.float(), y)
        scaler.scale(loss).backward()
        dtypes.append(logits.dtype)
        return loss

    losses = []
    for _ in range(30):
        losses.append(scaler.step(optimizer, closure).item())
        scaler.update()
    assert set(dtypes) == {torch.float16}
    assert losses[-1] < 0.3 * losses[0]


def test_disabled_scaler_changes_nothing():
    plain, scaled = (Problem(BASES["sgd"], scaler=s) for s in (None, GradScaler("cpu", enabled=False)))
    plain.step()
    scaled.step()
    assert all(torch.equal(x, y) for x, y in zip(plain.everything(), scaled.everything(), strict=True))


def test_scaler_works_with_another_optimizer():
    p, scaler = Parameter(torch.ones(3)), scaler_of("cpu")
    optimizer = torch.optim.SGD([p], lr=0.5)
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert p.tolist() == [0.5] * 3


# Overflow ------------------------------------------------------------------------------------------------------------


@bases
@pytest.mark.parametrize("settings", [SETTINGS["linear"], SETTINGS["log"]], ids=["linear", "log"])
@pytest.mark.parametrize("form", [Problem.step, Problem.step_in_calls], ids=["closure", "calls"])
@pytest.mark.parametrize("overflow", [1, 2, 3])
def test_overflow_skips_the_step_and_lowers_the_scale(overflow, form, settings, base, backend_options, device):
    cls = GradScaler if form is Problem.step else torch.amp.GradScaler
    problem = Problem(base, device, scaler_of(device, cls), dtype=torch.float32, **settings, **backend_options)
    form(problem)
    before = problem.everything()
    problem.overflow = overflow
    form(problem)
    assert all(torch.equal(x, y) for x, y in zip(problem.everything(), before, strict=True))
    assert problem.scaler.get_scale() == SCALE / 2
    assert problem.optimizer.stats.skipped == 1
    problem.overflow = None
    form(problem)
    assert not torch.equal(problem.params[0], before[0])
    assert problem.scaler.get_scale() == SCALE / 2


# Misuse --------------------------------------------------------------------------------------------------------------


def test_torchs_scaler_refuses_a_closure():
    problem = Problem(BASES["sgd"], scaler=scaler_of("cpu", torch.amp.GradScaler))
    problem.step_in_calls()
    with pytest.raises(RuntimeError, match=r"use crsam_ext\.GradScaler"):
        problem.scaler.step(problem.optimizer, problem.closure)


def test_unscale_in_the_middle_of_a_step_is_refused():
    problem = Problem(BASES["sgd"], scaler=scaler_of("cpu"))
    before = problem.everything()
    problem.optimizer.first_step(loss=problem.closure(), zero_grad=True)
    problem.optimizer.second_step(loss=problem.closure(), zero_grad=True)
    problem.closure()
    problem.scaler.unscale_(problem.optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) was called in the middle of a step"):
        problem.scaler.step(problem.optimizer)
    assert all(torch.equal(x, y) for x, y in zip(problem.params, before, strict=True))


def test_two_steps_without_an_update_are_refused():
    problem = Problem(BASES["sgd"], scaler=scaler_of("cpu"))
    problem.scaler.step(problem.optimizer, problem.closure)
    with pytest.raises(RuntimeError, match=r"call update\(\) first"):
        problem.scaler.step(problem.optimizer, problem.closure)


# Combine -------------------------------------------------------------------------------------------------------------


def passes_before_combine(problem):
    for call in (problem.optimizer.first_step, problem.optimizer.second_step):
        call(zero_grad=True, loss=problem.closure())
    return problem.closure()


@bases
@pytest.mark.parametrize("options", [{}, {"regularizer": "log"}], ids=["linear", "log"])
def test_clipping_after_combine_equals_max_grad_norm(options, base, backend_options, device):
    """clip_grad_norm_ on the result of combine() has the effect of max_grad_norm."""
    ours = Problem(base, device, max_grad_norm=0.1, **options, **backend_options)
    theirs = Problem(base, device, **options, **backend_options)
    for _ in range(3):
        ours.step()
        w = [p.detach().clone() for p in theirs.params]
        theirs.optimizer.combine(passes_before_combine(theirs))
        assert all(torch.equal(p, x) for p, x in zip(theirs.params, w, strict=True))
        torch.nn.utils.clip_grad_norm_(theirs.params, 0.1)
        theirs.optimizer.step()
        theirs.optimizer.zero_grad()
    for x, y in zip(theirs.everything(), ours.everything(), strict=True):
        assert_close(x, y, EXACT)
    assert theirs.optimizer.stats.steps == 3


def test_torchs_scaler_unscales_and_clips_after_combine():
    ours = Problem(BASES["sgd"], max_grad_norm=0.1, regularizer="log")
    theirs = Problem(BASES["sgd"], scaler=scaler_of("cpu", torch.amp.GradScaler), regularizer="log")
    for _ in range(3):
        ours.step()
        theirs.optimizer.combine(passes_before_combine(theirs), grad_scale=SCALE)
        theirs.scaler.unscale_(theirs.optimizer)
        torch.nn.utils.clip_grad_norm_(theirs.params, 0.1)
        theirs.scaler.step(theirs.optimizer)
        theirs.scaler.update()
        theirs.optimizer.zero_grad()
    for x, y in zip(theirs.everything(), ours.everything(), strict=True):
        assert_close(x, y, EXACT)


@pytest.mark.parametrize("overflow", [1, 2, 3])
def test_overflow_before_combine_skips_the_step(overflow):
    problem = Problem(BASES["sgd"], scaler=scaler_of("cpu", torch.amp.GradScaler))
    before, problem.overflow = problem.everything(), overflow
    problem.optimizer.combine(passes_before_combine(problem))
    problem.scaler.step(problem.optimizer)
    problem.scaler.update()
    assert all(torch.equal(x, y) for x, y in zip(problem.params, before, strict=True))
    assert problem.scaler.get_scale() == SCALE / 2
    assert problem.optimizer.stats.skipped == 1


@pytest.mark.parametrize("calls", [0, 1])
def test_combine_before_the_last_pass_is_refused(calls):
    problem = Problem(BASES["sgd"])
    for _ in range(calls):
        problem.optimizer.first_step(loss=problem.closure())
    problem.closure()
    with pytest.raises(RuntimeError, match=r"combine\(\) called too early"):
        problem.optimizer.combine()


# Accumulation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"regularizer": "log", "estimator": "loss"}], ids=["linear", "log-loss"])
def test_micro_batches_equal_the_large_batch(options, backend_options, device):
    large = Problem(BASES["sgd"], device, **options, **backend_options)
    small = Problem(BASES["sgd"], device, **options, **backend_options)
    parts = list(zip(*(x.chunk(4) for x in small.data), strict=True))
    closures = [closure_of(lambda p, part=part: network_loss(p, part) / len(parts), small.params) for part in parts]
    for _ in range(3):
        assert_close(small.optimizer.step(closures), large.step(), EXACT, "loss")
    for x, y in zip(small.everything(), large.everything(), strict=True):
        assert_close(x, y, EXACT)


@pytest.mark.parametrize("closures", [[], [None], [1, 2]])
def test_other_lists_of_closures_are_refused(closures):
    with pytest.raises(TypeError, match="a closure or a list of closures"):
        Problem(BASES["sgd"]).optimizer.step(closures)
