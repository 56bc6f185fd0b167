"""Which backends the other tests run with here: one skip, with its reason, for each that is not available."""

import pytest
import torch

from crsam_ext import CRSAM, available_backends

from .conftest import missing


@pytest.mark.parametrize("name", available_backends())
def test_backend(name):
    verdict = available_backends()[name]
    if verdict != "available":
        missing(f"no test runs with backend {name}, which is {verdict}")
    param = torch.nn.Parameter(torch.ones(3, device="cpu" if name == "torch" else "cuda"))
    optimizer = CRSAM([param], lr=0.1, backend=name)
    optimizer.step(lambda: param.square().sum().backward())
    assert optimizer.backend == name
    assert (param < 1).all()
