"""The learning rate, rho, alpha and beta of every step against closed forms."""

import math

import pytest
import torch

from crsam_ext.training.options import parse
from crsam_ext.training.schedules import Schedules
from crsam_ext.training.steps import create_optimizer

EPOCHS, STEPS = 6, 5  # steps per epoch
TOTAL = EPOCHS * STEPS


def scheduled(command, model=None):
    """Return the optimizer and the schedules of a command line."""
    options = parse(f"--epochs {EPOCHS} --lr 2 {command}".split())
    optimizer = create_optimizer(torch.nn.Linear(2, 2) if model is None else model, options)
    return optimizer, Schedules(optimizer, options, STEPS)


def values(command, name="lr"):
    optimizer, schedules = scheduled(command)
    seen = []
    for step in range(TOTAL):
        schedules.set(step)
        seen.append(optimizer.param_groups[0][name])
    return seen


def closed_form(kind, step, warmup=0, peak=2.0, minimum=0.0):
    if step < warmup:
        return peak * step / warmup
    part = (step - warmup) / (TOTAL - warmup)
    return {
        "cosine": minimum + (peak - minimum) * (1 + math.cos(math.pi * part)) / 2,
        "linear": minimum + (peak - minimum) * (1 - part),
        "step": peak * 0.1 ** (3 * step // TOTAL),
        "constant": peak,
    }[kind]


@pytest.mark.parametrize("kind", ["cosine", "linear", "step", "constant"])
@pytest.mark.parametrize(
    ("options", "warmup", "minimum"),
    [
        ("", 0, 0.0),
        ("--warmup-steps 7", 7, 0.0),
        ("--warmup-epochs 1.5", 8, 0.0),  # 7.5 steps, rounded to an even number
        ("--min-lr 0.5", 0, 0.5),
        ("--warmup-steps 4 --min-lr 0.5", 4, 0.5),
        (f"--warmup-steps {TOTAL - 1}", TOTAL - 1, 0.0),
    ],
)
def test_learning_rate_follows_its_formula(kind, options, warmup, minimum):
    expected = [closed_form(kind, step, warmup, minimum=minimum) for step in range(TOTAL)]

    assert values(f"--schedule {kind} {options}") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["rho", "alpha", "beta"])
@pytest.mark.parametrize("kind", ["cosine", "linear", "step", "constant"])
def test_other_options_have_no_warmup(name, kind):
    expected = [closed_form(kind, step, peak=0.3) for step in range(TOTAL)]

    assert values(f"--{name} 0.3 --{name}-schedule {kind} --warmup-steps 7", name) == pytest.approx(expected, rel=1e-12)


def test_rho_ends_at_min_rho():
    expected = [closed_form("linear", step, peak=0.3, minimum=0.1) for step in range(TOTAL)]

    assert values("--rho 0.3 --rho-schedule linear --min-rho 0.1", "rho") == pytest.approx(expected, rel=1e-12)


def test_rho_can_be_proportional_to_the_learning_rate():
    command = "--schedule linear --min-lr 0.5 --warmup-steps 8 --rho 0.6 --min-rho 0.1 --rho-schedule proportional"
    rho, lr = values(command, "rho"), values(command)

    assert rho == pytest.approx([min(max(0.1 + 0.5 * (x - 0.5) / 1.5, 0.1), 0.6) for x in lr], rel=1e-12)
    assert rho[:3] == [0.1, 0.1, 0.1]  # the rate is 0, 0.25, 0.5; rho stays within its bounds
    assert rho[8] == 0.6
    # Without min_lr, rho follows the rate during warm-up, too.
    rho = values("--schedule cosine --warmup-steps 4 --rho 0.6 --rho-schedule proportional", "rho")
    assert rho[:5] == pytest.approx([0, 0.15, 0.3, 0.45, 0.6])


def test_rho_stays_in_its_range_if_the_rate_is_below_min_lr():
    rho = values("--schedule step --min-lr 0.1 --rho 0.6 --min-rho 0.2 --rho-schedule proportional", "rho")

    assert rho[0] == 0.6
    assert rho[10] == pytest.approx(0.2 + 0.4 * 0.1 / 1.9)
    assert rho[20] == 0.2
    assert set(values("--schedule constant --min-lr 2 --rho 0.6 --rho-schedule proportional", "rho")) == {0.6}


def test_all_parameter_groups_are_scheduled():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    optimizer, schedules = scheduled("--decay-of matrices --rho-schedule proportional --alpha-schedule linear", model)
    schedules.set(12)

    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 1e-3]
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(closed_form("cosine", 12))
        assert group["rho"] == pytest.approx(0.1 * closed_form("cosine", 12) / 2)
        assert group["alpha"] == pytest.approx(closed_form("linear", 12, peak=0.1))


def test_the_values_depend_only_on_the_step_number():
    """This holds even after an optimizer state with the values of another step was loaded."""
    command = "--warmup-steps 4 --rho-schedule cosine --alpha-schedule step --beta-schedule linear"
    names = ("lr", "rho", "alpha", "beta")
    first, schedules = scheduled(command)
    schedules.set(17)
    state = first.state_dict()
    schedules.set(18)
    options = parse(f"--epochs {EPOCHS} --lr 2 {command}".split())
    second = create_optimizer(torch.nn.Linear(2, 2), options)
    second.load_state_dict(state)
    resumed = Schedules(second, options, STEPS)
    for step in (3, 29, 18):
        resumed.set(step)

    assert [second.param_groups[0][name] for name in names] == [first.param_groups[0][name] for name in names]
