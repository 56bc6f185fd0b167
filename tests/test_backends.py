"""Which backends the other tests can use on this machine: one skip, with a reason, per unavailable backend."""

import pytest
import torch

from crsam_ext import CRSAM, available_backends
from crsam_ext.backends import triton
from crsam_ext.backends.fused import no_device

from .conftest import missing


@pytest.mark.parametrize("name", available_backends())
def test_backend_is_available(name):
    verdict = available_backends()[name]
    if verdict != "available":
        missing(f"no test runs with backend {name}, which is {verdict}")
    param = torch.nn.Parameter(torch.ones(3, device="cpu" if name == "torch" else "cuda"))
    optimizer = CRSAM([param], lr=0.1, backend=name)
    optimizer.step(lambda: param.square().sum().backward())
    assert optimizer.backend == name
    assert (param < 1).all()


def test_cuda_that_cannot_initialize_is_reported(monkeypatch):
    """In a process forked from one that uses CUDA, backend "torch" works, and the others report the reason."""

    def start(*_):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", start)
    why = "CUDA cannot be used in this process: Cannot re-initialize CUDA in forked subprocess"
    assert no_device() == why
    assert triton.why_unavailable() == why
    assert available_backends()["torch"] == "available"
    assert CRSAM([torch.nn.Parameter(torch.ones(3))], lr=0.1, backend="torch").backend == "torch"
