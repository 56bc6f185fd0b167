"""DistributedDataParallel: one all-reduce per step, replicas that stay equal bit for bit, and refused
configurations."""

import copy
import warnings
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from crsam_ext import CRSAM, GradScaler, combine_wrapper
from crsam_ext.backends import cuda

from .cuda_on_cpu import build
from .ranks import Collectives, Ranks

pytestmark = pytest.mark.slow

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
    """Return the parameters after some steps, the all-reduces of each step, and the statistics."""
    model, optimizer = made(rank, base, ddp, dtype, **options)
    counts = []
    for step in range(steps):
        closure = closure_of(model, *batch_of(step, rank, dtype))
        with Collectives() as counted:
            if form == "closure":
                optimizer.step(closure)
            elif form == "list":
                x, y = batch_of(step, rank, dtype)
                halves = [closure_of(model, x[:4], y[:4]), closure_of(model, x[4:], y[4:])]
                optimizer.step([lambda half=half: half() for half in halves])
            else:
                calls = (optimizer.first_step, optimizer.second_step, optimizer.third_step)[: optimizer.passes]
                for call in calls:
                    with optimizer.no_sync() if form == "calls" or step == 0 else nullcontext():
                        closure()
                    call(zero_grad=True)
        counts.append(counted.count)
    optimizer.check_replicas()
    return [p.detach().clone() for p in model.parameters()], counts, optimizer.stats.as_dict()


def expected(size, base, options, dtype=torch.float64, steps=STEPS, e=None):
    """Compute each rank's ghat with a separate optimizer, and make a step of the base optimizer with the mean."""
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


def assert_close(params, others, tolerance=1e-9):
    """Compare trajectories of 5 steps in float64, in which rounding grows by at most a factor of 1e4."""
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=tolerance, atol=tolerance)


LINEAR = {"rho": 0.1, "alpha": 0.3, "beta": 0.2}
WRAPPED = {
    "plain": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "tiny buckets": {"bucket_cap_mb": 1e-6},
    "tiny bucket views": {"bucket_cap_mb": 1e-6, "gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "static graph, bucket views": {"static_graph": True, "gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
}


@pytest.mark.parametrize(
    ("base", "form"),
    [*((base, "closure") for base in BASES), ("sgd", "calls"), ("sgd", "calls without no_sync"), ("nadam", "calls")],
)
@pytest.mark.parametrize("passes", ["crsam", "sam"])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_local_perturbation_equals_the_mean_of_separate_ranks(two, base, passes, wrapped, form):
    """The step equals the mean of what each rank computes alone, bit for bit; one all-reduce per step and bucket."""
    options = LINEAR if passes == "crsam" else {"rho": 0.1, "alpha": 0.0, "beta": 0.0}
    results = two(trained, base, options, tuple(WRAPPED[wrapped].items()), form)
    assert_equal(results, expected(2, base, options))
    if wrapped in ("plain", "bucket views", "static graph") and form != "calls without no_sync":
        assert all(counts[1:] == [1] * (STEPS - 1) for _, counts, _ in results)


@bases
@pytest.mark.parametrize("wrapped", ["plain", "bucket views", "static graph"])
def test_a_user_hook_makes_all_passes_local(two, base, wrapped):
    """The optimizer does not know the hook: all passes are local, and ghat is reduced in pieces."""
    if wrapped == "static graph":
        failures = two.attempt(with_own_hook, base, {}, tuple(WRAPPED[wrapped].items()))
        assert all("combine_wrapper" in failure.message for failure in failures)
        return
    for options in (LINEAR, {"rho": 0.1, "alpha": 0.0, "beta": 0.0}):
        results = two(with_own_hook, base, options, tuple(WRAPPED[wrapped].items()))
        assert_equal(results, expected(2, base, options))
        assert all(counts == [1] * STEPS for _, counts in results)


def with_own_hook(rank, size, base, options, ddp, wrapper=None):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    model, optimizer = made(rank, base, ddp, **options)
    if wrapper is None:
        model.register_comm_hook(None, allreduce_hook)
    else:
        model.register_comm_hook(optimizer, combine_wrapper(wrapper))
    counts = []
    for step in range(STEPS):
        with Collectives() as counted:
            optimizer.step(closure_of(model, *batch_of(step, rank)))
        counts.append(counted.count)
    optimizer.check_replicas()
    return [p.detach().clone() for p in model.parameters()], counts


def halving(state, bucket):
    """Reduce in two steps, as compression hooks do."""
    future = torch.distributed.all_reduce(bucket.buffer().div_(2 * 2), async_op=True).get_future()
    return future.then(lambda done: done.value()[0].mul_(2))


def test_combine_wrapper_wraps_a_user_hook(two):
    results = two(with_own_hook, "sgd", LINEAR, (), halving)
    assert_equal(results, expected(2, "sgd", LINEAR))


@pytest.mark.parametrize("form", ["closure", "calls"])
@pytest.mark.parametrize("base", ["sgd", "nadam"])
def test_four_ranks_equal_the_mean_of_separate_ranks(four, base, form):
    results = four(trained, base, LINEAR, (), form)
    assert_equal(results)
    assert_close(results[0][0], expected(4, base, LINEAR))  # gloo adds in another order


@pytest.mark.parametrize("passes", ["crsam", "sam", "clipped", "adaptive"])
def test_sync_perturbation_equals_a_step_of_the_whole_batch(two, passes):
    """It takes two all-reduces."""
    options = {
        "crsam": LINEAR,
        "sam": {"rho": 0.1, "alpha": 0.0, "beta": 0.0},
        "clipped": {**LINEAR, "max_grad_norm": 0.1},
        "adaptive": {**LINEAR, "adaptive": True},
    }[passes]
    results = two(trained, "sgd", {**options, "sync_perturbation": True})
    assert_equal(results)
    assert all(counts == [2] * STEPS for _, counts, _ in results)
    assert_close_to_whole(results, 2, options)


def assert_close_to_whole(results, size, options, base="sgd"):
    """Compare with one process that has the batches of all ranks."""
    model = Network().double()
    kind, settings = BASES[base]
    optimizer = CRSAM(model.parameters(), kind, **settings, **options)
    for step in range(STEPS):
        batches = [batch_of(step, rank) for rank in range(size)]
        optimizer.step(closure_of(model, *(torch.cat(parts) for parts in zip(*batches, strict=True))))
    assert_close(results[0][0], model.parameters())


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_without_the_model_every_pass_is_reduced(two, wrapped):
    """DistributedDataParallel reduces every pass; its gradients may be views of buckets, even of whole buckets."""
    results = two(trained, "sgd", {**LINEAR, "model": None}, tuple(WRAPPED[wrapped].items()))
    assert_equal(results)
    assert_close_to_whole(results, 2, LINEAR)


@pytest.mark.parametrize(
    "options",
    [
        {"regularizer": "log"},
        {"max_regularizer_ratio": 0.01},
        {"curvature_interval": 2},
        {"interval": 2, "reuse": True},
    ],
)
def test_sync_perturbation_reduces_all_gradients_if_needed(two, options):
    """If every gradient is needed, all are reduced."""
    results = two(trained, "sgd", {**LINEAR, **options, "sync_perturbation": True})
    assert_equal(results)
    assert_close_to_whole(results, 2, {**LINEAR, **options})


def test_sync_perturbation_works_within_groups_of_ranks(four):
    """Two groups of two ranks have one e each: the result is that of two ranks with twice the batch."""
    results = four(in_groups)
    assert_equal(results)
    model = Network().double()
    plain = CRSAM(model.parameters(), torch.optim.SGD, rho=0.0, **BASES["sgd"][1])
    for step in range(STEPS):
        gradients = []
        for pair in ((0, 1), (2, 3)):
            twin = Network().double()
            twin.load_state_dict(model.state_dict())
            optimizer = CRSAM(twin.parameters(), torch.optim.SGD, lr=0.0, **LINEAR)
            batches = [batch_of(step, rank) for rank in pair]
            closure = closure_of(twin, *(torch.cat(parts) for parts in zip(*batches, strict=True)))
            closure(), optimizer.first_step(zero_grad=True)
            closure(), optimizer.second_step(zero_grad=True)
            closure(), optimizer.combine()
            gradients.append([p.grad for p in twin.parameters()])
        for param, x, y in zip(model.parameters(), *gradients, strict=True):
            param.grad = (x + y) / 2
        plain.step()
    assert_close(results[0][0], model.parameters())


def in_groups(rank, size):
    groups = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    return trained(rank, size, "sgd", {**LINEAR, "sync_perturbation": groups[rank // 2]})


LOG = {"rho": 0.1, "alpha": 0.02, "beta": 0.02, "regularizer": "log"}


@pytest.mark.parametrize("options", [{}, {"estimator": "loss"}, {"max_regularizer_ratio": 1e9}, {"max_grad_norm": 0.1}])
@pytest.mark.parametrize("form", ["closure", "calls"])
def test_log_form_averages_kappa_and_sigma(two, options, form):
    """kappa and sigma are means over the ranks; there is one all-reduce of ghat and a small one."""
    if form == "calls" and "estimator" in options:
        pytest.skip("trained() passes no losses in the form of calls")
    options = {**LOG, **options}
    results = two(trained, "sgd", options, (), form)
    assert_equal(results)
    assert all(counts == [2] * STEPS for _, counts, _ in results)
    first, second = (stats for *_, stats in results)
    for name in (
        "kappa",
        "sigma",
        "a",
        "b",
        "clip_factor",
        "regularizer_ratio",
        "regularized_norm",
        "skipped",
        "capped",
    ):
        assert first[name] == second[name], name
    assert form == "calls" or first["loss"] != second["loss"]
    assert_close(results[0][0], by_means(2, options))


def test_log_form_is_capped_and_counted(two):
    results = two(trained, "sgd", {**LOG, "max_regularizer_ratio": 1e-3})
    assert_equal(results)
    assert all(stats["capped"] == STEPS for *_, stats in results)


def test_log_form_works_with_two_groups(two):
    """kappa and sigma are means over the ranks, each of which has its own e in both groups."""
    (kappa, sigma, *alone), (_, _, *other) = two(grouped_log)
    for found, own, others in zip((kappa, sigma), alone, other, strict=True):
        assert found == pytest.approx((own + others) / 2, rel=1e-9)


def grouped_log(rank, size):
    results = []
    for wrapped in (True, False):
        network = Network().double()
        model = DistributedDataParallel(network) if wrapped else network
        params = list(network.parameters())
        groups = [{"params": params[:2], "rho": 0.3}, {"params": params[2:], "rho": 0.05}]
        optimizer = CRSAM(groups, torch.optim.SGD, lr=0.1, model=model, **LOG)
        optimizer.step(closure_of(model, *batch_of(0, rank)))
        results += [float(optimizer.stats.kappa), float(optimizer.stats.sigma)]
    return results


def test_single_passes_are_not_compressed(two):
    """If every pass is reduced, a hook in combine_wrapper receives none of them."""
    options = {**LOG, "sync_perturbation": True}
    found, wanted = two(with_own_hook, "sgd", options, (), rounding), two(trained, "sgd", options)
    assert_equal(found, wanted[0][0])
    compressed = two(with_own_hook, "sgd", LINEAR, (), rounding)
    assert_equal(compressed)
    assert not torch.equal(compressed[0][0][0], two(trained, "sgd", LINEAR)[0][0][0])


def rounding(state, bucket):
    """Lose precision, as compression hooks do."""
    rounded = bucket.buffer().to(torch.bfloat16).double().div_(2)
    return torch.distributed.all_reduce(rounded, async_op=True).get_future().then(lambda done: done.value()[0])


def by_means(size, options):
    """Return the steps of the log regularizer, computed from the formulas."""
    model = Network().double()
    params = list(model.parameters())
    plain = CRSAM(params, torch.optim.SGD, rho=0.0, max_grad_norm=options.get("max_grad_norm"), **BASES["sgd"][1])
    for step in range(STEPS):
        of_ranks = [three_gradients(model, batch_of(step, rank), options["rho"]) for rank in range(size)]
        if options.get("estimator") == "loss":
            kappa = sum(up + down - 2 * at for _, _, (at, up, down) in of_ranks) / size
            sigma = sum(up - down for _, _, (at, up, down) in of_ranks) / size
        else:
            kappa = sum(dot(e, d1(g)) / 2 for g, e, _ in of_ranks) / size
            sigma = sum(2 * dot(e, g[0]) + dot(e, d2(g)) / 3 for g, e, _ in of_ranks) / size
        a = options["alpha"] / kappa if kappa > 0 else 0.0
        b = options["beta"] / sigma if sigma > 0 else 0.0
        top = sum(dot(x, x) for x in ([a * s + b * f for s, f in zip(d2(g), d1(g), strict=True)] for g, *_ in of_ranks))
        ratio = (top / sum(dot(g[1], g[1]) for g, *_ in of_ranks)).sqrt()
        cap = min(1.0, options.get("max_regularizer_ratio", 1.0) / ratio)
        for index, param in enumerate(params):
            combined = [g[1][index] + cap * (a * d2(g)[index] + b * d1(g)[index]) for g, *_ in of_ranks]
            param.grad = sum(combined) / size
        plain.step()
    return [p.detach() for p in params]


def three_gradients(model, batch, rho):
    """Return (g0, g+, g-), e and the losses of a batch."""
    w = [p.detach().clone() for p in model.parameters()]
    gradients, losses, e = [], [], None
    for sign in (0, 1, -1):
        for p, x, shift in zip(model.parameters(), w, e or w, strict=True):
            p.data.copy_(x + sign * shift if sign else x)
            p.grad = None
        losses.append(closure_of(model, *batch)().detach())
        gradients.append([p.grad for p in model.parameters()])
        if e is None:
            e = [rho * g / dot(gradients[0], gradients[0]).sqrt() for g in gradients[0]]
    for p, x in zip(model.parameters(), w, strict=True):
        p.data.copy_(x)
    return gradients, e, losses


def dot(xs, ys):
    return sum((x * y).sum() for x, y in zip(xs, ys, strict=True))


def d1(g):
    return [up - down for _, up, down in zip(*g, strict=True)]


def d2(g):
    return [up + down - 2 * at for at, up, down in zip(*g, strict=True)]


def with_cuda_on_cpu(rank, size):
    """Make backend "cuda" available for CPU tensors on a rank."""
    monkeypatch = pytest.MonkeyPatch()
    build.install(monkeypatch, build.library())
    monkeypatch.setattr(cuda, "why_unavailable", lambda: None)


def test_compiled_cuda_sources_and_host_functions_make_the_same_steps():
    """The CUDA sources are compiled for a CPU, together with the host functions; the steps agree up to rounding."""
    build.library()  # builds it here, where no time limit applies
    ranks = Ranks(2)
    try:
        ranks(with_cuda_on_cpu)
        kept, adaptive, alone = {"curvature_interval": 2}, {"adaptive": True}, {"model": None}
        for options in (LINEAR, LOG, {**LINEAR, **kept}, {**LINEAR, **adaptive}, {**LINEAR, **alone}):
            for ddp in ({}, WRAPPED["tiny bucket views"]):
                found = ranks(trained, "adamw", {**options, "backend": "cuda"}, tuple(ddp.items()))
                assert_equal(found)
                wanted = ranks(trained, "adamw", options, tuple(ddp.items()))
                assert_close(found[0][0], wanted[0][0], 1e-8)
        own = ranks(with_own_hook, "sgd", {**LINEAR, "backend": "cuda"}, ())
        assert_close(own[0][0], expected(2, "sgd", LINEAR))
    finally:
        ranks.close()


class Nested(torch.autograd.Function):
    """The identity; its backward calls backward, nested to a depth of `depth`."""

    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.depth:
            with torch.enable_grad():
                Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).backward()
        return gradient, None


def test_ranks_call_backward_after_autograd_has_started_a_thread():
    """Ranks do not inherit the state of the process that runs the tests; its forks could not call backward now."""
    Nested.apply(torch.ones(1, requires_grad=True), 100).backward()
    ranks = Ranks(2)
    try:
        assert_equal(ranks(trained, "sgd", LINEAR, ()))
    finally:
        ranks.close()


# Differences between ranks -------------------------------------------------------------------------------------------


def with_a_bad_gradient(rank, size, bad, options, form="closure"):
    """Return parameters and skipped steps after three steps; in the second, one gradient of one rank contains
    ``value``."""
    where, index, value = bad
    model, optimizer = made(rank, **options)
    seen = []
    for step in range(3):
        calls = []

        def closure(step=step, calls=calls):
            loss = closure_of(model, *batch_of(step, rank))()
            if (step, rank, len(calls)) == (1, where, index):
                next(model.parameters()).grad.view(-1)[0] = value
            calls.append(0)
            return loss

        def hooked(grad, step=step, calls=calls):
            return torch.full_like(grad, value) if (step, rank, len(calls)) == (1, where, index) else grad

        handle = next(model.parameters()).register_hook(hooked)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step(closure)
        stayed = all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
        assert stayed == (step == 1)
        handle.remove()
        seen.append(int(optimizer.stats.skipped))
    optimizer.check_replicas()
    return [p.detach().clone() for p in model.parameters()], seen


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "options",
    [LINEAR, LOG, {**LINEAR, "sync_perturbation": True}, {**LOG, "sync_perturbation": True}, {**LINEAR, "alpha": 0.2}],
)
def test_a_nonfinite_gradient_skips_the_step_on_all_ranks(two, where, index, value, options):
    """It may occur on any rank in any pass: all ranks skip that step, and only that one."""
    results = two(with_a_bad_gradient, (where, index, value), options)
    assert_equal(results)
    assert all(seen == [0, 1, 1] for _, seen in results)


@pytest.mark.parametrize("index", [0, 1])
def test_sam_with_a_nonfinite_gradient_skips_the_step(two, index):
    results = two(with_a_bad_gradient, (1, index, torch.nan), {"rho": 0.1, "alpha": 0.0, "beta": 0.0})
    assert_equal(results)
    assert all(seen == [0, 1, 1] for _, seen in results)


@pytest.mark.parametrize(
    ("options", "index"),
    [*product((LINEAR, LOG), range(3)), *product(({"rho": 0.1, "alpha": 0.0, "beta": 0.0},), range(2))],
)
def test_a_squared_norm_that_overflows_skips_the_step(two, index, options):
    """The elements are finite; e would be 0, or the gradient would seem finite."""
    results = two(with_a_bad_gradient, (1, index, 1e200), options)
    assert_equal(results)
    assert all(seen == [0, 1, 1] for _, seen in results)


@pytest.mark.parametrize("scaler", ["ours", "ours in calls", "torch's"])
@pytest.mark.parametrize("options", [LINEAR, LOG])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_grad_scalers_of_all_ranks_agree(two, scaler, options, index):
    """An overflow in one pass of one rank decreases the scale on all ranks."""
    if scaler == "torch's" and options is LOG:  # it checks each rank's own gradient of the last pass
        failures = two.attempt(scaled, scaler, options, index)
        assert all("use crsam_ext.GradScaler" in failure.message for failure in failures)
        return
    results = two(scaled, scaler, options, index)
    assert_equal(results)
    assert all(scales == [1024.0, 512.0, 512.0] and skipped == 1 for _, scales, skipped in results)


def scaled(rank, size, scaler, options, index):
    model, optimizer = made(rank, **options)
    form, scaler = scaler, (torch.amp.GradScaler if scaler == "torch's" else GradScaler)("cpu", init_scale=1024.0)
    scales, calls = [], []
    next(model.parameters()).register_hook(lambda g: g * torch.inf if (len(calls), rank) == (3 + index, 1) else g)
    for step in range(3):

        def closure(step=step):
            loss = torch.nn.functional.cross_entropy(model(batch_of(step, rank)[0]), batch_of(step, rank)[1])
            scaler.scale(loss).backward()
            calls.append(0)
            return loss

        if form == "ours":
            scaler.step(optimizer, closure)
        else:
            for call in (optimizer.first_step, optimizer.second_step):
                with optimizer.no_sync():
                    closure()
                call(zero_grad=True)
            with optimizer.no_sync():
                closure()
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        scales.append(scaler.get_scale())
    optimizer.check_replicas()
    return [p.detach().clone() for p in model.parameters()], scales, int(optimizer.stats.skipped)


@pytest.mark.parametrize(
    "options", [LINEAR, LOG, {**LINEAR, "curvature_interval": 2}, {**LINEAR, "interval": 2, "reuse": True}]
)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_branch_taken_by_one_rank_works(two, options, base):
    results = two(branching, options, base)
    assert_equal(results)
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][1], Network(branches=True).double().branch.weight)


def branching(rank, size, options, base):
    model, optimizer = made(rank, base, {"find_unused_parameters": True}, network={"branches": True}, **options)
    for step in range(STEPS):
        branch = rank == 0 and step % 2 == 1
        optimizer.step(closure_of(model, *batch_of(step, rank), branch=branch))
    optimizer.check_replicas()
    return [p.detach().clone() for p in model.parameters()], model.module.branch.weight.detach().clone()


@pytest.mark.parametrize("options", [{}, {"curvature_interval": 2}, {"interval": 2}, {"interval": 2, "reuse": True}])
@pytest.mark.parametrize("base", ["sgd", "nadam"])
def test_intervals_store_reduced_values(two, options, base):
    """Stored values are reduced: the checkpoint of each rank is valid for all."""
    results = two(trained_with_state, base, {**LINEAR, **options})
    assert_equal(results)
    (_, state), (_, other) = results
    for x, y in zip(state["state"].values(), other["state"].values(), strict=True):
        assert x.keys() == y.keys()
        assert ("second_difference" in x) == ("curvature_interval" in options)
        assert ("sharpness_direction" in x) == ("reuse" in options)
        assert all(torch.equal(torch.as_tensor(x[name]), torch.as_tensor(y[name])) for name in x)
    if "curvature_interval" in options:
        assert_close(results[0][0], with_kept_difference(2, base))


@bases
@pytest.mark.parametrize("options", [{}, {"alpha": 0.0, "beta": 0.0}, {"max_grad_norm": 0.1}])
def test_reuse_averages_the_direction(two, base, options):
    """The direction is the mean over the ranks: a step that perturbs makes a second all-reduce, other steps do not."""
    options = {**LINEAR, **options}
    results = two(trained, base, {**options, "interval": 2, "reuse": True})
    assert_equal(results)
    assert_close(results[0][0], with_reuse(2, base, options))
    assert all(counts[2:] == [2, 1, 2] for _, counts, _ in results)


def with_reuse(size, base, options):
    """Return the steps with a perturbation in every second step, computed from the formulas."""
    model, kept = Network().double(), None
    params = list(model.parameters())
    settings = {**BASES[base][1], "max_grad_norm": options.get("max_grad_norm")}
    plain, (a, b) = CRSAM(params, BASES[base][0], rho=0.0, **settings), (options["alpha"], options["beta"])
    for step in range(STEPS):
        of_ranks = [three_gradients(model, batch_of(step, rank), options["rho"])[0] for rank in range(size)]
        g0 = [sum(parts) / size for parts in zip(*(g[0] for g in of_ranks), strict=True)]
        if step % 2 == 0:
            ghats = [[p + a * s + b * f for p, s, f in zip(g[1], d2(g), d1(g), strict=True)] for g in of_ranks]
            ghat = [sum(parts) / size for parts in zip(*ghats, strict=True)]
            kept = [x - y for x, y in zip(ghat, g0, strict=True)]
        else:
            weight = min(0.9, float((dot(g0, g0) / dot(kept, kept)).sqrt()) / 2)
            ghat = [x + weight * h for x, h in zip(g0, kept, strict=True)]
        for param, g in zip(params, ghat, strict=True):
            param.grad = g
        plain.step()
    return [p.detach() for p in params]


def trained_with_state(rank, size, base, options):
    model, optimizer = made(rank, base, **options)
    for step in range(STEPS):
        optimizer.step(closure_of(model, *batch_of(step, rank)))
    optimizer.check_replicas()
    return [p.detach().clone() for p in model.parameters()], optimizer.state_dict()


def with_kept_difference(size, base):
    model = Network().double()
    params, kept = list(model.parameters()), None
    plain = CRSAM(params, BASES[base][0], rho=0.0, **BASES[base][1])
    a, b = LINEAR["alpha"], LINEAR["beta"]
    for step in range(STEPS):
        of_ranks = [three_gradients(model, batch_of(step, rank), LINEAR["rho"])[0] for rank in range(size)]
        if step % 2 == 0:
            kept = [sum(parts) / size for parts in zip(*map(d2, of_ranks), strict=True)]
        else:
            for g in of_ranks:
                g[2] = [2 * at - up + d for at, up, d in zip(g[0], g[1], kept, strict=True)]
        for index, param in enumerate(params):
            param.grad = sum(g[1][index] + a * d2(g)[index] + b * d1(g)[index] for g in of_ranks) / size
        plain.step()
    return [p.detach() for p in params]


def test_a_list_of_closures_makes_one_all_reduce(two):
    """Each step of micro-batches makes one all-reduce of their common gradient."""
    results = two(trained, "sgd", LINEAR, (), "list")
    assert_equal(results)
    assert all(counts[1:] == [1] * (STEPS - 1) for _, counts, _ in results)


def test_two_groups_and_a_frozen_parameter_work(two):
    assert_equal(two(grouped))


def grouped(rank, size):
    network = Network().double()
    network.first.bias.requires_grad_(False)
    model = DistributedDataParallel(network)
    groups = [
        {"params": [network.first.weight, *network.second.parameters()], "rho": 0.05},
        {"params": [*network.norm.parameters(), *network.last.parameters()], "alpha": 0.0, "lr": 0.3},
    ]
    optimizer = CRSAM(groups, torch.optim.SGD, lr=0.1, momentum=0.9, model=model, **LINEAR)
    for step in range(STEPS):
        optimizer.step(closure_of(model, *batch_of(step, rank)))
    optimizer.check_replicas()
    return ([p.detach().clone() for p in network.parameters()],)


def test_bfloat16_replicas_stay_equal(two):
    """The masters stay equal, too."""
    results = two(in_bfloat16)
    assert_equal(results)
    assert all(torch.equal(x, y) for x, y in zip(results[0][1], results[1][1], strict=True))


def in_bfloat16(rank, size):
    model, optimizer = made(rank, "adamw", dtype=torch.bfloat16, stochastic_rounding=True, **LINEAR)
    for step in range(STEPS):
        optimizer.step(closure_of(model, *batch_of(step, rank, torch.bfloat16)))
    optimizer.check_replicas()
    masters = [optimizer.state[p]["master_param"].clone() for p in model.parameters()]
    return [p.detach().clone() for p in model.parameters()], masters


def test_all_reduce_overlaps_the_last_backward(two):
    """The first all-reduce of the last pass starts before its last gradient is computed."""
    for events in two(order_of_events):
        last_pass = events[events.index("second_step") :]
        assert last_pass.index("all-reduce") < last_pass.index("gradient of the first layer")
        assert "all-reduce" not in events[: events.index("second_step")]


def order_of_events(rank, size):
    model, optimizer = made(rank, ddp={"bucket_cap_mb": 1e-6}, **LINEAR)
    optimizer.step(closure_of(model, *batch_of(0, rank)))
    events, all_reduce = [], torch.distributed.all_reduce

    def noted(*arguments, **options):
        events.append("all-reduce")
        return all_reduce(*arguments, **options)

    torch.distributed.all_reduce = noted
    model.module.first.weight.register_hook(lambda _: events.append("gradient of the first layer"))
    closure = closure_of(model, *batch_of(1, rank))
    for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
        with optimizer.no_sync():
            closure()
        events.append(call.__name__)
        call(zero_grad=True)
    torch.distributed.all_reduce = all_reduce
    return events


def test_each_rank_has_its_own_statistics_and_dropout(two):
    """Running statistics count each rank's batch once; dropout masks are equal in all passes and differ between
    ranks."""
    (mean, masks), (other_mean, other_masks) = two(with_statistics)
    for passes in (masks, other_masks):
        assert all(torch.equal(passes[0], mask) for mask in passes)
    assert not torch.equal(masks[0], other_masks[0])
    for rank, seen in enumerate((mean, other_mean)):
        torch.testing.assert_close(seen, 0.1 * batch_of(0, rank)[0].mean(0))


def with_statistics(rank, size):
    torch.manual_seed(rank)
    masks = []
    dropout = torch.nn.Dropout()
    dropout.register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(6), dropout, torch.nn.Linear(6, 4)).double()
    model = DistributedDataParallel(network)
    optimizer = CRSAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model, **LINEAR)
    optimizer.step(closure_of(model, *batch_of(0, rank)))
    return network[0].running_mean.clone(), masks


# Failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [({"alpha": 0.0, "beta": 0.0}, "passes"), ({"lr": 0.3}, "lr"), ({"regularizer": "log"}, "regularizer")],
)
def test_options_that_differ_between_ranks_are_refused(two, options, word):
    """All ranks raise an error that names the options, and none waits."""
    failures = two.attempt(differing, options)
    assert all("differ in settings that must be equal" in failure.message for failure in failures)
    assert all(word in failure.message for failure in failures)


def differing(rank, size, options):
    model, optimizer = made(rank, **{**LINEAR, **(options if rank else {})})
    optimizer.step(closure_of(model, *batch_of(0, rank)))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_closure_that_raises_on_all_ranks_restores_w(two, index):
    """The next step is correct."""
    results = two(raising, index, (0, 1))
    assert_equal(results, expected(2, "sgd", LINEAR, steps=1))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_rank_whose_closure_raises_skips_its_batch(two, index):
    """Its step joins the next one of the other ranks, and the replicas stay equal."""
    results = two(raising, index, (1,))
    assert_equal(results)


def raising(rank, size, index, where):
    model, optimizer = made(rank, **LINEAR)
    before, calls = [p.detach().clone() for p in model.parameters()], []

    def failing():
        if rank in where and len(calls) == index:
            raise MemoryError("none left")
        calls.append(0)
        return closure_of(model, *batch_of(7, rank))()

    if rank in where:
        with pytest.raises(MemoryError):
            optimizer.step(failing)
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    optimizer.step(closure_of(model, *batch_of(0, rank)))
    optimizer.check_replicas()
    return ([p.detach().clone() for p in model.parameters()],)


@pytest.mark.parametrize("index", [1, 2])
def test_a_rank_that_fails_after_a_reduction_causes_an_error(index):
    """Its next step does not match that of the others, which wait for the rest of this one: both raise, and w is
    restored."""
    ranks = Ranks(2, seconds=3)
    try:
        assert all(ranks(failing_late, index))
    finally:
        ranks.close()


def failing_late(rank, size, index):
    model, optimizer = made(rank, **{**LINEAR, "sync_perturbation": True})
    optimizer.step(closure_of(model, *batch_of(0, rank)))
    before, calls = [p.detach().clone() for p in model.parameters()], []

    def failing():
        if rank == 1 and len(calls) == index:
            raise MemoryError("none left")
        calls.append(0)
        return closure_of(model, *batch_of(1, rank))()

    with pytest.raises((MemoryError, RuntimeError)):
        optimizer.step(failing)
    if rank == 1:
        with pytest.raises(RuntimeError):
            optimizer.step(closure_of(model, *batch_of(2, rank)))
    return all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


def test_loss_estimator_needs_the_model(two):
    for failure in two.attempt(with_local_losses):
        assert "give the DistributedDataParallel as model=" in failure.message


def with_local_losses(rank, size):
    model, optimizer = made(rank, **{**LOG, "estimator": "loss", "model": None})
    optimizer.step(closure_of(model, *batch_of(0, rank)))


def test_fully_sharded_data_parallel_is_refused(two):
    for failure in two.attempt(with_fsdp):
        assert "fully_shard" in failure.message


def with_fsdp(rank, size):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(Network(), device_id=torch.device("cpu"), use_orig_params=True)
    CRSAM(model.parameters(), lr=0.1)


def test_other_engines_are_refused():
    """They are recognized by their modules' names, because neither library is installed here."""
    engine = type("DeepSpeedEngine", (torch.nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    with pytest.raises(ValueError, match=r"DeepSpeed's engine .*: use DistributedDataParallel"):
        CRSAM(Network().parameters(), lr=0.1, model=engine)
    wrapped = type("CRSAM", (CRSAM,), {"__module__": "horovod.torch.optimizer"})
    with pytest.raises(TypeError, match=r"Horovod .*: use DistributedDataParallel"):
        wrapped(Network().parameters(), lr=0.1)


def test_parameters_may_be_added_later(two):
    assert_equal(two(with_late_parameters))


def with_late_parameters(rank, size):
    network = Network().double()
    model = DistributedDataParallel(network)
    first = [*network.first.parameters(), *network.second.parameters()]
    optimizer = CRSAM(first, torch.optim.SGD, lr=0.1, model=model, **LINEAR)
    for step in range(STEPS):
        if step == 2:
            optimizer.add_param_group({"params": [*network.norm.parameters(), *network.last.parameters()], "rho": 0.05})
        optimizer.step(closure_of(model, *batch_of(step, rank)))
    optimizer.check_replicas()
    assert not torch.equal(network.last.weight, Network().double().last.weight)
    return ([p.detach().clone() for p in network.parameters()],)


@pytest.mark.parametrize("wrapped", ["static graph", "unused"])
def test_log_form_works_in_other_wrappers(two, wrapped):
    results = two(trained, "sgd", LOG, tuple(WRAPPED[wrapped].items()))
    assert_equal(results)
    assert_close(results[0][0], by_means(2, LOG))


@pytest.mark.parametrize("options", [LINEAR, LOG])
def test_a_last_pass_without_synchronization_is_reduced(two, options):
    """The step reduces the gradient itself."""
    results = two(all_in_no_sync, options)
    assert_equal(results)
    if options is LINEAR:
        assert_equal(results, expected(2, "sgd", LINEAR))
    else:
        assert_close(results[0][0], by_means(2, LOG))


def all_in_no_sync(rank, size, options):
    model, optimizer = made(rank, **options)
    for step in range(STEPS):
        closure = closure_of(model, *batch_of(step, rank))
        for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
            with model.no_sync():
                closure()
            call(zero_grad=True)
    optimizer.check_replicas()
    return ([p.detach().clone() for p in model.parameters()],)


def test_a_base_optimizer_that_communicates_works(two):
    """All ranks agree whether the base optimizer makes its step: tested with sharded state, and a NaN on one rank."""
    results = two(with_sharded_state)
    assert_equal(results)
    assert results[0][1] == results[1][1] == 1


def with_sharded_state(rank, size):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(Network().double())
    base = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
    optimizer = CRSAM(model.parameters(), base, model=model, **LINEAR)
    for step in range(STEPS):
        handle = next(model.parameters()).register_hook(
            lambda g, bad=(step, rank) == (2, 1): g * torch.nan if bad else g
        )
        optimizer.step(closure_of(model, *batch_of(step, rank)))
        handle.remove()
    optimizer.check_replicas()
    return [p.detach().clone() for p in model.parameters()], int(optimizer.stats.skipped)


def test_channels_last_keeps_the_layout(two):
    """Gradients, buckets and flat buffers have the same memory layout, so DistributedDataParallel emits no warning."""
    assert_equal(two(in_channels_last))


def in_channels_last(rank, size):
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3), torch.nn.Flatten()
    network = torch.nn.Sequential(*layers, torch.nn.Linear(64, 4)).to(memory_format=torch.channels_last)
    model = DistributedDataParallel(network, gradient_as_bucket_view=True)
    optimizer = CRSAM(network.parameters(), torch.optim.SGD, lr=0.1, model=model, **LINEAR)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(100 * step + rank)
            x = torch.randn(8, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
            optimizer.step(closure_of(model, x, torch.randint(4, (8,), generator=generator)))
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    optimizer.check_replicas()
    return ([p.detach().clone() for p in network.parameters()],)


def test_a_compiled_model_and_a_copied_optimizer_work(two):
    results = two(compiled_and_copied)
    assert_equal(results, expected(2, "sgd", LINEAR))


def compiled_and_copied(rank, size):
    network = Network().double()
    ddp = DistributedDataParallel(network)
    model = torch.compile(ddp, backend="eager")
    optimizer = CRSAM(network.parameters(), torch.optim.SGD, model=model, **BASES["sgd"][1], **LINEAR)
    for step in range(STEPS):
        optimizer.step(closure_of(model, *batch_of(step, rank)))
    twin = copy.deepcopy(optimizer)
    assert twin.replicas.ddp is not optimizer.replicas.ddp
    assert twin.replicas.size == size
    return ([p.detach().clone() for p in network.parameters()],)


def test_check_replicas_detects_differences(two):
    """Replicas differ if the user's no_sync() omits a reduction; without model=, only this check detects it."""
    failures = two.attempt(parting)
    assert all("the replicas differ" in failure.message for failure in failures)
    assert all("first.weight" in failure.message for failure in failures)


def parting(rank, size):
    model = DistributedDataParallel(Network().double())
    optimizer = CRSAM(model.named_parameters(), torch.optim.SGD, lr=0.1, **LINEAR)
    optimizer.check_replicas()
    closure = closure_of(model, *batch_of(0, rank))
    with model.no_sync():
        closure()
    optimizer.first_step(zero_grad=True)
    closure(), optimizer.second_step(zero_grad=True)
    closure(), optimizer.third_step()
    optimizer.check_replicas()


def test_repeated_synchronized_backwards_are_refused(two):
    for failure in two.attempt(twice_in_the_last_pass):
        assert "run all but the last micro-batch within ddp.no_sync()" in failure.message
    for failure in two.attempt(without_the_first_all_reduce):
        assert "use optimizer.no_sync()" in failure.message


def twice_in_the_last_pass(rank, size):
    model, optimizer = made(rank, **LINEAR)
    optimizer.step(closure_of(model, *batch_of(0, rank)))
    closure = closure_of(model, *batch_of(1, rank))

    def twice():
        closure(), closure()

    optimizer.step(twice)


def without_the_first_all_reduce(rank, size):
    model, optimizer = made(rank, sync_perturbation=True, **LINEAR)
    optimizer.step(closure_of(model, *batch_of(0, rank)))
    with model.no_sync():
        closure_of(model, *batch_of(1, rank))()
    optimizer.first_step()


def test_invalid_configurations_are_refused(two):
    two(refusals)


def refusals(rank, size):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, optimizer = made(rank, **LINEAR)
    closure = closure_of(model, *batch_of(0, rank))
    for given in (model, None):
        alone = CRSAM(model.parameters(), lr=0.1, model=given)
        with pytest.raises(TypeError, match="parallel="):
            alone.step(closure, parallel=model.module)
    assert "CUDA" in optimizer.capture_blocker()  # the first reason on a CPU
    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="before the first step"):
        optimizer.model = model
    with pytest.raises(ValueError, match="DistributedDataParallel as model="):
        CRSAM(Network().parameters(), lr=0.1, sync_perturbation=True)
    with pytest.raises(TypeError, match=r"CRSAM\(params, ZeroRedundancyOptimizer"):
        ZeroRedundancyOptimizer(Network().parameters(), CRSAM, lr=0.1)
    inner = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    CRSAM(model.parameters(), inner, model=model).step(closure)
    model, optimizer = made(rank, **LINEAR)
    with pytest.raises(RuntimeError, match=r"join\(\)"), model.join():
        optimizer.step(closure_of(model, *batch_of(0, rank)))


def test_a_model_may_be_wrapped_later(two):
    results = two(wrapped_later)
    assert_equal(results, expected(2, "sgd", LINEAR))


def wrapped_later(rank, size):
    network = Network().double()
    optimizer = CRSAM(network.parameters(), torch.optim.SGD, model=network, **BASES["sgd"][1], **LINEAR)
    optimizer.model = model = DistributedDataParallel(network)
    for step in range(STEPS):
        optimizer.step(closure_of(model, *batch_of(step, rank)))
    return ([p.detach().clone() for p in network.parameters()],)


def test_replicas_are_equal_after_fifty_steps(two):
    """They are equal bit for bit, in float32."""
    assert_equal(two(trained, "sgd", LINEAR, (), "closure", torch.float32, 50))
    assert_equal(two(trained, "adamw", {**LINEAR, "max_grad_norm": 0.5}, (), "closure", torch.float32, 50))


def test_checkpoints_load_on_other_numbers_of_ranks(two, four, tmp_path):
    """Saved by four ranks, loaded and saved by two, and loaded by one process into torch's own AdamW."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    (saved, *_) = four(saved_and_loaded, None, tmp_path / "four")
    loaded, other = two(saved_and_loaded, tmp_path / "four", tmp_path / "two")
    assert_equal([loaded], other[0])
    assert all(torch.equal(p, q) for p, q in zip(saved[1], loaded[0], strict=True))
    network = Network().double()
    plain = torch.optim.AdamW(network.parameters(), lr=0.01)
    weights, state = get_state_dict(network, plain)
    read = {"model": weights, "optimizer": state}
    dcp.load(read, checkpoint_id=tmp_path / "two", no_dist=True)
    set_state_dict(network, plain, model_state_dict=read["model"], optim_state_dict=read["optimizer"])
    assert_equal([(list(network.parameters()),)], loaded[1])
    assert plain.state[network.first.weight]["step"] == 6


def saved_and_loaded(rank, size, source, target):
    """Return the parameters after loading, and after three more steps, which are saved."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = made(rank, "adamw", **LINEAR, curvature_interval=2)
    weights, state = get_state_dict(model, optimizer)
    read = {"model": weights, "optimizer": state}
    if source is not None:
        dcp.load(read, checkpoint_id=source)
        set_state_dict(model, optimizer, model_state_dict=read["model"], optim_state_dict=read["optimizer"])
        assert optimizer.stats.steps == 3
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        optimizer.step(closure_of(model, *batch_of(step, rank)))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=target)
    return before, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("form", ["full", "broadcast"])
def test_state_dicts_of_torch_distributed_checkpoint_load(two, form):
    """Tested with full state dicts, also those that rank 0 broadcasts."""
    results = two(resumed, form)
    assert_equal(results)


def resumed(rank, size, form):
    from torch.distributed.checkpoint import state_dict as dcp

    options = {**LINEAR, "curvature_interval": 2}
    model, optimizer = made(rank, "adamw", **options)
    for step in range(3):
        optimizer.step(closure_of(model, *batch_of(step, rank)))
    saving = dcp.StateDictOptions(full_state_dict=True, cpu_offload=form == "broadcast")
    weights, state = dcp.get_state_dict(model, optimizer, options=saving)
    if form == "broadcast" and rank:
        weights, state = {}, {}
    other, loaded = made(rank, "adamw", **options)
    loading = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=form == "broadcast")
    dcp.set_model_state_dict(other, weights, options=loading)
    dcp.set_optimizer_state_dict(other, loaded, state, options=loading)
    for step in range(3, 6):
        assert optimizer.passes == loaded.passes
        for m, o in ((model, optimizer), (other, loaded)):
            o.step(closure_of(m, *batch_of(step, rank)))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    return ([p.detach().clone() for p in other.parameters()],)
