"""Configuration shared by all tests: seeds, one thread, deterministic Hypothesis runs, and skips of tests whose
hardware is missing."""

import ctypes
import os
import random
import signal
from typing import NoReturn

import numpy as np
import pytest
import torch
from hypothesis import settings

from crsam_ext import available_backends
from crsam_ext.backends import cuda, triton

from . import triton_interpreted
from .cuda_on_cpu import build

torch.set_num_threads(1)  # tests are small: threads would only wait for each other
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


# A shell starts background jobs with SIGINT ignored, and the programs that tests start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that take minutes come first: otherwise one worker would still run them when the others have finished.
LONGEST = ("test_triton_interpreted.py", "test_end_to_end.py", "test_triton_machine_code.py", "test_cuda_on_cpu.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def missing(reason: str) -> NoReturn:
    """Skip the test, or fail it on a machine that promises a GPU with CRSAM_REQUIRE_CUDA=1."""
    if os.environ.get("CRSAM_REQUIRE_CUDA") == "1":
        pytest.fail(f"CRSAM_REQUIRE_CUDA=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def require_cuda(request):
    if request.node.get_closest_marker("require_cuda") and not torch.cuda.is_available():
        missing("torch finds no CUDA device")


@pytest.fixture
def library(monkeypatch):
    """Compile the CUDA sources for a CPU and install the result as the extension; its operators take CPU tensors."""
    return build.install(monkeypatch, build.library())


@pytest.fixture
def shim(library):
    """Return the same library as a ctypes object, which has counters and sets the order of threads."""
    shim = ctypes.CDLL(library.__file__)
    yield shim
    shim.crsam_set_order(0)


@pytest.fixture
def cuda_on_cpu(library, monkeypatch):
    """Make backend "cuda" available for CPU tensors."""
    monkeypatch.setattr(cuda, "why_unavailable", lambda: None)


if triton.interpreted():
    triton_interpreted.prepare()
else:
    collect_ignore = ["test_triton_operators.py"]  # tests/test_triton_interpreted.py runs it


AVAILABLE = [name for name, verdict in available_backends().items() if verdict == "available"]


@pytest.fixture(params=["triton_interpreted"] if triton.interpreted() else [*AVAILABLE, "cuda_on_cpu"])
def backend(request):
    """Return the name of each available backend in turn, and "cuda_on_cpu", the CUDA sources compiled for a CPU.

    tests/test_backends.py reports unavailable backends. With TRITON_INTERPRET=1, only Triton runs:
    tests/test_triton_interpreted.py selects those tests.
    """
    if request.param == "triton_interpreted":
        return "triton"
    if request.param == "cuda_on_cpu":
        request.getfixturevalue("cuda_on_cpu")
        return "cuda"
    if request.param in ("cuda", "triton") and request.node.get_closest_marker("on_cpu"):
        pytest.skip("this test uses CPU tensors; tests/gpu has the GPU tests")
    return request.param


@pytest.fixture
def backend_options(backend):
    """Return the keyword arguments of CRSAM that select each backend in turn."""
    return {"backend": backend}


@pytest.fixture
def device(backend, request):
    """Return the device of the tensors for `backend`."""
    on_gpu = request.node.callspec.params["backend"] in ("cuda", "triton")
    return torch.device("cuda" if on_gpu else "cpu")
