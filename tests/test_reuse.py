"""Steps between perturbations that add the last sharpness direction."""

import copy
import math

import pytest
import torch

from crsam_ext import CRSAM, GradScaler, reuse

from .reference import (
    EXACT,
    Reference,
    assert_close,
    assert_same,
    batch,
    closure_of,
    evaluator,
    network_loss,
    network_params,
    run_three_calls,
    update_tolerance,
)

pytestmark = pytest.mark.slow

DIRECTION = "sharpness_direction"
STEPS = 7
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "radam": (torch.optim.RAdam, {"lr": 0.01}),
}
OPTIONS = {
    "linear": {"alpha": 0.3, "beta": 0.2},
    "sam": {"alpha": 0, "beta": 0},
    "log": {"regularizer": "log", "alpha": 0.02, "beta": 0.02},
    "capped": {"alpha": 0.3, "beta": 0.2, "max_regularizer_ratio": 0.01},
    "asam": {"alpha": 0.3, "beta": 0.2, "adaptive": True},
    "clipped": {"alpha": 0.3, "beta": 0.2, "max_grad_norm": 0.05},
    "maximize": {"alpha": 0.3, "beta": 0.2, "maximize": True},
    "compile": {"alpha": 0.3, "beta": 0.2, "max_grad_norm": 0.05, "compile": True},
}


def batches(count=STEPS, dtype=torch.float64, device="cpu"):
    torch.manual_seed(1)
    return [batch(dtype, device) for _ in range(count)]


def problem(base="sgd", dtype=torch.float64, device="cpu", interval=3, **options):
    torch.manual_seed(0)
    params = network_params(dtype, device)
    kind, settings = BASES[base]
    options = {"rho": 0.2, "alpha": 0.3, "beta": 0.2, "reuse": True, **settings, **options}
    return params, CRSAM(params, kind, interval=interval, **options)


def closure(params, data):
    return closure_of(lambda p: network_loss(p, data), params)


def assert_equal(params, others):
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def reference_of(params, base, options, interval=3):
    kind, settings = BASES[base]
    own = {k: v for k, v in options.items() if k not in ("compile", "backend")}
    if base == "radam":
        own.pop("maximize", None)
        return Reference([{"params": params}], lambda w: kind(w, **settings), rho=0.2, interval=interval, **own)
    return Reference([{"params": params}], base, rho=0.2, interval=interval, **settings, **own)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", OPTIONS)
def test_formula_holds(base, name, backend_options, device):
    """In the steps between, ghat = g0 + min(0.9^j, |g0| / 2 |h|) h, clipped as in other steps."""
    options = OPTIONS[name]
    if name == "compile" and (backend_options["backend"] != "torch" or base == "radam"):
        pytest.skip("torch.compile is an option of backend torch")
    if name == "maximize" and base == "radam":
        pytest.skip("only tested with native update rules")
    params, optimizer = problem(base, device=device, **options, **backend_options)
    reference = reference_of(params, base, options)
    for step, data in enumerate(batches(device=device)):
        assert optimizer.passes == ((2 if name == "sam" else 3) if step % 3 == 0 else 1)
        optimizer.step(closure(params, data))
        reference.step(evaluator(lambda w, data=data: network_loss(w, [x.cpu() for x in data])))
        assert_same(params, reference, 100 * EXACT if name == "log" else EXACT)  # cancellation in kappa
        if name != "asam":
            assert float(optimizer.stats.grad_norm) == pytest.approx(reference.last["grad_norm"], rel=1e-9)
    if name in ("clipped", "compile"):
        assert float(optimizer.stats.clip_factor) == pytest.approx(reference.last["clip_factor"], rel=1e-9)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_dtypes_agree_up_to_rounding(base, dtype, backend_options, device):
    """The direction is stored in the compute dtype: steps with the same gradients only differ by rounding."""
    torch.manual_seed(0)
    shapes = [(5, 4), (300,), ()]
    params = [torch.nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in shapes]
    gradients = [[1 + torch.rand(shape) for shape in shapes] for _ in range(12)]
    gradients = [[g.to(dtype) for g in of_pass] for of_pass in gradients]
    kind, settings = BASES[base]
    options = {"rho": 0.2, "alpha": 0.3, "beta": 0.2, **settings}
    optimizer = CRSAM(params, kind, interval=3, reuse=True, **options, **backend_options)
    reference = Reference([{"params": params}], base, interval=3, **options)
    given, expected = iter(gradients), iter(gradients)

    def fill():
        for p, g in zip(params, next(given), strict=True):
            p.grad = g.to(device)

    for _ in range(5):
        optimizer.step(fill)
        reference.step(lambda w: (0.0, next(expected)))
    for p, w in zip(params, reference.w, strict=True):
        state = optimizer.state[p]
        master = p if dtype == torch.float32 else state["master_param"]
        assert_close(master, w, update_tolerance(dtype, 5))
        assert state[DIRECTION].dtype == torch.float32


@pytest.mark.parametrize("base", BASES)
def test_curvature_interval_and_interval_combine(base, backend_options, device):
    """Every third step perturbs, and every second of these takes all three passes."""
    params, optimizer = problem(base, device=device, curvature_interval=2, **backend_options)
    passes = []
    for data in batches(9, device=device):
        passes.append(optimizer.passes)
        optimizer.step(closure(params, data))
    assert passes == [3, 1, 1, 2, 1, 1, 3, 1, 1]
    kept = torch.cat([optimizer.state[p][DIRECTION].flatten() for p in params])
    assert kept.isfinite().all()
    assert kept.abs().max() > 0


@pytest.mark.parametrize("base", ["sgd", "radam"])
def test_calls_give_the_same_bits(base, backend_options, device):
    """This includes combine()."""
    options = {"device": device, **backend_options}
    (params, by_closure), (others, by_calls), (more, combined) = (problem(base, **options) for _ in range(3))
    for data in batches(device=device):
        by_closure.step(closure(params, data))
        run_three_calls(by_calls, lambda _, data=data: closure(others, data)(), calls=by_calls.passes) if (
            by_calls.passes > 1
        ) else (closure(others, data)(), by_calls.step(), by_calls.zero_grad())
        if combined.passes > 1:
            for call in (combined.first_step, combined.second_step):
                closure(more, data)()
                call(zero_grad=True)
            closure(more, data)()
            combined.combine()
        else:
            closure(more, data)()
        combined.step()
        combined.zero_grad()
    assert_equal(params, others)
    for p, q in zip(params, more, strict=True):  # ghat is rounded once more
        assert_close(q, p, EXACT)


def test_micro_batches_give_the_direction_of_their_sum(backend_options, device):
    """Tested with a list of closures."""
    (params, whole), (others, in_parts) = (problem(device=device, **backend_options) for _ in range(2))
    for data in batches(device=device):
        whole.step(closure(params, data))
        halves = [
            closure_of(lambda p, part=part: network_loss(p, part) / 2, others)
            for part in zip(*(x.chunk(2) for x in data), strict=True)
        ]
        in_parts.step(halves)
    for p, q in zip(params, others, strict=True):
        assert_close(p, q, EXACT)


@pytest.mark.parametrize("clip", [{}, {"max_grad_norm": 0.05}], ids=["plain", "clipped"])
@pytest.mark.parametrize("form", ["closure", "calls"])
def test_a_scale_that_changes_does_not_affect_the_direction(form, clip, backend_options, device):
    """The direction is stored for unscaled losses."""
    (params, optimizer), (others, scaled) = (problem(device=device, **clip, **backend_options) for _ in range(2))
    scaler = (GradScaler if form == "closure" else torch.amp.GradScaler)(
        device.type, init_scale=1024.0, growth_interval=1
    )
    for data in batches(device=device):

        def scaled_closure(data=data):
            loss = network_loss(others, data)
            scaler.scale(loss).backward()
            return loss

        optimizer.step(closure(params, data))
        if form == "closure":
            scaler.step(scaled, scaled_closure)
        else:
            for call in (scaled.first_step, scaled.second_step)[: scaled.passes - 1]:
                scaled_closure()
                call(zero_grad=True)
            scaled_closure()
            scaler.step(scaled)
            scaled.zero_grad()
        scaler.update()
    for p, q in zip(params, others, strict=True):  # e differs slightly: epsilon is not scaled
        assert_close(p, q, 100 * EXACT)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("at", range(1, 6))
def test_training_resumes_to_the_same_bits(base, at, backend_options, device):
    """A checkpoint after any step continues with the same bits."""
    params, optimizer = problem(base, device=device, **backend_options)
    data = batches(device=device)
    for one in data[:at]:
        optimizer.step(closure(params, one))
    others, resumed = problem(base, device=device, **backend_options)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied_params, copied = copy.deepcopy((params, optimizer))
    for one in data[at:]:
        optimizer.step(closure(params, one))
        resumed.step(closure(others, one))
        copied.step(closure(copied_params, one))
    assert_equal(params, others)
    assert_equal(params, copied_params)


# When the direction is kept or dropped -------------------------------------------------------------------------------


def plain_steps(params, base, data, rho=0.0):
    """Return the same parameters after steps of the base optimizer alone, with new state."""
    twins = copy.deepcopy(params)
    kind, settings = BASES[base]
    plain = CRSAM(twins, kind, rho=rho, **settings)
    for one in data:
        plain.step(closure(twins, one))
    return twins


@pytest.mark.parametrize("base", BASES)
def test_a_checkpoint_without_a_direction_loads(base, backend_options, device):
    """Steps equal those of the base optimizer until the next perturbation."""
    params, optimizer = problem(base, device=device, **backend_options)
    first, *rest = batches(3, device=device)
    optimizer.step(closure(params, first))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"] = {}
    optimizer.load_state_dict(state)
    twins = plain_steps(params, base, rest)
    for data in rest:
        assert optimizer.passes == 1
        optimizer.step(closure(params, data))
    for p, q in zip(params, twins, strict=True):
        assert_close(p, q, EXACT)


@pytest.mark.parametrize("base", BASES)
def test_a_perturbation_that_is_skipped_drops_the_direction(base, backend_options, device):
    params, optimizer = problem(base, device=device, **backend_options)
    data = batches(6, device=device)
    for one in data[:3]:
        optimizer.step(closure(params, one))
    calls = []

    def failing():
        loss = closure(params, data[3])()
        calls.append(0)
        if len(calls) == 2:
            params[0].grad.fill_(torch.nan)
        return loss

    optimizer.step(failing)
    assert optimizer.stats.skipped == 1
    assert all((optimizer.state[p][DIRECTION] == 0).all() for p in params)
    optimizer.step(closure(params, data[4]))
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("base", BASES)
def test_a_step_between_that_is_skipped_keeps_the_direction(base, backend_options, device):
    params, optimizer = problem(base, device=device, **backend_options)
    first, second, third = batches(3, device=device)
    optimizer.step(closure(params, first))
    kept, before = [optimizer.state[p][DIRECTION].clone() for p in params], [p.detach().clone() for p in params]

    def failing():
        loss = closure(params, second)()
        params[0].grad.fill_(torch.inf)
        return loss

    optimizer.step(failing)
    assert optimizer.stats.skipped == 1
    assert_equal(params, before)
    assert_equal([optimizer.state[p][DIRECTION] for p in params], kept)
    optimizer.step(closure(params, third))
    assert not torch.equal(params[0], before[0])


def test_a_zero_rho_drops_the_direction(backend_options, device):
    """A step with rho = 0 takes the place of a perturbation; otherwise later steps would use an outdated direction."""
    params, optimizer = problem(device=device, **backend_options)
    data = batches(6, device=device)
    for one in data[:3]:
        optimizer.step(closure(params, one))
    assert any((optimizer.state[p][DIRECTION] != 0).any() for p in params)
    optimizer.param_groups[0]["rho"] = 0.0
    assert optimizer.passes == 1
    optimizer.step(closure(params, data[3]))
    assert all((optimizer.state[p][DIRECTION] == 0).all() for p in params)


def test_a_step_with_a_zero_rho_equals_the_base_optimizer(backend_options, device):
    params, optimizer = problem("adamw", device=device, **backend_options)
    first, second = batches(2, device=device)
    optimizer.step(closure(params, first))
    twins = copy.deepcopy(params)
    state = copy.deepcopy(optimizer.state_dict())
    plain = CRSAM(twins, torch.optim.AdamW, rho=0.0, **BASES["adamw"][1])
    plain.load_state_dict({**state, "param_groups": [{**g, "rho": 0.0} for g in state["param_groups"]]})
    optimizer.param_groups[0]["rho"] = 0.0
    optimizer.step(closure(params, second))
    plain.step(closure(twins, second))
    for p, q in zip(params, twins, strict=True):
        assert_close(p, q, EXACT)


@pytest.mark.parametrize("name", ["rho", "alpha", "beta"])
def test_changes_of_other_options_keep_the_direction(name, backend_options, device):
    """A schedule changes them in every step; the next perturbation uses the new values."""
    params, optimizer = problem(device=device, **backend_options)
    others, unchanged = problem(device=device, **backend_options)
    first, second = batches(2, device=device)
    for ps, o in ((params, optimizer), (others, unchanged)):
        o.step(closure(ps, first))
    optimizer.param_groups[0][name] *= 2
    for ps, o in ((params, optimizer), (others, unchanged)):
        o.step(closure(ps, second))
    assert_equal(params, others)


def test_an_added_group_has_no_direction(backend_options, device):
    params, optimizer = problem(device=device, **backend_options)
    first, second, third = batches(3, device=device)
    optimizer.step(closure(params[:], first))
    more = torch.nn.Parameter(torch.ones(3, dtype=torch.float64, device=device))
    kept = [optimizer.state[p][DIRECTION].clone() for p in params]
    optimizer.add_param_group({"params": [more], "lr": 0.5, "momentum": 0.0, "weight_decay": 0.0})

    def both():
        loss = network_loss(params, second) + (more**2).sum()
        loss.backward()
        return loss

    optimizer.step(both)
    assert_close(more, torch.zeros(3), EXACT)  # 1 - 0.5 * 2
    assert_equal([optimizer.state[p][DIRECTION] for p in params], kept)
    optimizer.step(closure(params, third))


@pytest.mark.parametrize("base", BASES)
def test_a_parameter_that_was_not_perturbed_has_no_direction(base, backend_options, device):
    """It has no older direction either."""
    used, other = (torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64, device=device)) for _ in range(2))
    kind, settings = BASES[base]
    optimizer = CRSAM([used, other], kind, rho=0.2, interval=2, reuse=True, **settings, **backend_options)

    def loss_of(params):
        return sum((p**3).sum() for p in params)

    for params in ([used, other], [used, other], [used], [used, other]):
        optimizer.step(closure_of(loss_of, params))
    assert (optimizer.state[other][DIRECTION] == 0).all()
    assert (optimizer.state[used][DIRECTION] != 0).all()


def test_an_exception_keeps_the_direction(backend_options, device):
    params, optimizer = problem(device=device, **backend_options)
    others, undisturbed = problem(device=device, **backend_options)
    data = batches(device=device)

    def failing():
        closure(params, data[0])()
        if optimizer.pass_index == optimizer.passes - 1:
            raise KeyboardInterrupt

    for one in data:
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(failing)
        optimizer.step(closure(params, one))
        undisturbed.step(closure(others, one))
    assert_equal(params, others)


# Cost and stability --------------------------------------------------------------------------------------------------


def test_memory_is_one_additional_buffer():
    """The buffer has the parameters' size in the compute dtype."""
    params, optimizer = problem()
    optimizer.step(closure(params, batches(1)[0]))
    kept = [optimizer.state[p][DIRECTION] for p in params]
    assert [h.shape for h in kept] == [p.shape for p in params]
    (bucket,) = optimizer._flat.buckets
    assert set(bucket.buffers) == {"momentum_buffer", DIRECTION}
    assert bucket.buffers[DIRECTION].numel() == bucket.saved.numel()


def final_loss(interval, rho=0.2, steps=300):
    """Return the loss of a network trained with the whole batch, where an outdated direction does not average out."""
    params, data = problem()[0], batches(1)[0]
    options = {"rho": rho, "alpha": 0.5, "beta": 0.1, "interval": interval, "reuse": interval > 1}
    optimizer = CRSAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, **options)
    for _ in range(steps):
        optimizer.step(closure(params, data))
    return network_loss(params, data).item()


def test_training_converges_with_any_interval(monkeypatch):
    """However rare perturbations are, the loss falls to less than half; without either bound it would grow."""
    start = network_loss(problem()[0], batches(1)[0]).item()
    losses = {interval: final_loss(interval) for interval in (2, 3, 5, 10, 20, 50, 100)}
    assert all(loss < start / 2 for loss in losses.values()), losses
    monkeypatch.setattr(reuse, "MAX_RATIO", math.inf)
    monkeypatch.setattr(reuse, "DECAY", 1.0)
    assert not final_loss(100) < start


# Errors --------------------------------------------------------------------------------------------------------------


def test_reuse_without_an_interval_is_refused():
    with pytest.raises(ValueError, match="set interval to 2 or more"):
        problem(interval=1)


def test_reuse_with_separate_perturbations_is_refused():
    params, optimizer = problem()
    data = batches(2)
    with pytest.raises(ValueError, match="curvature_interval and reuse"):
        optimizer.step([closure(params, one) for one in data], sync_perturbation=False)
