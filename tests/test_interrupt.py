"""Ctrl-C, or any exception, at any operation of a step leaves the parameters at w or at the updated w, bit for bit."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from crsam_ext import CRSAM


class InterruptAt(TorchDispatchMode):
    """Raises KeyboardInterrupt once, before the n-th operation, and counts operations."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def trained(dtype: torch.dtype, **options):
    """Return a small network after two steps, its optimizer and a closure."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(16, 6, dtype=dtype), torch.randint(3, (16,))
    optimizer = CRSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model, **options)

    def closure():
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(1.25)  # w differs from the result of the last step
    return model, optimizer, closure


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), (torch.bfloat16, {"regularizer": "log"}), (torch.float32, {"alpha": 0, "beta": 0})],
    ids=["linear", "log-bfloat16", "sam"],
)
def test_interrupt_at_every_eleventh_operation_restores(dtype, options):
    model, optimizer, closure = trained(dtype, **options)
    before = bits(model)
    with InterruptAt() as counter:
        optimizer.step(closure)
    after = bits(model)
    assert counter.count > 100

    for at in range(1, counter.count + 1, 11):
        model, optimizer, closure = trained(dtype, **options)
        statistics = [b.clone() for b in model.buffers()]
        with pytest.raises(KeyboardInterrupt), InterruptAt(at):
            optimizer.step(closure)
        found = bits(model)
        assert any(all(map(torch.equal, found, expected)) for expected in (before, after)), f"operation {at}"
        assert all(b.isfinite().all() for b in model.buffers()), f"operation {at}"
        optimizer.step(closure)  # training continues
        assert [b.shape for b in model.buffers()] == [b.shape for b in statistics]
