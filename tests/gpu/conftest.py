"""What the tests on a GPU share."""

import pytest

from crsam_ext import available_backends

from ..conftest import missing


@pytest.fixture(params=["cuda", "triton"])
def fused(request):
    """The name of each backend with kernels of its own."""
    verdict = available_backends()[request.param]
    if verdict != "available":
        missing(f"backend {request.param} is {verdict}")
    return request.param
