"""DistributedDataParallel: one all-reduce a step, replicas that stay equal to the bit, and what is refused."""

from contextlib import nullcontext

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from crsam_ext import CRSAM

from .ranks import Ranks

STEPS = 5
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
}
bases = pytest.mark.parametrize("base", BASES)


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


class Network(torch.nn.Module):
    def __init__(self, branches=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(6, 9), torch.nn.Linear(9, 9)
        self.norm, self.last = torch.nn.LayerNorm(9), torch.nn.Linear(9, 4)
        self.branch = torch.nn.Linear(9, 9) if branches else None

    def forward(self, x, branch=False):
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        if branch:
            x = x + self.branch(x)
        return self.last(self.norm(x))


def batch_of(step, rank, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return (
        torch.randn(8, 6, generator=generator, dtype=torch.float64).to(dtype),
        torch.randint(4, (8,), generator=generator),
    )


def closure_of(model, x, y, **options):
    def closure():
        loss = torch.nn.functional.cross_entropy(model(x, **options), y)
        loss.backward()
        return loss

    return closure


def made(rank, base="sgd", ddp=(), dtype=torch.float64, **options):
    model = DistributedDataParallel(Network(**dict(options.pop("network", {}))).to(dtype), **dict(ddp))
    kind, settings = BASES[base]
    return model, CRSAM(model.parameters(), kind, **{"model": model, **settings, **options})


def trained(rank, size, base, options, ddp=(), form="closure", dtype=torch.float64, steps=STEPS):
    """The parameters after some steps, the all-reduces of each, and the statistics."""
    model, optimizer = made(rank, base, ddp, dtype, **options)
    counts = []
    for step in range(steps):
        closure = closure_of(model, *batch_of(step, rank, dtype))
        with CommDebugMode() as counted:
            if form == "closure":
                optimizer.step(closure)
            elif form == "list":
                x, y = batch_of(step, rank, dtype)
                halves = [closure_of(model, x[:4], y[:4]), closure_of(model, x[4:], y[4:])]
                optimizer.step([lambda half=half: half() for half in halves])
            else:
                calls = (optimizer.first_step, optimizer.second_step, optimizer.third_step)[: optimizer.passes]
                for call in calls:
                    with optimizer.no_sync() if form == "calls" else nullcontext():
                        closure()
                    call(zero_grad=True)
        counts.append(sum(n for op, n in counted.get_comm_counts().items() if "allreduce" in str(op)))
    optimizer.check_replicas()
    return [p.detach().clone() for p in model.parameters()], counts, optimizer.stats.as_dict()


def expected(size, base, options, dtype=torch.float64, steps=STEPS, e=None):
    """Each rank's ghat by an optimizer of its own, and a step of the base optimizer with their mean."""
    kind, settings = BASES[base]
    model = Network().to(dtype)
    plain = CRSAM(model.parameters(), kind, rho=0.0, **settings)
    for step in range(steps):
        gradients = []
        for rank in range(size):
            twin = Network().to(dtype)
            twin.load_state_dict(model.state_dict())
            optimizer = CRSAM(twin.parameters(), torch.optim.SGD, lr=0.0, **options)
            closure = closure_of(twin, *batch_of(step, rank, dtype))
            closure(), optimizer.first_step(zero_grad=True)
            if optimizer.passes == 3:
                closure(), optimizer.second_step(zero_grad=True)
            closure(), optimizer.combine()
            gradients.append([p.grad for p in twin.parameters()])
        for param, *of_ranks in zip(model.parameters(), *gradients, strict=True):
            total = of_ranks[0] / size
            for g in of_ranks[1:]:
                total = total + g / size
            param.grad = total
        plain.step()
    return [p.detach() for p in model.parameters()]


def assert_equal(results, wanted=None):
    first = results[0][0] if wanted is None else wanted
    for params, *_ in results:
        assert all(torch.equal(p, q) for p, q in zip(params, first, strict=True))


LINEAR = {"rho": 0.1, "alpha": 0.3, "beta": 0.2}
WRAPPED = {
    "plain": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "tiny buckets": {"bucket_cap_mb": 1e-4},
    "tiny bucket views": {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
}


@bases
@pytest.mark.parametrize("passes", ["crsam", "sam"])
@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("form", ["closure", "calls", "calls without no_sync"])
def test_local_perturbation(two, base, passes, wrapped, form):
    """To the bit what each rank would do alone, averaged; one all-reduce a step for each bucket."""
    options = LINEAR if passes == "crsam" else {"rho": 0.1, "alpha": 0.0, "beta": 0.0}
    results = two(trained, base, options, tuple(WRAPPED[wrapped].items()), form)
    assert_equal(results, expected(2, base, options))
    if wrapped in ("plain", "bucket views", "static graph") and form != "calls without no_sync":
        assert all(counts[1:] == [1] * (STEPS - 1) for _, counts, _ in results)
