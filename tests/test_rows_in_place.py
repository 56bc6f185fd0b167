"""Parameters with shared memory: they are not moved, and train as other parameters, bit for bit."""

import multiprocessing

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import Parameter

from crsam_ext import CRSAM, flat
from crsam_ext.flat import _is_held_by_others

pytestmark = pytest.mark.on_cpu

SHAPES = [(700, 300), (3, 5), (7,), ()]  # the first is too large to share a row in backend "torch"
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "wrapped": (torch.optim.RMSprop, {"lr": 0.01}),
}
bases = pytest.mark.parametrize("base", BASES)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


# Ways to share a parameter's memory, given the values of a tensor: each returns the parameter and a function that reads
# the shared memory.


def twin(values):
    param = Parameter(values.clone())
    frozen = Parameter(param.data, requires_grad=False)
    return param, lambda: frozen


def detached(values):
    param = Parameter(values.clone())
    view = param.detach()
    return param, lambda: view


def a_part(values):
    whole = torch.zeros(values.numel() + 3, dtype=values.dtype)
    param = Parameter(whole[3:].view(values.shape))
    param.data.copy_(values)
    return param, lambda: whole[3:].view(values.shape)


def columns(values):
    """Return a parameter with gaps in its memory."""
    whole = torch.zeros(*values.shape, 2, dtype=values.dtype)
    param = Parameter(whole[..., 0])
    param.data.copy_(values)
    return param, lambda: whole[..., 0]


def transposed(values):
    """Return a parameter whose dimensions have another order in memory."""
    whole = values.clone().permute(list(reversed(range(values.ndim)))).contiguous()
    param = Parameter(whole.permute(list(reversed(range(values.ndim)))))
    return param, lambda: whole.permute(list(reversed(range(values.ndim))))


def of_numpy(values):
    array = values.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[values.element_size()]).numpy().copy()
    param = Parameter(torch.from_numpy(array).view(values.dtype))
    return param, lambda: torch.from_numpy(array).view(values.dtype)


def shared(values):
    param = Parameter(values.clone())
    param.share_memory_()
    handle = param.untyped_storage()
    return param, lambda: torch.empty(0, dtype=values.dtype).set_(handle, 0, values.shape)


HOLDERS = [twin, detached, a_part, columns, transposed, of_numpy, shared]
holders = pytest.mark.parametrize("hold", HOLDERS, ids=lambda hold: hold.__name__)


def loss_of(params):
    return sum((i + 1) * (p.sin().float().square() + (p.float() - 1).square()).mean() for i, p in enumerate(params))


def train(params, backend_options, base, steps=4, **options):
    """Return the parameters after some steps, and the optimizer."""
    cls, base_options = BASES[base]
    optimizer = CRSAM(params, cls, rho=0.5, **base_options, **options, **backend_options)

    def closure():
        loss = loss_of(params)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return optimizer


def pair(hold, dtype, device):
    """Return unshared parameters, and equal shared ones with the functions that read them."""
    values = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in SHAPES]
    held = [hold(x) for x in values]
    own = [Parameter(param.detach().clone()) for param, _ in held]  # in the same order in memory
    return own, [param for param, _ in held], [see for _, see in held]


def same(params, others):
    return all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@bases
@dtypes
@holders
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_parameters_are_trained_in_place_with_the_same_bits(rho, hold, dtype, base, backend_options, device):
    own, held, seen = pair(hold, dtype, device)
    addresses = [p.data_ptr() for p in held]
    cls, options = BASES[base]
    for params in (own, held):
        optimizer = CRSAM(params, cls, rho=rho, **options, **backend_options)
        for _ in range(3):
            optimizer.step(lambda params=params: loss_of(params).backward())
    assert [p.data_ptr() for p in held] == addresses
    assert same(held, own)
    assert same(held, [see() for see in seen])


@dtypes
@pytest.mark.parametrize("flatten", [True, False])
def test_flatten_does_not_change_the_result(flatten, dtype, backend_options, device):
    """The option decides whether unshared parameters are moved, not their values."""
    own, others, _ = pair(twin, dtype, device)
    own, others = own, [Parameter(p.detach().clone()) for p in others]
    addresses = [p.data_ptr() for p in others]
    train(own, backend_options, "sgd")
    train(others, backend_options, "sgd", flatten=flatten)
    assert same(own, others)
    assert ([p.data_ptr() for p in others] == addresses) != flatten


@holders
@dtypes
@pytest.mark.parametrize("when", [1, 2, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, "nan"])
def test_parameters_are_restored_in_place(error, when, dtype, hold, backend_options, device):
    _, held, seen = pair(hold, dtype, device)
    optimizer = train(held, backend_options, "sgd", steps=1)
    before, passes = [p.detach().clone() for p in held], []

    def closure():
        loss_of(held).backward()
        passes.append(0)
        if len(passes) == when:
            if error == "nan":
                held[1].grad[0, 2] = torch.nan
            else:
                raise error

    if error == "nan":
        optimizer.step(closure)
        assert optimizer.stats.skipped == 1
    else:
        with pytest.raises(error):
            optimizer.step(closure)
    assert same(held, before)
    assert same(held, [see() for see in seen])


@holders
def test_change_through_shared_memory_takes_effect(hold, backend_options, device):
    """A step starts from values written through the other tensor."""
    own, held, seen = pair(hold, torch.float32, device)
    for params in (own, held):
        optimizer = train(params, backend_options, "sgd", steps=1)
        with torch.no_grad():
            for p, see in zip(params, seen, strict=True):
                (p if params is own else see()).mul_(0.5)
        optimizer.step(lambda params=params: loss_of(params).backward())
    assert same(held, own)


@holders
def test_shared_parameters_may_lack_gradients_in_some_passes(hold, backend_options, device):
    own, held, _ = pair(hold, torch.bfloat16, device)
    for params in (own, held):
        optimizer = CRSAM(params, lr=0.1, momentum=0.9, rho=0.5, **backend_options)
        for _ in range(2):
            optimizer.step(lambda params=params, o=optimizer: loss_of(params[: 4 - o.pass_index]).backward())
            optimizer.step(lambda params=params, o=optimizer: loss_of(params[2 - o.pass_index :]).backward())
    assert same(held, own)


@pytest.mark.parametrize("options", [{"adaptive": True}, {"stochastic_rounding": True}, {"max_grad_norm": 0.1},
                                     {"alpha": 0, "beta": 0}, {"curvature_interval": 2}, {"interval": 2},
                                     {"reuse": True, "interval": 2},
                                     {"regularizer": "log"}], ids=lambda o: next(iter(o)))  # fmt: skip
@pytest.mark.parametrize("hold", [columns, twin], ids=["columns", "twin"])
def test_options_have_the_same_effect_in_place(hold, options, backend_options, device):
    own, held, _ = pair(hold, torch.bfloat16, device)
    for params in (own, held):
        train(params, backend_options, "sgd", **options)
    assert same(held, own)


@holders
def test_both_points_at_once_work_in_place(hold, backend_options, device):
    def model_of(params):
        model = nn.Module()
        model.params = nn.ParameterList(params)
        return model

    own, held, seen = pair(hold, torch.float64, device)
    for params in (own, held):
        model = model_of(params)
        optimizer = CRSAM(model.parameters(), lr=0.1, rho=0.5, **backend_options)
        for _ in range(2):
            optimizer.step(lambda model=model: loss_of(list(model.params)), parallel=model)
    assert same(held, own)
    assert same(held, [see() for see in seen])


def test_shared_and_unshared_parameters_may_be_mixed(backend_options, device):
    """They share one row of backend "torch"."""
    own, _, _ = pair(twin, torch.float32, device)
    mixed = [Parameter(p.detach().clone()) for p in own]
    holder = mixed[1].detach()
    for params in (own, mixed):
        train(params, backend_options, "adamw")
    assert same(mixed, own)
    assert torch.equal(holder, mixed[1])


@pytest.mark.parametrize("hold", [a_part, columns, of_numpy, shared], ids=lambda hold: hold.__name__)
def test_sharing_is_detected_without_torchs_use_count(hold, backend_options, device, monkeypatch):
    """The properties of the storage still count: its size, whether it is resizable, whether it is in shared memory."""
    monkeypatch.setattr(flat, "storage_is_shared", lambda storage: False)
    _, held, seen = pair(hold, torch.float32, device)
    train(held, backend_options, "sgd", steps=2)
    assert same(held, [see() for see in seen])


def test_alias_of_the_flat_buffer_stays_valid(backend_options, device):
    """A tensor that shares a parameter's memory after the first step keeps sharing it when parameters are adopted
    again."""
    trained, generating = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = CRSAM(trained.parameters(), lr=0.1, rho=0.0, **backend_options)
    closure = lambda: trained(torch.ones(2, 4)).square().sum().backward()  # noqa: E731
    optimizer.step(closure)
    generating.load_state_dict(trained.state_dict(), assign=True)
    optimizer.add_param_group({"params": [Parameter(torch.ones(2))]})
    for _ in range(2):
        optimizer.step(closure)
        assert same(generating.parameters(), trained.parameters())


def test_freed_references_do_not_keep_parameters_in_place(backend_options, device):
    """A freed graph, gradients and a freed state dict do not count as sharing: parameters are moved into the flat
    buffer, and moved again after a change."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LSTM(4, 3))
    model.state_dict()
    assert not any(_is_held_by_others(p, {}) for p in model.parameters())
    optimizer = CRSAM(model.parameters(), lr=0.1, **backend_options)
    model(torch.ones(2, 4))[0].sum().backward()
    optimizer.first_step()
    optimizer.restore()
    for _ in range(2):
        (bucket,) = optimizer._flat.buckets
        assert all(slot.home is None for slot in bucket.slots)
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))]})
        optimizer.step(lambda: model(torch.randn(2, 4))[0].sum().backward())


class FlatteningLSTM(nn.LSTM):
    """As on CUDA, flatten_parameters() copies the weights into a new block and re-points the parameters."""

    def flatten_parameters(self):
        weights = getattr(self, "_flat_weights", [])
        if not weights or not all(isinstance(w, torch.Tensor) for w in weights):
            return
        with torch.no_grad():
            block, start = torch.cat([w.reshape(-1) for w in weights]), 0
            for w in weights:
                w.set_(block[start : start + w.numel()].view(w.shape))
                start += w.numel()


@bases
@pytest.mark.parametrize("rho", [0.0, 0.3])
@pytest.mark.parametrize("form", ["closure", "calls"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_parameters_re_pointed_in_every_forward_are_followed(dtype, form, rho, base, backend_options, device):
    cls, options = BASES[base]
    x, trained = torch.randn(3, 2, 40, dtype=dtype), []
    for flattens in (False, True):
        torch.manual_seed(0)
        lstm = (FlatteningLSTM if flattens else nn.LSTM)(40, 200).to(dtype)  # weights of two kinds of rows
        optimizer = CRSAM(lstm.parameters(), cls, rho=rho, **options, **backend_options)

        def backward(lstm=lstm, flattens=flattens):
            if flattens:
                lstm.flatten_parameters()
            lstm(x)[0].square().mean().backward()

        for _ in range(3):
            if form == "closure":
                optimizer.step(backward)
            else:
                for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
                    backward()
                    call(zero_grad=True)
        trained.append(list(lstm.parameters()))
    assert same(*trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("passes", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_re_pointed_parameter_is_restored_after_an_interrupt(passes, dtype, backend_options, device):
    """w is written to the parameter's new memory."""
    params = [Parameter(torch.randn(s).to(dtype)) for s in SHAPES]
    optimizer = train(params, backend_options, "sgd", steps=1)
    before = [p.detach().clone() for p in params]

    def closure():
        if optimizer.pass_index in passes:
            for p in params:
                p.data = p.data.clone()
        if optimizer.pass_index == 2:
            raise KeyboardInterrupt
        loss_of(params).backward()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert same(params, before)


@pytest.mark.parametrize(("base", "how"), [("sgd", "strides"), ("sgd", "dtype"), ("sgd", "both"), ("adamw", "strides")])
def test_layout_may_change_between_steps(base, how, backend_options, device):
    """Address and shape do not change; torch's own optimizer gives the expected result."""
    cls, options = BASES[base]
    options = {**options, "weight_decay": 0.0}
    trained = []
    for make in (cls, lambda p, **o: CRSAM(p, cls, rho=0.0, **o, **backend_options)):
        torch.manual_seed(0)
        weight = Parameter(torch.randn(4, 4, dtype=torch.float32))
        optimizer = make([weight], **options)
        for step in range(4):
            optimizer.zero_grad()
            (weight * torch.arange(16).view(4, 4)).sin().sum().backward()
            optimizer.step()
            if step in (0, 2) and how != "dtype":
                weight.data = weight.data.t()
            if step == 1 and how != "strides":
                weight.data = weight.data.double()
                weight.grad = None
        trained.append(weight.detach())
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "overlapping columns"])
def test_parameters_that_overlap_are_refused(layout, backend_options, device):
    whole = torch.randn(6, 8)
    parts = {"contiguous": (whole[:4], whole[3:]), "overlapping columns": (whole[:, :5], whole[:, 4:])}[layout]
    params, before = [Parameter(part) for part in parts], whole.clone()
    optimizer = CRSAM(params, lr=0.1, **backend_options)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step(lambda: sum(p.square().sum() for p in params).backward())
    assert torch.equal(whole, before)


def test_parameters_that_interleave_are_accepted(backend_options, device):
    whole = torch.randn(6, 8)
    params = [Parameter(whole[:, :4]), Parameter(whole[:, 4:])]
    CRSAM(params, lr=0.1, rho=0.0, **backend_options).step(lambda: sum(p.square().sum() for p in params).backward())
    assert torch.equal(torch.cat([p.detach() for p in params], 1), whole)


def test_parameter_without_memory_is_refused(backend_options, device):
    """Steps work as long as parameters have their own storages; a step is refused while one has no memory."""
    model = nn.Linear(3, 3)
    optimizer = CRSAM(model.parameters(), lr=0.1, flatten=False, **backend_options)
    closure = lambda: model(torch.ones(2, 3)).square().mean().backward()  # noqa: E731
    optimizer.step(closure)
    storage, kept = model.weight.untyped_storage(), model.weight.detach().clone()
    size = storage.nbytes()
    model.weight.grad = torch.ones(3, 3)
    storage.resize_(0)
    with pytest.raises(ValueError, match="no memory"):
        optimizer.first_step()
    storage.resize_(size)
    model.weight.data.copy_(kept)
    before = kept.clone()
    optimizer.step(closure)
    assert not torch.equal(model.weight, before)


def train_shared(model, backend):
    torch.set_num_threads(1)
    x = torch.ones(4, 3)
    optimizer = CRSAM(model.parameters(), lr=0.1, momentum=0.9, backend=backend)

    def closure():
        # The gradients of model(x).square().sum() / 2, without backward(): it fails in a fork of a process in which
        # autograd has started a thread, as it may in another test.
        with torch.no_grad():
            y = model(x)
            model.weight.grad, model.bias.grad = y.T @ x, y.sum(0)

    for _ in range(3):
        optimizer.step(closure)


def test_hogwild_works(backend_options, device):
    """The parent process sees the updates of its child."""
    model, alone = nn.Linear(3, 2), nn.Linear(3, 2)
    alone.load_state_dict(model.state_dict())
    model.share_memory()
    process = multiprocessing.get_context("fork").Process(target=train_shared, args=(model, backend_options["backend"]))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    train_shared(alone, backend_options["backend"])
    assert same(model.parameters(), alone.parameters())


def test_a_mapped_file_is_trained_in_place(tmp_path, backend_options, device):
    path = tmp_path / "weights"
    np.arange(12, dtype=np.float32).tofile(path)
    param = Parameter(torch.from_file(str(path), shared=True, size=12, dtype=torch.float32))
    train([param], backend_options, "sgd")
    assert np.array_equal(np.fromfile(path, np.float32), param.detach().numpy())
    assert not np.array_equal(np.fromfile(path, np.float32), np.arange(12))
