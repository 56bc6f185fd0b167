"""Curvature covers all parameters and weights batches as the loss does, or raises an error; the model is restored."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from crsam_ext import curvature

from .test_curvature import ALL

pytestmark = pytest.mark.slow

SECOND = [m for m in ALL if m not in (curvature.gradient_norm, curvature.ascent_gap)]
CRITERION = nn.CrossEntropyLoss()


def data(sizes=(7, 3), classes=3):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, dtype=torch.float64, generator=generator), torch.randint(classes, (n,), generator=generator))
        for n in sizes
    ]


def value_of(measured):
    return measured.values[0] if isinstance(measured, curvature.Eigenvalues) else getattr(measured, "value", None)


# Parts of the model --------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, which, use_reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)]).double()
        self.which, self.use_reentrant = which, use_reentrant

    def forward(self, x):
        x = x.detach().requires_grad_()
        for index, layer in enumerate(self.layers):
            wrapped = self.which in ("all", index)
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant) if wrapped else layer(x)
        if self.which == "nested":
            return checkpoint(lambda y: checkpoint(torch.tanh, y, use_reentrant=self.use_reentrant), x,
                              use_reentrant=self.use_reentrant)  # fmt: skip
        return x


@pytest.mark.parametrize("which", ["all", 0, 2, 3, 4, "nested"])
@pytest.mark.parametrize("measure", ALL)
def test_reentrant_checkpoints_are_refused(measure, which):
    with pytest.raises(ValueError, match="use_reentrant=False") as raised:
        measure(Checkpointed(which, True), CRITERION, data())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("which", ["all", 0, 2, 4, "nested"])
@pytest.mark.parametrize("measure", SECOND)
def test_other_checkpoints_change_nothing(measure, which):
    found = value_of(measure(Checkpointed(which, False), CRITERION, data()))
    if which != "nested":
        assert found == pytest.approx(value_of(measure(Checkpointed(None, False), CRITERION, data())), rel=1e-9)
    assert found != 0


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class OnceSquare(Square):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class InheritsIt(OnceSquare):
    pass


class Squaring(nn.Module):
    def __init__(self, square, at=1):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 3)]).double()
        self.square, self.at = square, at

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = self.square(x) if index == self.at else x
            x = layer(x)
        return self.square(x) if self.at == 2 else x


@pytest.mark.parametrize("function", [OnceSquare, InheritsIt])
@pytest.mark.parametrize("measure", SECOND)
@pytest.mark.parametrize("at", [1, 2])
def test_functions_without_a_second_derivative_are_refused(at, measure, function):
    with pytest.raises(ValueError, match=f"the backward of {function.__name__} is marked once_differentiable"):
        measure(Squaring(function.apply, at), CRITERION, data())


@pytest.mark.parametrize("measure", SECOND)
def test_other_user_functions_are_accepted(measure):
    expected = value_of(measure(Squaring(lambda x: x**2), CRITERION, data()))
    assert value_of(measure(Squaring(Square.apply), CRITERION, data())) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("estimator", ["gradient", "loss"])
def test_estimators_that_need_first_derivatives_accept_these_functions(estimator):
    found, expected = (
        curvature.hessian_trace(Squaring(square), CRITERION, data(), estimator=estimator, rho=1e-2, probes=4).value
        for square in (OnceSquare.apply, lambda x: x**2)
    )
    assert found == pytest.approx(expected, rel=1e-6)


def test_functions_that_do_not_depend_on_the_parameters_are_accepted():
    """Functions of the data or of a frozen part need no second derivative."""
    expected = curvature.hessian_trace(Squaring(lambda x: x**2, at=0), CRITERION, data(), probes=2).value
    assert curvature.hessian_trace(Squaring(OnceSquare.apply, at=0), CRITERION, data(), probes=2).value == expected


def test_unused_parameters_count_as_zero():
    model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]).double()
    model.forward = lambda x: model[0](x)
    alone = curvature.hessian_trace(model[0], CRITERION, data(), estimator="exact").value
    assert curvature.hessian_trace(model, CRITERION, data(), estimator="exact").value == pytest.approx(alone, rel=1e-12)


# Weights of the batches ----------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Logits for several positions, classes in dimension 1."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x):
        return self.layer(x).movedim(-1, 1)


CLASS_WEIGHTS = torch.tensor([0.2, 1.5, 3.0], dtype=torch.float64)
LOSSES = {
    "plain": {},
    "class weights": {"weight": CLASS_WEIGHTS},
    "ignore_index": {"ignore_index": 2},
    "ignored and weighted": {"weight": CLASS_WEIGHTS, "ignore_index": 1},
    "smoothed": {"weight": CLASS_WEIGHTS, "label_smoothing": 0.1},
    "a class without weight": {"weight": CLASS_WEIGHTS * torch.tensor([1.0, 0.0, 1.0])},
}


def token_data(positions):
    """Return unequal batches; all targets of one batch are 2."""
    torch.manual_seed(1)
    shape = (5,) if positions else ()
    loader = [(torch.randn(n, *shape, 4, dtype=torch.float64), torch.randint(3, (n, *shape))) for n in (6, 2, 3)]
    loader.append((torch.randn(2, *shape, 4, dtype=torch.float64), torch.full((2, *shape), 2)))
    return loader


@pytest.mark.parametrize("positions", [False, True], ids=["samples", "tokens"])
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_batches_are_weighted_as_in_the_loss_over_all_samples(options, positions):
    model, loss_fn = Tokens(), nn.CrossEntropyLoss(**options)
    loader = token_data(positions)
    whole = [tuple(torch.cat(parts) for parts in zip(*loader, strict=True))]
    for measure in ALL:
        options = {"estimator": "exact"} if measure is curvature.hessian_trace else {}
        found, expected = (measure(model, loss_fn, batches, **options) for batches in (loader, whole))
        if measure is curvature.ascent_gap:
            assert found.loss == pytest.approx(expected.loss, rel=1e-10)
            assert found.one_step == pytest.approx(expected.one_step, rel=1e-8)
        else:
            assert value_of(found) == pytest.approx(value_of(expected), rel=1e-6)
        assert found.samples == expected.samples


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_log_likelihoods_are_weighted_as_in_the_loss_over_all_samples(options):
    options = {k: v for k, v in options.items() if k != "label_smoothing"}
    model, loader = nn.Sequential(Tokens(), nn.LogSoftmax(1)), token_data(True)
    whole = [tuple(torch.cat(parts) for parts in zip(*loader, strict=True))]
    found, expected = (curvature.gradient_norm(model, nn.NLLLoss(**options), x).value for x in (loader, whole))
    assert found == pytest.approx(expected, rel=1e-10)


def test_batches_with_probabilities_are_weighted_by_samples():
    """The mean is over samples, whatever the class weights."""
    model, loss_fn = Tokens(), nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)
    loader = [(x, F.one_hot(y, 3).double() * 0.9 + 0.1 / 3) for x, y in token_data(False)]
    whole = [tuple(torch.cat(parts) for parts in zip(*loader, strict=True))]
    found, expected = (curvature.gradient_norm(model, loss_fn, x).value for x in (loader, whole))
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("options", [{"ignore_index": 2}, {"weight": torch.tensor([1.0, 1.0, 0.0])}])
def test_loader_without_counted_targets_is_refused(options):
    batch = torch.randn(2, 4), torch.full((2,), 2)
    with pytest.raises(ValueError, match="ignores all targets of the loader"):
        curvature.gradient_norm(Tokens().float(), nn.CrossEntropyLoss(**options), [batch])


# Loaders -------------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(x, y) for batch in data() for x, y in zip(*batch, strict=True)])


@pytest.mark.parametrize("progress", [False, True])
def test_loader_without_a_length_is_accepted(progress):
    model = nn.Linear(4, 3).double()
    found = curvature.gradient_norm(model, CRITERION, DataLoader(Stream(), batch_size=4), progress=progress)
    assert found.value == pytest.approx(curvature.gradient_norm(model, CRITERION, data()).value, rel=1e-10)


def test_user_defined_iterable_is_accepted():
    class Loader:
        def __iter__(self):
            return iter(data())

    model = nn.Linear(4, 3).double()
    assert curvature.gradient_norm(model, CRITERION, Loader()) == curvature.gradient_norm(model, CRITERION, data())


# Models that change --------------------------------------------------------------------------------------------------


class Changing(nn.Linear):
    """Changes its buffers in every way, and draws from every global generator."""

    def __init__(self):
        super().__init__(4, 3, dtype=torch.float64)
        self.register_buffer("mask", torch.ones(1, 3, dtype=torch.float64).expand(16, 3))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("moved", torch.zeros(2))
        self.register_buffer("none", None)
        self.register_buffer("gone", torch.ones(1))
        self.register_buffer("transient", torch.zeros(1), persistent=False)
        self.register_buffer("part", torch.zeros(4)[1:3])
        self.fails_at = math.inf

    def forward(self, x):
        self.replaced = self.replaced + 1
        for buffer in (self.moved, self.transient, self.part):
            buffer.add_(1)
        self.moved.data.add_(1)
        self.none = torch.ones(()) if self.none is None else self.none + 1
        if "gone" in self._buffers:
            del self.gone
        if "added" not in self._buffers:
            self.register_buffer("added", torch.ones(()))
        self.fails_at -= 1
        if self.fails_at == 0:
            raise KeyboardInterrupt
        noise = torch.rand(()) + random.random() + np.random.rand()
        return super().forward(x) * self.mask[: len(x)] * (1 + 0.01 * noise)


def state_of(model):
    buffers = {name: (buffer, None if buffer is None else buffer.clone()) for name, buffer in model._buffers.items()}
    return buffers, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("fails_at", [math.inf, 1, 2])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("measure", ALL)
def test_the_model_is_restored(measure, training, fails_at):
    model = Changing()
    model.fails_at = fails_at
    before = state_of(model)
    if fails_at < math.inf:
        with pytest.raises(KeyboardInterrupt):
            measure(model, CRITERION, data(), training=training)
    else:
        measure(model, CRITERION, data(), training=training)
    after = state_of(model)
    assert after[0].keys() == before[0].keys()
    for name, (buffer, values) in before[0].items():
        assert model._buffers[name] is buffer, name
        assert buffer is None or torch.equal(buffer, values), name
    assert torch.equal(after[1], before[1])
    assert after[2:] == before[2:]


@pytest.mark.parametrize("measure", ALL)
def test_noise_is_the_same_in_every_call(measure):
    """Otherwise differences of losses and gradients would measure the noise."""
    first, second = (measure(Seeded(), CRITERION, data()) for _ in range(2))
    assert first == second


class Seeded(Changing):
    def __init__(self):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        super().__init__()


@pytest.mark.parametrize("how", ["model", "in place", "a part", "a function"])
@pytest.mark.parametrize("before", [False, True], ids=["fresh", "compiled already"])
def test_compiled_models_are_accepted(before, how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    expected = curvature.hessian_trace(model, CRITERION, data(), estimator="exact").value
    compiled = model
    if how == "model":
        compiled = torch.compile(model, backend="aot_eager")
    elif how == "in place":
        model.compile(backend="aot_eager")
    elif how == "a part":
        model[1] = torch.compile(model[1], backend="aot_eager")
    else:
        model[1].forward = torch.compile(torch.tanh, backend="aot_eager")
    if before:
        compiled(data()[0][0]).sum().backward()
    assert curvature.hessian_trace(compiled, CRITERION, data(), estimator="exact").value == pytest.approx(
        expected, rel=1e-9
    )
