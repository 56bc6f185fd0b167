"""DTensor parameters on four processes: fully_shard, HSDP, tensor parallelism and replicate() match one process."""

import copy
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

from crsam_ext import CRSAM, GradScaler, GraphedStep, shards

from .ranks import Collectives, Ranks

pytestmark = pytest.mark.slow

STEPS = 4
SHARDED = ["fsdp", "fsdp root", "fsdp kept", "fsdp of 2", "hsdp", "tp", "tp and fsdp", "replicate"]
FULL = {"rho": 0.1, "alpha": 0.3, "beta": 0.2, "lr": 0.1}
SGD = {**FULL, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {**FULL, "base_optimizer": torch.optim.AdamW, "lr": 0.01}
LOG = {**SGD, "regularizer": "log", "alpha": 0.01, "beta": 0.01}
OPTIONS = {
    "sgd": SGD,
    "adamw": ADAMW,
    "sam": {**SGD, "alpha": 0.0, "beta": 0.0},
    "base": {**SGD, "rho": 0.0},
    "asam": {**SGD, "adaptive": True, "rho": 1.0},
    "log": LOG,
    "cap": {**SGD, "max_regularizer_ratio": 0.05},
    "clip": {**SGD, "max_grad_norm": 0.1},
    "clip, log, adamw": {**ADAMW, "regularizer": "log", "alpha": 0.01, "max_grad_norm": 0.1},
    "curvature_interval": {**SGD, "curvature_interval": 2},
    "reuse": {**SGD, "interval": 2, "reuse": True},
    "reuse, clip, adamw": {**ADAMW, "interval": 2, "reuse": True, "max_grad_norm": 0.1},
    "reuse of a long direction": {**SGD, "rho": 3.0, "alpha": 1.0, "interval": 2, "reuse": True},
    "rmsprop": {**FULL, "base_optimizer": torch.optim.RMSprop, "lr": 0.01},
    "maximize": {**SGD, "maximize": True, "lr": 0.01},
    "flatten=False": {**SGD, "flatten": False},
}


@pytest.fixture(scope="module")
def four():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


class Network(nn.Module):
    """Input (N, 6), output (N, 3). With four ranks, shards are uneven, and some are empty."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 8)
        self.c, self.scale = nn.Linear(8, 3), nn.Parameter(torch.ones(1))
        self.to(dtype)

    def forward(self, x):
        x = self.norm(torch.tanh(self.a(x)))
        return self.c(torch.tanh(self.b(x)) * self.scale)


class Sequence(nn.Module):
    """Input (N, 4, 6), output (N, 4, 3); suited to tensor parallelism, with a norm that is within the plan."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.Sequential(nn.LayerNorm(8)), nn.Linear(8, 8)
        self.c, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.to(dtype)

    def forward(self, x):
        return self.last(self.c(torch.tanh(self.b(self.norm(torch.tanh(self.a(x)))))))


# The plan for Sequence: the norm works on a part of the sequence, and its gradients are partial sums over the ranks;
# ``a`` and ``last`` are outside of the plan.
PLAN = {
    "norm": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)),
    "norm.0": SequenceParallel(),
    "b": ColwiseParallel(input_layouts=Shard(1)),
    "c": RowwiseParallel(),
}


@cache
def mesh_of(*shape, names=None):
    """Return a mesh, created once per process: every mesh has its own process groups."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def network_of(kind):
    return Sequence if kind.startswith("tp") else Network


def sharded(kind, size, dtype=torch.float64, **options):
    """Return a model sharded by ``kind``, this rank's part of the batch, and the number of parts."""
    model, rank = network_of(kind)(dtype), dist.get_rank()
    if kind == "replicate":
        from torch.distributed._composable.replicate_with_fsdp import replicate

        replicate(model, mesh=mesh_of(size, names=("replicate",)))
        return model, rank, size
    if kind.startswith("tp"):
        mesh = mesh_of(size // 2, 2, names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], PLAN)
        if kind == "tp":
            return model, 0, 1
        for layer in (model.a, model.norm, model.b, model.c, model):
            fully_shard(layer, mesh=mesh["dp"])
        return model, rank // 2, size // 2
    shape = (2, size // 2) if kind == "hsdp" else (size,)
    options["mesh"] = mesh_of(*shape, names=("replicate", "shard")[-len(shape) :])
    if kind == "fsdp kept":
        options["reshard_after_forward"] = False
    if kind == "fsdp of 2":
        options["reshard_after_forward"] = 2
    for layer in () if kind == "fsdp root" else (model.a, model.b):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model, rank, size


def batch_of(step, part=0, parts=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 4, 6, generator=generator, dtype=torch.float64), torch.randint(3, (8, 4), generator=generator)
    return x[part::parts].to(dtype), y[part::parts]


def loss_of(model, x, y):
    if not isinstance(model, Sequence):
        x, y = x.flatten(0, 1), y.flatten()
        return F.cross_entropy(model(x), y)
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def closure_of(model, step, part=0, parts=1, dtype=torch.float64):
    x, y = batch_of(step, part, parts, dtype)

    def closure():
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    return closure


def full(tensor):
    return (tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()).clone()


def apart(model, expected):
    """Return the largest difference between the parameters of a model and the expected ones."""
    return max(float((full(p) - q).abs().max()) for p, q in zip(model.parameters(), expected, strict=True))


def trajectory(model, optimizer, part=0, parts=1, steps=STEPS):
    """Return all parameters after each step."""
    result = []
    for step in range(steps):
        optimizer.step(closure_of(model, step, part, parts))
        result.append([full(param) for param in model.parameters()])
    return result


def both(kind, size, options, **of_sharding):
    """Return the largest difference between a sharded model's steps and those of one process, and the shards'
    addresses."""
    model, part, parts = sharded(kind, size, **of_sharding)
    alone = network_of(kind)()
    made = CRSAM(model.parameters(), **options)
    expected = trajectory(alone, CRSAM(alone.parameters(), **options))
    found = trajectory(model, made, part, parts)
    made.check_replicas()
    return max(
        float((p - q).abs().max())
        for of_step, other in zip(found, expected, strict=True)
        for p, q in zip(of_step, other, strict=True)
    )


def difference(rank, size, kind, options):
    return both(kind, size, OPTIONS[options])


# The rounding error of float64 is 1e-16 relative; the largest difference observed is 2.5e-15.
ROUNDING = 1e-12


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["fsdp", "tp and fsdp"])
def test_steps_equal_those_of_one_process(four, kind, options):
    assert max(four(difference, kind, options)) < ROUNDING


@pytest.mark.parametrize("options", ["sgd", "adamw", "clip, log, adamw", "asam", "reuse, clip, adamw"])
@pytest.mark.parametrize("kind", [kind for kind in SHARDED if kind not in ("fsdp", "tp and fsdp")])
def test_every_kind_of_sharding_equals_one_process(four, kind, options):
    assert max(four(difference, kind, options)) < ROUNDING


@pytest.mark.parametrize("options", ["sgd", "adamw", "clip, log, adamw", "reuse, clip, adamw", "rmsprop", "asam"])
def test_ranks_without_elements_take_part(four, options):
    """They take part in every reduction, and their counters and state equal those of the others."""
    results = four(with_nothing, options)
    for error, numbers in results:
        assert error < ROUNDING
        assert numbers == results[0][1]


def with_nothing(rank, size, options):
    alone = nn.Linear(6, 1).double()
    model = copy.deepcopy(alone)
    fully_shard(model, mesh=mesh_of(size))
    assert (local_of(model.weight).numel() > 0) == (rank == 0)
    made, expected = (CRSAM(m.parameters(), **OPTIONS[options]) for m in (model, alone))
    for step in range(STEPS):
        for m, optimizer, part in ((model, made, slice(rank, None, size)), (alone, expected, slice(None))):
            x = batch_of(step)[0].flatten(0, 1)[part]

            def closure(m=m, x=x):
                loss = m(x).square().mean() + m(x).mean()
                loss.backward()
                return loss

            optimizer.step(closure)
    error = apart(model, alone.parameters())
    state = {name: full(x).tolist() for name, x in made.state[model.weight].items()}
    return error, (int(made.stats.skipped), float(made.stats.regularized_norm or 0), sorted(state), state.get("step"))


@pytest.mark.parametrize("kind", ["hsdp", "tp", "tp and fsdp", "replicate"])
def test_replicated_parameters_do_not_drift(four, kind):
    four(for_long, kind)


def for_long(rank, size, kind):
    model, part, parts = sharded(kind, size, torch.float32)
    optimizer = CRSAM(model.parameters(), **{**ADAMW, "regularizer": "log", "max_grad_norm": 0.1})
    for step in range(20):
        optimizer.step(closure_of(model, step, part, parts, torch.float32))
    optimizer.check_replicas()


@pytest.mark.parametrize("kind", SHARDED)
def test_e_has_the_length_rho(four, kind):
    """The norm is not reduced over a replicated dimension; otherwise it would be too large by the square root of the
    dimension's size."""
    for length in four(length_of_e, kind):
        assert length == pytest.approx(0.1, rel=1e-9)  # minus the 1e-12 that is added to the norm


def length_of_e(rank, size, kind):
    model, part, parts = sharded(kind, size)
    optimizer, before, moved = CRSAM(model.parameters(), **SGD), [], []
    closure = closure_of(model, 0, part, parts)

    def measured():
        (moved if optimizer.pass_index else before).append([full(param) for param in model.parameters()])
        return closure()

    optimizer.step(measured)
    return float(sum((p - q).square().sum() for p, q in zip(moved[0], before[0], strict=True)).sqrt())


@pytest.mark.parametrize(
    ("kind", "options", "count"),
    [
        ("fsdp", "sgd", 2),  # one for the norm of g0, one for the other two norms
        ("fsdp", "sam", 2),
        ("fsdp", "base", 1),
        ("fsdp", "clip, log, adamw", 2),  # one for the norm, one for the Gram matrix
        ("hsdp", "sgd", 2),
        ("tp and fsdp", "sgd", 4),  # one of each per dimension
        ("replicate", "sgd", 0),  # the ranks hold whole parameters
    ],
)
def test_sums_are_reduced_together(four, kind, options, count):
    """The number does not depend on the number of parameters and groups, and excludes the model's own backward."""
    for with_step, of_passes in four(reductions, kind, options):
        assert with_step - of_passes == count


def reductions(rank, size, kind, options):
    model, part, parts = sharded(kind, size)
    groups = [{"params": [param], "lr": 0.1} for param in model.parameters()]
    optimizer = CRSAM(groups, **OPTIONS[options])
    closure, passes = closure_of(model, 0, part, parts), optimizer.passes
    optimizer.step(closure)
    with Collectives() as of_passes:
        for _ in range(passes):
            optimizer.zero_grad()
            closure()
            # A gradient that is a partial sum is reduced when it is taken.
            for param in model.parameters():
                if isinstance(param.grad, DTensor):
                    param.grad.redistribute(param.device_mesh, param.placements)
    with Collectives() as with_step:
        optimizer.step(closure)
    return with_step.count, of_passes.count


def test_sums_are_reduced_over_groups_in_the_order_of_the_meshes(monkeypatch):
    """Ranks that reduce over their groups in different orders would deadlock."""
    seen = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: seen.append(group))
    groups = [object() for _ in range(20)]
    one = torch.ones(2)
    total = shards.sum_over({tuple(groups): one, tuple(groups[:5]): one, (): one, (groups[7],): one})
    assert seen == groups
    assert total.tolist() == [4, 4]
    total = shards.sum_over({(groups[3], groups[1]): one, (groups[1],): one})
    assert seen[20:] == [groups[3], groups[1]]


@pytest.mark.parametrize("kind", SHARDED)
def test_gradients_and_state_are_dtensors(four, kind):
    """They are sharded as the parameters, which are not moved; no shard is copied."""
    assert all(four(seen, kind))


def seen(rank, size, kind):
    model, part, parts = sharded(kind, size)
    optimizer = CRSAM(model.parameters(), **ADAMW, curvature_interval=2)
    closure_of(model, 0, part, parts)()  # fully_shard allocates its shards in the first forward
    model.zero_grad()
    params = list(model.parameters())
    shards = [param for param in params if isinstance(param, DTensor)]
    places = [local_of(param).data_ptr() for param in shards]
    trajectory(model, optimizer, part, parts)
    assert all(p is q for p, q in zip(model.parameters(), params, strict=True))
    assert [local_of(param).data_ptr() for param in shards] == places
    for param in params:
        state = optimizer.state[param]
        assert set(state) == {"exp_avg", "exp_avg_sq", "step", "second_difference"}
        assert not isinstance(state["step"], DTensor)
        assert state["step"] == STEPS
        for value in (param.grad, *(value for name, value in state.items() if name != "step")):
            assert isinstance(value, DTensor) == isinstance(param, DTensor)
            assert value.shape == param.shape
            if isinstance(param, DTensor):
                assert value.placements == param.placements
                assert value.device_mesh == param.device_mesh
                assert value.to_local().shape == param.to_local().shape
    return kind.startswith("tp") or not optimizer._flat._copies


def local_of(param):
    return param.detach().to_local() if isinstance(param, DTensor) else param.detach()


def test_gradients_after_a_step_are_those_at_w(four):
    for found, expected in four(gradients_after):
        assert float((found - expected).abs().max()) < ROUNDING


def gradients_after(rank, size):
    model, part, parts = sharded("fsdp", size)
    closure = closure_of(model, 0, part, parts)
    closure()
    expected = torch.cat([full(param.grad).flatten() for param in model.parameters()])
    CRSAM(model.parameters(), **SGD).step(closure)
    return torch.cat([full(param.grad).flatten() for param in model.parameters()]), expected


@pytest.mark.parametrize("kind", ["fsdp", "tp and fsdp"])
@pytest.mark.parametrize("combines", [False, True])
def test_calls_equal_one_process(four, kind, combines):
    assert max(four(with_calls, kind, combines)) < ROUNDING


def with_calls(rank, size, kind, combines):
    alone = network_of(kind)()
    expected = trajectory(alone, CRSAM(alone.parameters(), **ADAMW))[-1]
    model, part, parts = sharded(kind, size)
    optimizer = CRSAM(model.parameters(), **ADAMW)
    for step in range(STEPS):
        closure = closure_of(model, step, part, parts)
        for call in (optimizer.first_step, optimizer.second_step):
            closure()
            call(zero_grad=step % 2 == 0)
            if step % 2:
                optimizer.zero_grad()
        closure()
        if combines:
            optimizer.combine()
            assert all(isinstance(p.grad, DTensor) == isinstance(p, DTensor) for p in model.parameters())
            optimizer.step()
        else:
            optimizer.third_step()
        optimizer.zero_grad()
    return apart(model, expected)


@pytest.mark.parametrize("reshards_late", [False, True])
def test_accumulation_equals_one_process(four, reshards_late):
    """set_reshard_after_backward(False) is for micro-batches, between which no perturbation happens."""
    assert max(four(accumulated, reshards_late)) < ROUNDING


def accumulated(rank, size, reshards_late):
    model, part, parts = sharded("fsdp", size)
    optimizer = CRSAM(model.parameters(), **SGD)
    alone = Network()
    expected = CRSAM(alone.parameters(), **SGD)

    def micro_batch(step, index):
        closure = closure_of(model, 2 * step + index, part, parts)

        def run():
            model.set_reshard_after_backward(not reshards_late or index == 1)
            return closure()

        return run

    for step in range(STEPS):
        optimizer.step([micro_batch(step, index) for index in range(2)])
        expected.step([closure_of(alone, 2 * step + i) for i in range(2)])
    return apart(model, alone.parameters())


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "tp and fsdp"])
def test_a_bad_element_of_one_shard_skips_the_step_of_all(four, kind, index):
    for same, skipped, skipped_by_scaler, moved in four(with_nan, kind, index):
        assert same
        assert skipped == 1
        assert skipped_by_scaler
        assert moved


def with_nan(rank, size, kind, index):
    model, part, parts = sharded(kind, size)
    optimizer, scaler = CRSAM(model.parameters(), **ADAMW), GradScaler("cpu", init_scale=4.0)
    optimizer.step(closure_of(model, 0, part, parts))
    before, weight, calls = [full(param) for param in model.parameters()], full(model.b.weight), []
    closure = closure_of(model, 1, part, parts)

    def poisoned():
        loss = closure()
        shard = model.b.weight.grad.to_local()
        # A replica of the shard has the same gradient.
        if len(calls) == index and rank in {"fsdp": (2,), "hsdp": (1, 3), "tp and fsdp": (2,)}[kind]:
            shard.view(-1)[0] = float("inf")
        calls.append(0)
        return loss

    scaler.step(optimizer, poisoned)
    scaler.update()
    same = all(torch.equal(full(p), q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.step(closure_of(model, 2, part, parts))
    moved = not torch.equal(full(model.b.weight), weight)
    return same, int(optimizer.stats.skipped), scaler.get_scale() == 2.0, moved


def test_torchs_scaler_skips_the_step_on_all_ranks(four):
    """It checks the gradients of its own rank only; the step reduces the result."""
    for same, skipped in four(with_torchs_scaler):
        assert same
        assert skipped == 1


def test_an_overflow_found_by_one_rank_skips_the_step_of_all(four):
    """This holds even if no gradient shows it."""
    for same, skipped in four(with_found_inf):
        assert same
        assert skipped == 1


def with_found_inf(rank, size):
    model, part, parts = sharded("tp and fsdp", size)
    optimizer = CRSAM(model.parameters(), **ADAMW)
    before = [full(param) for param in model.parameters()]
    for call in (optimizer.first_step, optimizer.second_step):
        closure_of(model, 0, part, parts)()
        call(zero_grad=True)
    closure_of(model, 0, part, parts)()
    # torch's GradScaler sets these attributes.
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(float(rank == 1))
    optimizer.step()
    same = all(torch.equal(full(p), q) for p, q in zip(model.parameters(), before, strict=True))
    return same, int(optimizer.stats.skipped)


def with_torchs_scaler(rank, size):
    model, part, parts = sharded("fsdp", size)
    optimizer, scaler = CRSAM(model.parameters(), **ADAMW), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [full(param) for param in model.parameters()]
    for call in (optimizer.first_step, optimizer.second_step, None):
        loss = loss_of(model, *batch_of(0, part, parts))
        scaler.scale(loss).backward()
        if call is not None:
            call(zero_grad=True)
    if rank == 2:
        model.b.weight.grad.to_local().view(-1)[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    same = all(torch.equal(full(p), q) for p, q in zip(model.parameters(), before, strict=True))
    return same, int(optimizer.stats.skipped)


@pytest.mark.parametrize("options", ["sgd", "adamw", "reuse, clip, adamw"])
def test_mixed_precision_of_fully_shard_equals_one_process(four, options):
    """Shards and gradients are float32: the steps equal those of a model whose forward rounds in the same way."""
    assert all(four(with_mixed_precision, options))


def with_mixed_precision(rank, size, options):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = []
    for _ in range(2):
        model, part, parts = sharded("fsdp", size, torch.float32, mp_policy=policy)
        optimizer = CRSAM(model.parameters(), **OPTIONS[options])
        for step in range(STEPS):
            optimizer.step(closure_of(model, step, part, parts, torch.bfloat16))
        assert all(param.dtype == param.grad.dtype == torch.float32 for param in model.parameters())
        results.append([full(param) for param in model.parameters()])
    # The parameters have moved, are finite, and are the same in a second run.
    assert all(torch.isfinite(p).all() for p in results[0])
    assert not torch.equal(results[0][0], Network(torch.float32).scale.detach())
    return all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "tp and fsdp"])
def test_low_precision_shards_have_masters(four, kind):
    """The state contains a float32 master of each bfloat16 shard as a DTensor, and the shard is its rounded value."""
    assert all(four(with_masters, kind))


def with_masters(rank, size, kind):
    model, part, parts = sharded(kind, size, torch.bfloat16)
    optimizer = CRSAM(model.parameters(), **ADAMW)
    for step in range(STEPS):
        optimizer.step(closure_of(model, step, part, parts, torch.bfloat16))
    optimizer.check_replicas()
    return all(
        torch.equal(full(optimizer.state[param]["master_param"]).to(torch.bfloat16), full(param))
        for param in model.parameters()
    )


def test_replicas_that_differ_are_found(four):
    """Every rank reports it, also if the differing replica belongs to other shards."""
    for failure in four.attempt(drifted):
        assert failure.kind == "RuntimeError"
        assert "the replicas differ: b.weight of 9 parameters are not equal on all ranks" in failure.message


def drifted(rank, size):
    model, part, parts = sharded("hsdp", size)
    optimizer = CRSAM(model.named_parameters(), **SGD)
    optimizer.step(closure_of(model, 0, part, parts))
    if rank == 3:
        local_of(model.b.weight)[0, 0] += 1
    optimizer.check_replicas()


# Errors --------------------------------------------------------------------------------------------------------------

REFUSED = {
    "kept gathered": ("RuntimeError", "leave set_reshard_after_backward(True) in place"),
    "made before": ("RuntimeError", "create the optimizer after fully_shard()"),
    "gathered": (
        "ValueError",
        "was gathered by fully_shard for a forward and will be freed: call model.reshard()",
    ),
    "stochastic_rounding": ("ValueError", "keep param_dtype=None in MixedPrecisionPolicy, and use torch.autocast"),
    "losses": ("ValueError", 'use estimator="gradient"'),
    "parallel": ("TypeError", "call step() without parallel="),
    "fsdp1": ("ValueError", "use torch.distributed.fsdp.fully_shard"),
    "partial": ("ValueError", "redistribute it to Shard or Replicate before you create the optimizer"),
    "graph": ("ValueError", "this step cannot be captured in a CUDA graph"),
    "shard_state": ("ValueError", "already shards the state"),
    "plain state": ("ValueError", "the parameter is a DTensor: load it with torch.distributed.checkpoint.state_dict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_name_a_solution(four, case):
    kind, message = REFUSED[case]
    for failure in four.attempt(refused, case):
        assert failure.kind == kind, failure.told
        assert message in failure.message
        assert "\n" not in failure.message


def refused(rank, size, case):
    if case == "made before":
        model = Network()
        optimizer = CRSAM(model.parameters(), **SGD)
        fully_shard(model, mesh=mesh_of(size))
        optimizer.step(closure_of(model, 0, rank, size))
    if case == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        CRSAM(FullyShardedDataParallel(Network(), device_id=torch.device("cpu")).parameters(), **SGD)
    if case == "partial":
        mesh = mesh_of(size)
        CRSAM([nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))], **SGD)
    model, part, parts = sharded("fsdp", size)
    closure = closure_of(model, 0, part, parts)
    if case == "gathered":
        model(batch_of(0)[0].flatten(0, 1))
        CRSAM(model.parameters(), **SGD)
    if case == "stochastic_rounding":
        CRSAM(model.parameters(), **SGD, stochastic_rounding=True)
    if case == "shard_state":
        CRSAM(model.parameters(), **SGD, model=model, shard_state=True)
    if case == "losses":
        CRSAM(model.parameters(), **LOG, estimator="loss").step(closure)
    optimizer = CRSAM(model.parameters(), **SGD)
    if case == "parallel":
        optimizer.step(closure, parallel=model)
    if case == "graph":
        GraphedStep(optimizer, closure)
    if case == "plain state":
        alone = Network()
        torchs = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
        closure_of(alone, 0)()
        torchs.step()
        optimizer.load_state_dict(torchs.state_dict())
        optimizer.step(closure)
    if case == "kept gathered":
        model.set_reshard_after_backward(False)
        before = [local_of(param).clone() for param in optimizer.param_groups[0]["params"]]
        try:
            optimizer.step(closure)
        finally:
            assert all(map(torch.equal, before, map(local_of, optimizer.param_groups[0]["params"])))


@pytest.mark.parametrize("index", range(3))
def test_an_exception_in_a_forward_restores_w(four, index):
    """If Python supports notes on exceptions, it also says what fully_shard requires before the next step."""
    for same, notes, difference in four(with_exception, index):
        assert same
        assert notes is None or "fully_shard needs model.reset_iter_state()" in notes
        assert difference < ROUNDING


def with_exception(rank, size, index):
    model, part, parts = sharded("fsdp", size)
    alone = Network()
    optimizer, expected = CRSAM(model.parameters(), **SGD), CRSAM(alone.parameters(), **SGD)
    before, calls = [local_of(param).clone() for param in model.parameters()], []

    def failing(module, inputs):
        calls.append(0)
        if len(calls) == index + 1:
            raise MemoryError("none left")

    handle = model.c.register_forward_pre_hook(failing)
    with pytest.raises(MemoryError) as raised:
        optimizer.step(closure_of(model, 0, part, parts))
    handle.remove()
    same = all(map(torch.equal, before, map(local_of, optimizer.param_groups[0]["params"])))
    if not hasattr(model, "reset_iter_state"):  # new in torch 2.14
        return same, None, 0.0
    model.reset_iter_state()
    for step in range(STEPS):
        optimizer.step(closure_of(model, step, part, parts))
        expected.step(closure_of(alone, step))
    notes = " ".join(raised.value.__notes__) if index and hasattr(raised.value, "add_note") else None
    return (
        same,
        notes,
        apart(model, alone.parameters()),
    )


@pytest.mark.parametrize("options", ["sgd", "adamw", "rmsprop"])
def test_accelerate_may_replace_the_parameters_of_an_optimizer(four, options):
    """It shards the model after the optimizer was created, and puts the shards into the groups."""
    assert max(four(exchanged, options)) < ROUNDING


def exchanged(rank, size, options):
    from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters

    alone, model = Network(), Network()
    expected = trajectory(alone, CRSAM(alone.parameters(), **OPTIONS[options]))[-1]
    optimizer = CRSAM(model.parameters(), **OPTIONS[options])
    before = dict(model.named_parameters())
    for group in optimizer.param_groups:
        for index, param in enumerate(group["params"]):
            group["params"][index] = torch.empty(1)
            group["params"][index].data_ptr = param.data_ptr()
    addresses = {name: param.data_ptr() for name, param in before.items()}
    fully_shard(model, mesh=mesh_of(size))
    fsdp2_switch_optimizer_parameters(optimizer, {addresses[name]: p for name, p in model.named_parameters()})
    trajectory(model, optimizer, rank, size)
    return apart(model, expected)
