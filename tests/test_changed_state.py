"""State and groups that users change, on the optimizer or its base; torch's own optimizers give the expected result."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import Parameter

from crsam_ext import CRSAM

from .reference import EXACT, assert_close

pytestmark = pytest.mark.on_cpu

SGD, ADAM = torch.optim.SGD, torch.optim.Adam
LARGE = 2**17 + 1  # elements of a parameter that has a row to itself in backend "torch"


def params_of(*shapes, dtype=torch.float64):
    torch.manual_seed(0)
    return [Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in shapes]


def compare(cls, options, backend_options, change, shapes=((2,), (3,), (LARGE,)), steps=8, tolerance=EXACT):
    """Compare steps with rho = 0 of ours and torch's optimizer; ``change(optimizer, params, step)`` runs after each
    step."""
    trained = []
    for make in (cls, lambda p, **o: CRSAM(p, cls, rho=0.0, **o, **backend_options)):
        params = params_of(*shapes)
        optimizer = make(params, **options)
        for step in range(steps):
            optimizer.zero_grad()
            sum((i + 1) * p.sin().sum() for i, p in enumerate(params)).backward()
            optimizer.step()
            change(optimizer, params, step)
        trained.append(params)
    for ours, theirs in zip(trained[1], trained[0], strict=True):
        assert_close(ours, theirs, tolerance)
    return optimizer


def zeroed_in_place(state, name):
    state[name].zero_()


def zeroed_by_data(state, name):
    state[name].data.zero_()


def zeroed_by_a_view(state, name):
    state[name].detach().view(-1)[:] = 0


def replaced(state, name):
    state[name] = torch.zeros_like(state[name])


ways = pytest.mark.parametrize(
    "way", [zeroed_in_place, zeroed_by_data, zeroed_by_a_view, replaced], ids=lambda way: way.__name__
)


@ways
@pytest.mark.parametrize("names", [("step",), ("exp_avg", "exp_avg_sq"), ("step", "exp_avg", "exp_avg_sq")], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_adam_state_of_one_parameter_can_change(which, names, way, backend_options, device):
    def change(optimizer, params, step):
        if step in (2, 5):
            for name in names:
                way(optimizer.state[params[which]], name)

    compare(ADAM, {"lr": 0.1}, backend_options, change)


@ways
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_momentum_of_one_parameter_can_change(dampening, way, backend_options, device):
    def change(optimizer, params, step):
        if step == 2:
            way(optimizer.state[params[1]], "momentum_buffer")

    compare(SGD, {"lr": 0.1, "momentum": 0.9, "dampening": dampening}, backend_options, change)


@pytest.mark.parametrize("how", ["cleared", "popped", "assigned"])
def test_state_can_be_discarded(how, backend_options, device):
    def change(optimizer, params, step):
        if step != 2:
            return
        if how == "cleared":
            optimizer.state.clear()
        elif how == "popped":
            optimizer.state.pop(params[1])
        else:
            optimizer.state = type(optimizer.state)(dict)

    compare(ADAM, {"lr": 0.1}, backend_options, change)


def moments(p, form):
    """Return zeros like p, in separate memory or as a part of a larger tensor."""
    if form == "own":
        return torch.zeros_like(p)
    if form == "part":
        return torch.zeros(p.numel() + 5, dtype=p.dtype)[5:].view_as(p)
    return torch.zeros(*p.shape, 2, dtype=p.dtype)[..., 1]


@pytest.mark.parametrize("form", ["own", "part", "columns"])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_assigned_state_is_used(base, form, backend_options, device):
    """It is updated in place, and changes by its owner take effect."""
    cls, options = {"sgd": (SGD, {"lr": 0.1, "momentum": 0.9}), "adam": (ADAM, {"lr": 0.1})}[base]
    handed = []

    def change(optimizer, params, step):
        names = ("momentum_buffer",) if base == "sgd" else ("exp_avg", "exp_avg_sq", "step")
        if step == 1:
            given = [{name: moments(optimizer.state[p][name], form) for name in names} for p in params]
            handed.append(given)
            for p, state in zip(params, given, strict=True):
                optimizer.state[p].update(state)
        if step == 4:
            for state in handed[-1]:
                state[names[0]].mul_(0.5)
            if base == "adam":
                handed[-1][1]["step"].zero_()

    compare(cls, options, backend_options, change)
    ours, theirs = handed[1], handed[0]
    for x, y in zip(ours, theirs, strict=True):
        for name in x:
            assert_close(x[name].double(), y[name].double(), EXACT)
            assert x[name].abs().sum() > 0


def test_assigned_numpy_state_is_used(backend_options, device):
    """The array is updated, also after parameters are adopted again."""
    (param,) = params_of((3,))
    optimizer = CRSAM([param], lr=0.1, momentum=0.9, **backend_options)
    array = np.zeros(3)
    optimizer.state[param]["momentum_buffer"] = torch.from_numpy(array)
    for _ in range(3):
        optimizer.step(lambda: param.sin().sum().backward())
        assert array.tolist() == optimizer.state[param]["momentum_buffer"].tolist()
        assert array.any()
        optimizer.add_param_group({"params": params_of((2,))})


def test_assigned_state_keeps_its_identity(backend_options, device):
    """This holds even if parameters are adopted again."""
    (param,) = params_of((3,))
    optimizer = CRSAM([param], lr=0.1, momentum=0.9, **backend_options)
    handed = optimizer.state[param]["momentum_buffer"] = torch.zeros(3, dtype=torch.float64)
    for _ in range(2):
        optimizer.step(lambda: param.sin().sum().backward())
        optimizer.add_param_group({"params": params_of((2,))})
        assert optimizer.state[param]["momentum_buffer"] is handed


@pytest.mark.parametrize("form", ["optimizer", "base"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_loading_does_not_write_into_the_checkpoint(dtype, form, backend_options, device):
    params, others = params_of((3,), (LARGE,), dtype=dtype), params_of((3,), (LARGE,), dtype=dtype)
    optimizer, resumed = (CRSAM(p, ADAM, lr=0.1, **backend_options) for p in (params, others))
    optimizer.step(lambda: sum(p.sin().sum() for p in params).backward())
    checkpoint = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(checkpoint["state"])
    (resumed if form == "optimizer" else resumed.base_optimizer).load_state_dict(checkpoint)
    resumed.step(lambda: sum(p.sin().sum() for p in others).backward())
    for key, state in kept.items():
        for name, value in state.items():
            assert torch.equal(checkpoint["state"][key][name], value)


# The base optimizer ---------------------------------------------------------------------------------------------------


def closure_of(model):
    def closure():
        loss = model(torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)).square().mean()
        loss.backward()
        return loss

    return closure


def make(base, backend_options, seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
    cls, base_options = {
        "sgd": (SGD, {"lr": 0.1, "momentum": 0.9}),
        "adamw": (torch.optim.AdamW, {"lr": 0.01}),
        "wrapped": (torch.optim.Adamax, {"lr": 0.01}),
        "alpha": (torch.optim.RMSprop, {"lr": 0.01}),  # has its own option alpha
    }[base]
    return model, CRSAM(groups, cls, **base_options, **options, **backend_options)


every_base = pytest.mark.parametrize("base", ["sgd", "adamw", "wrapped", "alpha"])


@every_base
@pytest.mark.parametrize("plain", [False, True], ids=["of-ours", "of-torch"])
def test_checkpoint_of_the_base_optimizer_loads(plain, base, backend_options, device):
    model, optimizer = make(base, backend_options)
    for _ in range(3):
        optimizer.step(closure_of(model))
    checkpoint = copy.deepcopy(optimizer.base_optimizer.state_dict())
    if plain:
        for group in checkpoint["param_groups"]:
            for name in optimizer._own.keys() - optimizer.base_optimizer.defaults.keys():
                group.pop(name, None)
    resumed, resumed_optimizer = make(base, backend_options, seed=1)
    resumed_optimizer.step(closure_of(resumed))
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer.base_optimizer.load_state_dict(checkpoint)
    for _ in range(2):
        optimizer.step(closure_of(model))
        resumed_optimizer.step(closure_of(resumed))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert_close(q, p, EXACT)


@every_base
def test_learning_rate_set_on_the_base_optimizer_is_used(base, backend_options, device):
    trained = []
    for on_base in (False, True):
        model, optimizer = make(base, backend_options)
        optimizer.step(closure_of(model))
        if on_base:
            optimizer.base_optimizer.load_state_dict(copy.deepcopy(optimizer.base_optimizer.state_dict()))
        (optimizer.base_optimizer if on_base else optimizer).param_groups[0]["lr"] = 0.5
        for _ in range(2):
            optimizer.step(closure_of(model))
        assert optimizer.param_groups[0]["lr"] == 0.5
        trained.append(list(model.parameters()))
        optimizer.param_groups[0]["lr"] = 0.25
        optimizer.step(closure_of(model))
        assert optimizer.base_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.25
    for p, q in zip(*trained, strict=True):
        assert_close(q, p, EXACT)


@every_base
@pytest.mark.parametrize("to", ["ours", "base"])
def test_groups_can_be_added_and_removed(to, base, backend_options, device):
    trained = []
    for changed in (False, True):
        model, optimizer = make(base, backend_options, rho=0.2)
        first = optimizer.param_groups[0]["params"]
        if changed:
            side = optimizer if to == "ours" else optimizer.base_optimizer
            optimizer.step(closure_of(model))
            torch.manual_seed(0)
            for layer in (model[0], model[2]):
                layer.reset_parameters()
            optimizer.state.clear()
            del side.param_groups[1]
            model[2].requires_grad_(False)
            optimizer.step(closure_of(model))
            assert [group["params"] for group in optimizer.param_groups] == [first]
            torch.manual_seed(0)
            for layer in (model[0], model[2]):
                layer.reset_parameters()
            optimizer.state.clear()
            model[2].requires_grad_(True)
            side.add_param_group({"params": list(model[2].parameters()), "lr": 0.05})
        else:
            torch.manual_seed(0)
            for layer in (model[0], model[2]):
                layer.reset_parameters()
            optimizer.param_groups[1]["lr"] = 0.05
        for _ in range(3):
            optimizer.step(closure_of(model))
        assert [group["rho"] for group in optimizer.param_groups] == [0.2, 0.2]
        assert len(optimizer.base_optimizer.param_groups) == 2
        trained.append(list(model.parameters()))
    for p, q in zip(*trained, strict=True):
        assert_close(q, p, EXACT)


@every_base
def test_copies_share_groups_with_their_own_base(base, backend_options, device):
    model, optimizer = make(base, backend_options)
    optimizer.step(closure_of(model))
    for way in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        twin, twin_optimizer = way((model, optimizer))
        twin_optimizer.base_optimizer.load_state_dict(copy.deepcopy(twin_optimizer.base_optimizer.state_dict()))
        twin_optimizer.base_optimizer.param_groups[1]["lr"] = 0.125
        twin_optimizer.step(closure_of(twin))
        assert twin_optimizer.param_groups[1]["lr"] == 0.125
        assert optimizer.param_groups[1]["lr"] != 0.125


# torch.distributed.checkpoint ----------------------------------------------------------------------------------------


@every_base
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_state_dict_functions_of_torch_work(tensor_lr, base, backend_options, device):
    """They initialize the state of a new optimizer with a step without a closure, with zero gradients and a learning
    rate of 0."""
    model, optimizer = make(base, backend_options)
    resumed, resumed_optimizer = make(base, backend_options, seed=1)
    if tensor_lr:
        if base == "alpha":
            pytest.skip("RMSprop accepts a tensor learning rate only with capturable=True")
        for o in (optimizer, resumed_optimizer):
            for group in o.param_groups:
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    for _ in range(2):
        optimizer.step(closure_of(model))
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    before = [p.detach().clone() for p in resumed.parameters()]
    get_state_dict(resumed, resumed_optimizer)
    assert all(map(torch.equal, resumed.parameters(), before))
    assert resumed_optimizer.stats.steps == 0
    set_state_dict(resumed, resumed_optimizer, model_state_dict=weights, optim_state_dict=state)
    assert [float(group["lr"]) for group in resumed_optimizer.param_groups] == rates
    for _ in range(2):
        optimizer.step(closure_of(model))
        resumed_optimizer.step(closure_of(resumed))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert_close(q, p, EXACT)


def test_step_without_a_closure_is_still_refused(backend_options):
    """A step with a nonzero learning rate is refused, with and without state."""
    for steps in (0, 1):
        model, optimizer = make("sgd", backend_options)
        for _ in range(steps):
            optimizer.step(closure_of(model))
        closure_of(model)()
        with pytest.raises(RuntimeError, match=r"call first_step\(\), or step\(closure\)"):
            optimizer.step()


# Pickles of earlier versions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["sgd", "alpha"])
def test_pickles_without_later_attributes_load(base, backend_options, device):
    """Attributes with a default may be missing; param_groups and state were attributes of CRSAM."""
    model, optimizer = make(base, backend_options)
    optimizer.step(closure_of(model))
    for name in ("interval", "reuse", "curvature_interval", "replay_rng", "stochastic_rounding", "compile", "flatten",
                 "model_buffers", "_difference", "_separate", "_model", "sync_perturbation"):  # fmt: skip
        twin, state = copy.deepcopy((model, optimizer.__getstate__()))
        state["state"], state["param_groups"] = state["base_optimizer"].state, copy.deepcopy(optimizer).param_groups
        if base == "alpha":
            for ours, theirs in zip(state["param_groups"], state["base_optimizer"].param_groups, strict=True):
                ours["params"] = theirs["params"]
        del state[name]
        resumed = CRSAM.__new__(CRSAM)
        resumed.__setstate__(state)
        expected, expected_optimizer = copy.deepcopy((model, optimizer))
        resumed.step(closure_of(twin))
        expected_optimizer.step(closure_of(expected))
        for p, q in zip(twin.parameters(), expected.parameters(), strict=True):
            assert_close(p, q, EXACT)
