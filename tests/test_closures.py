"""What closures may return and do to gradients, and errors that name the closure."""

import pytest
import torch
from torch.nn import Parameter

from crsam_ext import CRSAM, flat

from .reference import EXACT, assert_close, update_tolerance

pytestmark = pytest.mark.on_cpu

RETURNS = {
    "tensor": lambda loss: loss,
    "one element": lambda loss: loss.view(1, 1),
    "float": lambda loss: loss.item(),
    "numpy": lambda loss: loss.detach().numpy()[()],
    "tuple": lambda loss: (loss, loss),
    "dict": lambda loss: {"loss": loss},
    "vector": lambda loss: loss * torch.ones(3),
    "string": lambda loss: "loss",
    "none": lambda loss: None,
}
LOSSES = ("tensor", "one element", "float", "numpy")


def problem(returns, backend_options, count=1, **options):
    param = Parameter(torch.linspace(0.5, 1, 4, dtype=torch.float64))
    optimizer = CRSAM([param], lr=0.1, **options, **backend_options)

    def closure():
        loss = param.pow(3).sum() / count
        loss.backward()
        return RETURNS[returns](loss)

    return param, optimizer, closure


@pytest.mark.parametrize("returns", RETURNS)
def test_single_closure_may_return_anything(returns, backend_options):
    param, optimizer, closure = problem(returns, backend_options)
    other, plain, plainly = problem("none", backend_options)
    result = optimizer.step(closure)
    plain.step(plainly)
    assert torch.equal(param, other)
    assert type(result) is type(RETURNS[returns](torch.ones((), dtype=torch.float64)))
    assert not isinstance(result, torch.Tensor) or not result.requires_grad
    assert optimizer.stats.as_dict()["loss"] is None or returns in LOSSES


@pytest.mark.parametrize("returns", RETURNS)
def test_closures_of_a_list_must_return_losses(returns, backend_options):
    param, optimizer, closure = problem(returns, backend_options, count=2)
    whole, plain, plainly = problem("float", backend_options)
    before = param.detach().clone()
    if returns in (*LOSSES, "none"):
        result, expected = optimizer.step([closure, closure]), plain.step(plainly)
        assert_close(param, whole, EXACT)
        if returns == "none":
            assert result is None
        else:
            assert_close(torch.as_tensor(result).reshape(()), expected, EXACT)
    else:
        with pytest.raises(TypeError, match="a closure in a list must return its loss"):
            optimizer.step([closure, closure])
        assert torch.equal(param, before)


def test_closures_of_a_list_must_agree(backend_options):
    param, optimizer, closure = problem("float", backend_options)
    before = param.detach().clone()
    for closures in ([closure, lambda: closure() and None], [lambda: closure() and None, closure]):
        with pytest.raises(TypeError, match="all must return a loss, or all None"):
            optimizer.step(closures)
        assert torch.equal(param, before)


@pytest.mark.parametrize("returns", RETURNS)
@pytest.mark.parametrize("form", ["one", "calls"])
def test_estimator_loss_needs_losses(form, returns, backend_options):
    options = {"regularizer": "log", "estimator": "loss"}
    param, optimizer, closure = problem(returns, backend_options, **options)
    other, plain, plainly = problem("tensor", backend_options, **options)
    before = param.detach().clone()

    def step(optimizer, closure):
        if form == "one":
            return optimizer.step(closure)
        for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
            call(zero_grad=True, loss=closure())

    if returns in LOSSES:
        step(optimizer, closure)
        step(plain, plainly)
        assert_close(param, other, EXACT)
    else:
        with pytest.raises(ValueError, match="return it from the closure, or pass it as loss="):
            step(optimizer, closure)
        assert torch.equal(param, before)


def test_losses_as_numbers_do_not_evict_other_constants(backend_options):
    """rho, alpha and beta stay on the device, however many steps pass new losses."""
    _, optimizer, closure = problem("float", backend_options, regularizer="log", estimator="loss")
    optimizer.step(closure)
    kept = dict(optimizer._flat._constants)
    for _ in range(70):
        optimizer.step(closure)
    assert all(optimizer._flat._constants.get(values) is tensor for values, tensor in kept.items())


def test_cache_of_constants_is_limited(backend_options, monkeypatch):
    """A scheduled rho adds a number in every step: the oldest is evicted, and the steps remain correct."""
    monkeypatch.setattr(flat, "_MAX_CONSTANTS", 4)
    param, optimizer, closure = problem("float", backend_options)
    other, plain, plainly = problem("float", backend_options)
    for step in range(10):
        optimizer.param_groups[0]["rho"] = 0.1 / (step + 1)
        plain.param_groups[0]["rho"] = torch.tensor(0.1 / (step + 1), dtype=torch.float64)
        optimizer.step(closure)
        plain.step(plainly)
        assert len(optimizer._flat._constants) <= 4
        assert torch.equal(param, other)
    assert (0.1,) in optimizer._flat._constants  # alpha, which every step uses


def test_returned_graph_does_not_outlive_its_pass(backend_options):
    """Two live graphs would double the memory of activations."""
    param = Parameter(torch.ones(3))
    optimizer, alive = CRSAM([param], lr=0.1, **backend_options), []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.watch = Watch()
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    class Watch:
        count = 0

        def __init__(self):
            Watch.count += 1
            alive.append(Watch.count)

        def __del__(self):
            Watch.count -= 1

    def closure():
        loss = Watched.apply(param).sum()
        loss.backward(retain_graph=True)
        return loss

    optimizer.step(closure)
    assert alive == [1, 1, 1]


# Changes of p.grad by closures ---------------------------------------------------------------------------------------


def cubic(p, q):
    return ((p + q) ** 3).detach()


@pytest.mark.parametrize("base", ["native", "wrapped", "combine"])
@pytest.mark.parametrize("size", [5, 140_000])  # too large to share a row with others
def test_one_tensor_can_be_the_gradient_of_two_parameters(size, base, backend_options):
    class Other(torch.optim.SGD):
        """A base optimizer without native support."""

    start = [torch.randn(size, dtype=torch.float64) for _ in range(2)]
    params = [Parameter(x.clone()) for x in start]
    cls = Other if base == "wrapped" else torch.optim.SGD
    optimizer = CRSAM(params, cls, lr=1.0, rho=1.0, alpha=0.3, beta=0.2, **backend_options)

    def backward():
        params[0].grad = params[1].grad = cubic(*params)

    if base == "combine":
        for call in (optimizer.first_step, optimizer.second_step, optimizer.combine, optimizer.step):
            if call != optimizer.step:
                backward()
            call()
    else:
        optimizer.step(backward)
    g0 = cubic(*start)
    e = g0 / (2 * g0.square().sum()).sqrt()
    up, down = cubic(*(x + e for x in start)), cubic(*(x - e for x in start))
    g = up + 0.3 * (up + down - 2 * g0) + 0.2 * (up - down)
    for p, x in zip(params, start, strict=True):
        assert_close(p, x - g, 1e2 * EXACT)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("alias", [lambda p: p.detach(), lambda p: p.data], ids=["detach", "data"])
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_parameter_can_be_its_own_gradient(rho, alias, base, backend_options):
    """The gradient of the squared norm shares the memory that the perturbation writes."""
    trained = []
    for make in (alias, lambda p: p.detach().clone()):
        param = Parameter(torch.linspace(0.5, 1, 5, dtype=torch.float64))
        optimizer = CRSAM([param], base, lr=0.1, rho=rho, **backend_options)
        for _ in range(3):
            optimizer.step(lambda param=param, make=make: setattr(param, "grad", make(param)))
        trained.append(param)
    assert_close(*trained, EXACT)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize(("dtype", "grad_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
                                                   (torch.float32, torch.float64)], ids=str)  # fmt: skip
@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.parametrize("form", ["closure", "combine"])
def test_gradients_of_another_dtype_are_converted(form, rho, dtype, grad_dtype, base, backend_options):
    """They are rounded to the parameter's dtype, and p.grad keeps its dtype."""
    trained = []
    for sets in (True, False):
        param = Parameter(torch.linspace(0.5, 1, 8).to(dtype))
        if sets:
            param.grad_dtype = grad_dtype
        optimizer = CRSAM([param], base, lr=0.01, rho=rho, **backend_options)

        def backward(param=param, sets=sets):
            param.grad = (2 * param.detach()).to(grad_dtype if sets else dtype)

        for _ in range(2):
            if form == "closure" or rho == 0:
                optimizer.step(backward)
            else:
                for call in (optimizer.first_step, optimizer.second_step, optimizer.combine):
                    backward()
                    call()
                optimizer.step()
        assert param.grad.dtype == (grad_dtype if sets else dtype)
        trained.append(param.float())
    assert_close(*trained, 0.02 if torch.bfloat16 in (dtype, grad_dtype) else update_tolerance(torch.float32, 2))


def test_nothing_changes_if_a_gradient_cannot_be_returned(backend_options):
    """No error occurs after the first write of an update."""
    param = Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = CRSAM([param], torch.optim.Adam, lr=0.1, **backend_options)
    closure = lambda: param.square().sum().backward()  # noqa: E731
    optimizer.step(closure)
    before = [param.detach().clone(), *(v.clone() for v in optimizer.state[param].values())]

    def broken(*_):
        raise MemoryError

    for name in ("set_gradients", "take_gradients", "share_memory"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimizer.operators.host, name, broken)
            with pytest.raises(MemoryError):
                optimizer.step(closure)
        after = [param.detach().clone(), *optimizer.state[param].values()]
        assert all(map(torch.equal, before, after)), name
