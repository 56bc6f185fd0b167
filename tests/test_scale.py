"""Steps on one rank of 4096: their collectives, memory use and host work.

The other ranks do not exist: a fake process group performs collectives without communication. Its results are
uninitialized memory, so the test writes values to the gradients after every backward.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, empty
from torch.testing._internal.distributed.fake_pg import FakeStore

import crsam_ext
from crsam_ext import CRSAM
from crsam_ext.backends.torch import TorchOperators
from crsam_ext.flat import ALIGNMENT

from .ranks import LIMIT, SERVER, Collectives

pytestmark = pytest.mark.slow

RANK, FEW, MANY = 5, 8, 4096
MESHES = {"fsdp": {FEW: (FEW,), MANY: (MANY,)}, "hsdp": {FEW: (2, FEW // 2), MANY: (16, MANY // 16)}}
LINEAR = {"rho": 0.1, "alpha": 0.3, "beta": 0.2, "lr": 1e-3}
# The lengths of the optimizer's all-reduces for each set of options. The Gram matrix has 9 numbers, sufficient for the
# clip factor and the log form; otherwise the norms of the second and third gradient show whether they are finite.
OPTIONS = {
    "linear": (LINEAR, [1, 2]),
    "clip": ({**LINEAR, "max_grad_norm": 1.0}, [1, 9]),
    "log, clip": ({**LINEAR, "regularizer": "log", "max_grad_norm": 1.0}, [1, 9]),
}


class Block(nn.Module):
    """Linear layers of 4096 hidden units, so that each of 4096 ranks has one row of each parameter."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Parameter(torch.randn(MANY, 16)), nn.Parameter(torch.randn(MANY, 16))
        self.bias = nn.Parameter(torch.zeros(MANY))

    def forward(self, x):
        return x + torch.relu(x @ self.into.t() + self.bias) @ self.out


class Run:
    """Steps of CRSAM with AdamW on a model of blocks, each sharded separately."""

    def __init__(self, size, kind, depth, options, **sharding):
        shape = MESHES[kind][size]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        self.model = nn.Sequential(*(Block() for _ in range(depth)))
        self.elements, self.shards = sum(p.numel() for p in self.model.parameters()), shape[-1]
        for block in self.model:
            fully_shard(block, mesh=mesh, **sharding)
        fully_shard(self.model, mesh=mesh, **sharding)
        self.optimizer = CRSAM(self.model.parameters(), torch.optim.AdamW, backend="torch", **OPTIONS[options][0])
        self.after_backward = lambda: None
        self._passes = 0

    def closure(self):
        loss = self.model(torch.ones(2, 16)).mean()
        loss.backward()
        self._passes += 1
        for param in self.model.parameters():
            param.grad.to_local().fill_(1.0 + 0.1 * (self._passes % 3))
        self.after_backward()
        return loss

    def step(self):
        self.optimizer.step(self.closure)


def on_one_of(size, function, *arguments):
    """Return the result of a function on one rank of ``size``, in a new process with its own process group."""
    with ProcessPoolExecutor(1, mp_context=SERVER) as pool:
        return pool.submit(_begin, size, function, arguments).result(LIMIT)


def _begin(size, function, arguments):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=size)
    return function(size, *arguments)


def collectives(size, kind, depth, options, sharding):
    """Return the collectives of a later step, the lengths of the optimizer's own, and whether the update was made."""
    run, lengths, all_reduce = Run(size, kind, depth, options, **sharding), [], dist.all_reduce
    run.step()
    before = [param.to_local().clone() for param in run.model.parameters()]

    def spy(tensor, *arguments, **keywords):
        if tensor.dtype == torch.float64:  # the gradients are float32
            lengths.append(tensor.numel())
        return all_reduce(tensor, *arguments, **keywords)

    with Collectives() as counted, mock.patch.object(dist, "all_reduce", spy):
        run.step()
    changed = all((p.to_local() != old).all() for p, old in zip(run.model.parameters(), before, strict=True))
    return dict(counted.counts), lengths, changed and int(run.optimizer.stats.skipped) == 0


@pytest.mark.parametrize("depth", [2, 5])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", MESHES)
def test_a_step_makes_two_small_all_reduces(kind, options, depth):
    own = OPTIONS[options][1]
    passes, gathers = 3, 2  # once in the forward and once in the backward, because parameters are freed in between
    expected = {"_allgather_base_": passes * gathers * depth, "_reduce_scatter_base_": passes * depth}
    expected["allreduce_"] = len(own) + (passes * depth if kind == "hsdp" else 0)
    for size in (FEW, MANY):
        assert on_one_of(size, collectives, kind, depth, options, {}) == (expected, own, True)


def test_parameters_kept_from_forward_to_backward_are_gathered_once_per_pass():
    counts, *_ = on_one_of(MANY, collectives, "fsdp", 3, "linear", {"reshard_after_forward": False})
    assert counts == {"_allgather_base_": 3 * 3, "_reduce_scatter_base_": 3 * 3, "allreduce_": 2}


def held(size, kind, depth):
    """Return the bytes of distinct memory in parameters, optimizer and gradients: with all gradients present, and
    afterwards.

    Also return the bytes and the number of the parameters, and the number of ranks.
    """
    with mock.patch.object(TorchOperators, "gather_below", 1):  # as with kernels: no gradients are gathered into rows
        run = Run(size, kind, depth, "log, clip")
        run.step()
        at_peak = 0

        def look():
            nonlocal at_peak
            at_peak = max(at_peak, _bytes_of(run))

        run.after_backward = look
        run.step()
    params = list(run.model.parameters())
    return at_peak, _bytes_of(run), 4 * run.elements, len(params), run.shards


def _bytes_of(run):
    optimizer, params = run.optimizer, list(run.model.parameters())
    sharded = [x for p in params for x in (p, p.grad, *optimizer.state[p].values()) if isinstance(x, DTensor)]
    tensors = [x.to_local() for x in sharded]
    for bucket in optimizer._flat.buckets:
        tensors += [bucket.points, bucket.saved, bucket.steps, *bucket.buffers.values()]
    if optimizer._step is not None:
        tensors += [g for of_pass in optimizer._step.grads for of_bucket in of_pass for g in of_bucket]
    tensors += optimizer._flat._copies.values()
    # Count by address: state consists of storages over parts of the flat buffers.
    spans = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (x.untyped_storage() for x in tensors))
    total = end = 0
    for start, stop in spans:
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("size", [FEW, MANY])
def test_a_rank_holds_only_its_shard_of_everything(kind, size):
    at_peak, afterwards, nbytes, count, shards = on_one_of(size, held, kind, 3)
    # Segments of w, exp_avg and exp_avg_sq are aligned to 16 bytes; each parameter has a counter. fully_shard may pad
    # each block's gradients once per pass.
    padding = count * (3 * (ALIGNMENT - 4) + 4) + count * 3 * ALIGNMENT
    share = nbytes // shards
    assert 7 * share <= at_peak <= 7 * share + padding  # live, w, exp_avg, exp_avg_sq and three gradients
    assert 5 * share <= afterwards <= 5 * share + padding  # one gradient is back in p.grad


def calls(size, kind, depth):
    """Return the number of calls of crsam_ext's functions in a later step."""
    run, home, count = Run(size, kind, depth, "log, clip"), str(Path(crsam_ext.__file__).parent), 0
    for _ in range(2):
        run.step()

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(home)

    sys.setprofile(profile)
    try:
        run.step()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("kind", MESHES)
def test_host_work_does_not_grow_with_the_ranks(kind):
    few, many = (on_one_of(size, calls, kind, 3) for size in (FEW, MANY))
    assert few == many > 0


def gradients(size, are_views):
    """Return whether a step without fully_shard returns the given gradients, and their values at w."""
    mesh, memory = init_device_mesh("cpu", (size,)), torch.empty(2, 3)
    params = [nn.Parameter(empty(3 * size, device_mesh=mesh, placements=[Shard(0)])) for _ in memory]
    optimizer, given = CRSAM(params, torch.optim.AdamW, backend="torch", **LINEAR), []

    def closure():
        given.append([torch.zeros_like(p) for p in params])
        memory.fill_(len(given))  # the next backward writes it again
        for p, g, part in zip(params, given[-1], memory, strict=True):
            g.to_local().fill_(len(given))
            if are_views:
                g = DTensor.from_local(part, mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
            p.grad = g

    for _ in range(2):
        given.clear()
        optimizer.step(closure)
    returned = all(p.grad is g for p, g in zip(params, given[0], strict=True))
    return returned, [p.grad.to_local().tolist() for p in params]


def test_gradients_are_only_copied_if_they_are_views():
    ones = [[1.0] * 3] * 2
    assert on_one_of(FEW, gradients, False) == (True, ones)
    assert on_one_of(FEW, gradients, True) == (False, ones)
