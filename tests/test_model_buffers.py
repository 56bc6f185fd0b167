"""``model=``: changes of the model's buffers in the first forward persist, and every pass starts with the same
buffers."""

import pytest
import torch
from torch import nn

from crsam_ext import CRSAM

pytestmark = pytest.mark.on_cpu


class Counting(nn.Module):
    """Changes a buffer in one of the ways that forwards use, and multiplies the input by it."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        shape = () if how != "resized" else (0,)
        self.register_buffer("moving", None if how == "set" else torch.zeros(shape), persistent=how != "transient")
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_buffer("empty", torch.zeros(0))
        self.seen = []

    def forward(self, x):
        with torch.no_grad():
            if self.how == "replaced":
                self.moving = self.moving + 1
            elif self.how == "set":
                self.moving = torch.ones(()) if self.moving is None else self.moving + 1
            elif self.how == "resized":
                self.moving.resize_(1).fill_(1.0 + self.moving.numel())
            elif self.how == "by data":
                self.moving.data.add_(1)
            else:
                self.moving.add_(1)
        self.seen.append(self.moving.sum().item())
        return x * self.moving * self.expanded


def model_of(how):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), Counting(how))


def run(model, optimizer, form):
    def backward():
        model(torch.ones(2, 3)).square().sum().backward()

    if form == "closure":
        optimizer.step(backward)
    else:
        for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step)[: optimizer.passes]:
            backward()
            call(zero_grad=True)


ways = pytest.mark.parametrize("how", ["in place", "replaced", "set", "by data", "transient"])


@ways
@pytest.mark.parametrize("weights", [{}, {"alpha": 0, "beta": 0}], ids=["three", "two"])
def test_all_passes_start_with_the_same_buffers(weights, how, backend_options, device):
    model = model_of(how).to(device)
    optimizer = CRSAM(model.parameters(), lr=0.1, model=model, **weights, **backend_options)
    passes = optimizer.passes
    for step in range(1, 4):
        run(model, optimizer, "closure")
        assert model[1].seen[-passes:] == [step] * passes
        assert model[1].moving == step
    assert "1.moving" in dict(model.named_buffers())


@ways
def test_with_calls_later_passes_start_from_the_buffers_of_the_first(how, backend_options, device):
    model = model_of(how).to(device)
    optimizer = CRSAM(model.parameters(), lr=0.1, model=model, **backend_options)
    for step in range(1, 4):
        run(model, optimizer, "calls")
        assert model[1].seen[-3:] == [step, step + 1, step + 1]
        assert model[1].moving == step


@pytest.mark.parametrize("form", ["closure", "calls"])
def test_resized_buffers_are_followed(form, backend_options, device):
    model = model_of("resized").to(device)
    optimizer = CRSAM(model.parameters(), lr=0.1, model=model, **backend_options)
    for _ in range(2):
        run(model, optimizer, form)
        assert model[1].moving.tolist() == [2.0]


@ways
def test_without_the_model_every_pass_changes_the_buffers(how, backend_options, device):
    """Without this, the tests above could pass because no pass changes a buffer."""
    model = model_of(how).to(device)
    optimizer = CRSAM(model.parameters(), lr=0.1, **backend_options)
    run(model, optimizer, "closure")
    assert model[1].seen == [1, 2, 3]


@ways
@pytest.mark.parametrize("when", [1, 2, 3])
def test_an_error_keeps_the_buffers_of_the_first_pass(when, how, backend_options, device):
    """The next step starts from these buffers."""
    model = model_of(how).to(device)
    optimizer = CRSAM(model.parameters(), lr=0.1, model=model, **backend_options)

    def closure():
        model(torch.ones(2, 3, device=device)).square().sum().backward()
        if len(model[1].seen) == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert model[1].moving == 1
    run(model, optimizer, "calls")
    assert model[1].seen[-3:] == [2, 3, 3]


def test_layers_may_be_added_and_replaced(backend_options, device):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).to(device)
    optimizer = CRSAM(model.parameters(), lr=0.1, model=model, **backend_options)
    x = torch.randn(16, 4, device=device)
    closure = lambda: model(x).square().mean().backward()  # noqa: E731
    optimizer.step(closure)
    model.append(nn.BatchNorm1d(8).to(device))
    optimizer.add_param_group({"params": model[2].parameters()})
    optimizer.step(closure)
    assert [int(layer.num_batches_tracked) for layer in model[1:]] == [2, 1]
    del optimizer.param_groups[1]
    model[2] = nn.BatchNorm1d(8).to(device)
    optimizer.step(closure)
    assert [int(layer.num_batches_tracked) for layer in model[1:]] == [3, 1]


def test_lazy_layers_are_followed(backend_options, device):
    model = nn.Sequential(nn.Linear(4, 8), nn.LazyBatchNorm1d()).to(device)
    optimizer = CRSAM(model[0].parameters(), lr=0.1, model=model, **backend_options)
    closure = lambda: model(torch.randn(16, 4, device=device)).square().mean().backward()  # noqa: E731
    for step in (1, 2):
        optimizer.step(closure)
        assert model[1].num_batches_tracked == step


@pytest.mark.parametrize("layer", ["spectral norm", "fake quantization"])
def test_layers_of_torch_follow_the_first_pass(layer, backend_options, device):
    """With a small rho, all passes have nearly the same loss; without model=, these layers change in every forward."""
    linear = nn.Linear(4, 16)
    if layer == "spectral norm":
        middle = [nn.utils.parametrizations.spectral_norm(linear, n_power_iterations=1)]
    else:
        quantization = torch.ao.quantization
        observer = quantization.MovingAverageMinMaxObserver
        middle = [linear, quantization.FakeQuantize(observer, quant_min=0, quant_max=255, averaging_constant=0.5)]
    model = nn.Sequential(*middle, nn.Linear(16, 3)).to(device)
    x = torch.randn(32, 4, device=device)
    model(3 * x)

    def losses(**options):
        if layer == "spectral norm":  # replace the singular vector that it has found
            for vector in model[0].buffers():
                vector.copy_(nn.functional.normalize(torch.randn_like(vector), dim=0))
        optimizer, seen = CRSAM(model.parameters(), lr=0.0, rho=1e-6, **options, **backend_options), []

        def closure():
            loss = model(x).square().sum()
            loss.backward()
            seen.append(loss.item())

        optimizer.step(closure)
        return max(seen) / min(seen) - 1

    assert losses(model=model) < 1e-4
    assert losses() > 1e-3
