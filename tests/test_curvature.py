"""Measured curvature equals that of the exact Hessian, within derived bounds; the model is left unchanged."""

import copy
import math
import statistics

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from crsam_ext import CRSAM, curvature

pytestmark = pytest.mark.slow

ALL = [
    curvature.hessian_trace,
    curvature.normalized_trace,
    curvature.gradient_norm,
    curvature.directional_curvature,
    curvature.top_eigenvalues,
    curvature.ascent_gap,
]
TRACES = [curvature.hessian_trace, curvature.normalized_trace]


class Tied(nn.Module):
    """An auto-encoder that uses its weight matrix twice."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 4)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(2, 2, batch_first=True)

    def forward(self, x):
        return torch.cat(self.cells(x.unflatten(1, (2, 2)))[1], 2)[0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(2, 6)

    def forward(self, x):
        q, k, v = self.project(x.unflatten(1, (2, 2))).chunk(3, 2)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]).flatten(1)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))


def with_batch_norm():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 4))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


MODELS = {"mlp": mlp, "batch norm": with_batch_norm, "tied": Tied, "LSTM": Recurrent, "attention": Attention}


def batches(dtype=torch.float64, sizes=(7, 3, 5)):
    """Return batches of unequal size; tanh networks and cross-entropy are twice differentiable."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, dtype=dtype, generator=generator), torch.randint(4, (n,), generator=generator))
        for n in sizes
    ]


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def mean_loss(model, loader):
    """Return the mean over all samples, computed at once, as a function of a flat vector of parameters."""
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))

    def loss(w):
        pieces = w.split([p.numel() for p in params])
        values = {n: piece.view_as(p) for n, p, piece in zip(names, params, pieces, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    return loss, flat(params).detach()


def exact(model, loader):
    """Return loss, gradient and Hessian of the mean over all samples, in evaluation mode."""
    model = copy.deepcopy(model).eval()
    if isinstance(model, (Recurrent, Attention)):  # torch.func does not differentiate these twice
        params = list(model.parameters())
        x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            gradient = flat(torch.autograd.grad(F.cross_entropy(model(x), y), params, create_graph=True))
        rows = [flat(torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)) for g in gradient]
        return gradient.detach(), torch.stack(rows)
    loss, w = mean_loss(model, loader)
    return torch.func.grad(loss)(w), torch.func.hessian(loss)(w)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]().double()


@pytest.mark.parametrize("measure", TRACES)
def test_exact_traces_equal_those_of_the_hessian(model, measure):
    gradient, hessian = exact(model, batches())
    expected = hessian.trace() / (gradient.norm() if measure is curvature.normalized_trace else 1)
    result = measure(model, F.cross_entropy, batches(), estimator="exact")

    assert result.value == pytest.approx(expected.item(), rel=1e-10)
    assert (result.standard_error, result.probes, result.samples) == (0, 0, 15)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_hutchinson_has_the_expected_mean_and_variance(model, distribution):
    """The mean is nearly normal: allow 5 standard deviations. The variance estimate has a relative standard
    deviation of sqrt((kurtosis - 1)/n), with a kurtosis of at most 15, that of one squared normal variable."""
    _, hessian = exact(model, batches())
    off_diagonal = hessian - hessian.diag().diag()
    variance = 2 * (off_diagonal if distribution == "rademacher" else hessian).square().sum().item()
    n = 500
    result = curvature.hessian_trace(model, F.cross_entropy, batches(), probes=n, distribution=distribution)

    assert abs(result.value - hessian.trace()) < 5 * math.sqrt(variance / n)
    assert result.standard_error**2 * n == pytest.approx(variance, rel=5 * math.sqrt(14 / n))


def test_probes_are_the_same_in_all_batches(model):
    """Otherwise the value would depend on the batching, and the errors of batches would average out."""
    whole = [tuple(torch.cat(parts) for parts in zip(*batches(), strict=True))]
    results = [curvature.hessian_trace(model, F.cross_entropy, loader, probes=3) for loader in (batches(), whole)]

    assert results[0].value == pytest.approx(results[1].value, rel=1e-10)
    assert results[0].standard_error == pytest.approx(results[1].standard_error, rel=1e-8)


def test_seeds_give_independent_probes():
    model = mlp().double()
    singles = [curvature.hessian_trace(model, F.cross_entropy, batches(), probes=1, seed=s) for s in range(5)]
    again = curvature.hessian_trace(model, F.cross_entropy, batches(), probes=1, seed=4)

    assert len({single.value for single in singles}) == 5
    assert again.value == singles[4].value
    assert math.isnan(again.standard_error)


def test_standard_error_is_that_of_the_mean_over_probes():
    args = (mlp().double(), F.cross_entropy, batches())
    result = curvature.hessian_trace(*args, probes=4)
    # Probe k of seed 0 is the first probe of seed 0 plus k large primes.
    values = [curvature.hessian_trace(*args, probes=1, seed=1_000_003 * k).value for k in range(4)]
    assert result.value == pytest.approx(statistics.mean(values))
    assert result.standard_error == pytest.approx(statistics.stdev(values) / 2)


@pytest.mark.parametrize("estimator", ["gradient", "loss"])
@pytest.mark.parametrize("measure", [curvature.hessian_trace, curvature.directional_curvature])
def test_finite_differences_converge_quadratically(measure, estimator):
    model = mlp().double()
    expected = measure(model, F.cross_entropy, batches()).value
    errors = [
        measure(model, F.cross_entropy, batches(), estimator=estimator, rho=rho).value - expected for rho in (0.2, 0.1)
    ]

    assert 3.8 < errors[0] / errors[1] < 4.2  # rho² is divided by 4; the next order, rho^4, contributes 1 %
    assert abs(errors[1]) < 0.02 * abs(expected)


def test_gradient_norm_and_directional_curvature_are_exact(model):
    gradient, hessian = exact(model, batches())
    v = gradient / gradient.norm()

    assert float(curvature.gradient_norm(model, F.cross_entropy, batches())) == pytest.approx(gradient.norm().item())
    result = curvature.directional_curvature(model, F.cross_entropy, batches())
    assert result.value == pytest.approx((v @ hessian @ v).item(), rel=1e-9)

    direction = [torch.randn_like(p) for p in model.parameters()]
    d = flat(direction)
    result = curvature.directional_curvature(model, F.cross_entropy, batches(), direction=direction)
    assert result.value == pytest.approx((d @ hessian @ d / (d @ d)).item(), rel=1e-9)


def test_directional_curvature_equals_that_of_the_optimizer():
    """Both are in float64 along the same e, up to the 1e-12 that the optimizer adds to the norm."""
    model = mlp().double()
    (batch,) = batches(sizes=(6,))
    expected = curvature.directional_curvature(model, F.cross_entropy, [batch], estimator="gradient", rho=0.1)
    optimizer = CRSAM(model.parameters(), rho=0.1, lr=0.1, max_grad_norm=1e9, backend="torch")

    def closure():
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.stats.directional_curvature.item() == pytest.approx(expected.value, rel=1e-9)


def test_top_eigenvalues_are_exact(model):
    _, hessian = exact(model, batches())
    expected = torch.linalg.eigvalsh(hessian).flip(0)
    result = curvature.top_eigenvalues(model, F.cross_entropy, batches(), count=3, tolerance=1e-10)

    assert result.values == pytest.approx(expected[:3].tolist(), abs=1e-8)
    assert max(result.residuals) < 1e-6
    assert result.products > 3


def test_residuals_bound_the_error_of_eigenvalues():
    model = mlp().double()
    _, hessian = exact(model, batches())
    eigenvalues = torch.linalg.eigvalsh(hessian)
    result = curvature.top_eigenvalues(model, F.cross_entropy, batches(), count=2, tolerance=0.3)
    for value, residual in zip(result.values, result.residuals, strict=True):
        assert (eigenvalues - value).abs().min() <= residual


def test_trace_agrees_with_curvlinops():
    model = mlp().eval()
    params = list(model.parameters())
    operator = pytest.importorskip("curvlinops").HessianLinearOperator(
        model, nn.CrossEntropyLoss(), params, batches(torch.float32)
    )
    matrix = operator @ torch.eye(operator.shape[1])

    trace = curvature.hessian_trace(model, nn.CrossEntropyLoss(), batches(torch.float32), estimator="exact")
    assert trace.value == pytest.approx(matrix.trace().item(), rel=1e-5)  # fp32, about 50 sums
    top = curvature.top_eigenvalues(model, nn.CrossEntropyLoss(), batches(torch.float32), tolerance=1e-6)
    assert top.values[0] == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-4)


def test_training_mode_couples_batches_and_fixes_dropout():
    model = with_batch_norm().double()
    x, y = batches(sizes=(8,))[0]
    model[0].weight.data *= 3
    torch.manual_seed(5)
    reference = copy.deepcopy(model).train()
    params = list(reference.parameters())
    loss = F.cross_entropy(reference(x), y)
    gradient = flat(torch.autograd.grad(loss, params, create_graph=True))
    rows = [flat(torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)) for g in gradient]

    torch.manual_seed(5)
    result = curvature.hessian_trace(model, F.cross_entropy, [(x, y)], estimator="exact", training=True)
    assert result.value == pytest.approx(torch.stack(rows).trace().item(), rel=1e-9)
    evaluated = curvature.hessian_trace(model, F.cross_entropy, [(x, y)], estimator="exact")
    assert abs(evaluated.value / result.value - 1) > 1e-3
    # With masks that changed between the losses, their second difference would be of the order of 1/rho².
    options = {"training": True, "rho": 1e-3}
    curvatures = [
        curvature.directional_curvature(model, F.cross_entropy, [(x, y)], estimator=e, **options).value
        for e in ("hessian", "gradient", "loss")
    ]
    assert curvatures[1:] == pytest.approx([curvatures[0]] * 2, rel=1e-3)


class Fails(RuntimeError):
    pass


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("measure", ALL)
def test_the_model_and_the_generators_are_restored(measure, training, fails):
    model = with_batch_norm()
    model[3].eval()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    x, y = (torch.cat(parts) for parts in zip(*batches(torch.float32), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True)  # draws from the global generator
    calls = 0

    def loss_fn(output, target):
        nonlocal calls
        calls += 1
        if fails and calls == 2:
            raise Fails
        return F.cross_entropy(output, target)

    def everything():
        tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters()), torch.get_rng_state()]
        return [t.clone() for t in tensors], [m.training for m in model.modules()]

    before, modes = everything()
    if fails:
        with pytest.raises(Fails):
            measure(model, loss_fn, loader, training=training)
    else:
        measure(model, loss_fn, loader, training=training)
    after, modes_after = everything()
    assert modes_after == modes
    assert all(a.equal(b) for a, b in zip(after, before, strict=True))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("estimator", ["gradient", "loss"])
def test_finite_differences_restore_the_model(estimator):
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    curvature.hessian_trace(model, F.cross_entropy, batches(torch.float32), estimator=estimator)
    assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))


def test_bf16_autocast_changes_the_result_by_rounding_alone():
    """Weights and activations are rounded to 8 bits, about 0.4 % each, a few times."""
    model = mlp()
    loader = batches(torch.float32, sizes=(64, 32))
    plain = curvature.normalized_trace(model, F.cross_entropy, loader, estimator="exact")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = curvature.normalized_trace(model, F.cross_entropy, loader, estimator="exact")
        differences = curvature.directional_curvature(model, F.cross_entropy, loader, estimator="gradient", rho=0.5)
        direct = curvature.directional_curvature(model, F.cross_entropy, loader)

    assert rounded.value != plain.value
    assert rounded.value == pytest.approx(plain.value, rel=0.03)
    assert differences.value == pytest.approx(direct.value, rel=0.2)


def test_prints_only_significant_digits():
    assert str(curvature.Measurement(84.1629, 5.23, 16, 9)) == "84.2 ± 5.2"
    assert str(curvature.Measurement(-0.0123456, 0.00021, 16, 9)) == "-0.01235 ± 0.00021"
    assert str(curvature.Measurement(12345.678, 190.0, 16, 9)) == "12346 ± 190"
    assert str(curvature.Measurement(84.1629, 0.0, 0, 9)) == "84.1629"


def test_frozen_parameters_do_not_count():
    model = mlp().double()
    model[0].requires_grad_(False)
    gradient, hessian = exact(model, batches())
    result = curvature.normalized_trace(model, F.cross_entropy, batches(), estimator="exact")
    assert result.value == pytest.approx((hessian.trace() / gradient.norm()).item())
    assert result.trace.value == pytest.approx(hessian.trace().item())
    assert result.gradient_norm.value == pytest.approx(gradient.norm().item())


def test_ascent_gap_of_a_quadratic_is_exact():
    """L = ½ wᵀAw: one step raises the loss by the curvature along the gradient; the maximum within the ball lies on its
    boundary (found by brute force here)."""
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    a, rho = torch.tensor([[5.0], [1.0]], dtype=torch.float64), 0.5
    model.weight.data = torch.tensor([[0.05, 0.6]], dtype=torch.float64)
    w = model.weight.detach().clone()

    def loss_fn(output, target):
        return (model.weight.square() @ a / 2).mean() + 0 * output.sum()

    def loss_at(points):
        return (points.square() @ a / 2).squeeze(1)

    angles = torch.linspace(0, 2 * math.pi, 100_001, dtype=torch.float64)
    best = loss_at(w + rho * torch.stack([angles.cos(), angles.sin()], 1)).max() - loss_at(w)
    g = w * a.T
    one = loss_at(w + rho * g / g.norm()) - loss_at(w)

    result = curvature.ascent_gap(model, loss_fn, [(torch.zeros(1, 2).double(), torch.zeros(1))], rho=rho, steps=50)
    assert result.one_step == pytest.approx(one.item())
    assert result.many_steps == pytest.approx(best.item(), rel=1e-3)
    assert result.many_steps <= best * (1 + 1e-9)
    assert result.ratio == pytest.approx((one / best).item(), rel=1e-3)
    assert result.ratio < 0.9
    assert result.loss == pytest.approx(loss_at(w).item())


def test_functions_without_curvature_have_trace_zero():
    """The Hessian is zero if the gradient does not depend on the parameters; an unused parameter adds nothing."""
    model = nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(3, 1)})
    model.forward = lambda x: model["used"](x)
    loader = [(torch.ones(2, 3), torch.zeros(2))]
    assert curvature.hessian_trace(model, lambda output, _: output.mean(), loader).value == 0
    assert curvature.gradient_norm(model, lambda output, _: output.mean(), loader).value == 2


def test_inputs_may_have_several_tensors():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, a, b):
            return (self.w * a).sum(1) + b

    a, b, y = torch.tensor([[1.0, 3.0]]), torch.zeros(1), torch.zeros(1)
    for x in ((a, b), {"a": a, "b": b}):
        assert curvature.hessian_trace(Sum(), F.mse_loss, [(x, y)], estimator="exact").value == pytest.approx(20)
        # Without a target, the input gives the number of samples.
        loader = [(x, None), ([a.repeat(3, 1), b.repeat(3)], None)]
        result = curvature.hessian_trace(Sum(), lambda output, _: output.square().mean(), loader, estimator="exact")
        assert result.value == pytest.approx(20)
        assert result.samples == 4


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_printed_if_enabled(capsys, progress):
    curvature.hessian_trace(mlp().double(), F.cross_entropy, batches(), probes=1, progress=progress)
    assert ("3/3" in capsys.readouterr().out) == progress


BAD = {
    "no model": ((F.relu, F.cross_entropy, batches()), {}, TypeError, "model must be a torch.nn.Module"),
    "no loss": ((mlp().double(), None, batches()), {}, TypeError, "loss_fn must be callable"),
    "sum": ((mlp().double(), nn.CrossEntropyLoss(reduction="sum"), batches()), {}, ValueError, "'sum'"),
    "no scalar": ((mlp().double(), lambda o, y: o, batches()), {}, ValueError, r"of shape \(7, 4\)"),
    "no tensor": ((mlp().double(), lambda o, y: 1.0, batches()), {}, ValueError, "returned a float"),
    "no graph": ((mlp().double(), lambda o, y: o.detach().sum(), batches()), {}, ValueError, "does not depend"),
    "no loader": ((mlp().double(), F.cross_entropy, 3), {}, TypeError, "iterable of batches"),
    "generator": ((mlp().double(), F.cross_entropy, iter(batches())), {}, TypeError, "only once"),
    "no samples": ((mlp(), F.cross_entropy, batches(torch.float32, sizes=(0,))), {}, ValueError, "no samples"),
    "empty": ((mlp().double(), F.cross_entropy, []), {}, ValueError, "no batches"),
    "no pairs": ((mlp().double(), F.cross_entropy, [3]), {}, TypeError, r"pairs \(input, target\)"),
    "frozen": ((mlp().double().requires_grad_(False), F.cross_entropy, batches()), {}, ValueError, "no parameter"),
    "probes": ((mlp().double(), F.cross_entropy, batches()), {"probes": 0}, ValueError, "probes must be"),
    "rho": ((mlp().double(), F.cross_entropy, batches()), {"rho": 0.0}, ValueError, "rho must be"),
    "estimator": (
        (mlp().double(), F.cross_entropy, batches()),
        {"estimator": "x"},
        ValueError,
        "unknown estimator 'x'",
    ),
    "distribution": ((mlp().double(), F.cross_entropy, batches()), {"distribution": "x"}, ValueError, "unknown dis"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises_one_clear_line(case):
    args, options, error, message = BAD[case]
    with pytest.raises(error, match=message) as info:
        curvature.hessian_trace(*args, **options)
    assert "\n" not in str(info.value)


def test_other_bad_input_is_refused():
    args = (mlp().double(), F.cross_entropy, batches())
    with pytest.raises(ValueError, match="count must be from 1 to 48"):
        curvature.top_eigenvalues(*args, count=49)
    with pytest.raises(ValueError, match="parameters' shapes"):
        curvature.directional_curvature(*args, direction=[torch.ones(3)])
    with pytest.raises(ValueError, match="finite, nonzero norm"):
        curvature.directional_curvature(*args, direction=[torch.zeros_like(p) for p in args[0].parameters()])
    with pytest.raises(ValueError, match="steps must be"):
        curvature.ascent_gap(*args, steps=0)
    with pytest.raises(RuntimeError, match="did not converge"):
        curvature.top_eigenvalues(*args, count=20, tolerance=1e-12, max_iterations=1)
    with pytest.raises(RuntimeError, match="not finite"):
        curvature.top_eigenvalues(args[0], lambda output, _: (output * math.inf).mean(), args[2])


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match=r"needs scipy: pip install 'crsam_ext\[curvature\]'"):
        curvature.top_eigenvalues(mlp().double(), F.cross_entropy, batches())


@pytest.mark.require_cuda
def test_curvature_works_on_a_gpu():
    """The loader stays on the CPU. Probes are drawn on the device and therefore differ; an exact trace does not."""
    model, loader = with_batch_norm(), batches(torch.float32)
    expected = curvature.normalized_trace(model, F.cross_entropy, loader, estimator="exact")
    result = curvature.normalized_trace(model.cuda(), F.cross_entropy, loader, estimator="exact")
    assert result.value == pytest.approx(expected.value, rel=1e-4)
    for measure in ALL:
        measure(model, F.cross_entropy, loader)
