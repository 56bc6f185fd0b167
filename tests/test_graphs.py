"""The host part of GraphedStep, with a stand-in for the graph; tests/gpu/test_graphs.py captures real graphs."""

import pytest
import torch

from crsam_ext import CRSAM, GraphedStep, graphs
from crsam_ext.reuse import SharpnessDirection

from .reference import EXACT, assert_close, batch, closure_of, network_loss, network_params


class StandIn:
    """Stand-in for a graph: each replay makes a step on the device and in the counters, as a real graph does."""

    captured = 0

    def __init__(self, optimizer, closure, baked, *_):
        self.optimizer, self.closure, self.baked = optimizer, closure, baked
        self.passes = optimizer.passes
        StandIn.captured += 1

    def replay(self):
        assert self.optimizer.passes == self.passes
        self.loss = self.optimizer.step(self.closure)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(StandIn, "captured", 0)
    monkeypatch.setattr(graphs, "_Graph", StandIn)
    monkeypatch.setattr(CRSAM, "capture_blocker", lambda self: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(GraphedStep, "_on_stream", lambda self, function: function())
    return StandIn


def problem(**options):
    torch.manual_seed(0)
    params, data = network_params(torch.float64), batch(torch.float64)
    optimizer = CRSAM(params, torch.optim.SGD, **{"lr": 0.1, "momentum": 0.9, "rho": 0.2, **options})
    return params, optimizer, closure_of(lambda p: network_loss(p, data), params)


def test_each_call_is_a_step_and_each_number_of_passes_a_graph(stand_in):
    """Each call makes one step, and each number of passes has its own graph."""
    params, optimizer, closure = problem(curvature_interval=2)
    others, plain, closure_of_others = problem(curvature_interval=2)
    step = GraphedStep(optimizer, closure, warmup=2)
    for index in range(8):
        assert step() == plain.step(closure_of_others)
        assert stand_in.captured == (0, 0, 0, 0, 1, 2, 2, 2)[index]
    assert optimizer.stats.steps == 8
    for p, q in zip(params, others, strict=True):
        assert_close(p, q, EXACT)


def test_reuse_counts_the_age_of_the_direction(stand_in):
    """The age of the direction changes with each replay."""
    options = {"interval": 3, "reuse": True}
    params, optimizer, closure = problem(**options)
    others, plain, closure_of_others = problem(**options)
    step = GraphedStep(optimizer, closure, warmup=1)
    for index in range(10):
        step()
        plain.step(closure_of_others)
        assert float(optimizer._direction._replayed) == 0.9 ** (index % 3)
    assert stand_in.captured == 2
    for p, q in zip(params, others, strict=True):
        assert_close(p, q, EXACT)


def test_graph_reads_its_inputs_from_one_tensor(monkeypatch):
    """The tensor is written before each replay, but not in a captured step."""
    direction, cpu = SharpnessDirection(), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    direction.prepare_replay(2, cpu)
    direction.begin_step(1)
    read = direction._decay(torch.device("cuda"))
    assert float(read) == 0.9**2
    direction.prepare_replay(1, cpu)
    assert float(read) == 0.9
    assert direction._decay(torch.device("cuda")) is read


def assigning(optimizer, epoch):
    """Assign a learning rate, as timm's schedulers do."""
    optimizer.param_groups[0]["lr"] = 0.1 / (epoch + 2)


def test_schedulers_take_effect_without_another_capture(stand_in):
    """This holds for schedulers that change a tensor in place and for those that assign a number."""
    params, optimizer, closure = problem(alpha=0.0)
    others, plain, closure_of_others = problem(alpha=0.0)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, plain)]
    step = GraphedStep(optimizer, closure, warmup=1)
    for index in range(8):
        step()
        plain.step(closure_of_others)
        for o, scheduler in zip((optimizer, plain), schedulers, strict=True):
            assigning(o, index) if index > 4 else scheduler.step()
    group = optimizer.param_groups[0]
    assert all(isinstance(group[name], torch.Tensor) for name in ("rho", "beta"))
    assert group["alpha"] == 0.0  # a number, because it determines the number of passes
    assert stand_in.captured == 1
    for p, q in zip(params, others, strict=True):
        assert_close(p, q, EXACT)


def test_other_options_are_captured_again(stand_in):
    params, optimizer, closure = problem()
    others, plain, closure_of_others = problem()
    step = GraphedStep(optimizer, closure, warmup=1)
    for index, momentum in enumerate((0.9, 0.9, 0.9, 0.8, 0.8)):
        optimizer.param_groups[0]["momentum"] = plain.param_groups[0]["momentum"] = momentum
        step()
        plain.step(closure_of_others)
        assert stand_in.captured == (0, 1, 1, 1, 2)[index], "an eager step with the new options comes first"
    for p, q in zip(params, others, strict=True):
        assert_close(p, q, EXACT)


def test_an_option_that_becomes_nonzero_is_captured_again(stand_in):
    """A graph contains the constant 0 of one group, and tensors for the others."""
    torch.manual_seed(0)
    params = network_params(torch.float64)
    data = batch(torch.float64)
    groups = [{"params": params[:2], "alpha": 0.0}, {"params": params[2:]}]
    optimizer = CRSAM(groups, torch.optim.SGD, lr=0.1, rho=0.2)
    step = GraphedStep(optimizer, closure_of(lambda p: network_loss(p, data), params), warmup=1)
    captured = []
    for alpha in (0.0, 0.0, 0.0, 0.3, 0.3, 0.0, 0.2):
        optimizer.param_groups[0]["alpha"] = alpha
        step()
        captured.append(stand_in.captured)
    assert captured == [0, 1, 1, 1, 2, 2, 2]  # now a tensor, also if it is 0


@pytest.mark.parametrize("event", ["moved", "loaded"])
def test_first_step_after_an_event_is_eager(event, stand_in):
    params, optimizer, closure = problem()
    step = GraphedStep(optimizer, closure, warmup=1)
    for _ in range(3):
        step()
    if event == "moved":
        params[0].data = params[0].data.clone()
    else:
        optimizer.load_state_dict(optimizer.state_dict())
    assert stand_in.captured == 1
    step()
    assert stand_in.captured == 1
    step()
    assert stand_in.captured == 2


def test_steps_that_cannot_be_captured_are_refused():
    _, optimizer, closure = problem()
    with pytest.raises(ValueError, match=r"cannot be captured in a CUDA graph: .* not on one CUDA device"):
        GraphedStep(optimizer, closure)


def test_warmup_must_be_at_least_1(stand_in):
    _, optimizer, closure = problem()
    with pytest.raises(ValueError, match="warmup must be at least 1"):
        GraphedStep(optimizer, closure, warmup=0)
