"""torch.distributed.checkpoint: reading the state changes nothing, and a checkpoint contains all that a run needs to
resume."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from crsam_ext import CRSAM

pytestmark = pytest.mark.slow

BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "plain": (torch.optim.SGD, {}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9}),  # has its own option alpha
    "nadam": (torch.optim.NAdam, {}),
}
FLATTENED = StateDictOptions(flatten_optimizer_state_dict=True)
OPTIONS = {
    "plain": StateDictOptions(),
    "flattened": FLATTENED,
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
bases = pytest.mark.parametrize("base", BASES)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)
    return torch.nn.Sequential(*layers).to(dtype)


def problem(base="sgd", dtype=torch.float32, **options):
    model = network(dtype)
    kind, settings = BASES[base]
    optimizer = CRSAM(model.named_parameters(), kind, **{"lr": 0.1, **settings, **options})

    def step(index):
        x = torch.randn(11, 5, generator=torch.Generator().manual_seed(index)).to(dtype)

        def closure():
            loss = model(x).square().mean()
            loss.backward()
            return loss

        return optimizer.step(closure)

    return model, optimizer, step


def assert_same(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@bases
@pytest.mark.parametrize(
    "options", [{}, {"curvature_interval": 2}, {"interval": 2}, {"interval": 3, "reuse": True}, {"weight_decay": 0.3}]
)
@pytest.mark.parametrize("form", OPTIONS)
def test_reading_the_state_before_the_first_step_changes_nothing(base, options, form):
    model, optimizer, step = problem(base, **options)
    twin, _, step_of_twin = problem(base, **options)
    before = copy.deepcopy(model.state_dict())
    rates = [group["lr"] for group in optimizer.param_groups]
    get_optimizer_state_dict(model, optimizer, options=OPTIONS[form])
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert optimizer.stats.steps == 0
    for index in range(5):
        assert torch.equal(step(index), step_of_twin(index))
        assert_same(model, twin)


def test_reading_the_state_between_two_perturbations_changes_nothing():
    """torch makes a step whenever there is no state. Here a step of a single pass is due, which would be counted."""
    model, optimizer, step = problem("plain", interval=3)
    twin, _, step_of_twin = problem("plain", interval=3)
    for index in range(6):
        step(index), step_of_twin(index)
        optimizer.zero_grad()
        get_optimizer_state_dict(model, optimizer)
        assert optimizer.stats.steps == index + 1
        assert_same(model, twin)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_reading_the_state_before_any_step_creates_zeros(base):
    model, optimizer, _ = problem(base, curvature_interval=2)
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert set(state) == {name for name, _ in model.named_parameters()}
    for values in state.values():
        assert "second_difference" in values
        assert all(not value.any() for value in values.values())


@bases
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"curvature_interval": 3},
        {"interval": 2, "curvature_interval": 2},
        {"interval": 3, "reuse": True},
        {"dtype": torch.bfloat16},
    ],
)
@pytest.mark.parametrize("form", OPTIONS)
def test_training_resumes_to_the_same_bits(base, options, form, tmp_path):
    """Save after four steps, load into a new model and optimizer, and continue."""
    if base == "plain" and form == "full":
        base = "sgd"  # torch raises for any optimizer without state
    model, optimizer, step = problem(base, **options)
    for index in range(4):
        step(index)
    save(tmp_path, model, optimizer, OPTIONS[form])
    resumed, loaded, step_of_resumed = problem(base, **options)
    load(tmp_path, resumed, loaded, OPTIONS[form])
    assert_same(model, resumed)
    for index in range(4, 8):
        assert loaded.passes == optimizer.passes
        assert torch.equal(step(index), step_of_resumed(index))
        assert_same(model, resumed)


def save(folder, model, optimizer, options=None):
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder, no_dist=True)


def load(folder, model, optimizer, options=None, partial=False):
    weights, state = get_state_dict(model, optimizer, options=options)
    read = {"model": weights, "optimizer": state}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=partial)
    dcp.load(read, checkpoint_id=folder, no_dist=True, planner=planner)
    weights, state = read["model"], read["optimizer"]
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("flattened", [False, True])
def test_checkpoints_of_crsam_and_torchs_optimizer_are_interchangeable(base, flattened, tmp_path):
    """A checkpoint of CRSAM is one of its base optimizer, and vice versa."""
    options = FLATTENED if flattened else None
    model, optimizer, step = problem(base, curvature_interval=2)
    for index in range(4):
        step(index)
    save(tmp_path / "ours", model, optimizer, options)
    kind, settings = BASES[base]
    theirs = network()
    plain = kind(theirs.named_parameters(), lr=0.1, **settings)
    load(tmp_path / "ours", theirs, plain, options)
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
        for name in plain.state[q]:
            assert torch.equal(plain.state[q][name], optimizer.state[p][name]), name
    if not flattened:  # torch requires every option of the groups there
        save(tmp_path / "theirs", theirs, plain)
        back, loaded, step_back = problem(base)
        without, other, step_of_other = problem(base)
        load(tmp_path / "theirs", back, loaded, partial=True)  # rho is missing there, and keeps its value
        load(tmp_path / "ours", without, other)
        step_back(4), step_of_other(4)
        assert_same(back, without)


def test_a_skipped_first_step_creates_the_state():
    model, optimizer, step = problem("adamw")
    model[0].weight.register_hook(lambda g: g * torch.nan)
    step(0)
    assert optimizer.stats.skipped == 1
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert all(value.eq(0).all() for values in state.values() for value in values.values())
    assert set(state["0.weight"]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("base", ["sgd", "adamw", "nadam"])
def test_a_skipped_first_step_changes_no_later_one(base):
    """The first momentum is undamped, whatever the state contains."""
    model, optimizer, step = problem(base, weight_decay=0.0)
    twin, _, step_of_twin = problem(base, weight_decay=0.0)
    handle = model[0].weight.register_hook(lambda g: g * torch.nan)
    step(0)
    handle.remove()
    optimizer.add_param_group({"params": [("extra", torch.nn.Parameter(torch.ones(2)))]})  # moves the state
    for index in range(1, 4):
        step(index), step_of_twin(index)
        assert_same(model, twin)


def test_only_a_learning_rate_of_zero_creates_the_state():
    model, optimizer, _ = problem()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    with pytest.raises(RuntimeError, match="step\\(\\) without a closure"):
        optimizer.step()
    assert not optimizer.state
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0)
    optimizer.step()
    assert len(optimizer.state) == 4
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="step\\(\\) without a closure"):
        optimizer.step()


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"interval": 2}])
def test_a_step_of_one_pass_equals_the_base_optimizers(options):
    """This includes a learning rate of 0, with which the momentum is still updated."""
    model, optimizer, step = problem("sgd", **options)
    step(0)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    optimizer.zero_grad()
    model(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    assert optimizer.stats.steps == 2
    after = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert not any(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("base", ["sgd", "nadam"])
def test_provisional_state_filled_by_a_checkpoint_is_kept(base):
    """This holds even if it is written in place, without set_state_dict."""
    model, optimizer, step = problem(base)
    for index in range(3):
        step(index)
    resumed, loaded, step_of_resumed = problem(base)
    kept = get_optimizer_state_dict(resumed, loaded)["state"]
    resumed.load_state_dict(model.state_dict())
    for name, values in get_optimizer_state_dict(model, optimizer)["state"].items():
        for key, value in values.items():
            kept[name][key].copy_(value)
    step(3), step_of_resumed(3)
    assert_same(model, resumed)


def test_set_optimizer_state_dict_keeps_the_weights():
    model, optimizer, step = problem("adamw", weight_decay=0.5)
    for index in range(2):
        step(index)
    state = get_optimizer_state_dict(model, optimizer)
    other, loaded, _ = problem("adamw", weight_decay=0.5)
    before = copy.deepcopy(other.state_dict())
    set_optimizer_state_dict(other, loaded, state)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
