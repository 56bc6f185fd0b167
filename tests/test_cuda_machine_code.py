"""nvcc's output for the kernels: registers, spills, access widths and uses of float64."""

import importlib.util
import re
import shutil
import subprocess
from itertools import groupby
from pathlib import Path

import pytest

from .conftest import missing
from .cuda_on_cpu.build import KERNELS, SOURCES

pytestmark = pytest.mark.slow

DTYPES = {"d": "float64", "f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


@pytest.fixture(scope="module", params=["80", "86", "90", "100", "120"])
def kernels(request, tmp_path_factory):
    """Map (kernel, dtype) to a list of (resources, machine code), with one entry per further template argument.

    The name of a kernel of an update rule contains both.
    """
    tools = importlib.util.find_spec("triton")
    tools = Path(tools.origin).parent / "backends" / "nvidia" / "bin" if tools else Path()
    if not shutil.which("nvcc"):
        missing("no nvcc was found")
    if not (tools / "cuobjdump").exists():
        missing("Triton was not found, whose wheel contains cuobjdump")
    folder = tmp_path_factory.mktemp("cubin")
    flags = ["-std=c++17", "-O3", f"-arch=sm_{request.param}", "-Werror", "all-warnings"]
    compilers = [
        subprocess.Popen(["nvcc", *flags, "-cubin", SOURCES / "cuda" / name, "-o", folder / name]) for name in KERNELS
    ]
    assert [compiler.wait() for compiler in compilers] == [0] * len(KERNELS)
    found = {}
    for name in KERNELS:

        def dump(option, cubin=folder / name):
            return subprocess.run(
                [tools / "cuobjdump", option, cubin], capture_output=True, text=True, check=True
            ).stdout

        usage = dict(re.findall(r"Function (\S+):\n\s*(REG:.*)", dump("-res-usage")))
        code = re.split(r"Function : (\S+)\n", dump("-sass"))
        for mangled, text in zip(code[1::2], code[2::2], strict=True):
            kernel, dtype = re.match(r"_ZN5crsam\d+(\w+?_kernel)(?:I(d|f|6__half|13__nv_bfloat16))?", mangled).groups()
            rule = re.search(r"NS_\d+([A-Z][a-z]+)ELNS_", mangled)
            kernel = f"{rule[1]} {kernel}" if rule else kernel
            resources = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", usage[mangled])}
            found.setdefault((kernel, DTYPES.get(dtype)), []).append((resources, text))
    return found


def test_all_kernels_exist(kernels):
    names = {"grad_norm", "perturb", "fd_gram", "Sgd step", "Adam step", "combine", "fd_direction"}
    of_few_numbers = {"coefficients_kernel", "perturbation_scale_kernel", "direction_weight_kernel"}
    expected = {(f"{name}_kernel", dtype) for name in names for dtype in DTYPES.values()}
    assert set(kernels) == expected | {(name, None) for name in of_few_numbers}


def test_kernels_do_not_spill_and_fit(kernels):
    """No spills, and 1024 threads fit on a multiprocessor: 512 for float64, 768 for 16-bit fd_gram."""
    for (kernel, dtype), variants in kernels.items():
        threads = 512 if dtype == "float64" else 768 if kernel == "fd_gram_kernel" and dtype != "float32" else 1024
        for resources, code in variants:
            assert resources["STACK"] == resources["LOCAL"] == 0, (kernel, dtype)
            assert not re.search(r"\b(LDL|STL)\b", code), (kernel, dtype)
            assert resources["REG"] <= 65536 // threads, (kernel, dtype, resources)


def test_accesses_are_wide(kernels):
    """Check the minimum number of 128-bit loads and stores: every stream of a main loop uses them."""
    streams = {
        "grad_norm_kernel": (1, 0),
        "perturb_kernel": (2, 1),
        "fd_gram_kernel": (4, 0),
        "Sgd step_kernel": (3, 2),
        "Adam step_kernel": (4, 3),
        "combine_kernel": (2, 2),
        "fd_direction_kernel": (3, 1),
    }
    for (kernel, dtype), variants in kernels.items():
        loads, stores = streams.get(kernel, (0, 0))
        for _, code in variants:
            assert len(re.findall(r"\bLDG\S*\.128", code)) >= loads, (kernel, dtype)
            assert len(re.findall(r"\bSTG\S*\.128", code)) >= stores, (kernel, dtype)


def test_loads_precede_their_use(kernels):
    """A main loop reads all streams before it uses the first, so that the loads overlap."""
    together = {
        "grad_norm_kernel": 1,
        "perturb_kernel": 2,
        "fd_gram_kernel": 3,
        "Sgd step_kernel": 5,
        "Adam step_kernel": 6,
        "combine_kernel": 3,
        "fd_direction_kernel": 3,
    }
    for kernel, loads in together.items():
        runs = []
        for _, code in kernels[kernel, "float32"]:
            steps = re.findall(r"\bLDG\S*\.128|\bSTG|\b[DF](?:ADD|MUL|FMA)\b", code)
            runs += [len(list(run)) for is_load, run in groupby(steps, lambda x: x.startswith("LDG")) if is_load]
        assert max(runs) >= loads, kernel


def test_no_float64_arithmetic_on_float32(kernels):
    """The exceptions are the last stages of the sums, and 1 - beta, once per block, if beta is a float64 tensor."""
    final_stages = (
        "grad_norm_kernel", "fd_gram_kernel", "coefficients_kernel", "perturbation_scale_kernel",
        "direction_weight_kernel",
    )  # fmt: skip
    for (kernel, dtype), variants in kernels.items():
        if dtype == "float64" or kernel in final_stages:
            continue
        for _, code in variants:
            found = re.findall(r"\b(DADD|DMUL|DFMA)\b", code)
            allowed = {"Sgd step_kernel": 1, "Adam step_kernel": 2}.get(kernel, 0)
            assert len(found) <= allowed, (kernel, dtype, found)


def test_no_float64_products_in_float32_sums(kernels):
    """The last stages only add."""
    for kernel in ("grad_norm_kernel", "fd_gram_kernel"):
        for dtype in ("float32", "float16", "bfloat16"):
            for _, code in kernels[kernel, dtype]:
                assert not re.search(r"\b(DMUL|DFMA)\b", code), (kernel, dtype)


def test_partial_sums_bypass_the_cache(kernels):
    """The last block reads what other blocks wrote; the L1 cache of its multiprocessor may contain older values."""
    for kernel, sums in {"grad_norm_kernel": 1, "fd_gram_kernel": 9}.items():
        for dtype in DTYPES.values():
            for _, code in kernels[kernel, dtype]:
                assert len(re.findall(r"\bLDG\.E\.64\.STRONG\.GPU", code)) >= sums, (kernel, dtype)
