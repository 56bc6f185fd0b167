"""Schedules of rho, alpha and beta."""

import copy
import inspect
import pickle

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler as schedulers

from crsam_ext import CRSAM, Scheduled

from .reference import EXACT, assert_same, batch, closure_of, evaluator, network_loss, network_params
from .reference import Reference as ReferenceCRSAM


def two(optimizer):
    return [schedulers.ConstantLR(optimizer), schedulers.ExponentialLR(optimizer, 0.9)]


MAKERS = {
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(two(o)),
    "ConstantLR": schedulers.ConstantLR,
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 0.3, cycle_momentum=False),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 1 / (epoch + 1)),
    "LinearLR": schedulers.LinearLR,
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.3, total_steps=8, cycle_momentum=False),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 4),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: schedulers.SequentialLR(o, two(o), [2]),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
}


def optimizer_with(rho=0.2, lr=0.1):
    groups = [{"params": [Parameter(torch.ones(3))]}, {"params": [Parameter(torch.ones(2))], "rho": 0.4}]
    return CRSAM(groups, lr=lr, rho=rho)


@pytest.mark.parametrize("name", MAKERS)
def test_every_scheduler_can_schedule_rho(name):
    """Rho takes the values that a learning rate would take."""
    optimizer = optimizer_with()
    groups = [{"params": [Parameter(torch.ones(1))]}, {"params": [Parameter(torch.ones(1))], "lr": 0.4}]
    twin = torch.optim.SGD(groups, lr=0.2)
    scheduler, expected = MAKERS[name](Scheduled(optimizer, "rho")), MAKERS[name](twin)
    arguments = (1.0,) if name == "ReduceLROnPlateau" else ()
    for _ in range(6):
        twin.step()
        expected.step(*arguments)
        scheduler.step(*arguments)
        assert [g["rho"] for g in optimizer.param_groups] == [g["lr"] for g in twin.param_groups]
        assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1]


def test_schedulers_of_timm_work():
    timm = pytest.importorskip("timm.scheduler")
    optimizer = optimizer_with()
    scheduler = timm.CosineLRScheduler(Scheduled(optimizer, "rho"), t_initial=4, warmup_t=0)
    scheduler.step(2)
    assert [g["rho"] for g in optimizer.param_groups] == pytest.approx([0.1, 0.2])


def test_steps_use_the_current_values(backend_options, device):
    """Each step uses the current values of all three options; compare with the reference."""
    params, data = network_params(torch.float64, device), batch(torch.float64, device)
    options = {"rho": 0.2, "alpha": 0.4, "beta": 0.3, "lr": 0.1, "momentum": 0.9}
    reference = ReferenceCRSAM([{"params": [p.detach().cpu() for p in params]}], **options)
    optimizer = CRSAM(params, **options, **backend_options)
    chain = [schedulers.ExponentialLR(Scheduled(optimizer, name), 0.5) for name in ("rho", "alpha", "beta")]
    closure, cpu_data = closure_of(lambda p: network_loss(p, data), params), tuple(x.cpu() for x in data)
    for _ in range(3):
        optimizer.step(closure)
        reference.step(evaluator(lambda p: network_loss(p, cpu_data)))
        assert_same(params, reference, EXACT)
        for scheduler in chain:
            scheduler.step()
        for name in ("rho", "alpha", "beta"):
            reference.options[0][name] /= 2


def test_tensors_are_changed_in_place():
    rho = torch.tensor(0.2)
    optimizer = CRSAM([Parameter(torch.ones(3))], lr=0.1, rho=rho)
    scheduler = schedulers.ExponentialLR(Scheduled(optimizer, "rho"), 0.5)
    scheduler.step()
    assert optimizer.param_groups[0]["rho"] is rho
    assert rho == pytest.approx(0.1)


def test_schedule_resumes():
    """The scheduler has its own state; the optimizer's state contains the current value."""
    optimizer = optimizer_with()
    scheduler = schedulers.LinearLR(Scheduled(optimizer, "rho"), total_iters=8)
    for _ in range(3):
        scheduler.step()
    resumed = optimizer_with()
    other = schedulers.LinearLR(Scheduled(resumed, "rho"), total_iters=8)
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(scheduler.state_dict())
    for _ in range(3):
        scheduler.step()
        other.step()
        assert [g["rho"] for g in optimizer.param_groups] == [g["rho"] for g in resumed.param_groups]


def test_an_added_group_is_scheduled():
    optimizer = optimizer_with()
    view = Scheduled(optimizer, "rho")
    optimizer.add_param_group({"params": [Parameter(torch.ones(1))]})
    assert [group["lr"] for group in view.param_groups] == [0.2, 0.4, 0.2]
    assert dict(view.param_groups[0]) == {"params": optimizer.param_groups[0]["params"], "lr": 0.2}


def test_mistakes_raise_clear_errors():
    optimizer = optimizer_with()
    with pytest.raises(ValueError, match=r"CRSAM has no option 'roh' to schedule; it has .*'rho'"):
        Scheduled(optimizer, "roh")
    with pytest.raises(RuntimeError, match="call step"):
        Scheduled(optimizer, "rho").step()
    # a schedule of rho must not cycle the momentum
    with pytest.raises(ValueError, match="momentum"):
        schedulers.OneCycleLR(Scheduled(optimizer, "rho"), max_lr=0.3, total_steps=8)


def optimizer_methods():
    """Return the public methods of torch's optimizers."""
    members = vars(torch.optim.Optimizer).items()
    return [name for name, member in members if not name.startswith("_") and inspect.isfunction(member)]


@pytest.mark.parametrize("name", optimizer_methods())
@pytest.mark.parametrize("scheduled", [False, True], ids=["alone", "with a scheduler"])
def test_the_view_is_not_an_optimizer(scheduled, name):
    view = Scheduled(optimizer_with(), "rho")
    if scheduled:
        schedulers.ExponentialLR(view, 0.9)
    with pytest.raises(RuntimeError, match=rf"call {name}\(\) of the optimizer itself"):
        getattr(view, name)({})


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"])
def test_copies_of_a_scheduler_use_the_copied_optimizer(way):
    """The copied view belongs to the copied optimizer."""
    optimizer = optimizer_with()
    scheduler = schedulers.ExponentialLR(Scheduled(optimizer, "rho"), 0.5)
    optimizer_copy, view = way((optimizer, scheduler.optimizer))
    schedulers.ExponentialLR(view, 0.5).step()
    assert [group["rho"] for group in optimizer_copy.param_groups] == [0.1, 0.2]
    assert [group["rho"] for group in optimizer.param_groups] == [0.2, 0.4]
    assert "rho" in repr(view)


def test_state_of_a_scheduler_can_be_saved():
    optimizer, other = optimizer_with(), optimizer_with()
    scheduler, resumed = (schedulers.StepLR(Scheduled(o, "rho"), 2) for o in (optimizer, other))
    for _ in range(3):
        scheduler.step()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for _ in range(3):
        scheduler.step()
        resumed.step()
        assert [g["rho"] for g in other.param_groups] == [g["rho"] for g in optimizer.param_groups]
