"""The mathematics of a step: every option against the float64 reference and against derivatives by autograd."""

import math

import pytest
import torch

from crsam_ext import CRSAM

from . import reference
from .reference import (
    COMPILED,
    EXACT,
    LIMIT,
    Reference,
    assert_close,
    assert_same,
    batch,
    closure_of,
    evaluator,
    network_loss,
    network_params,
    run_three_calls,
    sum_tolerance,
    update_tolerance,
)

STEPS = 4
BASES = {
    "sgd": ("sgd", {"lr": 0.3}),
    "momentum": ("sgd", {"lr": 0.1, "momentum": 0.9}),
    "nesterov": ("sgd", {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.03}),
    "dampening": ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.01}),
    "adam": ("adam", {"lr": 0.02, "weight_decay": 0.05, "betas": (0.8, 0.95)}),
    "adamw": ("adamw", {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-6}),
}
CLASSES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
OPTIONS = {
    "linear": {"rho": 0.3, "alpha": 0.5, "beta": 0.2},
    "alpha": {"rho": 0.3, "alpha": 0.5, "beta": 0.0},
    "beta": {"rho": 0.3, "alpha": 0.0, "beta": 0.4},
    "defaults": {},
    "sam": {"rho": 0.3, "alpha": 0.0, "beta": 0.0},
    "base": {"rho": 0.0},
    "asam": {"rho": 0.5, "alpha": 0.5, "beta": 0.2, "adaptive": True},
    "asam-two-passes": {"rho": 0.5, "alpha": 0.0, "beta": 0.0, "adaptive": True},
    "maximize": {"rho": 0.3, "alpha": 0.5, "beta": 0.2, "maximize": True},
    "clip": {"rho": 0.3, "alpha": 0.5, "beta": 0.2, "max_grad_norm": 0.05},
    "clip-sam": {"alpha": 0.0, "beta": 0.0, "max_grad_norm": 0.05},
    "clip-base": {"rho": 0.0, "max_grad_norm": 0.05},
    "clip-maximize": {"rho": 0.3, "maximize": True, "max_grad_norm": 0.05},
    "cap": {"rho": 0.3, "alpha": 5.0, "beta": 2.0, "max_regularizer_ratio": 0.1},
    "log": {"rho": 0.3, "regularizer": "log"},
    "log-loss": {"rho": 0.3, "regularizer": "log", "estimator": "loss"},
    "log-strong": {"rho": 0.3, "alpha": 0.1, "beta": 0.2, "regularizer": "log", "max_regularizer_ratio": 0.2},
    "log-uncapped": {"rho": 0.2, "regularizer": "log", "max_regularizer_ratio": math.inf},
    "log-clip": {"rho": 0.3, "regularizer": "log", "max_grad_norm": 0.05},
    "log-asam": {"rho": 0.5, "regularizer": "log", "adaptive": True},
    "log-maximize": {"rho": 0.3, "regularizer": "log", "maximize": True},
    "log-loss-maximize": {"rho": 0.3, "regularizer": "log", "estimator": "loss", "maximize": True},
}  # fmt: skip
# Options of the second of two groups, one at a time.
SECOND_GROUP = {
    "radius": {"rho": 0.7},
    "no-radius": {"rho": 0.0},
    "weights": {"alpha": 0.9, "beta": 0.0},
    "asam": {"adaptive": True},
    "maximize": {"maximize": True},
    "rate": {"lr": 0.01, "weight_decay": 0.3},
    "everything": {"rho": 0.2, "alpha": 0.0, "beta": 0.7, "adaptive": True, "maximize": True, "lr": 0.04},
}
STATE = {
    "sgd": ("momentum_buffer",),
    "adam": ("step", "exp_avg", "exp_avg_sq"),
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
}

bases = pytest.mark.parametrize("base", BASES)
options_by_name = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(params, base, options, backend_options, groups=None):
    """Return CRSAM and its reference over the same parameters."""
    name, base_options = BASES[base]
    both = {**options, **base_options}
    groups = groups or [{"params": params}]
    expected = Reference(groups, name, **both)
    return CRSAM(groups, CLASSES[name], **both, **backend_options), expected


def split(params, **second):
    return [{"params": params[:2]}, {"params": params[2:], **second}]


def measured(optimizer, expected):
    """Return the names of the optional measurements that a step must make; the Gram matrix gives most of them."""
    clips, caps = expected.max_grad_norm < math.inf, expected.cap < math.inf
    needs_gram = clips or caps or (expected.log and expected.estimator == "gradient")
    gram = optimizer.passes == 3 and (needs_gram or optimizer.backend != "torch")
    names = {"clip_factor"} if clips else set()
    if gram:
        names |= {"regularizer_ratio"}
    perturbs = any(rho > 0 for rho in expected.each("rho"))
    if gram or not perturbs or not any(expected.each("adaptive")):
        names |= {"grad_norm"}
    return names


def assert_stats(optimizer, expected, tolerance=EXACT, groups=None):
    found, conditional = optimizer.stats.as_dict(), {"clip_factor", "regularizer_ratio", "grad_norm"}
    for name, value in expected.counts.items():
        assert found[name] == value, name
    must = (expected.last.keys() - conditional) | (expected.last.keys() & measured(optimizer, expected))
    assert {name for name in expected.last if found[name] is not None} == must
    groups = groups or [slice(0, None)]
    for name in must:
        value = expected.last[name]
        if name in ("a", "b"):
            value = [value[g][0] for g in groups]
        assert_close(found[name], value, tolerance, name, max(1.0, expected.scales.get(name, 0.0)))


# Every option, every native base optimizer ---------------------------------------------------------------------------


@options_by_name
@bases
def test_steps_equal_the_reference(base, options, backend_options, device):
    params, data = network_params(device=device), batch(device=device)
    optimizer, expected = make(params, base, options, backend_options)
    names = STATE[BASES[base][0]] if "momentum" in BASES[base][1] or BASES[base][0] != "sgd" else ()
    for _ in range(STEPS):
        loss = optimizer.step(closure_of(lambda p: network_loss(p, data), params))
        expected_loss = expected.step(evaluator(lambda p: network_loss(p, data)))
        assert_close(loss, -expected_loss if options.get("maximize") else expected_loss, EXACT, "loss")
        assert_same(params, expected, EXACT, optimizer.state, names)
        assert_stats(optimizer, expected)
    if names:
        assert all(set(names) == optimizer.state[p].keys() for p in params)


@pytest.mark.parametrize("second", SECOND_GROUP.values(), ids=SECOND_GROUP)
@pytest.mark.parametrize("options", [OPTIONS["linear"], OPTIONS["log"], OPTIONS["clip"]], ids=["linear", "log", "clip"])
@pytest.mark.parametrize("base", ["nesterov", "adamw"])
def test_two_groups_equal_the_reference(base, options, second, backend_options, device):
    params, data = network_params(device=device), batch(device=device)
    optimizer, expected = make(params, base, options, backend_options, split(params, **second))
    for _ in range(STEPS):
        optimizer.step(closure_of(lambda p: network_loss(p, data), params))
        expected.step(evaluator(lambda p: network_loss(p, data)))
        assert_same(params, expected, EXACT, optimizer.state, STATE[BASES[base][0]])
        assert_stats(optimizer, expected, groups=[slice(0, 2), slice(2, 4)])


@pytest.mark.parametrize("base", ["momentum", "adamw"])
@pytest.mark.parametrize(
    "options", [OPTIONS["linear"], OPTIONS["asam"], OPTIONS["log-clip"]], ids=["linear", "asam", "log-clip"]
)
def test_compiled_steps_equal_the_reference(base, options):
    params, data = network_params(), batch()
    optimizer, expected = make(params, base, options, COMPILED)
    for _ in range(STEPS):
        optimizer.step(closure_of(lambda p: network_loss(p, data), params))
        expected.step(evaluator(lambda p: network_loss(p, data)))
        assert_same(params, expected, EXACT, optimizer.state, STATE[BASES[base][0]])
        assert_stats(optimizer, expected)


@pytest.mark.parametrize("name", ["momentum", "nesterov"])
def test_options_may_change_between_steps(name, backend_options, device):
    params, data = network_params(device=device), batch(device=device)
    optimizer, expected = make(params, name, OPTIONS["linear"], backend_options)
    for step in range(STEPS):
        changed = {"lr": 0.1 / (step + 1), "rho": 0.1 * (step + 1), "alpha": 0.2 * step, "beta": 0.1 * step}
        optimizer.param_groups[0].update(changed)
        expected.options[0].update(changed)
        optimizer.step(closure_of(lambda p: network_loss(p, data), params))
        expected.step(evaluator(lambda p: network_loss(p, data)))
        assert_same(params, expected)


# Lower precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", ["momentum", "nesterov", "dampening", "adam", "adamw"])
@pytest.mark.parametrize("option", ["linear", "sam", "base", "asam", "maximize", "clip", "log", "log-loss", "log-asam"])
def test_given_gradients_make_the_steps_of_the_reference(option, base, dtype, backend_options, device):
    """Gradients and losses are both given, so only the rounding of the step remains."""
    shapes = [(40, 30), (7,), (), (5000,)]
    params = [torch.nn.Parameter(torch.randn(s).to(device, dtype)) for s in shapes]
    options = OPTIONS[option]
    optimizer, expected = make(params, base, options, backend_options)
    for _ in range(STEPS):
        # No gradient is near 0, where Adam's m / sqrt(v) would be as uncertain as its sign.
        g0 = [(torch.rand_like(p) + 0.5) * torch.randn_like(p).sign() for p in params]
        change = [0.2 * g + torch.rand_like(g) for g in g0]
        gradients = [[(g + s * c).to(dtype) for g, c in zip(g0, change, strict=True)] for s in (0, 0.3, -0.2)]
        losses = [1.0, 1.5, 0.75]
        given = iter(zip(losses, gradients, strict=True))

        def closure():
            loss, grads = next(given)  # noqa: B023
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            return loss

        again = iter(zip(losses, gradients, strict=True))
        optimizer.step(closure)
        if option in ("sam", "base"):  # these never make the remaining passes
            used = {"sam": (0, 1, 0), "base": (0, 0, 0)}[option]
            again = iter([(losses[i], gradients[i]) for i in used])
        expected.step(lambda w: next(again))  # noqa: B023

    # The norm's error changes e, a, b and the clip factor by at most SUMS; all else is rounding.
    tolerance = update_tolerance(dtype, STEPS) + (
        0 if option in ("linear", "sam", "base", "maximize") else sum_tolerance(dtype, 5000)
    )
    for i, param in enumerate(params):
        value = param
        if dtype != torch.float32:
            value = optimizer.state[param]["master_param"]
            assert value.dtype == torch.float32
            assert torch.equal(param, value.to(dtype))
        assert_close(value, expected.w[i], tolerance, f"parameter {i}")
        for name in STATE[BASES[base][0]]:
            assert_close(optimizer.state[param][name], expected.state[i][name], tolerance, f"{name} {i}")
    # The errors of kappa and sigma: a norm under a square root, a sum of products, and the square of w in ASAM.
    bound = 1.5 * sum_tolerance(dtype, 5000) + 2 * tolerance
    if "asam" in option and dtype != torch.float32:
        bound += torch.finfo(dtype).eps / 2  # its norm is weighted with the parameters in the model's dtype
    assert_stats(optimizer, expected, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_accumulates_small_updates(dtype, backend_options, device):
    """Updates are a thousandth of an ulp: lost without a master, accumulated with one."""
    param = torch.nn.Parameter(torch.ones(8, dtype=dtype, device=device))
    ulp = torch.finfo(dtype).eps
    optimizer = CRSAM([param], lr=ulp / 16, rho=0.0, **backend_options)
    for _ in range(32):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert_close(optimizer.state[param]["master_param"], torch.full((8,), 1 - 2 * ulp), update_tolerance(dtype, 32))
    assert torch.equal(param, torch.full_like(param, 1 - 2 * ulp))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parallel", [False, True], ids=["in_turn", "at_once"])
def test_stochastic_rounding_applies_small_perturbations(parallel, dtype, backend_options, device):
    """The perturbation is a tenth of the spacing, which rounding to nearest would lose; w does not change."""
    rho = torch.finfo(dtype).eps / 2 / 10 * 2000**0.5

    def moved(stochastic):
        torch.manual_seed(0)
        model = torch.nn.Linear(100, 20, bias=False).to(device, dtype)
        torch.nn.init.uniform_(model.weight, 0.5, 1.0)
        w, points = model.weight.detach().clone(), []
        optimizer = CRSAM(model.parameters(), lr=0.0, rho=rho, stochastic_rounding=stochastic, **backend_options)

        def loss_of():
            return model(x).square().mean()

        def closure():
            points.append(model.weight.detach().clone())
            loss = loss_of()
            loss.backward()
            return loss

        x = torch.randn(8, 100).to(device, dtype)
        for _ in range(2):
            optimizer.step(loss_of, parallel=model) if parallel else optimizer.step(closure)
        assert torch.equal(model.weight, w)
        if parallel:
            (bucket,) = optimizer._flat.buckets
            points = [w, None, bucket.points[1][: w.numel()].view_as(w)] * 2
        return [(p != w).double().mean().item() for p in points if p is not None]

    assert max(moved(False)) < 0.02
    shares = moved(True)
    assert shares[0] == shares[len(shares) // 2] == 0  # at w
    assert all(0.02 < share < 0.5 for share in shares if share)
    assert any(shares)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_points_of_the_passes_are_w_and_w_plus_and_minus_e(adaptive, dtype, backend_options, device):
    """The closure finds the parameters at w, w + e and w - e."""
    params = [torch.nn.Parameter(torch.randn(s).to(device, dtype)) for s in [(30, 40), (3,), ()]]
    w = [p.detach().clone() for p in params]
    grads = [torch.randn_like(p) for p in params]
    optimizer = CRSAM(params, rho=0.7, adaptive=adaptive, lr=0.1, **backend_options)
    seen = []

    def closure():
        seen.append([p.detach().clone() for p in params])
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()

    optimizer.step(closure)
    e = reference.perturbation([p.double() for p in w], [g.double() for g in grads], [0.7] * 3, [adaptive] * 3)
    for i, p in enumerate(w):
        assert torch.equal(seen[0][i], p)
        for point, sign in ((seen[1][i], 1), (seen[2][i], -1)):
            # The point is rounded once to the parameter's dtype.
            tolerance = reference.point_tolerance(dtype) + sum_tolerance(dtype, 1200) * 0.7 + torch.finfo(dtype).eps / 2
            assert_close(point, p.double() + sign * e[i], tolerance, f"point {sign}")


# The log regularizer against autograd --------------------------------------------------------------------------------


def derivatives(params, data, alpha, beta):
    """Return the norm of g, v'Hv for v = g / |g|, and the gradient of alpha log v'Hv + beta log |g| with v fixed."""
    loss = network_loss(params, data)
    g = torch.autograd.grad(loss, params, create_graph=True)
    length = sum((x**2).sum() for x in g).sqrt()
    v = [(x / length).detach() for x in g]
    hv = torch.autograd.grad(sum((x * y).sum() for x, y in zip(g, v, strict=True)), params, create_graph=True)
    vhv = sum((x * y).sum() for x, y in zip(hv, v, strict=True))
    gradient = torch.autograd.grad(alpha * vhv.log() + beta * length.log(), params)
    return length.item(), vhv.item(), gradient


@pytest.mark.parametrize(("estimator", "rho"), [("gradient", 1e-3), ("loss", 1e-3)])
def test_kappa_and_sigma_approach_the_derivatives(estimator, rho, backend_options, device):
    params, data = network_params(device=device), batch(device=device)
    length, vhv, _ = derivatives(params, data, 1.0, 1.0)
    assert vhv > 0
    optimizer = CRSAM(params, lr=0.0, rho=rho, regularizer="log", estimator=estimator, **backend_options)
    optimizer.step(closure_of(lambda p: network_loss(p, data), params))
    assert optimizer.stats.kappa.item() / rho**2 == pytest.approx(vhv, rel=LIMIT)
    assert optimizer.stats.sigma.item() / (2 * rho) == pytest.approx(length, rel=LIMIT)


def test_estimators_have_the_orders_of_their_rules(backend_options, device):
    """The relative error of kappa is rho^2 by the trapezoid rule, that of sigma rho^4 by Simpson's rule."""
    params, data = network_params(device=device), batch(device=device)
    errors = []
    for rho in (0.04, 0.02):
        found = {}
        for estimator in ("gradient", "loss"):
            optimizer = CRSAM(params, lr=0.0, rho=rho, regularizer="log", estimator=estimator, **backend_options)
            optimizer.step(closure_of(lambda p: network_loss(p, data), params))
            found[estimator] = optimizer.stats.kappa.item(), optimizer.stats.sigma.item()
        errors.append([g / x - 1 for g, x in zip(found["gradient"], found["loss"], strict=True)])
    (kappa, sigma), (kappa_half, sigma_half) = errors
    assert kappa / kappa_half == pytest.approx(4, rel=0.1)
    assert sigma / sigma_half == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 0.5)], ids=["trace", "norm", "both"])
def test_log_regularizer_is_the_gradient_of_its_function(weights, backend_options, device):
    """ghat - g+ approaches the gradient of alpha log v'Hv + beta log |g|, by autograd, as rho decreases."""
    alpha, beta = weights
    rho = 1e-3
    params, data = network_params(device=device), batch(device=device)
    _, _, expected = derivatives(params, data, alpha, beta)
    w = [p.detach().clone() for p in params]
    options = {"rho": rho, "regularizer": "log", "max_regularizer_ratio": math.inf, "lr": 1.0, **backend_options}
    results = []
    for a, b in ((alpha, beta), (0.0, 0.0)):
        copies = [torch.nn.Parameter(p.clone()) for p in w]
        CRSAM(copies, alpha=a, beta=b, **options).step(closure_of(lambda p: network_loss(p, data), copies))
        results.append(copies)
    for with_regularizer, without, g in zip(*results, expected, strict=True):
        assert_close(without - with_regularizer, g, 10 * LIMIT, "gradient of the regularizer")


@pytest.mark.parametrize("estimator", ["gradient", "loss"])
@pytest.mark.parametrize(
    ("ascent", "descent", "dropped"),
    [
        (0.9, 1.1, "curvature_dropped"),  # the gradient decreases along e: concave
        (-8.0, -10.0, "gradient_norm_dropped"),  # both point against e
        (1.1, 0.9, None),
    ],
)
def test_terms_without_a_logarithm_are_dropped(ascent, descent, dropped, estimator, backend_options, device):
    params = [torch.nn.Parameter(torch.randn(6, dtype=torch.float64, device=device))]
    g = torch.randn(6, dtype=torch.float64, device=device)
    losses = {"curvature_dropped": (1.1, 0.85), "gradient_norm_dropped": (1.2, 1.3), None: (1.2, 0.9)}[dropped]
    options = {"rho": 0.1, "alpha": 0.1, "beta": 0.1, "regularizer": "log", "estimator": estimator}
    optimizer, expected = make(params, "sgd", options, backend_options)
    given = list(zip((1.0, *losses), ([g], [ascent * g], [descent * g]), strict=True))

    def backward(index):
        params[0].grad = given[index][1][0].clone()
        return given[index][0]

    run_three_calls(optimizer, backward)
    again = iter(given)
    expected.step(lambda w: next(again))
    assert_same(params, expected)
    assert_stats(optimizer, expected)
    found = optimizer.stats.as_dict()
    assert (found["curvature_dropped"], found["gradient_norm_dropped"]) == (
        dropped == "curvature_dropped",
        dropped == "gradient_norm_dropped",
    )
    assert (found["a"] == [0.0]) == (dropped == "curvature_dropped")
    assert (found["b"] == [0.0]) == (dropped == "gradient_norm_dropped")


# Call forms, passes, stats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_grad", [True, False])
@pytest.mark.parametrize("option", ["linear", "sam", "asam", "log-loss", "clip"])
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_call_forms_agree_bit_for_bit(base, option, zero_grad, backend_options, device):
    data = batch(torch.float32, device)
    results = []
    for form in ("closure", "calls"):
        torch.manual_seed(1)
        params = network_params(torch.float32, device)
        optimizer, _ = make(params, base, OPTIONS[option], backend_options)
        closure = closure_of(lambda p: network_loss(p, data), params)
        for _ in range(STEPS):
            if form == "closure":
                optimizer.step(closure)
            else:
                optimizer.zero_grad()

                def backward(index):
                    optimizer.zero_grad()  # noqa: B023
                    return closure()  # noqa: B023

                run_three_calls(optimizer, backward, optimizer.passes, zero_grad)
        results.append([params, [optimizer.state[p] for p in params], optimizer.stats.as_dict()])
        if form == "calls":
            assert all((p.grad is None) == zero_grad for p in params)
    (params, state, stats), (params2, state2, stats2) = results
    assert all(torch.equal(p, q) for p, q in zip(params, params2, strict=True))
    assert all(torch.equal(s[k], t[k]) for s, t in zip(state, state2, strict=True) for k in s)
    assert stats | dict.fromkeys(("loss", "loss_ascent", "loss_descent")) == stats2 | dict.fromkeys(
        ("loss", "loss_ascent", "loss_descent")
    )


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 3),
        ({"alpha": 0}, 3),
        ({"beta": 0}, 3),
        ({"alpha": 0, "beta": 0}, 2),
        ({"rho": 0}, 1),
        ({"rho": 0, "regularizer": "log"}, 1),
        ({"rho": torch.tensor(0.1)}, 3),
    ],
)
def test_only_the_needed_passes_are_taken(options, passes, backend_options, device):
    params, data = network_params(device=device), batch(device=device)
    optimizer = CRSAM(params, lr=0.1, **options, **backend_options)
    calls = []

    def closure():
        calls.append([p.grad for p in params])
        loss = network_loss(params, data)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.passes == passes == len(calls)
    assert all(g is None for grads in calls for g in grads), "gradients must be cleared before each pass"


def test_passes_count_all_groups(backend_options):
    params = network_params()
    optimizer = CRSAM(split(params, alpha=0.3), lr=0.1, alpha=0, beta=0, **backend_options)
    assert optimizer.passes == 3
    optimizer.param_groups[1]["alpha"] = 0.0
    assert optimizer.passes == 2
    optimizer.param_groups[0]["rho"] = 0.0
    assert optimizer.passes == 2
    optimizer.param_groups[1]["rho"] = 0.0
    assert optimizer.passes == 1


def test_gamma_is_another_name_of_alpha(backend_options):
    params = network_params()
    optimizer = CRSAM(split(params, gamma=0.25), lr=0.1, gamma=0.75, **backend_options)
    assert [group["alpha"] for group in optimizer.param_groups] == [0.75, 0.25]
    assert all("gamma" not in group for group in optimizer.param_groups)


def test_options_have_the_documented_defaults():
    params = network_params()
    for options, alpha in (({}, 0.1), ({"regularizer": "log"}, 0.01)):
        group = CRSAM(params, lr=0.1, **options).param_groups[0]
        assert {k: group[k] for k in ("rho", "alpha", "beta", "adaptive")} == {
            "rho": 0.1,
            "alpha": alpha,
            "beta": 0.01,
            "adaptive": False,
        }
    assert CRSAM(params, lr=0.1, regularizer="log").max_regularizer_ratio == 1.0
    assert isinstance(CRSAM(params, lr=0.1).base_optimizer, torch.optim.SGD)


def test_stats_before_and_after_steps(backend_options, device):
    params, data = network_params(device=device), batch(device=device)
    optimizer = CRSAM(params, lr=0.1, regularizer="log", max_grad_norm=1.0, **backend_options)
    before = optimizer.stats.as_dict()
    counters = ("steps", "skipped", "curvature_dropped", "gradient_norm_dropped", "capped")
    assert all(before[name] == 0 for name in counters)
    assert all(value is None for name, value in before.items() if name not in counters)
    losses = []

    def closure():
        loss = network_loss(params, data)
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(2):
        optimizer.step(closure)
    after = optimizer.stats.as_dict()
    assert after["steps"] == 2
    assert [after[k] for k in ("loss", "loss_ascent", "loss_descent")] == losses[3:]
    assert isinstance(after["kappa"], float)
    assert isinstance(after["a"], list)
    assert isinstance(after["skipped"], int)
    assert optimizer.stats.grad_norm.shape == ()
    assert optimizer.stats.a.shape == (1,)
    assert not optimizer.stats.loss.requires_grad, "the graph of the loss must be freed"


def test_gradient_at_w_remains_in_grad(backend_options, device):
    params, data = network_params(device=device), batch(device=device)
    expected = torch.autograd.grad(network_loss(params, data), params)
    optimizer = CRSAM(params, lr=0.1, **backend_options)
    optimizer.step(closure_of(lambda p: network_loss(p, data), params))
    assert all(torch.equal(p.grad, g) for p, g in zip(params, expected, strict=True))


# Other base optimizers -----------------------------------------------------------------------------------------------

WRAPPED = {
    "NAdam": (torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "AMSGrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
}


class OwnSGD(torch.optim.SGD):
    """A subclass may change the update, so it is not computed natively."""


WRAPPED["subclass"] = (OwnSGD, {"lr": 0.1, "momentum": 0.9})


@pytest.mark.parametrize("given", ["class", "instance"])
@pytest.mark.parametrize("option", ["linear", "sam", "base", "asam", "log", "clip", "clip-base"])
@pytest.mark.parametrize("base", WRAPPED)
def test_other_base_optimizers_equal_the_reference(base, option, given, backend_options, device):
    cls, base_options = WRAPPED[base]
    params, data = network_params(device=device), batch(device=device)
    expected = Reference([{"params": params}], lambda w: cls(w, **base_options), **OPTIONS[option])
    if given == "class":
        optimizer = CRSAM(params, cls, **OPTIONS[option], **base_options, **backend_options)
    else:
        instance = cls(params, **base_options)
        optimizer = CRSAM(params, instance, **OPTIONS[option], **backend_options)
        assert optimizer.base_optimizer is instance
    # RMSprop has its own alpha, so its groups cannot be shared.
    assert (optimizer.param_groups is optimizer.base_optimizer.param_groups) == (base != "RMSprop")
    assert optimizer.state is optimizer.base_optimizer.state
    for _ in range(STEPS):
        optimizer.step(closure_of(lambda p: network_loss(p, data), params))
        expected.step(evaluator(lambda p: network_loss(p, data)))
        assert_same(params, expected)
        assert_stats(optimizer, expected)
    g0 = torch.autograd.grad(network_loss(params, data), params)
    optimizer.step(closure_of(lambda p: network_loss(p, data), params))
    assert all(torch.equal(p.grad, g) for p, g in zip(params, g0, strict=True)), "p.grad is g0 again, not ghat"


def test_instance_of_a_native_optimizer_is_used(backend_options, device):
    """An instance of SGD is computed natively, with its momentum."""
    params, data = network_params(device=device), batch(device=device)
    base = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    expected = Reference([{"params": params}], "sgd", lr=0.1, momentum=0.9)
    optimizer = CRSAM(params, base, **backend_options)
    for _ in range(STEPS):
        optimizer.step(closure_of(lambda p: network_loss(p, data), params))
        expected.step(evaluator(lambda p: network_loss(p, data)))
    assert_same(params, expected, EXACT, optimizer.state, ["momentum_buffer"])
    assert base.state[params[0]]["momentum_buffer"] is optimizer.state[params[0]]["momentum_buffer"]


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_native_bases_are_not_called(cls, backend_options, device, monkeypatch):
    params, data = network_params(device=device), batch(device=device)
    optimizer = CRSAM(params, cls, lr=0.1, **backend_options)
    monkeypatch.setattr(cls, "step", None)
    optimizer.step(closure_of(lambda p: network_loss(p, data), params))


@pytest.mark.parametrize("base", ["momentum", "adamw"])
@pytest.mark.parametrize("option", ["linear", "log", "asam", "cap"])
def test_large_parameters_equal_the_reference(option, base, backend_options, device):
    """The parameters have several blocks, in their own rows and in shared rows."""
    shapes = [(300, 1100), (7,), (128, 128), (3, 3), (40000,)]
    params = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64, device=device)) for s in shapes]

    def loss_of(p):
        return sum((x**2).mean() * (i + 1) + x.sin().mean() for i, x in enumerate(p)) * 10

    optimizer, expected = make(params, base, OPTIONS[option] | {"rho": 1.5}, backend_options, split(params, rho=2.0))
    for _ in range(2):
        optimizer.step(closure_of(loss_of, params))
        expected.step(evaluator(loss_of))
    assert_same(params, expected, EXACT, optimizer.state, STATE[BASES[base][0]])
    assert_stats(optimizer, expected, groups=[slice(0, 2), slice(2, 5)])
