"""Gradients at w + e and w - e computed together equal those of two passes, up to rounding."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from crsam_ext import CRSAM

from .reference import EXACT, assert_close

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "wrapped": (torch.optim.RMSprop, {"lr": 1e-3}),
}


# Adam divides a gradient by its own magnitude, so a gradient that is 0 except for rounding would give an arbitrary
# step. The models therefore have no biases before batch norm, which removes them, and none of keys, which do not
# change the softmax.


class TiedTransformer(nn.Module):
    """Self-attention over token embeddings, which are also the output weights."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, bias=False)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


def mlp(*layers, bias=True):
    return nn.Sequential(nn.Linear(20, 32, bias=bias), *layers, nn.ReLU(), nn.Linear(32, 5))


def convolutions():
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    body = (nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.ReLU())
    return nn.Sequential(*body, *head).to(memory_format=torch.channels_last)


def with_a_frozen_and_an_unused_layer():
    model = mlp()
    model[0].bias.requires_grad_(False)
    model.unused = nn.Linear(3, 3)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    return model


MODELS = {
    "mlp": (mlp, lambda: torch.randn(8, 20), 5),
    "batch_norm": (lambda: mlp(nn.BatchNorm1d(32), bias=False), lambda: torch.randn(8, 20), 5),
    "convolutions": (convolutions, lambda: torch.randn(4, 3, 12, 12), 5),
    "transformer": (TiedTransformer, lambda: torch.randint(50, (8, 7)), 50),
    "frozen": (with_a_frozen_and_an_unused_layer, lambda: torch.randn(8, 20), 5),
}


def pair(model, base="sgd", device="cpu", dtype=torch.float64, **options):
    """Return two equal models with their optimizers."""
    make, base_options = BASES[base]
    model = model.to(device, dtype)
    other = copy.deepcopy(model)
    if hasattr(model, "unused"):
        other.forward = lambda x: other[2](other[1](other[0](x)))
    optimizers = [CRSAM(m.parameters(), make, rho=0.1, model=m, **base_options, **options) for m in (model, other)]
    return model, other, *optimizers


def losses(model, x, y):
    """Return the loss of a batch, and a closure for two passes that also calls backward()."""

    def loss_of():
        return F.cross_entropy(model(x), y)

    def closure():
        loss = loss_of()
        loss.backward()
        return loss

    return loss_of, closure


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of attention on a CPU
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", MODELS)
def test_parallel_step_equals_two_passes(name, base, backend_options, device):
    make, data, classes = MODELS[name]
    model, other, optimizer, sequential = pair(make(), base, device, **backend_options)
    for _ in range(3):
        x, y = data().to(device), torch.randint(classes, (8,), device=device)
        x = x.double() if x.is_floating_point() else x
        y = y[: len(x)]
        loss = optimizer.step(losses(model, x, y)[0], parallel=model)
        assert_close(loss, sequential.step(losses(other, x, y)[1]), EXACT, "loss")
        for when in ("loss_ascent", "loss_descent"):
            assert_close(getattr(optimizer.stats, when), getattr(sequential.stats, when), EXACT, when)
    for (key, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert_close(value, expected, EXACT, key)
    for param, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert (param in optimizer.state) == (twin in sequential.state)
        assert param.stride() == twin.stride()


@pytest.mark.parametrize("options", [{"regularizer": "log", "estimator": "loss"}, {"max_grad_norm": 0.1},
                                     {"adaptive": True}, {"maximize": True}], ids=lambda o: next(iter(o)))  # fmt: skip
def test_options_have_the_same_effect(options):
    model, other, optimizer, sequential = pair(mlp(), **options)
    for _ in range(3):
        x, y = torch.randn(8, 20, dtype=torch.float64), torch.randint(5, (8,))
        optimizer.step(losses(model, x, y)[0], parallel=model)
        sequential.step(losses(other, x, y)[1])
    for param, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(param, twin, EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_give_the_same_bits(dtype):
    """Both points are the perturbed master, rounded, so that they equal those of two passes bit for bit."""
    model, other, optimizer, sequential = pair(mlp(), dtype=dtype)
    expected, points, weight = [], [], model[0].weight
    x, y = torch.randn(8, 20, dtype=dtype), torch.randint(5, (8,))
    other.register_forward_pre_hook(lambda *_: expected.append(other[0].weight.detach().clone()))
    sequential.step(losses(other, x, y)[1])

    def loss_of():
        if optimizer.pass_index > 0:
            (bucket,) = optimizer._flat.buckets
            points.extend(bucket.stacked(s).clone() for s in bucket.slots if s.param is weight)
        return losses(model, x, y)[0]()

    optimizer.step(loss_of, parallel=model)
    assert torch.equal(points[0], torch.stack(expected[1:]))


def test_both_kinds_of_steps_may_alternate():
    """State is moved when memory for two points is first needed; with fewer passes nothing is parallel."""
    model, other, optimizer, sequential = pair(mlp(), curvature_interval=2)
    for index in range(6):
        x, y = torch.randn(8, 20, dtype=torch.float64), torch.randint(5, (8,))
        loss_of, closure = losses(model, x, y)
        optimizer.step(loss_of, parallel=model) if index in (2, 3) else optimizer.step(closure)
        sequential.step(losses(other, x, y)[1])
    for param, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(param, twin, EXACT)
        assert_close(optimizer.state[param]["momentum_buffer"], sequential.state[twin]["momentum_buffer"], EXACT)


def test_an_error_restores_w():
    model, _, optimizer, _ = pair(mlp())
    x, y = torch.randn(8, 20, dtype=torch.float64), torch.randint(5, (8,))
    before = [p.detach().clone() for p in model.parameters()]
    calls = 0

    def loss_of():
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return losses(model, x, y)[0]()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(loss_of, parallel=model)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    optimizer.step(losses(model, x, y)[0], parallel=model)


def test_a_nan_skips_the_step():
    model, _, optimizer, _ = pair(mlp())
    x, y = torch.full((8, 20), torch.nan, dtype=torch.float64), torch.randint(5, (8,))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(losses(model, x, y)[0], parallel=model)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert optimizer.stats.skipped == 1


def test_schedulers_and_hooks_see_the_step():
    model, _, optimizer, _ = pair(mlp())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    hooked = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(1))
    x, y = torch.randn(8, 20, dtype=torch.float64), torch.randint(5, (8,))
    optimizer.step(losses(model, x, y)[0], parallel=model)
    scheduler.step()  # warns, and thereby fails, if it has seen no step
    assert hooked == [1]


def test_invalid_arguments_are_refused():
    model, other, optimizer, _ = pair(mlp(nn.Dropout(0.5)))
    x, y = torch.randn(8, 20, dtype=torch.float64), torch.randint(5, (8,))
    loss_of, closure = losses(model, x, y)
    before = [p.detach().clone() for p in model.parameters()]
    for error, match, given, module in (
        (RuntimeError, "draws random numbers", loss_of, model),
        (TypeError, "leave backward", lambda: closure().item(), model),
        (TypeError, "takes one closure", [loss_of], model),
        (TypeError, "takes the model", loss_of, model.parameters()),
    ):
        with pytest.raises(error, match=match):
            optimizer.step(given, parallel=module)
    model.eval()
    with pytest.raises(ValueError, match=r"shape \(32, 20\) does not belong to the model"):
        optimizer.step(loss_of, parallel=other)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


def test_random_numbers_are_the_same_at_both_points():
    """With replay_rng off, random numbers are not refused."""
    model, _, optimizer, _ = pair(mlp(), replay_rng=False)
    x = torch.randn(8, 20, dtype=torch.float64)
    optimizer.step(lambda: 0 * model(x).sum() + torch.rand((), dtype=torch.float64), parallel=model)
    assert optimizer.stats.loss_ascent == optimizer.stats.loss_descent != optimizer.stats.loss
