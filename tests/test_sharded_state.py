"""shard_state: every rank keeps a shard of the base optimizer's state, and the parameters are those without
sharding."""

from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from crsam_ext import CRSAM, GradScaler, sharded_state

from .ranks import Collectives, Ranks

pytestmark = pytest.mark.slow

STEPS = 4
SGD = {"lr": 0.1, "momentum": 0.9, "rho": 0.1, "alpha": 0.3, "beta": 0.2}
ADAM = {"base_optimizer": torch.optim.Adam, "lr": 0.01, "weight_decay": 0.1, "rho": 0.1, "alpha": 0.3, "beta": 0.2}
ADAMW = {**ADAM, "base_optimizer": torch.optim.AdamW}
OPTIONS = {
    "sgd": SGD,
    "plain sgd": {**SGD, "momentum": 0.0},
    "dampening": {**SGD, "dampening": 0.5},
    "adam": ADAM,
    "adamw": ADAMW,
    "sam": {**ADAMW, "alpha": 0.0, "beta": 0.0},
    "base": {**ADAMW, "rho": 0.0},
    "log, clip": {**ADAMW, "regularizer": "log", "alpha": 0.01, "max_grad_norm": 0.1},
    "curvature_interval": {**ADAMW, "curvature_interval": 2},
    "reuse": {**ADAMW, "interval": 2, "reuse": True},
    "sync_perturbation": {**SGD, "sync_perturbation": True},
    "flatten=False": {**ADAMW, "flatten": False},
}


@pytest.fixture(scope="module")
def four():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


class Network(nn.Module):
    """Input (N, 2, 5, 5), output (N, 3). With four ranks, some own no element of some parameters."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.a = nn.Conv2d(2, 6, 3), nn.Linear(54, 9)
        self.turned, self.scale = nn.Parameter(torch.randn(3, 9).t()), nn.Parameter(torch.tensor(1.0))
        self.to(dtype).to(memory_format=torch.channels_last)

    def forward(self, x):
        x = torch.tanh(self.a(torch.tanh(self.conv(x)).flatten(1)))
        return x @ self.turned * self.scale


def made(dtype=torch.float32, **options):
    model = Network(dtype)
    ddp = DistributedDataParallel(model)
    return ddp, CRSAM(ddp.named_parameters(), model=ddp, **options)


def closure_of(model, step, rank, size, dtype=torch.float32, scale=lambda loss: loss):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 2, 5, 5, generator=generator), torch.randint(3, (16,), generator=generator)
    x, y = x[rank::size].to(dtype), y[rank::size]

    def closure():
        loss = F.cross_entropy(model(x), y)
        scale(loss).backward()
        return loss

    return closure


def values(model):
    return [param.detach().clone() for param in model.parameters()]


def equal(x, y):
    return all(map(torch.equal, x, y))


def trained(rank, size, options, dtype=torch.float32, steps=range(STEPS)):
    model, optimizer = made(dtype, **options)
    for step in steps:
        optimizer.step(closure_of(model, step, rank, size, dtype))
    optimizer.check_replicas()
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_parameters_equal_those_of_whole_state(four, options, dtype):
    assert all(four(both, options, dtype))


def both(rank, size, options, dtype):
    whole, _ = trained(rank, size, OPTIONS[options], dtype)
    shared, _ = trained(rank, size, {**OPTIONS[options], "shard_state": True}, dtype)
    return equal(values(whole), values(shared))


def test_pieces_of_one_parameter_give_the_same_parameters(four):
    """Each collective sends one whole parameter."""
    assert all(four(with_pieces))


def with_pieces(rank, size):
    with mock.patch.object(sharded_state, "PIECE", 100):
        return both(rank, size, "adamw", torch.float32)


def test_two_ranks_give_the_same_parameters(two):
    assert all(two(both, "adamw", torch.float32))


def test_calls_give_the_same_parameters(four):
    assert all(four(with_calls))


def with_calls(rank, size):
    model, optimizer = made(**ADAMW, shard_state=True)
    for step in range(STEPS):
        closure = closure_of(model, step, rank, size)
        for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
            with optimizer.no_sync():
                closure()
            call(zero_grad=True)
    expected, _ = trained(rank, size, ADAMW)
    return equal(values(model), values(expected))


def test_combine_gives_the_same_parameters(four):
    """p.grad contains the whole ghat, as without shard_state."""
    assert all(four(with_combine))


def with_combine(rank, size):
    results = []
    for shard_state in (False, True):
        model, optimizer = made(**ADAMW, shard_state=shard_state)
        for step in range(STEPS):
            closure = closure_of(model, step, rank, size)
            for call in (optimizer.first_step, optimizer.second_step):
                with optimizer.no_sync():
                    closure()
                call(zero_grad=True)
            with optimizer.no_sync():
                closure()
            optimizer.combine()
            results.append([param.grad.clone() for param in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
        results.append(values(model))
    half = len(results) // 2
    return all(map(equal, results[:half], results[half:]))


def test_each_rank_keeps_a_shard(four):
    """Each rank keeps a quarter of AdamW's two buffers, and at most one row per parameter more."""
    whole = sum(param.nbytes for param in Network().parameters())
    for name, kept, of_rows in [("exp_avg", *sizes) for sizes in four(bytes_kept)]:
        assert kept <= whole / 4 + of_rows, name


def bytes_kept(rank, size):
    model, optimizer = trained(rank, size, {**ADAMW, "shard_state": True})
    storages, rows = {}, 0
    for param in model.parameters():
        state = optimizer.state[param]["exp_avg"]
        state = state.to_local() if isinstance(state, DTensor) else state
        storages[state.untyped_storage().data_ptr()] = state.untyped_storage().nbytes()
        rows += param[0].nbytes if param.dim() else 0
    turned = model.module.turned
    assert not isinstance(optimizer.state[turned]["exp_avg"], DTensor)  # its rows are not contiguous
    flat = [bucket.buffers["exp_avg"].nbytes for bucket in optimizer._flat.buckets]
    # Undivided state is counted in full; a segment is aligned to 16 bytes.
    assert sum(flat) <= sum(storages.values()) + 16 * len(storages)
    return sum(storages.values()) - turned.nbytes, rows


@pytest.mark.parametrize("index", range(3))
def test_a_bad_gradient_of_one_rank_skips_the_step_of_all(four, index):
    for unmoved, skipped, moved in four(with_nan, index):
        assert unmoved
        assert skipped == 1
        assert moved


def with_nan(rank, size, index):
    model, optimizer = trained(rank, size, {**ADAMW, "shard_state": True}, steps=range(2))
    state = {name: values_of(optimizer, name) for name in ("exp_avg", "exp_avg_sq", "step")}
    before, factors = values(model), [1.0] * 3
    factors[index] = float("nan") if rank == 1 else 1.0
    numbers = iter(factors)
    poisoned = closure_of(model, 2, rank, size, scale=lambda loss: loss * next(numbers))
    optimizer.step(poisoned)
    same = equal(values(model), before) and all(equal(kept, values_of(optimizer, n)) for n, kept in state.items())
    optimizer.step(closure_of(model, 3, rank, size))
    return same, int(optimizer.stats.skipped), not equal(values(model), before)


def values_of(optimizer, name):
    found = [optimizer.state[param][name] for group in optimizer.param_groups for param in group["params"]]
    return [(x.to_local() if isinstance(x, DTensor) else x).clone() for x in found]


def test_scaler_gives_the_same_parameters(four):
    assert all(four(with_scaler))


def with_scaler(rank, size):
    results = []
    for shard_state in (False, True):
        model, optimizer = made(**ADAMW, shard_state=shard_state)
        scaler = GradScaler("cpu", init_scale=1024.0)
        for step in range(STEPS):
            scaled = closure_of(model, step, rank, size, scale=scaler.scale)
            scaler.step(optimizer, scaled)
            scaler.update()
        results.append(values(model))
    return equal(*results)


@pytest.mark.parametrize("options", ["sgd", "adamw", "curvature_interval", "reuse"])
def test_checkpoints_load_on_any_number_of_ranks(four, two, options, tmp_path):
    """Saved by four ranks that shard the state, loaded by four, by two, and by two that keep whole state."""
    # A new DistributedDataParallel sums four numbers in another order until it has seen the order of its gradients.
    assert max(four(save_and_resume, options, str(tmp_path / "by four"))) < 1e-10
    assert max(two(save_and_resume, options, str(tmp_path / "by two"))) == 0
    results = [two(resume, options, str(tmp_path / "by four"), shard_state) for shard_state in (True, False)]
    for of_state, of_params in results[0] + results[1]:
        assert equal(of_state, results[0][0][0])
        assert equal(of_params, results[0][0][1])


def state_of(optimizer):
    """Return the whole state, in the order of the parameters."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            for name, value in sorted(optimizer.state[param].items()):
                found.append((value.full_tensor() if isinstance(value, DTensor) else value).clone())
                assert name == "step" or found[-1].shape == param.shape
    return found


def save_and_resume(rank, size, options, folder):
    options = {**OPTIONS[options], "shard_state": True}
    model, optimizer = trained(rank, size, options, torch.float64, steps=range(3))
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    resumed, loaded = made(torch.float64, **options)
    load(folder, resumed, loaded)
    before = state_of(optimizer)
    assert equal(before, state_of(loaded))
    for step in range(3, 6):
        for m, o in ((model, optimizer), (resumed, loaded)):
            o.step(closure_of(m, step, rank, size, torch.float64))
    return max(float((p - q).abs().max()) for p, q in zip(values(model), values(resumed), strict=True))


def load(folder, model, optimizer):
    of_model, of_optimizer = get_state_dict(model, optimizer)
    content = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(content, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])


def resume(rank, size, options, folder, shard_state):
    model, optimizer = made(torch.float64, **OPTIONS[options], shard_state=shard_state)
    load(folder, model, optimizer)
    at_first = state_of(optimizer)
    for step in range(3, 5):
        optimizer.step(closure_of(model, step, rank, size, torch.float64))
    return at_first, values(model)


def test_state_of_other_optimizers_loads(four):
    """torch's own state is whole on every rank; sharded state is refused where whole state is required."""
    assert all(four(with_torchs_state))


def with_torchs_state(rank, size):
    model = Network()
    torchs = torch.optim.AdamW(model.parameters(), lr=0.01)
    closure_of(model, 0, 0, 1)()
    torchs.step()
    shared, optimizer = made(**ADAMW, shard_state=True)
    whole, other = made(**ADAMW)
    for target, made_here in ((shared, optimizer), (whole, other)):
        target.module.load_state_dict(model.state_dict())
        made_here.load_state_dict(torchs.state_dict())
        made_here.step(closure_of(target, 1, rank, size))
    with pytest.raises(ValueError, match=r"is a DTensor, but the parameter is a plain tensor: load it with"):
        other.load_state_dict(optimizer.state_dict())
    return equal(values(shared), values(whole))


def test_state_of_another_shape_is_refused(two):
    for failure in two.attempt(with_another_shape):
        assert failure.kind == "ValueError"
        assert "a parameter that changes shape needs a new optimizer" in failure.message


def with_another_shape(rank, size):
    _, torchs = trained(rank, size, ADAMW, steps=range(1))
    state = torchs.state_dict()
    state["state"][2]["exp_avg"] = state["state"][2]["exp_avg"][:1]
    model, optimizer = made(**ADAMW, shard_state=True)
    optimizer.load_state_dict(state)
    optimizer.step(closure_of(model, 1, rank, size))


def test_sharding_adds_no_other_reduction(four):
    for count in four(reductions):
        assert count == 1


def reductions(rank, size):
    model, optimizer = trained(rank, size, {**ADAMW, "shard_state": True}, steps=range(2))
    with Collectives() as counted:
        optimizer.step(closure_of(model, 2, rank, size))
    return counted.count


def test_invalid_configurations_are_refused(two):
    params = list(Network().parameters())
    with pytest.raises(ValueError, match=r"shard_state=True needs the ranks .*: pass one as model="):
        CRSAM(params, lr=0.1, shard_state=True)
    for failure in two.attempt(with_another_base):
        assert failure.kind == "ValueError"
        assert "use CRSAM(params, ZeroRedundancyOptimizer(params, RMSprop))" in failure.message


def with_another_base(rank, size):
    made(base_optimizer=torch.optim.RMSprop, lr=0.01, shard_state=True)
