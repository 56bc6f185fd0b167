"""Checkpoints of sharded models: saved on four processes, loaded on any number and into any kind of sharding."""

import threading
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from crsam_ext import CRSAM
from crsam_ext.backends.torch import TorchOperators

from .ranks import LIMIT, Ranks
from .test_shards import Network, full, network_of, sharded

pytestmark = pytest.mark.slow

CRSAM_OPTIONS = {"rho": 0.1, "alpha": 0.3, "beta": 0.2}
SGD = {**CRSAM_OPTIONS, "lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01}
ADAMW = {**CRSAM_OPTIONS, "base_optimizer": torch.optim.AdamW, "lr": 0.01, "weight_decay": 0.1}
OPTIONS = {
    "adamw": ADAMW,
    "curvature_interval": {**SGD, "curvature_interval": 2},
    "reuse": {**ADAMW, "interval": 2, "reuse": True},
    "all": {**SGD, "interval": 2, "curvature_interval": 3, "reuse": True},
    "rmsprop": {**CRSAM_OPTIONS, "base_optimizer": torch.optim.RMSprop, "lr": 0.01, "curvature_interval": 2},
    "adagrad": {**CRSAM_OPTIONS, "base_optimizer": torch.optim.Adagrad, "lr": 0.01, "interval": 2, "reuse": True},
}
UNDAMPED = {**SGD, "dampening": 0.0}
WRAPPED = ("rmsprop", "adagrad")
every_option = pytest.mark.parametrize("options", [name for name in OPTIONS if name != "adamw"])  # "reuse" tests it
SAVED, END = 3, 5  # steps; those in between use all stored values

# The rounding error of float64 is 1e-16 relative. It grows with the number of steps, by 1/rho in differences of
# gradients, and where Adam and others divide by the square root of a small number.
ROUNDING = 1e-11


@pytest.fixture(scope="module")
def ranks_of():
    """Return a function that calls functions in ``size`` processes, which are reused until one fails."""
    kept = {}

    def call(size, *arguments):
        ranks = kept.pop(size, None) or Ranks(size, seconds=60)
        try:
            results = ranks(*arguments)
        except BaseException:
            ranks.close()  # after a failure, the other processes may wait in a collective
            raise
        kept[size] = ranks
        return results

    yield lambda size: partial(call, size)
    for ranks in kept.values():
        ranks.close()


@pytest.fixture(scope="module")
def four(ranks_of):
    return ranks_of(4)


class Mixed(Network):
    """A network with two layers of another dtype."""

    def __init__(self, other):
        super().__init__()
        self.a.to(other), self.c.to(other)

    def forward(self, x):
        x = self.norm(torch.tanh(self.a(x.to(self.a.weight.dtype))).double())
        return self.c((torch.tanh(self.b(x)) * self.scale).to(self.c.weight.dtype)).double()


def made(kind, options, size):
    """Return a model, its optimizer, this rank's part of the batch, and the number of parts."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    keywords, part = {}, (rank, size)
    if kind == "torch":
        model = Network()
        return model, torch.optim.AdamW(model.named_parameters(), lr=ADAMW["lr"], weight_decay=0.1), part
    if kind == "ddp":
        model = DistributedDataParallel(Network())
        keywords = {"model": model, "sync_perturbation": True}  # one e, as on one process
    elif kind.startswith("mixed"):
        model = Mixed(getattr(torch, kind.split()[1]))
        mesh = init_device_mesh("cpu", (size,))
        for module in (model.a, model.c, model):  # fully_shard requires one dtype in each of its groups
            fully_shard(module, mesh=mesh)
    elif kind.startswith("one"):
        model = network_of(kind.partition(" ")[2])()
    else:
        model, *part = sharded(kind, size)
    settings = OPTIONS[options] if isinstance(options, str) else options
    optimizer = CRSAM(inner(model).named_parameters(), **keywords, **settings)
    return model, optimizer, part


def inner(model):
    return model.module if isinstance(model, DistributedDataParallel) else model


def closure_of(model, step, part=0, parts=1):
    """Return a closure for this part of 12 samples, which any number of ranks up to 4 divides evenly."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 4, 6, generator=generator, dtype=torch.float64)[part::parts]
    y = torch.randint(3, (12, 4), generator=generator)[part::parts].flatten()

    def closure():
        flat = isinstance(inner(model), Network)
        out = model(x.flatten(0, 1)) if flat else model(x).flatten(0, 1)
        loss = F.cross_entropy(out, y)
        loss.backward()
        return loss

    return closure


def train(model, optimizer, part, steps):
    for step in steps:
        optimizer.zero_grad()  # torch's own optimizers leave it to the caller
        optimizer.step(closure_of(model, step, *part))


def everything(model, optimizer):
    """Return parameters and state as full tensors. Names are sorted, because all ranks must gather in the same
    order."""
    result = {}
    for name, param in inner(model).named_parameters():
        result[name] = full(param)
        for key, value in sorted(optimizer.state.get(param, {}).items()):
            check_placed(param, key, value)
            result[f"{name}: {key}"] = full(value)
    return result


def check_placed(param, key, value):
    """Check that state is sharded as its parameter, also on ranks without elements, and that counters are plain
    tensors."""
    if key == "step" or not isinstance(param, DTensor):
        assert type(value) is torch.Tensor, key
        return
    assert isinstance(value, DTensor), key
    assert (value.device_mesh, value.placements) == (param.device_mesh, param.placements), key
    assert (value.shape, value.to_local().shape) == (param.shape, param.to_local().shape), key


def save(folder, model, optimizer, options=None, **how):
    weights, state = get_state_dict(model, optimizer, options=options)
    alone = not dist.is_initialized()
    return how.pop("by", dcp.save)({"model": weights, "optimizer": state}, checkpoint_id=folder, no_dist=alone, **how)


def load(folder, model, optimizer, options=None, lacking=False):
    """Load a checkpoint; with ``lacking``, options of the groups that it does not contain keep their values."""
    weights, state = get_state_dict(model, optimizer, options=options)
    read = {"model": weights, "optimizer": state}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=lacking)
    dcp.load(read, checkpoint_id=folder, planner=planner, no_dist=not dist.is_initialized())
    set_state_dict(
        model, optimizer, model_state_dict=read["model"], optim_state_dict=read["optimizer"], options=options
    )


def saved_on_the_way(rank, size, kind, options, folder):
    """Return everything at the time of saving, and at the end."""
    model, optimizer, part = made(kind, options, size)
    train(model, optimizer, part, range(SAVED))
    save(folder, model, optimizer)
    then = everything(model, optimizer)
    train(model, optimizer, part, range(SAVED, END))
    return then, everything(model, optimizer)


def resumed(rank, size, kind, options, folder, *, steps=range(SAVED, END), target=None, **how):
    """Return everything after loading, and after more steps, at the end of which it may be saved."""
    model, optimizer, part = made(kind, options, size)
    if folder is not None:
        load(folder, model, optimizer, **how)
    then = everything(model, optimizer)
    train(model, optimizer, part, steps)
    if target is not None:
        save(target, model, optimizer)
    return then, everything(model, optimizer)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_close(found, expected, bound=ROUNDING):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].double() - value.double()).abs().max() < bound, name


# Reading the state ---------------------------------------------------------------------------------------------------

FULL = {"full_state_dict": True}
FORMS = {
    "sharded": {},
    "offloaded": {"cpu_offload": True},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": FULL,
    "full on rank 0": {**FULL, "cpu_offload": True},
}


def read_first(rank, size, options, forms):
    """Return everything after some steps, of a run whose state was first read in these forms, and of an undisturbed
    run."""
    results = []
    for asked in (forms, ()):
        model, optimizer, part = made("fsdp", options, size)
        before = everything(model, optimizer)
        for form in asked:
            get_state_dict(model, optimizer, options=StateDictOptions(**FORMS[form]))
            entered = everything(model, optimizer)
            assert optimizer.stats.steps == 0
            assert all(torch.equal(entered[name], value) for name, value in before.items())
            # A wrapped optimizer creates its state in a step of its own, which it counts.
            own = [name for name in entered if name not in before and not (": step" in name and options in WRAPPED)]
            assert not any(entered[name].any() for name in own)
            assert all(param in optimizer.state for param in model.parameters())
            if OPTIONS[options].get("curvature_interval", 1) > 1:
                assert "scale: second_difference" in entered
            if OPTIONS[options].get("reuse"):
                assert "scale: sharpness_direction" in entered
        train(model, optimizer, part, range(SAVED))
        results.append(everything(model, optimizer))
    return results


@pytest.mark.parametrize("options", ["all", "reuse", "rmsprop", "adagrad"])
def test_reading_the_state_before_the_first_step_changes_nothing(four, options):
    for asked, twin in four(read_first, options, list(FORMS)):
        assert_same(asked, twin)


def skipped_first(rank, size, options):
    """Return everything after some steps, of a run whose first step was skipped, and of a run without that step."""
    results = []
    for skips in (True, False):
        model, optimizer, part = made("fsdp", options, size)
        if skips:
            optimizer.step(partial(backward_of_nan, model, rank))
            assert optimizer.stats.skipped == 1
            state = get_optimizer_state_dict(model, optimizer)["state"]
            assert all(not full(value).any() for values in state.values() for value in values.values())
            assert "step" not in state["scale"] or not state["scale"]["step"]
            everything(model, optimizer)
        train(model, optimizer, part, range(SAVED))
        results.append(everything(model, optimizer))
    return results


def backward_of_nan(model, rank):
    """Run a backward whose gradient is NaN on one rank."""
    x = torch.ones(2, 6, dtype=torch.float64)
    loss = model(x * torch.nan if rank == 1 else x).sum()
    loss.backward()
    return loss


# Dampening is excluded, because a momentum shows that there has been a step; other optimizers are excluded, because
# they create their own state.
@pytest.mark.parametrize("options", [UNDAMPED, ADAMW], ids=["sgd", "adamw"])
def test_a_skipped_first_step_leaves_state_that_changes_nothing(four, options):
    for skipped, twin in four(skipped_first, options):
        assert_same(skipped, twin)


def round_trips(rank, size, options):
    """Return, for each form, everything in the optimizer that was read and in one that loaded it; for the last, a step
    later."""
    results = []
    model, optimizer, part = made("fsdp", options, size)
    train(model, optimizer, part, range(SAVED))
    for form, keywords in FORMS.items():
        other, loaded, _ = made("fsdp", options, size)
        asking = StateDictOptions(**keywords)
        weights, state = get_state_dict(model, optimizer, options=asking)
        if form == "full on rank 0":
            assert bool(state) == (rank == 0)
            asking = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        if state and form.startswith("full"):
            values = [value for of_param in state["state"].values() for value in of_param.values()]
            assert all(type(value) is torch.Tensor for value in values)
        # set_state_dict() refuses the empty dictionaries of the other ranks.
        set_model_state_dict(other, weights, options=asking)
        set_optimizer_state_dict(other, loaded, state, options=asking)
        assert loaded.passes == optimizer.passes
        results.append((everything(model, optimizer), everything(other, loaded)))
    train(other, loaded, part, [SAVED])
    train(model, optimizer, part, [SAVED])
    return [*results, (everything(model, optimizer), everything(other, loaded))]


@pytest.mark.parametrize("options", ["reuse", "rmsprop"])
def test_every_form_can_be_loaded(four, options):
    for pairs in four(round_trips, options):
        for expected, found in pairs:
            assert_same(found, expected)


def gathered_in_order(rank, size):
    """Return everything, and a full state dict, of a model in which shards of only some ranks share rows."""
    kept, TorchOperators.gather_below = TorchOperators.gather_below, 10
    try:
        model, optimizer, part = made("fsdp", "adamw", size)
        train(model, optimizer, part, range(SAVED))
        state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**FULL))["state"]
        return everything(model, optimizer), state
    finally:
        TorchOperators.gather_below = kept


def test_every_rank_gathers_in_the_same_order(four):
    """A shard's position in its bucket depends on its size, and shards are uneven; the order of the state must not
    depend on it."""
    for expected, state in four(gathered_in_order):
        found = {f"{name}: {key}": value for name, values in state.items() for key, value in values.items()}
        assert_same({**expected, **found}, expected)


def not_written_to(rank, size, options):
    """Return the loaded state, before and after training with it."""
    model, optimizer, part = made("fsdp", options, size)
    train(model, optimizer, part, range(SAVED))
    read = optimizer.state_dict()["state"]
    read = {key: {name: value.clone() for name, value in values.items()} for key, values in read.items()}
    _, loaded, _ = other = made("fsdp", options, size)
    loaded.load_state_dict({**optimizer.state_dict(), "state": read})
    before = [full(value) for key in sorted(read) for _, value in sorted(read[key].items())]
    train(*other, range(SAVED, END))
    return before, [full(value) for key in sorted(read) for _, value in sorted(read[key].items())]


@pytest.mark.parametrize("options", ["curvature_interval", "reuse", "rmsprop"])
def test_training_does_not_write_to_the_loaded_state(four, options):
    for before, after in four(not_written_to, options):
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


# Other numbers of ranks, other kinds of sharding ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(ranks_of, tmp_path_factory):
    """Save once for each kind of sharding and each optimizer; return the folder, everything then, and everything at the
    end."""
    kept = {}

    def of(kind, options):
        if (kind, options) not in kept:
            folder = tmp_path_factory.mktemp("checkpoints") / "0"
            kept[kind, options] = folder, *ranks_of(4)(saved_on_the_way, kind, options, folder)[0]
        return kept[kind, options]

    return of


@pytest.mark.parametrize("size", [4, 3, 2, "one process"])
@every_option
def test_checkpoint_loads_on_other_numbers_of_ranks(ranks_of, saved, options, size):
    folder, then, end = saved("fsdp", options)
    if size == "one process":
        results = [resumed(0, 1, "one", options, folder)]
    else:
        results = ranks_of(size)(resumed, "fsdp", options, folder)
    for found, at_the_end in results:
        assert_same(found, then)
        (assert_same if size == 4 else assert_close)(at_the_end, end)


# Neighboring numbers below 1 are 2^-24 apart in float32, and 2^-8 in bfloat16. A parameter that rounds the other way
# differs by that much, and its gradient adds less than that in two steps with learning rates up to 0.1.
MIXED = {"float32": 100 * 2.0**-24, "bfloat16": 10 * 2.0**-8}


@pytest.mark.parametrize("size", [4, 3, 2])
@pytest.mark.parametrize("dtype", MIXED)
def test_two_dtypes_load(ranks_of, saved, dtype, size):
    options = "all"
    folder, then, end = saved(f"mixed {dtype}", options)
    assert ("a.weight: master_param" in then) == (dtype == "bfloat16")
    assert "b.weight: master_param" not in then
    for found, at_the_end in ranks_of(size)(resumed, f"mixed {dtype}", options, folder):
        assert_same(found, then)
        if size == 4:
            assert_same(at_the_end, end)  # compare master parameters, which determine the parameters
        else:
            assert_close(at_the_end, end, MIXED[dtype])


WAYS = [
    ("hsdp", "hsdp"),
    ("fsdp", "hsdp"),
    ("replicate", "fsdp"),
    ("hsdp", "replicate"),
    ("tp and fsdp", "tp and fsdp"),
    ("tp and fsdp", "tp"),
    ("tp", "tp and fsdp"),
    ("tp and fsdp", "one tp"),
]


@pytest.mark.parametrize(("source", "target"), WAYS)
def test_checkpoint_loads_into_other_kinds_of_sharding(four, saved, source, target):
    options = "all"
    folder, then, end = saved(source, options)
    if target.startswith("one"):
        results = [resumed(0, 1, target, options, folder)]
    else:
        results = four(resumed, target, options, folder)
    for found, at_the_end in results:
        assert_same(found, then)
        (assert_same if source == target else assert_close)(at_the_end, end)


def test_checkpoint_passes_through_ddp_and_torchs_own_optimizer(ranks_of, tmp_path):
    """Each loads the checkpoint of the previous one. The trajectory is that of one process without checkpoints."""
    stages = [("ddp", 2), ("fsdp", 4), ("one", 1), ("torch", 1), ("fsdp", 3), ("ddp", 2)]
    before, source = None, None
    for step, (kind, size) in enumerate(stages):
        target, how = tmp_path / str(step), {"steps": [step], "lacking": stages[step - 1][0] == "torch"}
        if kind in ("one", "torch"):
            results = [resumed(0, 1, kind, "adamw", source, target=target, **how)]
        else:
            results = ranks_of(size)(partial(resumed, target=target, **how), kind, "adamw", source)
        for then, _ in results:
            assert before is None or assert_same(then, before) is None
        source, before = target, results[0][1]
    model, optimizer, part = made("one", "adamw", 1)
    for step, (kind, _) in enumerate(stages):
        optimizer.param_groups[0]["rho"] = 0.0 if kind == "torch" else ADAMW["rho"]
        train(model, optimizer, part, [step])
    assert_close(before, everything(model, optimizer))


FLATTENED = StateDictOptions(flatten_optimizer_state_dict=True)


def flattened_of_torchs_own(rank, size, folder):
    """Return what CRSAM reads from a flattened checkpoint of torch's AdamW, and the state of AdamW."""
    model, _, part = made("fsdp", "adamw", size)
    plain = torch.optim.AdamW(model.named_parameters(), lr=0.5)
    train(model, plain, part, range(2))
    save(folder, model, plain, FLATTENED)
    theirs = get_optimizer_state_dict(model, plain, options=FLATTENED)
    other, optimizer, _ = made("fsdp", "adamw", size)
    with pytest.raises(KeyError, match=r"param_groups\..*\.rho"):
        set_optimizer_state_dict(other, optimizer, theirs, options=FLATTENED)
    load(folder, other, optimizer, FLATTENED, lacking=True)
    third, handed, _ = made("fsdp", "adamw", size)
    completed = {**get_optimizer_state_dict(third, handed, options=FLATTENED), **theirs}
    set_optimizer_state_dict(third, handed, completed, options=FLATTENED)
    third.load_state_dict(model.state_dict())
    for each in (optimizer, handed):
        assert (each.param_groups[0]["rho"], each.param_groups[0]["lr"]) == (ADAMW["rho"], 0.5)
    assert_same(everything(third, handed), everything(other, optimizer))
    return everything(other, optimizer), everything(model, plain)


def test_flattened_checkpoint_of_torchs_own_optimizer_loads(four, tmp_path):
    """Options that the checkpoint does not contain keep CRSAM's values, if its state is read and then loaded into."""
    for found, expected in four(flattened_of_torchs_own, tmp_path):
        assert_same(found, expected)


# Asynchronous saving -------------------------------------------------------------------------------------------------


class HeldWriter(dcp.FileSystemWriter):
    """Waits before or after writing its data, so that a test knows that a checkpoint is in progress."""

    def __init__(self, folder, before):
        super().__init__(folder)
        self.before, self.held, self.released = before, threading.Event(), threading.Event()

    def write_data(self, plan, planner):
        if self.before:
            self._hold()
        future = super().write_data(plan, planner)
        future.wait()
        if not self.before:
            self._hold()
        return future

    def _hold(self):
        self.held.set()
        self.released.wait()


def begin_saving(folder, model, optimizer, before=False):
    """Start an asynchronous save; its collectives are in a separate process group."""
    writer = HeldWriter(folder, before)
    how = {"storage_writer": writer, "process_group": dist.new_group()}
    return writer, save(folder, model, optimizer, by=dcp.async_save, **how)


def saved_meanwhile(rank, size, folder):
    """Return everything when a checkpoint was started, and at the end of training, before it was written."""
    model, optimizer, part = made("fsdp", "all", size)
    train(model, optimizer, part, range(SAVED))
    then = everything(model, optimizer)
    writer, future = begin_saving(folder, model, optimizer, before=True)
    train(model, optimizer, part, range(SAVED, END))
    assert writer.held.wait(LIMIT)
    writer.released.set()
    future.result()
    return then, everything(model, optimizer)


def test_training_continues_during_an_asynchronous_save(four, tmp_path):
    expected = four(saved_meanwhile, tmp_path)[0]
    for results in four(resumed, "fsdp", "all", tmp_path):
        for found, value in zip(results, expected, strict=True):
            assert_same(found, value)


def newest_complete(folder):
    """Return the last step with a complete checkpoint; the metadata are written after the data of all ranks."""
    return max((path.parent for path in folder.glob("*/.metadata")), key=lambda path: int(path.name))


def killed_while_saving(rank, size, folder):
    """Return everything when the last complete checkpoint was saved."""
    model, optimizer, part = made("fsdp", "all", size)
    for step in range(SAVED):
        train(model, optimizer, part, [step])
        save(folder / str(step + 1), model, optimizer)
    then = everything(model, optimizer)
    train(model, optimizer, part, [SAVED])
    writer, _ = begin_saving(folder / str(SAVED + 1), model, optimizer, before=rank % 2 == 0)
    train(model, optimizer, part, [SAVED + 1])
    assert writer.held.wait(LIMIT)
    return then


def test_training_resumes_after_a_kill_while_saving(four, saved, tmp_path):
    ranks = Ranks(4)
    then = ranks(killed_while_saving, tmp_path)[0]
    ranks.close()  # with SIGKILL
    unfinished = tmp_path / str(SAVED + 1)
    assert len(list(unfinished.glob("*.distcp"))) == 2
    assert newest_complete(tmp_path) == tmp_path / str(SAVED)
    with pytest.raises(dcp.CheckpointException):
        resumed(0, 1, "one", "all", unfinished)
    _, _, end = saved("fsdp", "all")
    for found, at_the_end in four(resumed, "fsdp", "all", newest_complete(tmp_path)):
        assert_same(found, then)
        assert_same(at_the_end, end)


# Several parts of a model, as in pipeline parallelism ----------------------------------------------------------------


class Front(nn.Module):
    def __init__(self, whole):
        super().__init__()
        self.a, self.norm = whole.a, whole.norm

    def forward(self, x):
        return self.norm(torch.tanh(self.a(x)))


class Back(nn.Module):
    def __init__(self, whole):
        super().__init__()
        self.b, self.c, self.scale = whole.b, whole.c, whole.scale

    def forward(self, x):
        return self.c(torch.tanh(self.b(x)) * self.scale)


class OfParts(Stateful):
    """Merges the results of ``get`` for each part, and passes everything to ``put`` for each part."""

    def __init__(self, get, put, *lists):
        self.get, self.put, self.lists = get, put, lists

    def state_dict(self):
        return {key: value for found in map(self.get, *self.lists) for key, value in found.items()}

    def load_state_dict(self, state):
        for members in zip(*self.lists, strict=True):
            self.put(*members, dict(state))


class Trainer:
    """Parts of a model with an optimizer each; it steps them together, and saves them as one."""

    def __init__(self, size, options):
        self.parts = [Front(whole := Network()), Back(whole)]
        self.part = (dist.get_rank(), size) if size else (0, 1)
        for part in self.parts if size else ():
            fully_shard(part, mesh=init_device_mesh("cpu", (size,)))
        self.optimizers = [CRSAM(part.named_parameters(), **OPTIONS[options]) for part in self.parts]
        lenient = StateDictOptions(strict=False)
        self.states = {
            "model": OfParts(get_model_state_dict, partial(set_model_state_dict, options=lenient), self.parts),
            "optimizer": OfParts(
                partial(get_optimizer_state_dict, options=FLATTENED),
                partial(set_optimizer_state_dict, options=FLATTENED),
                self.parts,
                self.optimizers,
            ),
        }

    def train(self, steps):
        for step in steps:
            backward = closure_of(nn.Sequential(*self.parts), step, *self.part)
            while True:
                backward()
                last = [optimizer.pass_index == optimizer.passes - 1 for optimizer in self.optimizers]
                for optimizer in self.optimizers:
                    if optimizer.passes == 1:
                        optimizer.step()
                        optimizer.zero_grad()
                    else:
                        calls = optimizer.first_step, optimizer.second_step, optimizer.third_step
                        calls[optimizer.pass_index](zero_grad=True)
                if all(last):
                    break

    def everything(self):
        found = map(everything, self.parts, self.optimizers)
        return {name: value for of_part in found for name, value in of_part.items()}


def parts_saved(rank, size, options, folder):
    trainer = Trainer(size, options)
    trainer.train(range(SAVED))
    dcp.save(trainer.states, checkpoint_id=folder)
    then = trainer.everything()
    trainer.train(range(SAVED, END))
    return then, trainer.everything()


def parts_resumed(rank, size, options, folder):
    trainer = Trainer(size, options)
    dcp.load(trainer.states, checkpoint_id=folder, no_dist=not dist.is_initialized())
    then = trainer.everything()
    trainer.train(range(SAVED, END))
    return then, trainer.everything()


@pytest.mark.parametrize("options", ["all", "rmsprop"])
def test_parts_of_a_model_are_saved_in_one_checkpoint(ranks_of, options, tmp_path):
    then, end = ranks_of(4)(parts_saved, options, tmp_path)[0]
    for size in (4, 3, 0):
        results = ranks_of(size)(parts_resumed, options, tmp_path) if size else [parts_resumed(0, 0, options, tmp_path)]
        for found, at_the_end in results:
            assert_same(found, then)
            (assert_same if size == 4 else assert_close)(at_the_end, end)
    # All parts together equal the whole model with one optimizer.
    model, optimizer, _ = made("one", options, 1)
    load(tmp_path, model, optimizer, FLATTENED)
    assert_same(everything(model, optimizer), then)


# Refused checkpoints -------------------------------------------------------------------------------------------------


def refused(rank, size, options, change):
    """Return the error of load_state_dict() for a changed state; the state must not change."""
    model, optimizer, part = made("fsdp", options, size)
    train(model, optimizer, part, range(SAVED))
    before = everything(model, optimizer)
    given = optimizer.state_dict()
    given["state"] = {
        key: {name: change(value) if isinstance(value, DTensor) else value for name, value in values.items()}
        for key, values in given["state"].items()
    }
    messages = []
    for target in (optimizer, optimizer.base_optimizer) if options not in WRAPPED else (optimizer,):
        with pytest.raises(ValueError, match="set_optimizer_state_dict") as raised:
            target.load_state_dict(given)
        messages.append(str(raised.value))
    assert_same(everything(model, optimizer), before)
    train(model, optimizer, part, [SAVED])
    return messages


def whole(value):
    return value.full_tensor()


def transposed(value):
    return distribute_tensor(full(value), value.device_mesh, [Shard(value.dim() - 1)])


@pytest.mark.parametrize("options", ["adamw", "curvature_interval", "rmsprop"])
def test_full_tensors_are_refused(four, options):
    """The error is one line, which says how to load them."""
    for messages in four(refused, options, whole):
        assert all(message.startswith("state '") and "\n" not in message for message in messages)
        assert all("is a plain tensor, but the parameter is a DTensor" in message for message in messages)


@pytest.mark.parametrize("options", ["adamw", "curvature_interval"])
def test_other_placements_are_refused(four, options):
    for messages in four(refused, options, transposed):
        assert all("has the placements (Shard(dim=1),)" in message for message in messages)


def read_in_place(rank, size, options, folder):
    """Return everything after more steps: of an uninterrupted run, and of one whose state was overwritten by a
    checkpoint."""
    model, optimizer, part = made("fsdp", options, size)
    train(model, optimizer, part, range(SAVED))
    save(folder, model, optimizer)
    other, loaded, _ = made("fsdp", options, size)
    weights, state = get_state_dict(other, loaded)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    train(model, optimizer, part, range(SAVED, END))
    train(other, loaded, part, range(SAVED, END))
    return everything(model, optimizer), everything(other, loaded)


# Without the counters of the groups, which are not tensors: only set_state_dict() loads them.
@pytest.mark.parametrize("options", [SGD, {**OPTIONS["rmsprop"], "curvature_interval": 1}], ids=["sgd", "rmsprop"])
def test_state_that_a_checkpoint_has_overwritten_is_kept(four, options, tmp_path):
    for expected, found in four(read_in_place, options, tmp_path):
        assert_same(found, expected)
