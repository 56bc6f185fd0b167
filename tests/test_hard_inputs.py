"""Edge cases: each works as documented, or raises a one-line error that says what is wrong."""

import copy
import math
import warnings

import pytest
import torch
from torch.nn import Parameter

from crsam_ext import CRSAM

from .reference import (
    EXACT,
    Reference,
    assert_close,
    assert_same,
    batch,
    closure_of,
    evaluator,
    network_loss,
    network_params,
    run_three_calls,
    update_tolerance,
)

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
BASES = {
    "momentum": (SGD, "sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "adamw": (ADAMW, "adamw", {"lr": 0.02, "weight_decay": 0.1}),
}
bases = pytest.mark.parametrize("base", BASES)


class Pair:
    """CRSAM and the reference over the same parameters, making the same steps."""

    def __init__(self, params, backend_options, base="momentum", **options):
        cls, name, base_options = BASES[base]
        self.params = params
        self.expected = Reference([{"params": params}], name, **{**base_options, **options})
        self.optimizer = CRSAM(params, cls, **{**base_options, **options}, **backend_options)

    def step(self, loss_of):
        """Make a step; parameters that ``loss_of(params)`` does not use have no gradient."""
        loss = self.optimizer.step(closure_of(loss_of, self.params))
        expected = self.expected.step(evaluator(loss_of))
        assert_close(loss, expected, EXACT, "loss")
        self.check()

    def check(self, tolerance=EXACT):
        assert_same(self.params, self.expected, tolerance)


def tensors(*shapes, device="cpu", dtype=torch.float64):
    return [Parameter(torch.randn(s, dtype=torch.float64).to(device, dtype)) for s in shapes]


def smooth(params):
    return sum((i + 1) * p.sin().sum() + p.square().mean() for i, p in enumerate(params))


# Participating parameters --------------------------------------------------------------------------------------------


@bases
def test_unused_parameter_does_not_change(base, backend_options, device):
    """Without a gradient in any pass, it has no weight decay, no state and no counted step."""
    pair = Pair(tensors((3,), (4, 2), (), device=device), backend_options, base)
    unused = pair.params[1].detach().clone()
    for _ in range(3):
        pair.step(lambda p: smooth([p[0], p[2]]))
    assert torch.equal(pair.params[1], unused)
    assert not pair.optimizer.state.get(pair.params[1])
    pair.step(smooth)


@bases
@pytest.mark.parametrize("used", [{0}, {1}, {2}, {0, 2}, {1, 2}], ids=str)
def test_gradient_in_some_passes_counts_as_zero_in_the_others(used, base, backend_options, device):
    """In a pass without its gradient, zero is used; without a gradient in the first pass, the parameter is not
    perturbed."""
    pair = Pair(tensors((3,), (5,), (2, 2), device=device), backend_options, base, rho=0.4)
    points, count = [], 0

    def loss_of(p):
        nonlocal count
        points.append(p[1].detach().clone())
        chosen = p if count % 3 in used else [p[0], p[2]]
        count += 1
        return smooth(chosen)

    for _ in range(3):
        points.clear()
        pair.step(loss_of)
        assert torch.equal(points[0], points[1]) == (0 not in used)


@bases
def test_parameters_can_be_frozen_and_thawed(base, backend_options, device):
    pair = Pair(tensors((3,), (5,), (2, 2), device=device), backend_options, base)
    frozen = pair.params[1]
    frozen.requires_grad_(False)
    kept = frozen.detach().clone()

    def active(p):
        return smooth([p[0], p[2]])

    for _ in range(2):
        pair.step(active)
    assert torch.equal(frozen, kept)
    frozen.requires_grad_(True)
    for _ in range(2):
        pair.step(smooth)
    frozen.requires_grad_(False)
    pair.step(active)
    frozen.requires_grad_(True)
    pair.step(smooth)
    if base == "adamw":
        assert [int(pair.optimizer.state[p]["step"]) for p in pair.params] == [6, 3, 6]


@bases
def test_parameters_may_alternate_between_steps(base, backend_options, device):
    """Each parameter has its own bias correction and first moments."""
    pair = Pair(tensors((3,), (5,), (4,), (2, 2), device=device), backend_options, base)
    subsets = [[0, 1], [2, 3], [0, 1, 2, 3], [1], [0, 3], [1, 2], [0, 1], [2, 3]]
    for subset in subsets:
        pair.step(lambda p: smooth([p[i] for i in subset]))  # noqa: B023
    if base == "adamw":
        taken = [sum(i in subset for subset in subsets) for i in range(4)]
        assert [int(pair.optimizer.state[p]["step"]) for p in pair.params] == taken


def test_alternating_parameters_match_torch(backend_options, device):
    """Compare with torch.optim.AdamW itself, with rho = 0."""
    ours = tensors((3,), (5,), (4,), device=device)
    theirs = copy.deepcopy(ours)
    optimizer, expected = CRSAM(ours, ADAMW, lr=0.05, rho=0, **backend_options), ADAMW(theirs, lr=0.05)
    for subset in ([0, 1], [1, 2], [2], [0, 2], [0, 1, 2]):
        optimizer.step(closure_of(lambda p: smooth([p[i] for i in subset]), ours))  # noqa: B023
        expected.zero_grad()
        smooth([theirs[i] for i in subset]).backward()
        expected.step()
        for p, q in zip(ours, theirs, strict=True):
            assert_close(p, q, EXACT)


def test_many_subsets_of_parameters_may_take_part(backend_options, device):
    """There are more sets of participants than the cache holds."""
    pair = Pair(tensors(*[(3,)] * 7, device=device), backend_options, "adamw")
    for number in range(1, 100):
        pair.step(lambda p: smooth([x for i, x in enumerate(p) if number >> i & 1]))  # noqa: B023


@bases
def test_tied_parameter_counts_once(base, backend_options, device):
    """The same object twice in the list is one parameter."""
    first, second = tensors((4, 4), (3,), device=device)
    cls, name, options = BASES[base]
    optimizer = CRSAM([first, second, first], cls, **options, **backend_options)
    expected = Reference([{"params": [first, second]}], name, **options)
    for _ in range(3):
        optimizer.step(closure_of(lambda p: smooth([p[0], p[1], p[0]]), [first, second]))
        expected.step(evaluator(lambda p: smooth([p[0], p[1], p[0]])))
        assert_same([first, second], expected)


def test_parameters_that_share_memory_are_refused(backend_options, device):
    data = torch.randn(6, device=device)
    params = [Parameter(data), Parameter(data[2:])]
    optimizer = CRSAM(params, lr=0.1, **backend_options)
    with pytest.raises(ValueError, match="share memory without being the same object"):
        optimizer.step(closure_of(smooth, params))


def test_adjacent_parameters_of_one_storage_are_accepted(backend_options, device):
    data = torch.randn(10, dtype=torch.float64, device=device)
    pair = Pair([Parameter(data[:4]), Parameter(data[4:7]), Parameter(data[7:].view(3, 1))], backend_options)
    for _ in range(2):
        pair.step(smooth)


def test_empty_list_is_refused(backend_options):
    with pytest.raises(ValueError, match="empty parameter list"):
        CRSAM([], lr=0.1, **backend_options)


@bases
def test_empty_and_scalar_parameters_are_accepted(base, backend_options, device):
    pair = Pair(tensors((0,), (), (1,), (3, 0, 2), (), device=device), backend_options, base)
    for _ in range(3):
        pair.step(lambda p: smooth([p[1], p[2], p[4]]) + p[0].sum() + p[3].sum())


def test_step_without_any_gradient_is_refused(backend_options, device):
    params = tensors((3,), device=device)
    optimizer = CRSAM(params, lr=0.1, **backend_options)
    for call in (lambda: optimizer.step(lambda: 0.0), optimizer.first_step):
        with pytest.raises(RuntimeError, match="gradient"):
            call()
    optimizer.step(closure_of(smooth, params))  # the next step works


def test_later_pass_without_gradients_is_refused(backend_options, device):
    params = tensors((3,), device=device)
    kept = params[0].detach().clone()
    optimizer = CRSAM(params, lr=0.1, **backend_options)
    calls = []

    def closure():
        calls.append(0)
        if len(calls) == 1:
            smooth(params).backward()

    with pytest.raises(RuntimeError, match="gradient"):
        optimizer.step(closure)
    assert torch.equal(params[0], kept)


def test_frozen_parameters_alone_are_refused(backend_options, device):
    params = tensors((3,), device=device)
    params[0].requires_grad_(False)
    optimizer = CRSAM(params, lr=0.1, **backend_options)
    with pytest.raises(RuntimeError, match="gradient"):
        optimizer.step(lambda: 0.0)


@bases
@pytest.mark.parametrize("regularizer", ["linear", "log"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_zero_gradient_norm_leaves_weight_decay(adaptive, regularizer, base, backend_options, device):
    """Without a direction, every pass is at w, and weight decay still acts."""
    options = {"regularizer": regularizer, "adaptive": adaptive}
    pair = Pair(tensors((3,), (2, 2), device=device), backend_options, base, **options)
    for _ in range(2):
        pair.step(lambda p: sum((x * 0).sum() for x in p))
    assert all(p.isfinite().all() for p in pair.params)
    assert pair.optimizer.stats.as_dict()["skipped"] == 0


# Memory: strides, dtypes, kinds of tensors ---------------------------------------------------------------------------

LAYOUTS = {
    "channels_last": lambda t: t.view(2, 3, 2, 5).contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.view(6, 10).t(),
    "permuted": lambda t: t.view(2, 3, 10).permute(2, 0, 1),
    "strided-slice": lambda t: torch.stack([t, t + 1], 1)[:, 0],
    "column-slice": lambda t: torch.cat([t.view(6, 10), t.view(6, 10)], 1)[:, :10],
}


@bases
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts_are_accepted(layout, base, backend_options, device):
    """Dense strides are kept; a parameter with gaps becomes dense. Values do not depend on the layout."""
    data = LAYOUTS[layout](torch.randn(60, dtype=torch.float64, device=device))
    pair = Pair([Parameter(data), *tensors((3,), device=device)], backend_options, base)
    assert pair.params[0].stride() == data.stride()
    weights = torch.randn(data.shape, dtype=torch.float64, device=device)
    for _ in range(3):
        pair.step(lambda p: smooth(p) + (weights * p[0]).sum())
    if "slice" not in layout:
        assert pair.params[0].stride() == data.stride()


def test_expanded_parameter_is_refused(backend_options, device):
    with pytest.raises(ValueError, match="expanded"):
        CRSAM([Parameter(torch.randn(1, device=device).expand(5))], lr=0.1, **backend_options)


@bases
def test_gradient_may_have_other_strides(base, backend_options, device):
    param = tensors((4, 6), device=device)[0]
    pair = Pair([param], backend_options, base)
    g = torch.randn(6, 4, dtype=torch.float64, device=device)

    def closure():
        param.grad = (g * param.detach().t()).t()
        assert param.grad.stride() != param.stride()

    for _ in range(3):
        pair.optimizer.step(closure)
        pair.expected.step(lambda w: (0.0, [g.t() * w[0]]))
        pair.check()


@bases
def test_gradient_may_be_a_view_of_a_reused_storage(base, backend_options, device):
    """As with DDP and gradient_as_bucket_view, the next pass overwrites the gradients of the last one."""
    params = tensors((4,), (3, 2), device=device)
    pair = Pair(params, backend_options, base)
    storage = torch.empty(10, dtype=torch.float64, device=device)
    views = [storage[:4], storage[4:].view(3, 2)]

    def closure():
        for p, v in zip(params, views, strict=True):
            p.grad = v.copy_(2 * p.detach() + p.detach() ** 3)

    for _ in range(3):
        pair.optimizer.step(closure)
        pair.expected.step(lambda w: (0.0, [2 * x + x**3 for x in w]))
        pair.check()


@bases
def test_reused_gradient_buffers_are_refused(base, backend_options, device):
    """A closure that writes the same tensors in every pass, as a captured graph does, would overwrite g0."""
    params = tensors((4,), (3, 2), device=device)
    pair = Pair(params, backend_options, base)
    buffers = [torch.empty_like(p) for p in params]

    def closure():
        for p, v in zip(params, buffers, strict=True):
            p.grad = v.detach().copy_(2 * p.detach() + p.detach() ** 3)

    kept = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="pass 2 overwrote a gradient of an earlier pass"):
        pair.optimizer.step(closure)
    assert all(torch.equal(p, w) for p, w in zip(params, kept, strict=True))


@bases
def test_several_dtypes_share_one_norm(base, backend_options, device):
    """The norm is over all dtypes; each parameter is updated in its compute dtype."""
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    params = [Parameter(torch.randn(50, device=device).to(d)) for d in dtypes for _ in range(2)]
    grads = [(torch.rand_like(p) + 0.5) * torch.randn_like(p).sign() for p in params]
    pair = Pair(params, backend_options, base, max_grad_norm=1.0)
    given = [[(g * s).to(g.dtype) for g in grads] for s in (1.0, 1.25, 0.75)]

    def closure():
        for p, g in zip(params, next(passes), strict=True):
            p.grad = g.clone()

    for _ in range(3):
        passes = iter(given)
        pair.optimizer.step(closure)
        again = iter(given)
        pair.expected.step(lambda w: (0.0, next(again)))  # noqa: B023
    for p, w in zip(params, pair.expected.w, strict=True):
        value = pair.optimizer.state[p].get("master_param", p)
        assert_close(value, w, update_tolerance(torch.float32, 3))


def test_sparse_parameter_is_refused(backend_options):
    param = Parameter(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match="plain strided tensors"):
        CRSAM([param], lr=0.1, **backend_options)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtypes_are_refused(dtype, backend_options, device):
    param = Parameter(torch.zeros(3, device=device).to(dtype))
    with pytest.raises(ValueError, match=f"{dtype}"):
        CRSAM([param], lr=0.1, **backend_options)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_frozen_parameters_may_have_any_dtype(dtype, backend_options, device):
    pair = Pair(tensors((3,), device=device), backend_options)
    frozen = Parameter(torch.ones(3, device=device).to(dtype), requires_grad=False)
    pair.optimizer.add_param_group({"params": [frozen]})
    pair.step(smooth)
    assert torch.equal(frozen.to(torch.complex64), torch.ones(3, device=device, dtype=torch.complex64))


def test_sparse_gradient_is_refused(backend_options, device):
    embedding = torch.nn.Embedding(5, 3, sparse=True).to(device)
    kept = embedding.weight.detach().clone()
    optimizer = CRSAM(embedding.parameters(), lr=0.1, **backend_options)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step(lambda: embedding(torch.tensor([1, 2], device=device)).sum().backward())
    assert torch.equal(embedding.weight, kept)


def test_large_finite_gradient_does_not_skip_the_step(backend_options, device):
    """It is finite, although its square overflows float32."""
    if backend_options["backend"] != "torch":
        pytest.skip(
            "this backend sums in float32, where the square of such an element overflows: see Operators.grad_norm"
        )
    param = Parameter(torch.zeros(4, device=device))
    optimizer = CRSAM([param], lr=1e-20, rho=1e-3, **backend_options)

    def closure():
        param.grad = torch.full_like(param, 1e20)

    optimizer.step(closure)
    assert optimizer.stats.as_dict()["skipped"] == 0
    assert_close(param, torch.full((4,), -1.0), update_tolerance(torch.float32, 1))


def test_refused_group_is_removed(backend_options, device):
    pair = Pair(tensors((3,), device=device), backend_options)
    with pytest.raises(ValueError, match="complex64"):
        pair.optimizer.add_param_group({"params": [Parameter(torch.zeros(2, dtype=torch.complex64, device=device))]})
    assert len(pair.optimizer.param_groups) == 1


def test_gradient_may_have_a_graph(backend_options, device):
    """After backward(create_graph=True), the gradient is used, and its graph is freed."""
    pair = Pair(tensors((3,), device=device), backend_options)

    def closure():
        loss = smooth(pair.params)
        loss.backward(create_graph=True)
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about create_graph, once per process
        pair.optimizer.step(closure)
    pair.expected.step(evaluator(smooth))
    pair.check()
    assert not pair.params[0].grad.requires_grad


# Models that move ----------------------------------------------------------------------------------------------------


@bases
@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_model_can_change_its_dtype(dtype, when, base, backend_options, device):
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).to(device)
    cls, _, options = BASES[base]
    optimizer = CRSAM(model.parameters(), cls, **options, **backend_options)
    x = torch.randn(8, 4, device=device)

    def closure():
        loss = model(x.to(next(model.parameters()).dtype)).float().square().mean()
        loss.backward()
        return loss

    if when == "between":
        optimizer.step(closure)
        name = "momentum_buffer" if base == "momentum" else "exp_avg"
        kept = {p: optimizer.state[p][name].clone() for p in model.parameters()}
    model.to(dtype)
    w = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), w, strict=True))
    assert all(p.dtype == dtype for p in model.parameters())
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.step(closure)
    for p, q in zip(model.parameters(), w, strict=True):
        assert not torch.equal(p, q)
        state = optimizer.state[p]
        assert ("master_param" in state) == (dtype != torch.float64)
        if base == "adamw":
            assert state["step"] == (3 if when == "between" else 2)
    if when == "between":
        assert all(kept[p].shape == optimizer.state[p][name].shape for p in model.parameters())


@bases
def test_model_can_change_its_dtype_and_back(base, backend_options, device):
    """After half() and float(), the current values of the parameters are used, not an old master."""
    params = tensors((6,), device=device, dtype=torch.float32)
    cls, _, options = BASES[base]
    optimizer = CRSAM(params, cls, **{**options, "lr": 0.0, "weight_decay": 0.0}, **backend_options)
    for dtype in (torch.float16, torch.float32, torch.bfloat16, torch.float64):
        params[0].data = params[0].data.to(dtype)
        params[0].grad = None
        kept = params[0].detach().clone()
        optimizer.step(closure_of(smooth, params))
        assert torch.equal(params[0], kept)
        assert params[0].dtype == dtype


@bases
def test_parameter_can_be_re_pointed_between_steps(base, backend_options, device):
    pair = Pair(tensors((3,), (5, 2), device=device), backend_options, base)
    for step in range(4):
        pair.step(smooth)
        if step == 1:
            pair.params[0].data = pair.params[0].data.clone()
        if step == 2:
            new = torch.randn(5, 2, dtype=torch.float64, device=device)
            pair.params[1].data = new
            pair.expected.w[1] = new.clone()


@pytest.mark.parametrize("form", ["closure", "calls"])
def test_re_pointing_in_the_middle_of_a_step_is_refused(form, backend_options, device):
    params = tensors((3,), (5,), device=device)
    kept = [p.detach().clone() for p in params]
    optimizer = CRSAM(params, lr=0.1, **backend_options)
    calls = []

    def closure():
        calls.append(0)
        if len(calls) == 2:
            params[0].data = params[0].data + 1
        return closure_of(smooth, params)()

    def step():
        if form == "closure":
            optimizer.step(closure)
        else:
            run_three_calls(optimizer, lambda _: closure())

    with pytest.raises(RuntimeError, match="moved or changed between the passes"):
        step()
    optimizer.restore()
    assert torch.equal(params[1], kept[1])
    assert torch.equal(params[0], kept[0]), "w of a parameter that was re-pointed at w + e"
    optimizer.step(closure_of(smooth, params))


def test_reshaping_in_the_middle_of_a_step_is_refused(backend_options, device):
    """The parameter is re-pointed at the same memory with another shape."""
    params = tensors((2, 3), (5,), device=device)
    kept = [p.detach().clone() for p in params]
    optimizer = CRSAM(params, lr=0.1, **backend_options)

    def closure():
        if optimizer.pass_index == 1:
            params[0].data = params[0].data.view(3, 2)
        return closure_of(smooth, params)()

    with pytest.raises(RuntimeError, match="moved or changed between the passes"):
        optimizer.step(closure)
    assert torch.equal(params[0].view(2, 3), kept[0])
    assert torch.equal(params[1], kept[1])


@bases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_edits_between_steps_take_effect(dtype, base, backend_options, device):
    """Edits are made through p.data, under no_grad, or by the model's load_state_dict. With masters, only changed
    elements are copied."""
    param = Parameter(torch.randn(8, device=device).to(dtype))
    cls, _, options = BASES[base]
    optimizer = CRSAM([param], cls, **options, **backend_options)
    optimizer.step(closure_of(smooth, [param]))
    param.data[2] = 5.0
    with torch.no_grad():
        param[3] = -7.0
    now = param.detach().clone()
    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    before = optimizer.state[param].get("master_param", param).detach().clone()
    optimizer.step(closure_of(smooth, [param]))
    assert torch.equal(param, now)
    if "master_param" in optimizer.state[param]:
        master = optimizer.state[param]["master_param"]
        assert master[2] == 5.0
        assert master[3] == -7.0
        unchanged = torch.tensor([0, 1, 4, 5, 6, 7], device=device)
        assert torch.equal(master[unchanged], before[unchanged]), "unchanged elements keep the master's full precision"


# Closures and the order of calls -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 1.5, "tensor"])
def test_closure_may_return_anything(value, backend_options, device):
    params = tensors((3,), device=device)
    optimizer = CRSAM(params, lr=0.1, **backend_options)

    def closure():
        loss = smooth(params)
        loss.backward()
        return loss if value == "tensor" else value

    expected = smooth(params).item()
    loss = optimizer.step(closure)
    if value == "tensor":
        assert loss.device.type == device.type
        loss = loss.item()
    assert loss == (pytest.approx(expected) if value == "tensor" else value)
    stats = optimizer.stats.as_dict()
    assert stats["loss"] == loss


def test_loss_estimator_needs_a_loss(backend_options, device):
    params = tensors((3,), device=device)
    kept = params[0].detach().clone()
    optimizer = CRSAM(params, lr=0.1, regularizer="log", estimator="loss", **backend_options)
    with pytest.raises(ValueError, match="needs the loss of every pass"):
        optimizer.step(lambda: smooth(params).backward())
    assert torch.equal(params[0], kept)
    with pytest.raises(ValueError, match="needs the loss of every pass"):
        run_three_calls(optimizer, lambda _: smooth(params).backward())
    assert torch.equal(params[0], kept)


def test_loss_estimator_refuses_two_objectives(backend_options, device):
    first, second = tensors((3,), (2,), device=device)
    groups = [{"params": [first]}, {"params": [second], "maximize": True}]
    optimizer = CRSAM(groups, lr=0.1, regularizer="log", estimator="loss", **backend_options)
    with pytest.raises(ValueError, match="one objective"):
        optimizer.step(closure_of(smooth, [first, second]))


CALLS = ("first_step", "second_step", "third_step", "step", "step_with_closure")


@pytest.mark.parametrize("weights", [(0.1, 0.1), (0.0, 0.0)], ids=["three", "two"])
@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("call", CALLS)
def test_calls_in_the_wrong_order_are_refused(call, done, weights, backend_options, device):
    """Each call after each number of calls is either allowed, or names the call that is due and changes nothing."""
    params = tensors((3,), device=device)
    alpha, beta = weights
    optimizer = CRSAM(params, lr=0.1, alpha=alpha, beta=beta, **backend_options)
    number = 3 if alpha else 2
    for name in CALLS[: min(done, number - 1)]:
        optimizer.zero_grad()
        smooth(params).backward()
        getattr(optimizer, name)()
    done = min(done, number - 1)
    optimizer.zero_grad()
    smooth(params).backward()
    last = done == number - 1
    allowed = {"first_step": done == 0, "second_step": done == 1, "third_step": done == 2 and last, "step": last,
               "step_with_closure": done == 0}[call]  # fmt: skip
    kept = params[0].detach().clone()

    def make_call():
        if call == "step_with_closure":
            optimizer.step(closure_of(smooth, params))
        else:
            getattr(optimizer, call)()

    if allowed:
        make_call()
        assert not torch.equal(params[0], kept)
        return
    with pytest.raises(RuntimeError, match=f"{CALLS[done]}()"):
        make_call()
    assert torch.equal(params[0], kept)
    for name in CALLS[done:number]:  # the step continues as if the call had not happened
        smooth(params).backward()
        getattr(optimizer, name)(zero_grad=True)
    assert optimizer.stats.steps == 1


def test_step_within_a_closure_is_refused(backend_options, device):
    params = tensors((3,), device=device)
    kept = params[0].detach().clone()
    optimizer = CRSAM(params, lr=0.1, **backend_options)
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        optimizer.step(lambda: optimizer.step(closure_of(smooth, params)))
    assert torch.equal(params[0], kept)


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["default", "group"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["rho", "alpha", "beta"])
def test_invalid_numbers_are_refused(name, value, where, backend_options):
    params = tensors((3,))
    given = {name: value}
    groups, options = ([{"params": params}], given) if where == "default" else ([{"params": params, **given}], {})
    with pytest.raises(ValueError, match=f"{name} must be .* but is {value}"):
        CRSAM(groups, lr=0.1, **options, **backend_options)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"gamma": 0.1, "alpha": 0.1}, TypeError, "gamma is another name of alpha"),
        ({"momemtum": 0.9}, TypeError, "'momemtum': neither CRSAM nor SGD"),
        ({"regularizer": "quadratic"}, ValueError, "unknown regularizer 'quadratic'.*linear, log"),
        ({"estimator": "hessian"}, ValueError, "unknown estimator 'hessian'.*gradient, loss"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be positive"),
        ({"max_grad_norm": math.nan}, ValueError, "max_grad_norm must be positive"),
        ({"max_regularizer_ratio": -1.0}, ValueError, "max_regularizer_ratio must be at least 0"),
        ({"max_regularizer_ratio": math.nan}, ValueError, "max_regularizer_ratio must be at least 0"),
        ({"lr": -1.0}, ValueError, "learning rate"),
        ({"base_optimizer": "sgd"}, TypeError, "base_optimizer must be a class or an instance"),
        ({"base_optimizer": torch.optim.LBFGS}, ValueError, "LBFGS"),
        ({"backend": "opencl"}, ValueError, "unknown backend 'opencl'.*torch"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_invalid_arguments_are_refused(arguments, error, match):
    with pytest.raises(error, match=match) as raised:
        CRSAM(tensors((3,)), **{"lr": 0.1, **arguments})
    assert "\n" not in str(raised.value)


def test_unavailable_backends_report_the_reason():
    from crsam_ext import available_backends

    for name, verdict in available_backends().items():
        if verdict != "available":
            with pytest.raises(RuntimeError, match=f"'{name}' is unavailable: "):
                CRSAM(tensors((3,)), lr=0.1, backend=name)


def test_auto_reports_unused_backends():
    from crsam_ext import available_backends
    from crsam_ext.backends import passed_over

    optimizer = CRSAM(tensors((3,)), lr=0.1)
    assert optimizer.backend == "torch"
    for name, verdict in available_backends().items():
        if verdict != "available":
            assert f"{name} {verdict}" in repr(optimizer)
    assert "backend=torch," in repr(CRSAM(tensors((3,)), lr=0.1, backend="torch"))
    assert list(passed_over(devices=["cpu"])) == list(passed_over(compile=True)) == ["cuda", "triton"]


def test_auto_prefers_cuda_then_triton(monkeypatch):
    from crsam_ext.backends import cuda, passed_over, triton

    monkeypatch.setattr(triton, "why_unavailable", lambda: None)
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(cuda, "why_unavailable", lambda: "no")
    assert passed_over(devices=["cuda"]) == {"cuda": "unavailable: no"}
    assert passed_over(devices=["cuda", "cpu"])["triton"] == "does not run on cpu"
    monkeypatch.setattr(triton, "interpreted", lambda: True)
    assert passed_over(devices=["cuda"])["triton"] == "is interpreted, which is for debugging"
    monkeypatch.setattr(cuda, "why_unavailable", lambda: None)
    assert passed_over(devices=["cuda"]) == {}


def test_instances_of_base_optimizers_are_checked(backend_options):
    params = tensors((3,), (2,))
    with pytest.raises(ValueError, match="not the parameters of the base optimizer"):
        CRSAM(params, SGD(params[:1], lr=0.1), **backend_options)
    with pytest.raises(TypeError, match="lr given with an instance of SGD"):
        CRSAM(params, SGD(params, lr=0.1), lr=0.2, **backend_options)
    with pytest.raises(ValueError, match="LBFGS"):
        CRSAM(params, torch.optim.LBFGS(params), **backend_options)


@pytest.mark.parametrize(
    ("cls", "name"), [(torch.optim.RMSprop, "alpha"), (torch.optim.ASGD, "alpha"), (torch.optim.Adadelta, "rho")]
)
def test_base_optimizers_may_have_options_of_the_same_name(cls, name, backend_options, device):
    """If a name has two meanings, an argument of CRSAM is used by CRSAM."""
    params = tensors((3,), (2, 2), device=device)
    optimizer = CRSAM(params, cls, lr=0.01, **{name: 0.3}, **backend_options)
    expected = Reference([{"params": params}], lambda w: cls(w, lr=0.01), **{name: 0.3})
    for _ in range(3):
        optimizer.step(closure_of(smooth, params))
        expected.step(evaluator(smooth))
        assert_same(params, expected)


def test_params_may_be_a_generator(backend_options, device):
    """This includes an instance as the base, although both read the parameters."""
    model = torch.nn.Linear(3, 2, device=device)
    for base in (SGD, SGD(model.parameters(), lr=0.1)):
        options = {"lr": 0.1} if base is SGD else {}
        assert len(CRSAM(model.parameters(), base, **options, **backend_options).param_groups[0]["params"]) == 2


# User actions --------------------------------------------------------------------------------------------------------


@bases
def test_two_optimizers_may_alternate(base, backend_options, device):
    """Both optimize the same model: each finds its parameters again, and keeps its own state."""
    cls, name, options = BASES[base]
    params = tensors((3,), (4, 2), device=device)
    optimizers = [CRSAM(params, cls, **options, **backend_options) for _ in range(2)]
    expected = [Reference([{"params": params}], name, **options) for _ in range(2)]
    w = expected[0].w
    for turn in (0, 1, 1, 0, 1, 0):
        optimizers[turn].step(closure_of(smooth, params))
        expected[turn].w = list(w)
        expected[turn].step(evaluator(smooth))
        w = expected[turn].w
        assert_same(params, expected[turn])


def test_two_optimizers_may_share_a_model(backend_options, device):
    params = tensors((3,), (4, 2), device=device)
    optimizers = [CRSAM([p], lr=0.1, momentum=0.9, **backend_options) for p in params]
    kept = params[1].detach().clone()
    optimizers[0].step(closure_of(smooth, params))
    assert torch.equal(params[1], kept)
    optimizers[1].step(closure_of(smooth, params))
    assert not torch.equal(params[1], kept)


def test_momentum_that_is_switched_on_and_off_works(backend_options, device):
    pair = Pair(tensors((3,), (4, 2), device=device), backend_options, momentum=0.0)
    for momentum in (0.0, 0.9, 0.9, 0.0, 0.9):
        pair.optimizer.param_groups[0]["momentum"] = momentum
        pair.expected.options[0]["momentum"] = momentum
        pair.step(smooth)


@bases
def test_user_may_clear_the_state(base, backend_options, device):
    pair = Pair(tensors((3,), (4, 2), device=device), backend_options, base)
    pair.step(smooth)
    pair.step(smooth)
    for how in ("all", "one"):
        if how == "all":
            pair.optimizer.state.clear()
        else:
            del pair.optimizer.state[pair.params[0]]
        for i in (0, 1) if how == "all" else (0,):
            w = pair.expected.w[i]
            pair.expected.state[i] = {"momentum_buffer": None, "step": 0, "exp_avg": 0 * w, "exp_avg_sq": 0 * w}
        pair.step(smooth)
        pair.step(smooth)


def test_named_parameters_are_accepted(backend_options, device):
    model = torch.nn.Linear(3, 2, device=device, dtype=torch.float64)
    optimizer = CRSAM(model.named_parameters(), SGD, lr=0.1, momentum=0.9, **backend_options)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    x = torch.randn(4, 3, device=device, dtype=torch.float64)
    optimizer.step(lambda: model(x).square().sum().backward())
    state = optimizer.state_dict()
    assert state["param_groups"][0]["param_names"] == ["weight", "bias"]
    optimizer.load_state_dict(state)
    optimizer.step(lambda: model(x).square().sum().backward())


@bases
def test_lstm_works(base, backend_options, device):
    """Its weights are views of one block for cuDNN, and it stores further references to them."""
    lstm = torch.nn.LSTM(3, 4, num_layers=2).to(device, torch.float64)
    pair = Pair(list(lstm.parameters()), backend_options, base)
    x = torch.randn(5, 2, 3, device=device, dtype=torch.float64)
    names = [name for name, _ in lstm.named_parameters()]

    def loss_of(params):
        return torch.func.functional_call(lstm, dict(zip(names, params, strict=True)), (x,))[0].square().sum()

    def closure():
        loss = lstm(x)[0].square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        pair.optimizer.step(closure)
        pair.expected.step(evaluator(loss_of))
        pair.check()


@pytest.mark.parametrize("where", ["around", "within"])
def test_autocast_works(where, backend_options, device):
    """The cache of low-precision weights does not outlive the point to which they belong."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).to(device)
    x = torch.randn(32, 16, device=device)
    optimizer = CRSAM(model.parameters(), lr=0.5, rho=1.0, **backend_options)

    def loss_now():
        return model(x).square().mean()

    def closure():
        with torch.autocast(
            device.type, torch.bfloat16, enabled=where == "within" or torch.is_autocast_enabled(device.type)
        ):
            loss = loss_now()
        loss.backward()
        return loss

    with torch.autocast(device.type, torch.bfloat16, enabled=where == "around"):
        optimizer.step(closure)
        stats = optimizer.stats.as_dict()
        after = closure().item()
    assert stats["loss_ascent"] > stats["loss"] * 1.05
    assert stats["loss_descent"] != stats["loss"]
    with torch.autocast(device.type, torch.bfloat16):
        assert after == loss_now().item()


def test_autocast_works_with_calls(backend_options, device):
    model = torch.nn.Linear(16, 1).to(device)
    x = torch.randn(32, 16, device=device)
    optimizer = CRSAM(model.parameters(), lr=0.5, rho=1.0, **backend_options)
    losses = []

    def backward(_):
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss.item())

    with torch.autocast(device.type, torch.bfloat16):
        run_three_calls(optimizer, backward)
        backward(None)
    assert losses[1] > losses[0] * 1.05
    assert len(set(losses)) == 4


@bases
def test_tensor_learning_rate_works(base, backend_options, device):
    cls, name, options = BASES[base]
    params, data = network_params(device=device), batch(device=device)
    extra = {"foreach": False} if base == "momentum" else {}
    rate = torch.tensor(options["lr"], dtype=torch.float64)
    optimizer = CRSAM(params, cls, **{**options, "lr": rate}, **extra, **backend_options)
    expected = Reference([{"params": params}], name, **options)
    for _ in range(3):
        optimizer.step(closure_of(lambda p: network_loss(p, data), params))
        expected.step(evaluator(lambda p: network_loss(p, data)))
        assert_same(params, expected)
        rate.mul_(0.5)
        expected.options[0]["lr"] *= 0.5


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_steps_work_in_other_contexts(context, backend_options, device):
    pair = Pair(tensors((3,), (4, 2), device=device), backend_options)
    with context():
        pair.optimizer.step(closure_of(smooth, pair.params))
        enabled = torch.is_grad_enabled()
    assert enabled == (context is torch.enable_grad)
    pair.expected.step(evaluator(smooth))
    pair.check()
    assert all(p.requires_grad and p.is_leaf for p in pair.params)


def test_inference_mode_is_refused(backend_options, device):
    """Gradients cannot be computed in it; the parameters do not change."""
    pair = Pair(tensors((3,), device=device), backend_options)
    pair.step(smooth)
    with torch.inference_mode(), pytest.raises(RuntimeError):
        pair.optimizer.step(closure_of(smooth, pair.params))
    pair.check()
    pair.step(smooth)


def test_parameter_on_the_meta_device_is_refused(backend_options):
    param = Parameter(torch.empty(3, device="meta"))
    optimizer = CRSAM([param], lr=0.1, **backend_options)
    with pytest.raises(ValueError, match="meta device"):
        optimizer.step(lambda: param.sum().backward())
