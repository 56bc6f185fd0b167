"""User actions on an optimizer, in any order, against the float64 reference."""

import copy
import io
import math

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.optim.lr_scheduler import ExponentialLR

from crsam_ext import CRSAM

from .reference import Reference, assert_same, evaluator

pytestmark = pytest.mark.slow

CONFIGURATIONS = {
    "sgd-linear": (torch.optim.SGD, "sgd", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "rho": 0.3}),
    "sgd-dampened-sam": (
        torch.optim.SGD, "sgd", {"lr": 0.05, "momentum": 0.9, "dampening": 0.4, "alpha": 0.0, "beta": 0.0, "rho": 0.3},
    ),
    "sgd-log": (torch.optim.SGD, "sgd", {"lr": 0.05, "momentum": 0.9, "regularizer": "log", "rho": 0.3}),
    "adamw-linear": (torch.optim.AdamW, "adamw", {"lr": 0.02, "weight_decay": 0.1, "rho": 0.3, "max_grad_norm": 1.0}),
    "adamw-log": (torch.optim.AdamW, "adamw", {"lr": 0.02, "regularizer": "log", "rho": 0.3}),
}  # fmt: skip
OURS = ("rho", "alpha", "beta", "regularizer", "max_grad_norm")
# There are dozens of steps, each of which may amplify earlier rounding errors.
TOLERANCE = 1e-9
SHAPES = [(3,), (2, 3), (), (4,)]
LATER = [(2,), (3, 1)]


class Broken(Exception):
    pass


def loss_of(params):
    """Return a loss that couples all parameters, convex enough that rounding never drops a term of the log
    regularizer."""
    total = sum(p.sum() for p in params)
    return sum((i + 1) * p.square().sum() + p.cos().sum() for i, p in enumerate(params)) + 0.1 * total.sin()


class Training(RuleBasedStateMachine):
    configuration = ""

    @initialize(seed=st.integers(0, 9))
    def begin(self, seed):
        torch.manual_seed(seed)
        self.cls, name, self.options = CONFIGURATIONS[self.configuration]
        self.params = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in SHAPES]
        self.groups = [{"params": list(self.params)}]
        self.optimizer = self.make(self.groups)
        self.scheduler = ExponentialLR(self.optimizer, 0.9)
        self.expected = Reference([{"params": self.params}], name, **self.options)
        self.skipped = 0
        self.done = 0  # number of calls that the step in progress has made

    def make(self, groups):
        own = {k: v for k, v in self.options.items() if k in OURS}
        base = {k: v for k, v in self.options.items() if k not in OURS}
        return CRSAM([dict(g) for g in groups], self.cls, **own, **base)

    def active(self, params):
        """Return a loss that omits frozen parameters."""
        return loss_of([p for p, q in zip(params, self.params, strict=True) if q.requires_grad])

    def backward(self, spoil=False):
        self.optimizer.zero_grad()
        loss = self.active(self.params)
        loss.backward()
        if spoil:
            next(p for p in self.params if p.grad is not None).grad.view(-1)[0] = math.nan
        return loss

    def expect_step(self):
        self.expected.step(evaluator(self.active))

    between = precondition(lambda self: self.done == 0)

    # Steps

    @between
    @rule()
    def step(self):
        self.optimizer.step(self.backward)
        self.expect_step()

    @between
    @rule(failing=st.integers(0, 2))
    def exception_in_a_pass(self, failing):
        calls = iter(range(3))

        def closure():
            loss = self.backward()
            if next(calls) == failing % self.optimizer.passes:
                raise Broken
            return loss

        with pytest.raises(Broken):
            self.optimizer.step(closure)

    @between
    @rule(bad=st.integers(0, 2))
    def bad_gradient_in_a_pass(self, bad):
        calls = iter(range(3))
        self.optimizer.step(lambda: self.backward(spoil=next(calls) == bad % self.optimizer.passes))
        self.skipped += 1

    @rule()
    def next_call(self):
        loss = self.backward()
        calls = (self.optimizer.first_step, self.optimizer.second_step, self.optimizer.third_step)[
            : self.optimizer.passes
        ]
        calls[self.done](loss=loss)
        self.done = (self.done + 1) % len(calls)
        if self.done == 0:
            self.expect_step()

    @rule()
    def restore(self):
        self.optimizer.restore()
        self.done = 0

    # Between steps

    @between
    @rule(through_torch=st.booleans())
    def save_and_load(self, through_torch):
        """Load into new parameters and a new optimizer, optionally through torch's own optimizer, which has the same
        state."""
        file = io.BytesIO()
        torch.save((self.optimizer.state_dict(), self.scheduler.state_dict(), [p.detach() for p in self.params]), file)
        file.seek(0)
        state, scheduler, values = torch.load(file, weights_only=True)
        frozen = [not p.requires_grad for p in self.params]
        self.params = [torch.nn.Parameter(v.clone(), requires_grad=not f) for v, f in zip(values, frozen, strict=True)]
        found = iter(self.params)
        self.groups = [{"params": [next(found) for _ in g["params"]]} for g in self.groups]
        own = [{k: g[k] for k in ("rho", "alpha", "beta", "adaptive")} for g in state["param_groups"]]
        if through_torch:
            base = {k: v for k, v in self.options.items() if k not in OURS}
            theirs = self.cls([dict(g) for g in self.groups], **base)
            theirs.load_state_dict(state)
            state = theirs.state_dict()
            for group, values in zip(state["param_groups"], own, strict=True):
                assert values.items() <= group.items()
        self.optimizer = self.make(self.groups)
        self.scheduler = ExponentialLR(self.optimizer, 0.9)
        self.optimizer.load_state_dict(state)
        self.scheduler.load_state_dict(scheduler)
        self.skipped = 0

    @between
    @rule()
    def deep_copy(self):
        self.params, self.optimizer, self.groups = copy.deepcopy((self.params, self.optimizer, self.groups))
        scheduler = self.scheduler.state_dict()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scheduler = ExponentialLR(self.optimizer, 0.9)
        self.scheduler.load_state_dict(scheduler)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    @between
    @precondition(lambda self: len(self.groups) < 1 + len(LATER))
    @rule(rho=st.sampled_from([0.1, 0.5]))
    def add_param_group(self, rho):
        param = torch.nn.Parameter(torch.randn(LATER[len(self.groups) - 1], dtype=torch.float64))
        rate = 0.03
        self.params.append(param)
        self.groups.append({"params": [param]})
        self.optimizer.add_param_group({"params": [param], "rho": rho, "lr": rate})
        self.expected.add_group({"params": [param], "rho": rho, "lr": rate})

    @between
    @rule()
    def scheduler_step(self):
        self.scheduler.step()
        for options in {id(o): o for o in self.expected.options}.values():
            options["lr"] *= 0.9

    @between
    @rule(index=st.integers(0, 5), change=st.booleans())
    def re_point(self, index, change):
        i = index % len(self.params)
        self.params[i].data = self.params[i].data * (0.9 if change else 1.0)
        self.expected.w[i] = self.expected.w[i] * (0.9 if change else 1.0)

    @between
    @rule(index=st.integers(0, 5))
    def edit_in_place(self, index):
        i = index % len(self.params)
        self.params[i].data.add_(0.1)
        self.expected.w[i] = self.expected.w[i] + 0.1

    @between
    @rule(index=st.integers(1, 5))
    def freeze_or_thaw(self, index):
        param = self.params[index % len(self.params)]
        if param is not self.params[0]:  # one must remain
            param.requires_grad_(not param.requires_grad)
            param.grad = None

    # Invariants

    @invariant()
    def parameters_are_w(self):
        if self.done == 0:
            assert_same(self.params, self.expected, TOLERANCE)

    @invariant()
    def state_is_the_references(self):
        assert int(self.optimizer.stats.skipped) == self.skipped
        for i, param in enumerate(self.params):
            for name, value in self.optimizer.state.get(param, {}).items():
                expected = self.expected.state[i][name]
                expected = torch.as_tensor(0.0 if expected is None else expected, dtype=torch.float64)  # no step so far
                assert torch.allclose(value.double(), expected, rtol=TOLERANCE, atol=TOLERANCE), (name, i)


Training.TestCase = None  # replaced by one test per configuration


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # any order is allowed here
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_training_matches_the_reference(configuration):
    machine = type(configuration, (Training,), {"configuration": configuration})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=30))
