"""The CUDA sources, compiled for a CPU: what the tests of every backend do not ask.

Those tests run on this build as well, as backend "cuda_on_cpu". Here are the order of threads, bytes and launches, rows
of awkward sizes and addresses, and the sanitizers, which must see faults that are planted.
"""

import ctypes
import subprocess

import pytest
import torch

from crsam_ext.backends.cuda import CudaOperators

from .cuda_on_cpu import build
from .operator_cases import (
    ROWS,
    Case,
    check_arguments,
    check_interrupted_perturb,
    check_options_as_tensors,
    check_same_as_torch,
    check_schemas_and_fakes,
    check_versions,
    dtypes,
    each_operator,
    run_all,
    stepping,
    wrong_arguments,
)  # fmt: skip


@pytest.fixture
def shim(library):
    """The library as ctypes sees it."""
    shim = ctypes.CDLL(str(library))
    yield shim
    shim.crsam_set_order(0)


def counted(shim, body):
    """Launches, bytes read and bytes written by ``body``."""
    counters = (ctypes.c_uint64 * 3)()
    shim.crsam_take_counters(counters)
    body()
    shim.crsam_take_counters(counters)
    return list(counters)


# Values --------------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("rows", ROWS)
def test_same_as_torch(rows, dtype, library):
    check_same_as_torch(CudaOperators(), dtype, **ROWS[rows])


@dtypes
def test_order_of_threads_does_not_matter(dtype, shim):
    results = []
    for order in (0, 1, 7):
        shim.crsam_set_order(order)
        results.append(run_all(CudaOperators(), Case(dtype)))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


# Cost ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["odd", "misaligned"])
@each_operator
def test_bytes(operator, float32, bfloat16, rows, shim):
    """Bytes read and written an element, and one launch, whatever the number of rows."""
    for dtype, (read, written) in ((torch.float32, float32), (torch.bfloat16, bfloat16)):
        case, operators = Case(dtype, **ROWS[rows]), CudaOperators()
        elements = sum(p.numel() for p in case.live)
        assert counted(shim, lambda: operator(case, operators)) == [1, read * elements, written * elements]  # noqa: B023


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"regularizer": "log", "max_grad_norm": 1.0}], ids=["linear", "log"])
def test_launches_of_a_step(options, base, cuda_on_cpu, shim):
    launches, _, _ = counted(shim, stepping(base, options, backend="cuda"))
    assert launches == (7 if options else 8)


# Manners -------------------------------------------------------------------------------------------------------------


def test_versions_of_what_is_written(library):
    check_versions(CudaOperators())


@pytest.mark.parametrize("launched", [False, True], ids=["before", "after"])
def test_interrupted_perturb_can_be_undone(launched, library, monkeypatch):
    check_interrupted_perturb(CudaOperators(), torch.ops.crsam, launched, monkeypatch)


def test_schemas_and_fakes(library):
    CudaOperators()  # registers the fakes
    check_schemas_and_fakes(torch.ops.crsam)


@wrong_arguments
def test_arguments_are_checked(change, message, library):
    check_arguments(CudaOperators(), change, message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_options_as_tensors(dtype, library):
    check_options_as_tensors(CudaOperators(), dtype)


# Faults --------------------------------------------------------------------------------------------------------------

PLAIN = ("-O0",)
ADDRESSES = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
THREADS = ("-O1", "-fsanitize=thread", "-DEMU_PARALLEL")


def run_program(*flags, replaced=None, order=0):
    program = build.program(*flags, replaced=replaced)
    return subprocess.run([program, str(order)], capture_output=True, text=True)


@pytest.mark.parametrize("order", [0, 1, 7])
@pytest.mark.parametrize("flags", [PLAIN, ADDRESSES], ids=["plain", "addresses"])
def test_sanitizers_find_nothing(flags, order):
    done = run_program(*flags, order=order)
    assert done.returncode == 0, done.stdout + done.stderr


def test_thread_sanitizer_finds_nothing():
    done = run_program(*THREADS)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("flags", "replaced", "report"),
    [
        pytest.param(
            THREADS,
            ("reduce.cuh", "  }\n  __syncthreads();\n  if (threadIdx.x < K) {", "  }\n  if (threadIdx.x < K) {"),
            "data race",
            id="barrier",
        ),
        pytest.param(
            ADDRESSES,
            ("launch.cuh", "i < count; i += kThreads)", "i <= count; i += kThreads)"),
            "heap-buffer-overflow",
            id="bound",
        ),
        pytest.param(
            PLAIN,
            ("reduce.cuh", "if (threadIdx.x == 0) table.tickets[group] = 0;", ""),
            "is -1, not",
            id="ticket",
        ),
    ],
)  # fmt: skip
def test_planted_fault_is_found(flags, replaced, report):
    done = run_program(*flags, replaced=replaced)
    assert done.returncode != 0
    assert report in done.stdout + done.stderr
