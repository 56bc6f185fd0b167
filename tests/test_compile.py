"""torch.compile of the model, the loss, the closure and the backend, while schedulers change the learning rate and
rho."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers

from crsam_ext import CRSAM, Scheduled

from .reference import EXACT, assert_close

pytestmark = pytest.mark.slow

BASES = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {})}


def train(compiled, base="sgd", steps=5):
    """Return the parameters after some steps, and the number of compiled graphs after each step."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    model = nn.Sequential(nn.Linear(20, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5)).double()
    x, y = torch.randn(16, 20, dtype=torch.float64), torch.randint(5, (16,))
    make, options = BASES[base]
    in_backend = {"backend": "torch", "compile": compiled == "backend"}
    optimizer = CRSAM(model.parameters(), make, lr=0.1, rho=0.1, model=model, **in_backend, **options)
    chain = [schedulers.ExponentialLR(o, 0.9) for o in (optimizer, Scheduled(optimizer, "rho"))]
    forward = torch.compile(model, fullgraph=True) if compiled == "model" else model

    def loss_of():
        return F.cross_entropy(forward(x), y)

    if compiled == "loss":
        loss_of = torch.compile(loss_of, fullgraph=True)

    def closure():
        loss = loss_of()
        loss.backward()
        return loss

    if compiled == "closure":
        closure = torch.compile(closure)
    graphs = []
    for _ in range(steps):
        optimizer.step(closure)
        graphs.append(counters["stats"]["unique_graphs"])
        for scheduler in chain:
            scheduler.step()
    return list(model.parameters()), graphs


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("compiled", ["model", "loss", "closure", "backend"])
def test_compiled_training_equals_eager_training(compiled, base):
    """The result is the same, and changing lr and rho does not trigger recompilation."""
    params, graphs = train(compiled, base)
    expected, none = train(None, base)
    assert none[-1] == 0 < graphs[0] == graphs[-1]
    for p, q in zip(params, expected, strict=True):
        assert_close(p, q, 1e2 * EXACT)  # Adam divides by gradients near 0
