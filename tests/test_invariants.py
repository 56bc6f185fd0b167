"""Invariants of every step, for any loss; each test fails if its invariant is broken."""

import copy
import io
import math
import pickle
import warnings
from itertools import pairwise

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.utils._python_dispatch import TorchDispatchMode

from crsam_ext import CRSAM

from . import reference
from .reference import (
    COMPILED,
    EXACT,
    assert_close,
    batch,
    closure_of,
    network_loss,
    network_params,
    run_three_calls,
    update_tolerance,
)

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
FORMS = {
    "linear": {"rho": 0.3},
    "log": {"rho": 0.3, "regularizer": "log"},
    "sam": {"rho": 0.3, "alpha": 0.0, "beta": 0.0},
    "asam": {"rho": 0.3, "adaptive": True},
    "clip": {"rho": 0.3, "max_grad_norm": 0.1},
}
BASES = {
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (ADAMW, {"lr": 0.01}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
}

forms = pytest.mark.parametrize("form", FORMS)
bases = pytest.mark.parametrize("base", BASES)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


class Network(torch.nn.Module):
    """A network with normalization, dropout, small and large parameters."""

    def __init__(self, norm=None, dropout=0.0):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 4, 3, padding=1)
        self.norm = norm or torch.nn.Identity()
        self.dropout = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(4 * 16, 3)

    def forward(self, x):
        return self.head(self.dropout(torch.tanh(self.norm(self.conv(x)))).flatten(1))


def problem(device, dtype=torch.float32, **options):
    model = Network(**options).to(device, dtype)
    x = torch.randn(8, 2, 4, 4, device=device, dtype=dtype)

    def closure():
        loss = model(x).float().square().mean() + model(x.flip(0)).float().sin().mean()
        loss.backward()
        return loss

    return model, closure


def bits(tensors):
    """Return copies that compare equal only bit for bit."""
    return [t.detach().clone().contiguous().view(-1).view(torch.uint8) for t in tensors]


def same_bits(tensors, kept):
    return all(torch.equal(a, b) for a, b in zip(bits(tensors), kept, strict=True))


def snapshot(optimizer):
    """Return the parameters and the optimizer's whole state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [optimizer.state[p][k] for p in params if p in optimizer.state for k in sorted(optimizer.state[p])]
    return bits([torch.as_tensor(t) for t in params + state])


# w is never reconstructed --------------------------------------------------------------------------------------------


@dtypes
@forms
@pytest.mark.parametrize("base", ["momentum", "adamw", "nadam"])
def test_zero_learning_rate_changes_nothing(base, form, dtype, backend_options, device):
    """Every parameter is perturbed and restored, and no bit of w changes."""
    model, closure = problem(device, dtype)
    cls, options = BASES[base]
    if base == "nadam":
        options = {**options, "eps": 1e-3}  # 1e-8 is 0 in float16, and torch's NAdam divides by it
    optimizer = CRSAM(
        model.parameters(), cls, **FORMS[form], **{**options, "lr": 0.0, "weight_decay": 0.0}, **backend_options
    )
    kept = bits(model.parameters())
    moved = []

    def watched():
        moved.append(same_bits(model.parameters(), kept))
        return closure()

    for _ in range(3):
        optimizer.step(watched)
        assert same_bits(model.parameters(), kept)
    assert moved == [True, False, False][: optimizer.passes] * 3


class Broken(Exception):
    pass


@bases
@forms
@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("after_backward", [False, True])
def test_exception_in_a_pass_restores_w(after_backward, failing, form, base, backend_options, device):
    model, closure = problem(device, norm=torch.nn.BatchNorm2d(4))
    cls, options = BASES[base]
    optimizer = CRSAM(model.parameters(), cls, **FORMS[form], **options, model=model, **backend_options)
    if failing >= optimizer.passes:
        failing = optimizer.passes - 1
    optimizer.step(closure)
    kept, calls = snapshot(optimizer), []

    def breaking():
        calls.append(0)
        if len(calls) == failing + 1 and not after_backward:
            raise Broken
        loss = closure()
        if len(calls) == failing + 1:
            raise Broken
        return loss

    with pytest.raises(Broken):
        optimizer.step(breaking)
    assert same_snapshot(optimizer, kept)
    assert optimizer.stats.steps == 1
    optimizer.step(closure)  # the next step works
    assert not same_snapshot(optimizer, kept)


def same_snapshot(optimizer, kept):
    now = snapshot(optimizer)
    return len(now) == len(kept) and all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))


@pytest.mark.parametrize("done", [1, 2])
@dtypes
def test_restore_returns_to_w(done, dtype, backend_options, device):
    model, closure = problem(device, dtype)
    optimizer = CRSAM(model.parameters(), SGD, lr=0.1, momentum=0.9, rho=0.3, **backend_options)
    optimizer.step(closure)
    kept = snapshot(optimizer)
    for call in (optimizer.first_step, optimizer.second_step)[:done]:
        optimizer.zero_grad()
        closure()
        call()
    assert not same_snapshot(optimizer, kept)
    optimizer.restore()
    assert same_snapshot(optimizer, kept)
    optimizer.restore()  # a no-op
    assert same_snapshot(optimizer, kept)
    optimizer.step(closure)


# A bad pass skips the whole step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
@bases
@forms
def test_bad_gradient_skips_the_step(form, base, position, bad, backend_options, device):
    check_bad_gradient(BASES[base], FORMS[form], position, bad, backend_options, device, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_bad_gradient_skips_the_step_in_other_dtypes(base, position, dtype, backend_options, device):
    check_bad_gradient(BASES[base], FORMS["linear"], position, math.nan, backend_options, device, dtype)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_bad_gradient_skips_the_compiled_step(base, position):
    check_bad_gradient(BASES[base], FORMS["linear"], position, math.nan, COMPILED, "cpu", torch.float32)


def check_bad_gradient(base, form, position, bad, options, device, dtype):
    model, closure = problem(device, dtype)
    cls, base_options = base
    optimizer = CRSAM(model.parameters(), cls, **form, **base_options, **options)
    if position >= optimizer.passes:
        position = optimizer.passes - 1
    optimizer.step(closure)
    kept, calls = snapshot(optimizer), []

    def spoiled():
        loss = closure()
        calls.append(0)
        if len(calls) == position + 1:
            model.conv.bias.grad[1] = bad
        return loss

    for skipped in (1, 2):
        optimizer.step(spoiled)
        assert same_snapshot(optimizer, kept)
        assert optimizer.stats.as_dict()["skipped"] == skipped
        assert optimizer.stats.steps == 1 + skipped
        calls.clear()
    optimizer.step(closure)
    assert not same_snapshot(optimizer, kept)
    assert all(t.isfinite().all() for t in model.parameters())


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_skipped_first_step_does_not_change_later_steps(base, backend_options, device):
    """Momentum starts undamped in the next step, and counters start with 1."""
    results = []
    for spoil in (True, False):
        torch.manual_seed(3)
        params, data = network_params(device=device), batch(device=device)
        cls, options = BASES[base]
        if cls is SGD:
            options = {**options, "dampening": 0.5}
        optimizer = CRSAM(params, cls, **options, **backend_options)
        closure = closure_of(lambda p: network_loss(p, data), params)  # noqa: B023

        def spoiled():
            closure()  # noqa: B023
            params[0].grad.fill_(math.nan)  # noqa: B023

        if spoil:
            optimizer.step(spoiled)
            assert not any(value.any() for state in optimizer.state.values() for value in state.values())
        for _ in range(2):
            optimizer.step(closure)
        results.append(snapshot(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Same random numbers, same batch-norm statistics ---------------------------------------------------------------------


def test_all_passes_use_the_same_random_numbers(backend_options, device):
    model, closure = problem(device, torch.float64, dropout=0.5)
    params = list(model.parameters())
    seen = []

    def watched():
        loss = closure()
        seen.append([p.grad.clone() for p in params])
        return loss

    for replay in (True, False):
        seen.clear()
        CRSAM(params, lr=0.0, rho=1e-9, replay_rng=replay, **backend_options).step(watched)
        distance = max(reference.norm([a - b for a, b in zip(seen[0], g, strict=True)]) for g in seen[1:])
        assert (distance < 1e-6) == replay, "only other dropout masks change a gradient by more than rho"


@pytest.mark.parametrize("form", ["linear", "sam"])
def test_random_state_after_a_step_equals_that_after_one_pass(form, backend_options, device):
    """This holds even if the later passes draw other numbers than the first."""
    model, closure = problem(device, dropout=0.5)
    optimizer = CRSAM(model.parameters(), lr=0.1, **FORMS[form], **backend_options)
    calls = []

    def drawing():
        calls.append(0)
        torch.rand(len(calls)), torch.rand(len(calls), device=device)
        return closure()

    torch.manual_seed(5)
    drawing()
    calls.clear()
    expected = torch.rand(3), torch.rand(3, device=device)
    torch.manual_seed(5)
    optimizer.step(drawing)
    assert torch.equal(expected[0], torch.rand(3))
    assert torch.equal(expected[1], torch.rand(3, device=device))


class OwnNorm(torch.nn.Module):
    """A layer of another library: its buffers are named as in torch.nn, but updated differently."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x):
        if self.training:
            self.running_mean.lerp_(x.detach().mean((0, 2, 3)), 0.3)
            self.running_var.lerp_(x.detach().var((0, 2, 3)), 0.3)
        return x


NORMS = {
    "BatchNorm2d": lambda: torch.nn.BatchNorm2d(4),
    "momentum-None": lambda: torch.nn.BatchNorm2d(4, momentum=None),
    "momentum-1": lambda: torch.nn.BatchNorm2d(4, momentum=1.0),
    "InstanceNorm2d": lambda: torch.nn.InstanceNorm2d(4, track_running_stats=True),
    "OwnNorm": OwnNorm,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("how", ["step", "calls", "sam", "exception", "restore", "bad"])
def test_running_statistics_follow_the_first_pass_only(how, norm, backend_options, device):
    model, closure = problem(device, norm=NORMS[norm]())
    twin, _ = problem(device, norm=NORMS[norm]())
    weights = {"alpha": 0.0, "beta": 0.0} if how == "sam" else {}
    optimizer = CRSAM(model.parameters(), lr=0.1, rho=2.0, model=model, **weights, **backend_options)
    optimizer.step(closure)
    twin.load_state_dict(model.state_dict())
    rebind(closure, twin)()
    calls = []

    def failing():
        calls.append(0)
        loss = closure()
        if len(calls) == 3 and how == "exception":
            raise Broken
        if len(calls) == 2 and how == "bad":
            model.head.bias.grad[0] = math.nan
        return loss

    if how in ("step", "sam"):
        optimizer.step(closure)
    elif how == "calls":
        optimizer.zero_grad()
        run_three_calls(optimizer, lambda _: closure())
    elif how == "restore":
        optimizer.zero_grad()
        closure()
        optimizer.first_step(zero_grad=True)
        closure()
        optimizer.restore()
    elif how == "exception":
        with pytest.raises(Broken):
            optimizer.step(failing)
    else:
        optimizer.step(failing)
    for (name, found), expected in zip(model.norm.named_buffers(), twin.norm.buffers(), strict=True):
        assert torch.equal(found, expected), name


def rebind(closure, model):
    """Return the same closure over another model."""
    cells = dict(zip(closure.__code__.co_freevars, (cell.cell_contents for cell in closure.__closure__), strict=True))

    def other():
        loss = model(cells["x"]).float().square().mean() + model(cells["x"].flip(0)).float().sin().mean()
        loss.backward()
        return loss

    return other


def test_running_statistics_follow_every_pass_without_the_model(backend_options, device):
    """Without this, the test above could pass because no pass changes the statistics."""
    model, closure = problem(device, norm=torch.nn.BatchNorm2d(4))
    CRSAM(model.parameters(), lr=0.1, rho=2.0, **backend_options).step(closure)
    assert model.norm.num_batches_tracked == 6


def test_sync_batch_norm_follows_the_first_pass(backend_options, device):
    if device.type == "cpu":
        pytest.skip("SyncBatchNorm only trains on GPUs")
    model, closure = problem(device, norm=torch.nn.SyncBatchNorm(4))
    CRSAM(model.parameters(), lr=0.1, rho=2.0, model=model, **backend_options).step(closure)
    assert model.norm.num_batches_tracked == 2


# Determinism, synchronization ----------------------------------------------------------------------------------------


@forms
@bases
def test_two_runs_give_the_same_bits(base, form, backend_options, device):
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        params = [torch.nn.Parameter(torch.randn(s, device=device)) for s in [(700, 500), (9,), (40, 30)]]
        cls, options = BASES[base]
        optimizer = CRSAM(params, cls, **FORMS[form], **options, **backend_options)
        for _ in range(2):
            optimizer.step(closure_of(lambda ps: sum(p.sin().mean() + p.square().mean() for p in ps), params))
        results.append((snapshot(optimizer), optimizer.stats.as_dict()))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert results[0][1] == results[1][1]


class NoSynchronization(TorchDispatchMode):
    """Raises if an operation would synchronize with a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(
            part in name for part in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal.default", "masked_select")
        ), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["selecting", "compiled"])
@pytest.mark.parametrize("base", ["momentum", "adamw"])
@forms
def test_step_does_not_synchronize(form, base, how, monkeypatch):
    """The torch backend reads flags directly on a CPU, so the test pretends that this is another device."""
    params, data = network_params(torch.float32), batch(torch.float32)
    cls, options = BASES[base]
    optimizer = CRSAM(
        params, cls, **FORMS[form], **options, **(COMPILED if how == "compiled" else {"backend": "torch"})
    )
    if how == "selecting":
        monkeypatch.setattr(optimizer.operators, "selects", lambda row: True)
    gradients = [torch.autograd.grad(network_loss(params, data), params) for _ in range(3)]

    def closure():
        for p, g in zip(params, next(given), strict=True):
            p.grad = g.clone()
        return 1.0

    given = iter(gradients)
    optimizer.step(closure)  # the first step reads the flag: state is published after a step that was not skipped
    given = iter(gradients)
    before = snapshot(optimizer)
    for method in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy"):
        monkeypatch.setattr(torch.Tensor, method, lambda *_: pytest.fail("a tensor was read"))
    if how == "compiled":  # guards and dispatch of compiled code are torch's
        optimizer.step(closure)
    else:
        with NoSynchronization():
            optimizer.step(closure)
    monkeypatch.undo()
    assert not same_snapshot(optimizer, before)


# State that training resumes from ------------------------------------------------------------------------------------

INTERCHANGE = {
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    "plain": (SGD, {"lr": 0.1}),
    "sgd-maximize": (SGD, {"lr": 0.02, "momentum": 0.9, "maximize": True}),
    "adam": (ADAM, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    "adam-maximize": (ADAM, {"lr": 0.01, "maximize": True}),
    "adamw": (ADAMW, {"lr": 0.01, "weight_decay": 0.1}),
}
interchange = pytest.mark.parametrize("case", INTERCHANGE)


def torch_step(optimizer, closure):
    optimizer.zero_grad()
    closure()
    optimizer.step()


@interchange
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("direction", ["from-torch", "to-torch"])
def test_state_dicts_are_interchangeable_with_torchs(direction, dtype, case, backend_options, device):
    """Train with one, load into the other, and continue both: rho = 0 equals torch's own optimizer."""
    cls, options = INTERCHANGE[case]
    data = batch(dtype, device)
    theirs_params = network_params(dtype, device)
    ours_params = [torch.nn.Parameter(p.detach().clone()) for p in theirs_params]
    ours_closure, theirs_closure = (
        closure_of(lambda p: network_loss(p, data), ps) for ps in (ours_params, theirs_params)
    )
    theirs = cls(theirs_params, **options)
    ours = CRSAM(ours_params, cls, rho=0.0, **options, **backend_options)
    if direction == "from-torch":
        for _ in range(3):
            torch_step(theirs, theirs_closure)
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))  # otherwise both would write the same tensors
        for p, q in zip(ours_params, theirs_params, strict=True):
            p.data.copy_(q)
    else:
        for _ in range(3):
            ours.step(ours_closure)
        found = ours.state_dict()
        assert found["state"].keys() == (set() if case == "plain" else set(range(len(ours_params))))
        own = {"rho", "alpha", "beta", "adaptive"}
        assert own < found["param_groups"][0].keys()
        theirs.load_state_dict(copy.deepcopy(found))
        for p, q in zip(ours_params, theirs_params, strict=True):
            q.data.copy_(p)
    for _ in range(3):
        torch_step(theirs, theirs_closure)
        ours.step(ours_closure)
    tolerance = EXACT if dtype == torch.float64 else update_tolerance(dtype, 6)
    for p, q in zip(ours_params, theirs_params, strict=True):
        assert_close(p, q, tolerance, "parameter")
        assert {k for k, v in theirs.state[q].items() if v is not None} == ours.state[p].keys()
        for name, value in ours.state[p].items():
            assert_close(value, theirs.state[q][name], tolerance, name)
            assert value.dtype == theirs.state[q][name].dtype


@pytest.mark.parametrize("direction", ["from-torch", "to-torch"])
@pytest.mark.parametrize("case", ["momentum", "adamw"])
def test_state_dicts_are_interchangeable_in_bfloat16(direction, case, backend_options, device):
    """torch has no masters: if its state is loaded, masters start at the parameters, and torch ignores those in our
    state. Buffers stay float32 here."""
    cls, options = INTERCHANGE[case]
    model, closure = problem(device, torch.bfloat16)
    other, _ = problem(device, torch.bfloat16)
    other.load_state_dict(model.state_dict())
    ours, theirs = CRSAM(model.parameters(), cls, **options, **backend_options), cls(other.parameters(), **options)
    if direction == "from-torch":
        torch_step(theirs, rebind(closure, other))
        ours.load_state_dict(theirs.state_dict())
        ours.step(closure)
        name = "momentum_buffer" if cls is SGD else "exp_avg"
        assert all(ours.state[p][name].dtype == torch.float32 for p in model.parameters())
        return
    ours.step(closure)
    theirs.load_state_dict(ours.state_dict())
    # torch casts the buffers to bfloat16, also those of a state without anything else.
    plain = copy.deepcopy(other)
    plainly = cls(plain.parameters(), **options)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        buffers = {k: v for k, v in ours.state[q].items() if k != "master_param"}
        plainly.state[p] = {k: v.to(v.dtype if k == "step" else torch.bfloat16, copy=True) for k, v in buffers.items()}
    for optimizer, module in ((theirs, other), (plainly, plain)):
        torch_step(optimizer, rebind(closure, module))
    before, _ = problem(device, torch.bfloat16)
    for p, q, w in zip(other.parameters(), plain.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, w)


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@dtypes
@pytest.mark.parametrize("case", ["momentum", "nesterov", "adamw", "plain"])
def test_training_resumes_from_a_checkpoint(case, dtype, backend_options, device):
    """A run that is interrupted and resumed from a file ends with the same bits."""
    cls, options = INTERCHANGE[case]
    results = []
    for resume in (False, True):
        torch.manual_seed(11)
        model, closure = problem(device, dtype)
        optimizer = CRSAM(model.parameters(), cls, rho=0.2, **options, **backend_options)
        for step in range(4):
            if resume and step == 2:
                checkpoint = saved_and_loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
                other = Network().to(device, dtype)
                other.load_state_dict(checkpoint["model"])
                optimizer = CRSAM(other.parameters(), cls, rho=0.7, **options, **backend_options)
                optimizer.load_state_dict(checkpoint["optimizer"])
                assert optimizer.param_groups[0]["rho"] == 0.2
                model, closure = other, rebind(closure, other)
            optimizer.step(closure)
        results.append(snapshot(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_scratch_is_not_in_the_state(backend_options, device):
    model, closure = problem(device)
    for (cls, options), names in zip(
        BASES.values(), ({"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}, None), strict=True
    ):
        optimizer = CRSAM(model.parameters(), cls, **options, model=model, **backend_options)
        optimizer.step(closure)
        state = optimizer.state_dict()
        assert state.keys() == {"state", "param_groups"}
        if names:
            assert all(entry.keys() == names for entry in state["state"].values())
        size = sum(
            t.numel() for entry in state["state"].values() for t in entry.values() if isinstance(t, torch.Tensor)
        )
        assert size <= 2 * sum(p.numel() for p in model.parameters()) + 2 * len(list(model.parameters()))


def test_state_dict_has_the_size_of_torchs_on_disk(backend_options, device):
    """Views of flat buffers do not include their neighbors: one storage is saved once."""
    model, closure = problem(device)
    optimizer = CRSAM(model.parameters(), ADAMW, lr=0.1, **backend_options)
    optimizer.step(closure)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    theirs = ADAMW(model.parameters(), lr=0.1)
    theirs.step()
    expected = io.BytesIO()
    torch.save(theirs.state_dict(), expected)
    assert file.tell() < 1.5 * expected.tell() + 2000


# torch.optim.Optimizer interface -------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.95),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.5, 1.0, 3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.2, total_steps=10),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, 3),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("form", ["step", "calls"])
def test_schedulers_change_the_rates_as_with_torch(form, scheduler, backend_options, device):
    """The learning rates, and OneCycleLR's momenta, equal those of torch's SGD; there is no warning about the order of
    calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours_params, theirs_params, data = (
            network_params(device=device),
            network_params(device=device),
            batch(device=device),
        )
        theirs = SGD(theirs_params, lr=0.1, momentum=0.9)
        ours = CRSAM(ours_params, SGD, lr=0.1, momentum=0.9, **backend_options)
        ours_scheduler, theirs_scheduler = SCHEDULERS[scheduler](ours), SCHEDULERS[scheduler](theirs)
        closure = closure_of(lambda p: network_loss(p, data), ours_params)
        for _ in range(7):
            if form == "step":
                ours.step(closure)
            else:
                ours.zero_grad()
                run_three_calls(ours, lambda _: closure())
            torch_step(theirs, closure_of(lambda p: network_loss(p, data), theirs_params))
            arguments = [1.0] if scheduler == "ReduceLROnPlateau" else []
            ours_scheduler.step(*arguments)
            theirs_scheduler.step(*arguments)
            for name in ("lr", "momentum"):
                assert ours.param_groups[0][name] == theirs.param_groups[0][name]
            assert ours.base_optimizer.param_groups[0]["lr"] == ours.param_groups[0]["lr"]


def test_scheduler_warns_about_a_wrong_order(backend_options):
    optimizer = CRSAM(network_params(), lr=0.1, **backend_options)
    scheduler = schedulers.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()


@pytest.mark.parametrize("base", BASES)
def test_added_param_group_trains(base, backend_options, device):
    """A group that is added later trains as if it had always existed; the other groups keep their state."""
    data = batch(device=device)
    params = network_params(device=device)
    cls, options = BASES[base]
    optimizer = CRSAM(params[:3], cls, **options, **backend_options)
    closure = closure_of(lambda p: network_loss(p, data), params)
    optimizer.step(closure)
    before = bits(params)
    kept = [dict(optimizer.state[p]) for p in params[:3]]
    optimizer.add_param_group({"params": [params[3]], "rho": 0.5, "gamma": 0.7, "lr": 0.5})
    assert {k: optimizer.param_groups[1][k] for k in ("rho", "alpha", "beta", "lr")} == {
        "rho": 0.5,
        "alpha": 0.7,
        "beta": 0.01,
        "lr": 0.5,
    }
    assert all(torch.equal(a, b) for a, b in zip(bits(params), before, strict=True))
    steps = [float(s["step"]) for s in kept if "step" in s]
    optimizer.step(closure)
    assert not torch.equal(bits([params[3]])[0], before[3])
    assert [float(optimizer.state[p]["step"]) for p in params[:3] if "step" in optimizer.state[p]] == [
        s + 1 for s in steps
    ]
    if "step" in optimizer.state[params[3]]:
        assert optimizer.state[params[3]]["step"] == 1


@pytest.mark.parametrize("attach_scheduler", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("base", BASES)
def test_copies_are_independent_and_equal(base, how, attach_scheduler, backend_options, device):
    data = batch(device=device)
    params = network_params(device=device)
    cls, options = BASES[base]
    optimizer = CRSAM(params, cls, **options, **FORMS["log"], **backend_options)
    if attach_scheduler:
        schedulers.StepLR(optimizer, 1)
    optimizer.step(closure_of(lambda p: network_loss(p, data), params))
    if how == "deepcopy":
        other_params, other = copy.deepcopy((params, optimizer))
    else:
        other_params, other = pickle.loads(pickle.dumps((params, optimizer)))
    assert other.param_groups is other.base_optimizer.param_groups
    assert other.state is other.base_optimizer.state
    assert same_snapshot(other, snapshot(optimizer))
    kept = snapshot(optimizer)
    for _ in range(2):
        other.step(closure_of(lambda p: network_loss(p, data), other_params))
    assert same_snapshot(optimizer, kept)
    for _ in range(2):
        optimizer.step(closure_of(lambda p: network_loss(p, data), params))
    assert same_snapshot(other, snapshot(optimizer))
    assert other.stats.as_dict() == optimizer.stats.as_dict()


def test_copy_in_the_middle_of_a_step_has_no_step_in_progress(backend_options, device):
    """The copy has no step in progress; the original continues its step."""
    data, params = batch(device=device), network_params(device=device)
    optimizer = CRSAM(params, lr=0.1, **backend_options)
    closure_of(lambda p: network_loss(p, data), params)()
    optimizer.first_step(zero_grad=True)
    copied_params, copied = copy.deepcopy((params, optimizer))
    copied.step(closure_of(lambda p: network_loss(p, data), copied_params))
    with pytest.raises(RuntimeError, match="second_step"):
        optimizer.first_step()


@pytest.mark.parametrize("form", ["step", "calls"])
def test_step_hooks_are_called(form, backend_options, device):
    data, params = batch(device=device), network_params(device=device)
    optimizer = CRSAM(params, lr=0.1, **backend_options)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("pre"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("post"))
    closure = closure_of(lambda p: network_loss(p, data), params)
    if form == "step":
        optimizer.step(closure)
    else:
        run_three_calls(optimizer, lambda _: closure())
    assert seen == ["pre", "post"]


def test_state_dict_hooks_are_called(backend_options, device):
    data, params = batch(device=device), network_params(device=device)
    optimizer = CRSAM(params, SGD, lr=0.1, momentum=0.9, **backend_options)
    optimizer.step(closure_of(lambda p: network_loss(p, data), params))
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("state_dict pre"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "extra": 1})

    def before(_, state):
        assert state["extra"] == 1
        seen.append("load pre")
        state = {k: v for k, v in state.items() if k != "extra"}
        state["param_groups"] = [{**g, "lr": 0.25} for g in state["param_groups"]]
        return state

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("load post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["state_dict pre", "load pre", "load post"]
    assert optimizer.param_groups[0]["lr"] == 0.25
    optimizer.step(closure_of(lambda p: network_loss(p, data), params))


def test_zero_grad_and_repr_work(backend_options, device):
    params = network_params(device=device)
    optimizer = CRSAM(params, ADAMW, lr=0.1, rho=0.3, **backend_options)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.zero_grad()
    assert params[0].grad is None
    assert "AdamW" in repr(optimizer)
    assert "rho: 0.3" in repr(optimizer)
    assert f"backend={optimizer.backend}," in repr(optimizer)
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_writes_increment_the_version_counter(backend_options, device):
    """A graph that needs the old parameters raises an error instead of computing wrong gradients."""
    data, params = batch(device=device), network_params(device=device)
    optimizer = CRSAM(params, lr=0.1, **backend_options)
    closure = closure_of(lambda p: network_loss(p, data), params)
    optimizer.step(closure)
    loss = network_loss(params, data)
    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Flat buffers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_parameters_lie_in_one_buffer(base, dtype, backend_options, device):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Flatten(), torch.nn.Linear(80, 7)).to(device, dtype)
    model = model.to(memory_format=torch.channels_last)
    transposed = torch.nn.Parameter(torch.randn(6, 3, device=device, dtype=dtype).t())
    params = [*model.parameters(), transposed]
    shapes, strides, values = [p.shape for p in params], [p.stride() for p in params], bits(params)
    cls, options = BASES[base]
    optimizer = CRSAM(params, cls, **{**options, "lr": 0.0, "weight_decay": 0.0}, **backend_options)
    x = torch.randn(2, 3, 6, 6, device=device, dtype=dtype)

    def closure():
        (model(x).square().mean() + transposed.square().sum()).backward()

    optimizer.step(closure)
    assert [p.shape for p in params] == shapes
    assert [p.stride() for p in params] == strides
    assert same_bits(params, values)
    assert all(p.data_ptr() % 16 == 0 for p in params)
    assert_side_by_side(params)
    for name in optimizer.state[params[0]] if base != "nadam" else ():
        buffers = [optimizer.state[p][name] for p in params]
        if name != "step":
            assert_side_by_side(buffers)
            assert [b.stride() for b in buffers] == strides
    pointers = [p.data_ptr() for p in params]
    optimizer.step(closure)
    assert [p.data_ptr() for p in params] == pointers


def assert_side_by_side(tensors):
    """Check that tensors lie in one block with gaps of less than 16 bytes, each in a separate storage of its own
    size."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors)
    assert all(0 <= start - stop < 16 for (_, stop), (start, _) in pairwise(spans))
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def test_gradients_are_moved_not_copied(backend_options, device):
    """p.grad after the step is the tensor that autograd created in the first pass."""
    model, closure = problem(device)
    optimizer = CRSAM(model.parameters(), lr=0.1, **backend_options)
    seen = []

    def watched():
        loss = closure()
        seen.append([p.grad.data_ptr() for p in model.parameters()])
        return loss

    optimizer.step(watched)
    assert [p.grad.data_ptr() for p in model.parameters()] == seen[0]
    assert not set(seen[0]) & set(seen[1])
    assert not set(seen[1]) & set(seen[2])


class Allocations(TorchDispatchMode):
    """Counts the bytes of new storages that operations return."""

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        flat = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        known = {a.untyped_storage().data_ptr() for a in flat}
        for out in torch.utils._pytree.tree_leaves(result):
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
                self.bytes += out.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("form", [*FORMS, "base"])
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_steps_allocate_little_memory(base, form, backend_options, device):
    """From the third step on, a step allocates only a few numbers of its own."""
    params = [torch.nn.Parameter(torch.randn(s, device=device)) for s in [(1024, 1024), (1000, 1000), (99,), (128, 60)]]
    grads = [torch.randn_like(p) for p in params]
    cls, options = BASES[base]
    optimizer = CRSAM(params, cls, **{"base": {"rho": 0.0}, **FORMS}[form], **options, **backend_options)
    copies = [[g.clone() for g in grads] for _ in range(3 * 3)]

    def closure():
        for p, g in zip(params, copies.pop(), strict=True):
            p.grad = g

    for _ in range(2):
        optimizer.step(closure)
    with Allocations() as allocations:
        optimizer.step(closure)
    assert allocations.bytes < 64 * 1024
