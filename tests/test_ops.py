"""Each operator alone, over rows of several lengths, against the float64 reference."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crsam_ext import backends
from crsam_ext.ops import Coefficients, Direction
from crsam_ext.updates import AdamOptions, SGDOptions

from . import reference
from .reference import assert_close, compute_dtype, point_tolerance, sum_tolerance, unit, update_tolerance

SIZES = (1, 3, 4097, 300000)
SHORT = (1, 3, 4097, 5)  # for tests in which a long row would only take more time
GROUPS = (0, 1, 1, 0)
RHO = (0.4, 0.9)
ALPHA, BETA = (0.3, 0.7), (0.2, 0.05)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture
def operators(backend):
    return backends.load(backend)


@pytest.fixture(scope="module")
def compiled():
    return backends.load("torch", compile=True)


def rows(dtype, device="cpu", sizes=SIZES):
    return [torch.randn(n, dtype=torch.float64).to(device, dtype) for n in sizes]


def gradients(dtype, device="cpu", sizes=SIZES):
    """Return g0, g+ and g-, close to each other, and none close to 0, where Adam would only use the sign."""
    signs = [torch.randn(n).sign() for n in sizes]
    return [
        [(s * (1 + 0.3 * torch.rand(n))).to(device, dtype) for s, n in zip(signs, sizes, strict=True)] for _ in range(3)
    ]


def wide(tensors):
    return [t.to("cpu", torch.float64, copy=True) for t in tensors]


def vector(values, device="cpu"):
    return torch.tensor(values, dtype=torch.float64, device=device)


def coefficients(device="cpu", a=ALPHA, b=BETA, factor=None, ok=True):
    factor = None if factor is None else vector(factor, device)
    return Coefficients(pass_weights(a, b, device), factor, torch.tensor(ok, device=device))


def pass_weights(a, b, device="cpu"):
    """Return the weights of g+ - g0 and g- - g0 in a d2 + b d1."""
    return vector([[x + y for x, y in zip(a, b, strict=True)], [x - y for x, y in zip(a, b, strict=True)]], device)


def regularized(grads, factor=1.0, groups=GROUPS):
    """Return ghat in float64, for the given number of passes."""
    if len(grads) < 3:
        return [factor * g for g in wide(grads[-1])]
    g0, gp, gm = map(wide, grads)
    d1, d2 = reference.differences(g0, gp, gm)
    return [factor * (p + ALPHA[k] * y + BETA[k] * x) for p, x, y, k in zip(gp, d1, d2, groups, strict=True)]


# Reductions ----------------------------------------------------------------------------------------------------------


low_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def check_grad_norm(operators, dtype, weighted, device="cpu"):
    g, w = rows(dtype, device), rows(dtype, device)
    weights = [x if weighted[k] else None for x, k in zip(w, GROUPS, strict=True)]
    found = operators.grad_norm(g, GROUPS, 3, weights)
    assert found.dtype == torch.float64
    assert found.shape == (3,)
    products = [x * y.double() if weighted[k] else x for x, y, k in zip(wide(g), wide(w), GROUPS, strict=True)]
    for group in range(3):
        expected = reference.norm([x for x, k in zip(products, GROUPS, strict=True) if k == group]) ** 2
        assert found[group].item() == pytest.approx(expected, rel=sum_tolerance(dtype), abs=0)


def test_sums_of_long_rows_are_accurate():
    """Rounding does not grow with the length: float32 sums have at most 2^19 terms, in at least 8 lanes."""
    operators, g = backends.load("torch"), torch.rand(2**23 + 5)
    expected = pytest.approx(reference.norm([g]) ** 2, rel=unit(torch.float32) * math.sqrt(2**19 / 8), abs=0)
    assert operators.grad_norm([g], [0], 1, [None]).item() == expected
    assert operators.fd_gram([[g], [2 * g], [g]], [0], 1, [None])[0, :6].tolist() == [expected] * 6


@dtypes
@pytest.mark.parametrize("weighted", [(False, False), (True, True), (True, False)], ids=["plain", "weighted", "mixed"])
def test_grad_norm_is_that_of_the_reference(weighted, dtype, operators, device):
    check_grad_norm(operators, dtype, weighted, device)


@pytest.mark.parametrize(
    ("g", "h", "grad_scale", "expected"),
    [
        ([3.0, 0.0], [0.0, 1.0], None, 0.75),
        ([0.5, 0.0], [0.0, 4.0], None, 0.0625),
        ([0.5, 0.5], [2.0, 2.0], None, 0.125),
        ([500.0, 500.0], [2.0, 2.0], 1000.0, 125.0),
        ([5000.0, 0.0], [2.0, 0.0], 1000.0, 750.0),
        ([0.0, 0.0], [0.0, 0.0], None, 0.0),
        ([0.0, 0.0], [1.0, 0.0], None, 0.0),
        ([1.0, 0.0], [0.0, 0.0], None, 0.75),
        ([math.nan, 0.0], [1.0, 0.0], None, math.nan),
    ],
)
def test_direction_weight_is_limited(g, h, grad_scale, expected, operators, device):
    """It is min(0.75 S, |g| / 2 |h|) with the gradient scale S and the decay 0.75; norms are over all groups."""
    squared = [vector([x * x for x in of_groups], device) for of_groups in (g, h)]
    scale = None if grad_scale is None else vector(grad_scale, device)
    found = operators.direction_weight(*squared, vector(0.75, device), scale, 0.5)
    assert found.dtype == torch.float64
    assert found.shape == ()
    assert found.item() == pytest.approx(expected, rel=1e-11, nan_ok=True)


@pytest.mark.parametrize("ok", [True, False])
@dtypes
def test_fd_direction_is_ghat_minus_g0(ok, dtype, operators, device):
    """It is in the compute dtype, and 0 for a skipped step, whose gradients may be NaN."""
    grads = gradients(dtype, device)
    if not ok:
        grads[1][0].fill_(math.nan)
    out = [torch.full_like(g, math.nan, dtype=compute_dtype(dtype)) for g in grads[0]]
    weights = pass_weights((*ALPHA, 0.0), (*BETA, 0.0), device)
    operators.fd_direction_(out, grads, GROUPS, weights, vector(0.5, device), torch.tensor(ok, device=device))
    for h, ghat, g0 in zip(out, regularized(grads), wide(grads[0]), strict=True):
        assert_close(h, 0.5 * (ghat - g0) if ok else torch.zeros_like(g0), 8 * unit(dtype), "h")


@dtypes
def test_norm_includes_the_direction(dtype, operators, device):
    g, h = rows(dtype, device), rows(compute_dtype(dtype), device)
    found = operators.grad_norm(g, GROUPS, 3, [None] * len(g), Direction(h, vector(0.3, device)))
    sums = [x + 0.3 * y for x, y in zip(wide(g), wide(h), strict=True)]
    for group in range(3):
        expected = reference.norm([x for x, k in zip(sums, GROUPS, strict=True) if k == group]) ** 2
        assert found[group].item() == pytest.approx(expected, rel=sum_tolerance(dtype), abs=0)


@low_precision
def test_compiled_grad_norm_is_that_of_the_reference(dtype, compiled):
    check_grad_norm(compiled, dtype, (True, False))


def check_gram(found, grads, w, weighted, dtype):
    """Check that every entry is within SUMS of the product of the norms of its factors."""
    g0, gp, gm = map(wide, grads)
    d1, d2 = reference.differences(g0, gp, gm)
    h = [x**2 * g if weighted[k] else g for x, g, k in zip(wide(w), g0, GROUPS, strict=True)]
    pairs = [(g0, g0), (g0, d1), (g0, d2), (d1, d1), (d1, d2), (d2, d2), (h, g0), (h, d1), (h, d2)]
    assert found.shape == (3, 9)
    assert found.dtype == torch.float64
    for group in range(3):
        for column, (x, y) in enumerate(pairs):
            x, y = ([t for t, k in zip(ts, GROUPS, strict=True) if k == group] for ts in (x, y))
            error = abs(found[group, column].item() - reference.dot(x, y))
            assert error <= sum_tolerance(dtype) * reference.norm(x) * reference.norm(y), (group, column)


@dtypes
@pytest.mark.parametrize("weighted", [(False, False), (True, True), (True, False)], ids=["plain", "weighted", "mixed"])
def test_fd_gram_is_that_of_the_reference(weighted, dtype, operators, device):
    grads, w = gradients(dtype, device), rows(compute_dtype(dtype), device)
    weights = [x if weighted[k] else None for x, k in zip(w, GROUPS, strict=True)]
    check_gram(operators.fd_gram(grads, GROUPS, 3, weights), grads, w, weighted, dtype)


@pytest.mark.parametrize("weighted", [(True, False), None], ids=["weighted", "no Gram matrix"])
@pytest.mark.parametrize("over_the_last", [False, True])
@dtypes
def test_fd_combine_writes_ghat(weighted, over_the_last, dtype, operators, device):
    """It returns the Gram matrix too, and writes ghat to separate rows or over the last gradient."""
    grads, w = gradients(dtype, device), rows(compute_dtype(dtype), device)
    expected = regularized(grads, factor=0.5)
    weights = None if weighted is None else [x if weighted[k] else None for x, k in zip(w, GROUPS, strict=True)]
    found = [[g.clone() for g in of_pass] for of_pass in grads]
    out = found[-1] if over_the_last else [torch.full_like(g, torch.nan) for g in grads[0]]
    weights_of_passes = pass_weights((*ALPHA, 0.0), (*BETA, 0.0), device)
    gram = operators.fd_combine_(out, found, GROUPS, 3, weights, weights_of_passes, vector(0.5, device))
    for x, y in zip(out, expected, strict=True):
        assert_close(x, y, 8 * unit(dtype) + torch.finfo(dtype).eps / 2, "ghat")
    assert (gram is not None) == operators.fuses_gram
    if gram is not None and weighted is not None:
        check_gram(gram, grads, w, weighted, dtype)
    for earlier, of_pass in zip(found[:2], grads, strict=False):
        assert all(torch.equal(x, y) for x, y in zip(earlier, of_pass, strict=True))


def test_compiled_fd_gram_is_that_of_the_reference(compiled):
    grads, w = gradients(torch.bfloat16), rows(torch.float32)
    weights = [w[0], None, None, w[3]]
    check_gram(compiled.fd_gram(grads, GROUPS, 3, weights), grads, w, (True, False), torch.bfloat16)


def test_fd_gram_of_tiny_differences_is_accurate(operators, device):
    """Differences a millionth of the gradients keep their digits, because they are formed before the products."""
    g = [torch.ones(5000, device=device)]
    change = [torch.full((5000,), 2.0**-20, device=device)]
    plus, minus = [g[0] + change[0]], [g[0] - 2 * change[0]]
    found = operators.fd_gram([g, plus, minus], [0], 1, [None])[0]
    d1, d2 = 3 * 2.0**-20, -(2.0**-20)
    assert found[3].item() == pytest.approx(5000 * d1 * d1, rel=sum_tolerance(torch.float32))
    assert found[4].item() == pytest.approx(5000 * d1 * d2, rel=sum_tolerance(torch.float32))
    assert found[5].item() == pytest.approx(5000 * d2 * d2, rel=sum_tolerance(torch.float32))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 4096, 299999])
def test_reductions_propagate_nan_and_inf(place, bad, operators, device):
    g = rows(torch.float32, device)
    row = next(i for i, x in enumerate(g) if x.numel() > place)
    g[row][place] = bad
    assert not operators.grad_norm(g, GROUPS, 2, [None] * 4).isfinite().all()
    for position in range(3):
        grads = gradients(torch.float32, device)
        grads[position] = g
        assert not operators.fd_gram(grads, GROUPS, 2, [None] * 4).isfinite().all()


# Perturbation --------------------------------------------------------------------------------------------------------


def check_perturb(operators, dtype, adaptive, sign, device="cpu"):
    wide_dtype = compute_dtype(dtype)
    live, g = rows(dtype, device), rows(dtype, device)
    if dtype == wide_dtype:
        w = live
        saved = rows(wide_dtype, device) if sign > 0 else [p.clone() for p in live]
    else:  # masters that round to the parameters
        w = [p.to(wide_dtype) * (1 + torch.finfo(dtype).eps / 16) for p in live]
        saved = [p.clone() for p in w]
    w = [p.clone() for p in w]
    if sign < 0:
        for p in live:
            p.fill_(math.nan)  # w - e does not depend on the current parameters
    scale = vector([0.3, -0.2], device)
    undo = []
    operators.perturb_(live, saved, g, GROUPS, scale, adaptive, sign, undo)
    for p, s, x, gi, k in zip(live, saved, w, g, GROUPS, strict=True):
        assert torch.equal(s, x)
        x, gi = x.double().cpu(), gi.double().cpu()
        e = scale[k].item() * (x**2 * gi if adaptive[k] else gi)
        assert_close(p, x + sign * e, point_tolerance(dtype) + torch.finfo(dtype).eps / 2, "point")
    for p, s in undo:
        torch._foreach_copy_(p, s)
    if sign > 0:
        assert all(torch.equal(p, x.to(dtype)) for p, x in zip(live, w, strict=True))
    else:
        assert not undo


@dtypes
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("adaptive", [(False, False), (True, True), (False, True)], ids=["sam", "asam", "mixed"])
def test_perturb_moves_the_parameters_by_e(adaptive, sign, dtype, operators, device):
    check_perturb(operators, dtype, adaptive, sign, device)


@low_precision
@pytest.mark.parametrize("sign", [1, -1])
def test_compiled_perturb_moves_the_parameters_by_e(sign, dtype, compiled):
    check_perturb(compiled, dtype, (False, True), sign)


def check_stochastic_rounding(operators, dtype, adaptive, sign, device="cpu"):
    """Compare with the formula; a float32 product may differ in its last digit, and then, rarely, the result
    differs."""
    master = [
        p * (1 + torch.finfo(dtype).eps * (torch.rand(p.shape) - 0.5)).to(device) / 8
        for p in rows(torch.float32, device)
    ]
    live, g, scale = [p.to(dtype) for p in master], rows(dtype, device), vector([0.01, -0.3], device)
    w, saved = wide(live), [p.clone() for p in master]
    if sign < 0:
        for p in live:
            p.fill_(math.nan)
    operators.perturb_(live, saved, g, GROUPS, scale, [adaptive] * 2, sign, [], stochastic=True)
    off = count = 0
    for p, s, m, x, gi, k in zip(live, saved, master, w, g, GROUPS, strict=True):
        assert torch.equal(s, m)
        gi = gi.double().cpu()
        e = scale[k].item() * (x**2 * gi if adaptive else gi)
        cancelled = 4 * unit(dtype) * (x.abs() + e.abs())
        x = x + sign * e
        q = reference.spacing(x, dtype)
        expected = torch.floor(x / q + reference.random_bits(m.cpu(), gi)) * q
        error = (p.double().cpu() - expected).abs()
        assert (error <= 2 * q + cancelled).all()
        off, count = off + int((error > 0).sum()), count + len(p)
    assert off <= count / 1000


@low_precision
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("sign", [1, -1])
def test_stochastic_rounding_follows_its_formula(sign, adaptive, dtype, operators, device):
    check_stochastic_rounding(operators, dtype, adaptive, sign, device)


@low_precision
@pytest.mark.parametrize("sign", [1, -1])
def test_compiled_stochastic_rounding_follows_its_formula(sign, dtype, compiled):
    check_stochastic_rounding(compiled, dtype, True, sign)


@low_precision
def test_stochastic_rounding_is_correct_on_average(dtype, operators, device):
    """The mean displacement is e or -e, also where e is a hundredth of the spacing."""
    n = 2**16
    master = (0.5 + torch.rand(n)).to(device)
    live, g = master.to(dtype), torch.randn(n).to(device, dtype)
    w, moved = live.double(), []
    for sign in (1, -1):
        operators.perturb_(
            [live],
            [master],
            [g],
            [0],
            vector([torch.finfo(dtype).eps / 100], device),
            [False],
            sign,
            [],
            stochastic=True,
        )
        moved.append(live.double() - w)
    e = g.double() * torch.finfo(dtype).eps / 100
    for sign, found in zip((1, -1), moved, strict=True):
        slope = (found * e).sum() / (e * e).sum()
        # Each element is off by at most one spacing, with a variance of at most e times the spacing.
        deviation = (e.abs().pow(3) * torch.finfo(dtype).eps).sum().sqrt() / (e * e).sum()
        assert abs(slope - sign) < 5 * deviation
    assert (moved[0] != 0).double().mean() < 0.05  # with rounding to nearest, none would have moved


@low_precision
def test_stochastic_rounding_handles_special_numbers(dtype, operators, device):
    """Without a gradient nothing moves, the mean is correct near 0, and NaN and Inf are preserved."""
    tiny = torch.finfo(dtype).smallest_normal
    live = torch.tensor([0.0, -1.0, 3 * tiny, -tiny, 1.0, 1.0, 1.0], device=device, dtype=dtype)
    g = torch.tensor([0.0, 0.0, 0.0, 0.0, math.inf, -math.inf, math.nan], device=device, dtype=dtype)
    w, saved = live.clone(), live.float()
    operators.perturb_([live], [saved], [g], [0], vector([0.5], device), [False], 1, [], stochastic=True)
    assert torch.equal(live[:2], w[:2])
    assert ((live[2:4] - w[2:4]).abs() <= 2.0**-119).all()
    assert not live[4:].isfinite().any()


def test_wide_numbers_are_not_rounded_stochastically(operators, device):
    for dtype in (torch.float32, torch.float64):
        results = []
        for stochastic in (False, True):
            torch.manual_seed(0)
            live, g, saved = rows(dtype, device), rows(dtype, device), rows(dtype, device)
            operators.perturb_(
                live, saved, g, GROUPS, vector([0.3, 0.3], device), [False] * 2, 1, [], stochastic=stochastic
            )
            results.append(live)
        assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_perturb_can_be_undone_from_any_point(operators, device, monkeypatch):
    """After an exception at any block, the entries of undo restore w."""
    if operators.name != "torch":
        pytest.skip("one launch saves all rows: undo contains all of them or none, see test_interrupted_perturb_...")
    live = rows(torch.float32, device)
    w = [p.clone() for p in live]

    class Interrupted(list):
        def __init__(self, after):
            self.after = after

        def append(self, pair):
            super().append(pair)
            if len(self) == self.after:
                raise KeyboardInterrupt

    saved, g = rows(torch.float32, device), rows(torch.float32, device)
    undo = Interrupted(2)
    with pytest.raises(KeyboardInterrupt):
        operators.perturb_(live, saved, g, GROUPS, vector([0.3, 0.3], device), [False, False], 1, undo)
    assert not torch.equal(live[0], w[0])
    for p, s in undo:
        torch._foreach_copy_(p, s)
    assert all(torch.equal(p, x) for p, x in zip(live, w, strict=True))


def check_taken_over(operators, dtype, device="cpu"):
    master = torch.tensor([1.0, 1.0, 2.0, -3.0], device=device) * (1 + torch.finfo(dtype).eps / 16)
    live = master.to(dtype)
    live[2] = 7.0
    expected = master.clone()
    expected[2] = 7.0
    operators.perturb_([live], [master], [torch.zeros_like(live)], [0], vector([1.0], device), [False], 1, [])
    assert torch.equal(master, expected)


@low_precision
def test_perturb_keeps_changes_made_by_hand(dtype, operators, device):
    check_taken_over(operators, dtype, device)


@low_precision
def test_compiled_perturb_keeps_changes_made_by_hand(dtype, compiled):
    check_taken_over(compiled, dtype)


def test_perturbation_scale_is_rho_over_the_norm(operators, device):
    squared = vector([9.0, 16.0], device)
    found = operators.perturbation_scale(squared, vector(RHO, device))
    assert found.tolist() == pytest.approx([r / 5 for r in RHO], rel=1e-11)
    assert operators.perturbation_scale(vector([0.0], device), vector([0.5], device)).isfinite().all()


# Coefficients --------------------------------------------------------------------------------------------------------

finite = st.floats(-2, 2, allow_nan=False, width=32)


@settings(max_examples=60)
@given(
    numbers=st.lists(finite, min_size=18, max_size=18),
    alpha=st.tuples(st.floats(0, 2), st.floats(0, 2)),
    beta=st.tuples(st.floats(0, 2), st.floats(0, 2)),
    regularizer=st.sampled_from(["linear", "log"]),
    cap=st.sampled_from([0.0, 0.1, 1.0, math.inf]),
    clip=st.sampled_from([None, 0.1, 10.0]),
)
def test_coefficients_follow_from_the_gram_matrix(numbers, alpha, beta, regularizer, cap, clip):
    """The Gram matrix of three gradients gives the same coefficients as the gradients. No kernel runs, so one backend
    suffices."""
    operators = backends.load("torch")
    g0, gp, gm = ([torch.tensor(numbers[i : i + 3], dtype=torch.float64), torch.tensor(numbers[i + 3 : i + 6]).double()]
                  for i in (0, 6, 12))  # fmt: skip
    gram = operators.fd_gram([g0, gp, gm], [0, 1], 2, [None, None])
    scale = operators.perturbation_scale(gram[:, 0], vector(RHO))
    counters, steps = torch.zeros(4, dtype=torch.int64), [(torch.tensor([4.0, 7.0]), torch.tensor([1.0, 0.0]))]
    c = operators.coefficients(
        gram, [], scale, vector(alpha), vector(beta), counters=counters, steps=steps, passes=3,
        regularizer=regularizer, losses=None, grad_scale=None, max_regularizer_ratio=cap, max_grad_norm=clip,
    )  # fmt: skip
    assert c.ok
    assert counters[0] == 0
    assert steps[0][0].tolist() == [5.0, 7.0]
    e = reference.perturbation(g0, g0, RHO, [False, False])
    d1, d2 = reference.differences(g0, gp, gm)
    if regularizer == "log":
        kappa, sigma = reference.curvature(e, g0, d1, d2, None, "gradient")
        assert c.kappa.item() == pytest.approx(kappa, abs=1e-12)
        assert c.sigma.item() == pytest.approx(sigma, abs=1e-12)
        assume(min(abs(kappa), abs(sigma)) > 1e-6)  # not at the boundary where a term is dropped
        alpha = [x / kappa if kappa > 0 else 0.0 for x in alpha]
        beta = [x / sigma if sigma > 0 else 0.0 for x in beta]
    r = [x * s + y * t for x, s, y, t in zip(alpha, d2, beta, d1, strict=True)]
    size, base = reference.norm(r), reference.norm(gp)
    # A norm from a quadratic form has an absolute error: only half the digits near 0.
    assume(base > 1e-3 and not 0 < size < 1e-3)
    ratio = size / base
    shrink = min(1.0, cap / ratio) if ratio else 1.0
    assert c.a.tolist() == pytest.approx([shrink * x for x in alpha], rel=1e-6, abs=1e-12)
    assert c.b.tolist() == pytest.approx([shrink * x for x in beta], rel=1e-6, abs=1e-12)
    ghat = reference.norm([p + shrink * x for p, x in zip(gp, r, strict=True)])
    if clip is None:
        assert c.factor is None
    elif ghat > 1e-2:
        assert c.factor.item() == pytest.approx(min(1.0, clip / (ghat + 1e-6)), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["gram", "norms"])
def test_coefficients_of_a_bad_step_are_not_ok(where, bad, operators, device):
    """The step is only counted as skipped, and the step counters do not change."""
    gram, norms = torch.ones(2, 9, dtype=torch.float64, device=device), [vector([1.0, 1.0], device) for _ in range(3)]
    (gram[1] if where == "gram" else norms[2])[1] = bad
    counters = torch.zeros(4, dtype=torch.int64, device=device)
    taken = torch.tensor([3.0, 5.0], device=device)
    c = operators.coefficients(
        gram if where == "gram" else None, [] if where == "gram" else norms, vector(RHO, device), vector(ALPHA, device),
        vector(BETA, device), counters=counters, steps=[(taken, torch.ones_like(taken))], passes=3,
        regularizer="linear", losses=None, grad_scale=None, max_regularizer_ratio=math.inf, max_grad_norm=None,
    )  # fmt: skip
    assert not c.ok
    assert counters.tolist() == [1, 0, 0, 0]
    assert taken.tolist() == [3.0, 5.0]


def test_bad_step_counts_no_dropped_term(operators, device):
    """kappa and sigma of a skipped step are ignored."""
    gram = torch.ones(2, 9, dtype=torch.float64, device=device)
    gram[0, 6:] = -math.inf
    counters, ones = torch.zeros(4, dtype=torch.int64, device=device), vector([1.0, 1.0], device)
    operators.coefficients(
        gram, [], ones, ones, ones, counters=counters, steps=[], passes=3, regularizer="log", losses=None,
        grad_scale=None, max_regularizer_ratio=1.0, max_grad_norm=None,
    )  # fmt: skip
    assert counters.tolist() == [1, 0, 0, 0]


def test_coefficients_of_zero_gradients_are_finite(operators, device):
    zeros = [torch.zeros(3, device=device)]
    gram = operators.fd_gram([zeros] * 3, [0], 1, [None])
    counters = torch.zeros(4, dtype=torch.int64, device=device)
    c = operators.coefficients(
        gram, [], vector([0.0], device), vector([0.1], device), vector([0.1], device), counters=counters, steps=[],
        passes=3, regularizer="log", losses=None, grad_scale=None, max_regularizer_ratio=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    assert counters.tolist() == [0, 1, 1, 0]
    assert c.ok
    assert c.a.isfinite().all()
    assert c.b.isfinite().all()
    assert c.factor == 1


# Updates -------------------------------------------------------------------------------------------------------------

SGD = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "nesterov-decay": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05},
}
UPDATES = 3


def sgd_options(**options):
    return SGDOptions(
        **(
            {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
            | options
        )
    )


def adam_options(**options):
    defaults = {
        "lr": 0.01,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decoupled_weight_decay": False,
        "maximize": False,
    }
    return AdamOptions(**(defaults | options))


def check_updates(operators, dtype, passes, make, options, factor=None, device="cpu", sizes=SHORT):
    """Make some steps of one update rule in both groups; the second has another learning rate and maximizes."""
    wide_dtype = compute_dtype(dtype)
    live = rows(dtype, device, sizes)
    saved = [p.to(wide_dtype, copy=True) for p in live]
    buffers = {name: [torch.zeros_like(w) for w in saved] for name in ("momentum_buffer", "exp_avg", "exp_avg_sq")}
    expected = wide(live)
    state = [{"momentum_buffer": None, "step": 0, "exp_avg": 0 * w, "exp_avg_sq": 0 * w} for w in expected]
    groups_options = [make(**options), make(**options, lr=0.03, maximize=True)]
    step = torch.zeros((), device=device)
    c = coefficients(device, factor=factor)
    for _ in range(UPDATES):
        grads = gradients(dtype, device, sizes)[:passes]
        step += 1
        if dtype == wide_dtype:  # as perturb_ does
            for p, w in zip(live, saved, strict=True):
                w.copy_(p)
                p.fill_(math.nan)
        steps = [step] * len(live)
        if make is sgd_options:
            m = buffers["momentum_buffer"] if options.get("momentum") else [None] * len(live)
            operators.step_(live, saved, [m], grads, GROUPS, steps, groups_options, c)
        else:
            m, v = buffers["exp_avg"], buffers["exp_avg_sq"]
            operators.step_(live, saved, [m, v], grads, GROUPS, steps, groups_options, c)
        for i, (g, k) in enumerate(zip(regularized(grads, factor or 1.0), GROUPS, strict=True)):
            settings_ = {"lr": 0.1 if make is sgd_options else 0.01, **options, **({"lr": 0.03} if k else {})}
            g = -g if k else g
            if make is sgd_options:
                expected[i] = reference.sgd(expected[i], g, state[i], **settings_)
            else:
                decoupled = settings_.pop("decoupled_weight_decay", False)
                betas = settings_.pop("betas", (0.9, 0.99))
                expected[i] = reference.adam(expected[i], g, state[i], betas=betas, decoupled=decoupled, **settings_)
    tolerance = update_tolerance(dtype, UPDATES)
    for i, w in enumerate(expected):
        if dtype == wide_dtype:
            assert_close(live[i], w, tolerance, f"row {i}")
        else:
            assert_close(saved[i], w, tolerance, f"master row {i}")
            assert torch.equal(live[i], saved[i].to(dtype))
        names = ("momentum_buffer",) if make is sgd_options else ("exp_avg", "exp_avg_sq")
        for name in names:
            if state[i][name] is not None:
                assert_close(buffers[name][i], state[i][name], tolerance, f"{name} {i}")


@dtypes
@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
def test_sgd_step_equals_the_reference(options, passes, dtype, operators, device):
    check_updates(operators, dtype, passes, sgd_options, options, device=device)


ADAM = {
    "adam": {},
    "decay": {"weight_decay": 0.1},
    "adamw": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "betas": {"betas": (0.5, 0.9), "eps": 1e-3},
}


@dtypes
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("options", ADAM.values(), ids=ADAM)
def test_adamw_step_equals_the_reference(options, passes, dtype, operators, device):
    check_updates(operators, dtype, passes, adam_options, options, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("make", "options"), [(sgd_options, SGD["nesterov-decay"]), (adam_options, ADAM["adamw"])], ids=["sgd", "adamw"]
)
def test_clipped_steps_equal_the_reference(make, options, dtype, operators, device):
    check_updates(operators, dtype, 3, make, options, factor=0.3, device=device, sizes=SIZES)


@pytest.mark.parametrize(
    ("make", "options", "dtype"),
    [
        (sgd_options, SGD["dampening"], torch.float32),
        (adam_options, ADAM["adamw"], torch.bfloat16),
        (adam_options, ADAM["decay"], torch.float64),
    ],
    ids=["sgd", "adamw-bfloat16", "adam-float64"],
)
def test_compiled_steps_equal_the_reference(make, options, dtype, compiled):
    check_updates(compiled, dtype, 3, make, options, sizes=SIZES)


def check_step_that_is_not_ok(operators, update, dtype, device="cpu"):
    """Check that live becomes w and nothing else changes, whatever the gradients contain."""
    live, saved, m, v = (rows(t, device) for t in (dtype, torch.float32, torch.float32, torch.float32))
    if dtype == torch.bfloat16:
        saved = [p.float() for p in live]
        live = [p * 2 for p in live]
    v = [x.abs() for x in v]
    before = [[x.clone() for x in xs] for xs in (saved, m, v)]
    grads = gradients(dtype, device)
    for g in grads:
        g[3][17] = math.nan
        g[1][1] = math.inf
    c = coefficients(device, ok=False)._replace(pass_weights=vector([[math.nan] * 2] * 2, device))
    steps = [torch.tensor(0.0, device=device)] * 4
    if update == "sgd":
        options = [sgd_options(momentum=0.9, weight_decay=0.1)] * 2
        operators.step_(live, saved, [m], grads, GROUPS, steps, options, c)
    else:
        operators.step_(live, saved, [m, v], grads, GROUPS, steps, [adam_options(weight_decay=0.1)] * 2, c)
    for found, expected in zip((saved, m, v), before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert all(torch.equal(p, w.to(dtype)) for p, w in zip(live, before[0], strict=True))


low_and_full = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@low_and_full
@pytest.mark.parametrize("update", ["sgd", "adamw"])
def test_steps_that_are_not_ok_change_nothing(update, dtype, operators, device):
    check_step_that_is_not_ok(operators, update, dtype, device)


@low_and_full
@pytest.mark.parametrize("update", ["sgd", "adamw"])
@pytest.mark.parametrize("how", ["selecting", "compiled"])
def test_torch_steps_that_are_not_ok_change_nothing(how, update, dtype, compiled, monkeypatch):
    operators = compiled if how == "compiled" else backends.load("torch")
    if how == "selecting":  # as on devices other than the CPU
        monkeypatch.setattr(operators, "selects", lambda row: True)
    check_step_that_is_not_ok(operators, update, dtype)


@dtypes
@pytest.mark.parametrize(("passes", "factor"), [(3, None), (3, 0.5), (2, None), (2, 0.5)])
def test_combine_writes_ghat(passes, factor, dtype, operators, device):
    grads = gradients(dtype, device)[:passes]
    expected = regularized(grads, factor or 1.0)
    saved = rows(compute_dtype(dtype), device)
    live = rows(dtype, device)
    operators.combine_(live, saved, grads, GROUPS, coefficients(device, factor=factor))
    for p, w, g, e in zip(live, saved, grads[-1], expected, strict=True):
        assert torch.equal(p, w.to(dtype))
        assert_close(g, e, 8 * unit(dtype) + torch.finfo(dtype).eps / 2, "ghat")


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    data=st.data(),
    lr=st.floats(0, 1),
    momentum=st.floats(0, 1),
    dampening=st.floats(0, 1),
    weight_decay=st.floats(0, 1),
    nesterov=st.booleans(),
    first=st.booleans(),
)
def test_any_sgd_step_equals_torchs(sizes, data, lr, momentum, dampening, weight_decay, nesterov, first):
    """The step is over any rows in any groups."""
    groups = data.draw(st.lists(st.integers(0, 1), min_size=len(sizes), max_size=len(sizes)))
    dampening = 0.0 if nesterov and momentum else dampening
    nesterov = nesterov and momentum > 0
    options = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
    }
    w, g, m = (rows(torch.float64, sizes=sizes) for _ in range(3))
    params = [torch.nn.Parameter(p.clone()) for p in w]
    theirs = torch.optim.SGD(params, **options)
    for p, x, y in zip(params, g, m, strict=True):
        p.grad = x.clone()
        if momentum and not first:
            theirs.state[p]["momentum_buffer"] = y.clone()
    theirs.step()
    live = [p.clone() for p in w]
    step = torch.tensor(1.0 if first else 5.0)
    buffers = [torch.zeros_like(x) if first else x.clone() for x in m] if momentum else [None] * len(sizes)
    backends.load("torch").step_(
        live, w, [buffers], [g], groups, [step] * len(sizes), [sgd_options(**options)] * 2, coefficients()
    )
    for p, x in zip(live, params, strict=True):
        assert_close(p, x, update_tolerance(torch.float64, 1), "row")
