"""torch's default dtype and device change nothing; nor do numbers of other types."""

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from crsam_ext import CRSAM, GradScaler, Scheduled, curvature

from .reference import EXACT, assert_close

pytestmark = pytest.mark.on_cpu

BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.01}),
    "wrapped": (torch.optim.RMSprop, {}),
}
FORMS = {
    "linear": {},
    "log": {"regularizer": "log"},
    "loss": {"regularizer": "log", "estimator": "loss"},
    "asam": {"adaptive": True},
    "clipped": {"max_grad_norm": 0.1, "curvature_interval": 2},
    "tensors": {"lr": torch.tensor(0.0123, dtype=torch.float64)},
}


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


def train(base, form, backend_options, steps=5):
    params = [Parameter(torch.linspace(0.3, 1.3, 6 + i, dtype=torch.float32)) for i in range(3)]
    cls, options = BASES[base]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.0234}]
    options = {"lr": 0.0123, **options, **FORMS[form]}
    if base == "wrapped":
        options["lr"] = float(options["lr"])
    optimizer = CRSAM(groups, cls, rho=0.1234, **options, **backend_options)
    scheduler = LambdaLR(Scheduled(optimizer, "rho"), lambda step: 0.9**step)

    def closure():
        loss = sum(p.pow(3).sum() for p in params)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
        scheduler.step()
    numbers = [v for v in optimizer.stats.as_dict().values() if isinstance(v, float)]
    state = [v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    return params, state, numbers


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_default_dtype_changes_nothing(form, base, default_dtype, backend_options):
    expected = train(base, form, backend_options)
    torch.set_default_dtype(default_dtype)
    found = train(base, form, backend_options)
    for x, y in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        if base == "wrapped" and x.ndim == 0:  # torch's own counter has the default dtype
            assert x == y
        else:
            assert torch.equal(x, y)
            assert x.dtype == y.dtype
    assert found[2] == expected[2]


def test_counter_exceeds_the_integers_of_the_default_dtype(default_dtype, backend_options):
    torch.set_default_dtype(default_dtype)
    param = Parameter(torch.ones(2, dtype=torch.float32))
    optimizer = CRSAM([param], torch.optim.AdamW, lr=1e-3, rho=0.0, **backend_options)
    for _ in range(300):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert optimizer.state[param]["step"] == 300
    assert optimizer.state[param]["step"].dtype == torch.float32


def test_default_dtype_does_not_change_scaled_gradients(default_dtype, backend_options):
    trained = []
    for dtype in (torch.float32, default_dtype):
        torch.set_default_dtype(dtype)
        param = Parameter(torch.linspace(0.3, 1.3, 6, dtype=torch.float32))
        optimizer, scaler = CRSAM([param], lr=0.1, regularizer="log", **backend_options), GradScaler("cpu", 1000.0)

        def closure(param=param, scaler=scaler):
            loss = param.pow(3).sum()
            scaler.scale(loss).backward()
            return loss

        scaler.step(optimizer, closure)
        scaler.update()
        for call in (optimizer.first_step, optimizer.second_step):
            closure()
            call(zero_grad=True)
        closure()
        optimizer.combine(grad_scale=1000.0)
        trained.append((param.detach(), param.grad))
    for x, y in zip(*trained, strict=True):
        assert torch.equal(x, y)


def test_default_dtype_does_not_change_curvature(default_dtype):
    model, data = torch.nn.Linear(3, 2).float(), [(torch.randn(4, 3), torch.randn(4, 2))]
    expected = curvature.hessian_trace(model, torch.nn.MSELoss(), data, probes=3)
    torch.set_default_dtype(default_dtype)
    assert curvature.hessian_trace(model, torch.nn.MSELoss(), data, probes=3) == expected


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_default_device_changes_nothing(form, base, backend_options, device):
    """All tensors are on the parameters' device or the CPU; a tensor on the default device (meta) would have no
    values."""
    expected = train(base, form, backend_options)
    params = [Parameter(torch.linspace(0.3, 1.3, 6 + i, dtype=torch.float32)) for i in range(3)]
    cls, options = BASES[base]
    options = {"lr": 0.0123, **options, **FORMS[form]}
    if base == "wrapped":
        options["lr"] = float(options["lr"])
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.0234}]

    def closure():
        with torch.device("cpu"):
            loss = sum(p.pow(3).sum() for p in params)
            loss.backward()
        return loss

    with torch.device("meta"):
        optimizer = CRSAM(groups, cls, rho=0.1234, **options, **backend_options)
        scheduler = LambdaLR(Scheduled(optimizer, "rho"), lambda step: 0.9**step)
        if base != "wrapped":  # torch's own optimizers create their counters on the default device
            for _ in range(5):
                optimizer.step(closure)
                scheduler.step()
    for _ in range(5 if base == "wrapped" else 0):
        optimizer.step(closure)
        scheduler.step()
    for x, y in zip(params, expected[0], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("number", [np.int64, np.int32, lambda x: torch.tensor(x), bool])
def test_intervals_may_be_any_integer_type(number, backend_options):
    param = Parameter(torch.ones(2, dtype=torch.float64))
    value = number(1 if number is bool else 2)
    optimizer = CRSAM([param], lr=0.1, interval=value, curvature_interval=value, **backend_options)
    assert optimizer.interval == optimizer.curvature_interval == int(value)
    optimizer.step(lambda: param.square().sum().backward())


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", None, np.float64(2.0)], ids=str)
def test_invalid_intervals_are_refused(value):
    for name in ("interval", "curvature_interval"):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, but is {value}"):
            CRSAM([Parameter(torch.ones(2))], lr=0.1, **{name: value})


def test_options_may_be_numpy_numbers(backend_options):
    trained = []
    for number in (float, np.float64, np.float32):
        param = Parameter(torch.linspace(0.3, 1.3, 6, dtype=torch.float64))
        options = {name: number(0.125) for name in ("lr", "rho", "alpha", "beta", "momentum", "max_grad_norm")}
        optimizer = CRSAM([param], **options, **backend_options)
        for _ in range(3):
            optimizer.step(lambda param=param: param.pow(3).sum().backward())
        trained.append(param)
    for other in trained[1:]:
        assert_close(other, trained[0], EXACT)


# Uninitialized modules -----------------------------------------------------------------------------------------------


def test_lazy_modules_are_accepted(backend_options):
    """As with torch's optimizers, parameters may be uninitialized until the first batch, which comes before the first
    step or within it."""
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.LazyBatchNorm1d(), torch.nn.Linear(3, 2))
    optimizer = CRSAM(model.parameters(), lr=0.1, model=model, **backend_options)
    x = torch.randn(8, 4)
    closure = lambda: model(x).square().mean().backward()  # noqa: E731
    optimizer.step(closure)
    assert all(p in optimizer._flat._slots for p in model.parameters())
    optimizer.add_param_group({"params": torch.nn.LazyLinear(3).parameters()})
    with pytest.raises(ValueError, match="run a batch through the model before a step"):
        optimizer.step(closure)
