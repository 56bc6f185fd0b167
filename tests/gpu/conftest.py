"""Fixtures of the GPU tests."""

import pytest

from crsam_ext import available_backends

from ..conftest import missing


@pytest.fixture(params=["cuda", "triton"])
def fused(request):
    """Return the name of each fused backend in turn."""
    verdict = available_backends()[request.param]
    if verdict != "available":
        missing(f"backend {request.param} is {verdict}")
    return request.param
