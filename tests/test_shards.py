"""DTensor parameters on four processes: fully_shard, HSDP, tensor parallelism, replicate() step as one process does."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

from crsam_ext import CRSAM

from .ranks import Ranks

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
    """Input (N, 6), output (N, 3). Over four ranks, shards are uneven, and some are empty."""

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
    """Input (N, 4, 6), output (N, 4, 3); as tensor parallelism likes it, with a norm that is within its plan."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.Sequential(nn.LayerNorm(8)), nn.Linear(8, 8)
        self.c, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.to(dtype)

    def forward(self, x):
        return self.last(self.c(torch.tanh(self.b(self.norm(torch.tanh(self.a(x)))))))


# Of Sequence: the norm works on a part of the sequence, and its gradients are parts of a sum over the ranks; ``a`` and
# ``last`` are outside the plan.
PLAN = {
    "norm": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)),
    "norm.0": SequenceParallel(),
    "b": ColwiseParallel(input_layouts=Shard(1)),
    "c": RowwiseParallel(),
}


def network_of(kind):
    return Sequence if kind.startswith("tp") else Network


def sharded(kind, size, dtype=torch.float64, **options):
    """A model as ``kind`` says, what part of the batch this rank has, and of how many."""
    model, rank = network_of(kind)(dtype), dist.get_rank()
    if kind == "replicate":
        from torch.distributed._composable.replicate_with_fsdp import replicate

        replicate(model, mesh=init_device_mesh("cpu", (size,), mesh_dim_names=("replicate",)))
        return model, rank, size
    if kind.startswith("tp"):
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], PLAN)
        if kind == "tp":
            return model, 0, 1
        for layer in (model.a, model.norm, model.b, model.c, model):
            fully_shard(layer, mesh=mesh["dp"])
        return model, rank // 2, size // 2
    shape = (2, size // 2) if kind == "hsdp" else (size,)
    options["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
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


def trajectory(model, optimizer, part=0, parts=1, steps=STEPS):
    """All parameters after each step."""
    result = []
    for step in range(steps):
        optimizer.step(closure_of(model, step, part, parts))
        result.append([full(param) for param in model.parameters()])
    return result


def both(kind, size, options, **of_sharding):
    """The greatest difference between a sharded model's steps and those of one process, and the shards' addresses."""
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


# In float64, rounding is 1e-16 of numbers of size 1, and grows with the steps and by 1/rho in differences of gradients.
ROUNDING = 1e-11


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["fsdp", "tp and fsdp"])
def test_steps_are_those_of_one_process(four, kind, options):
    assert max(four(difference, kind, options)) < ROUNDING


@pytest.mark.parametrize("options", ["sgd", "adamw", "clip, log, adamw", "asam", "reuse, clip, adamw"])
@pytest.mark.parametrize("kind", [kind for kind in SHARDED if kind not in ("fsdp", "tp and fsdp")])
def test_every_way_of_sharding(four, kind, options):
    assert max(four(difference, kind, options)) < ROUNDING
