"""Triton's output for the kernels: access widths, registers, spills and uses of float64. No GPU is needed."""

import importlib.util
import re
import subprocess
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from crsam_ext.backends import triton as backend
from crsam_ext.precision import has_master

from .conftest import missing
from .operator_cases import Case
from .triton_driver import without_gpu

pytestmark = pytest.mark.slow

# The dtypes to check for each compute capability; compiling all kernels for all dtypes would take minutes. float16
# differs from bfloat16 in a conversion.
COMPILED = {
    80: (torch.float32, torch.bfloat16),
    90: (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    100: (torch.float32, torch.bfloat16),
    120: (torch.float32, torch.bfloat16),
}
POINTERS = {
    "rows": "*i64", "chunks": "*i32", "group_begin": "*i64", "tickets": "*i32", "num_groups": "i32", "partial": "*fp64",
    "norms": "*fp64", "gram": "*fp64", "scale": "*fp64", "marker": "*i64", "number": "i64", "option_table": "*i64",
    "pass_weights": "*fp64", "factor": "*fp64", "ok": "*u8", "direction_weight": "*fp64",
}  # fmt: skip


class Kernel(NamedTuple):
    """A kernel, its constants, and the numbers of streams of its main loop, for rows and for masters."""

    function: str
    constants: dict[str, Any]
    loads: int
    master_loads: int
    stores: int
    master_stores: int
    writes_master: bool = False  #: of w, if the rows are float16 or bfloat16


KERNELS = {
    "grad_norm": Kernel("grad_norm_kernel", {}, 2, 0, 0, 0),
    "perturb_first": Kernel("perturb_kernel", {"SAVE": True, "STOCHASTIC": False}, 2, 0, 1, 1),
    "perturb_second": Kernel("perturb_kernel", {"SAVE": False, "STOCHASTIC": False}, 1, 1, 1, 0),
    "perturb_first_stochastic": Kernel("perturb_kernel", {"SAVE": True, "STOCHASTIC": True}, 2, 0, 1, 1),
    "perturb_second_stochastic": Kernel("perturb_kernel", {"SAVE": False, "STOCHASTIC": True}, 1, 1, 1, 0),
    "fd_gram": Kernel("fd_gram_kernel", {"COMBINES": False}, 3, 1, 0, 0),
    "fd_combine": Kernel("fd_gram_kernel", {"COMBINES": True}, 3, 1, 1, 0),
    "sgd_step": Kernel("step_kernel", {"RULE": "sgd", "GIVEN": 3}, 3, 2, 1, 1, True),
    "sgd_step_plain": Kernel("step_kernel", {"RULE": "sgd", "GIVEN": 1}, 1, 2, 1, 1, True),
    "adam_step": Kernel("step_kernel", {"RULE": "adam", "GIVEN": 3}, 3, 3, 1, 2, True),
    "adam_step_plain": Kernel("step_kernel", {"RULE": "adam", "GIVEN": 1}, 1, 3, 1, 2, True),
    "combine": Kernel("combine_kernel", {"GIVEN": 3}, 3, 0, 1, 0),
    "fd_direction": Kernel("fd_direction_kernel", {}, 3, 0, 0, 1),
    "grad_norm_with_direction": Kernel("grad_norm_kernel", {}, 2, 1, 0, 0),
    "sgd_step_with_direction": Kernel("step_kernel", {"RULE": "sgd", "GIVEN": 1}, 1, 3, 1, 1, True),
    "adam_step_with_direction": Kernel("step_kernel", {"RULE": "adam", "GIVEN": 1}, 1, 4, 1, 2, True),
    "combine_with_direction": Kernel("combine_kernel", {"GIVEN": 1}, 1, 1, 1, 0),
}

SUMS = ("grad_norm", "grad_norm_with_direction", "fd_gram", "fd_combine")  # kernels that end with a reduction


class Compiled(NamedTuple):
    """The result of compiling a kernel."""

    kernel: Kernel
    dtype: torch.dtype
    ptx: str
    sass: str
    resources: dict[str, int]
    shared: int

    @property
    def accesses(self):
        """Return the minimum number of 128-bit loads and stores in the main loop. A vector of masters has as many
        elements as one of a 16-bit row, so twice as many bytes."""
        words = 2 if has_master(self.dtype) else 1
        k = self.kernel
        master_stores = k.master_stores + (k.writes_master and words == 2)
        return k.loads + words * k.master_loads, k.stores + words * master_stores

    @property
    def main_loops(self):
        """Return the basic blocks that load or store 128 bits."""
        blocks = re.split(r"^\$L\w+:", self.ptx, flags=re.MULTILINE)
        return [block for block in blocks if WIDE.search(block)]


WIDE = re.compile(r"\b(?:ld|st)\.global\S*\.(?:v4\.b32|v2\.b64)")


def constants_and_registers(kernel):
    """Return the constants of a kernel and the maximum number of registers per thread, as the launchers set them."""
    from crsam_ext.triton_kernels import launch
    from crsam_ext.triton_kernels.update_math import RULES

    constants = dict(kernel.constants)
    if constants.get("COMBINES"):
        return constants, launch.MORE_REGISTERS
    if "RULE" not in constants:
        return constants, launch.REGISTERS
    return constants, RULES[constants["RULE"]].registers


@pytest.fixture(scope="module", params=COMPILED, ids=lambda architecture: f"sm_{architecture}")
def compiled(request, tmp_path_factory):
    """Map (name, dtype) to Triton's output for the kernel."""
    if importlib.util.find_spec("triton") is None:
        missing("Triton was not found")
    if backend.interpreted():
        pytest.skip("with TRITON_INTERPRET=1, Triton does not compile")
    from crsam_ext.triton_kernels import fd_gram, grad_norm, launch, perturb, step
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    functions = {k: v for m in (grad_norm, perturb, fd_gram, step) for k, v in vars(m).items() if k.endswith("_kernel")}
    tools = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    cubin, found, block = tmp_path_factory.mktemp("cubin") / "kernel.cubin", {}, launch.DEFAULT_BLOCK

    def dump(option):
        return subprocess.run([tools / "cuobjdump", option, cubin], capture_output=True, text=True, check=True).stdout

    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        for name, kernel in KERNELS.items():
            # on other architectures, the other kernels suffice
            if name.endswith(("plain", "with_direction")) and request.param != 90:
                continue
            for dtype in COMPILED[request.param]:
                if name.endswith("stochastic") and not has_master(dtype):
                    continue
                function = functions[kernel.function]
                constants, registers = constants_and_registers(kernel)
                if "direction_weight" in function.arg_names and not name.endswith("with_direction"):
                    constants["direction_weight"] = None
                constants |= {"dtype": launch.DTYPES[dtype], "VECTORS": block.vectors}
                signature = {p: "constexpr" if p in constants else POINTERS[p] for p in function.arg_names}
                done = compile(
                    ASTSource(function, signature, constants),
                    target=GPUTarget("cuda", request.param, 32),
                    options={"num_warps": block.warps, "maxnreg": registers},
                )
                cubin.write_bytes(done.asm["cubin"])
                usage = re.search(r"Function .+:\n\s*(REG:.*)", dump("-res-usage"))[1]
                resources = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", usage)}
                found[name, dtype] = Compiled(
                    kernel, dtype, done.asm["ptx"], dump("-sass"), resources, done.metadata.shared
                )
    return found


def test_accesses_are_wide(compiled):
    """Every stream of a main loop moves in 128-bit words and bypasses the caches; nothing else is moved there."""
    for key, one in compiled.items():
        loads = stores = 0
        for block in one.main_loops:
            accesses = re.findall(r"\b(?:ld|st)\.global\S*", block)
            narrow = [access for access in accesses if not WIDE.match(access)]
            assert not narrow, (key, narrow)
            assert all(".L1::evict_first" in a or a.startswith("st.global.cs") for a in accesses), (key, accesses)
            loads += sum(access.startswith("ld") for access in accesses)
            stores += sum(access.startswith("st") for access in accesses)
        expected_loads, expected_stores = one.accesses
        assert loads >= expected_loads, (key, loads)
        assert stores >= expected_stores, (key, stores)


def test_loads_of_the_norm_precede_their_use(compiled):
    """Vectors are loaded ahead of the sums, so that loads overlap; one of two loads is masked out."""
    for (name, dtype), one in compiled.items():
        if name == "grad_norm" and dtype != torch.float64:
            steps = re.findall(r"\bLDG\S*\.128|\bF(?:ADD|MUL|FMA)\b|\bHFMA2\S*|\bPRMT\b|\bIMAD\.U32\b", one.sass)
            runs = [len(list(run)) for load, run in groupby(steps, lambda x: x.startswith("LDG")) if load]
            assert max(runs) >= 5, (name, dtype, runs)


def test_kernels_do_not_spill(compiled):
    for key, one in compiled.items():
        assert one.resources["STACK"] == one.resources["LOCAL"] == 0, (key, one.resources)
        assert not re.search(r"\b(LDL|STL)\b", one.sass), key


def test_kernels_use_few_registers(compiled):
    """Four programs of 256 threads fit on a multiprocessor with 65536 registers; two of Adam and fd_combine."""
    for (name, dtype), one in compiled.items():
        programs = 2 if name.startswith(("adam", "fd_combine")) else 4
        assert one.resources["REG"] * 256 * programs <= 65536, (name, dtype, one.resources)


def test_main_loops_exchange_no_data(compiled):
    """Shared memory is only used by reductions, at their end."""
    for (name, dtype), one in compiled.items():
        assert (one.shared > 0) == (name in SUMS), (name, dtype)
        for block in one.main_loops:
            assert not re.search(r"\.shared|bar\.sync|shfl", block), (name, dtype)


def test_no_float64_in_main_loops_of_float32(compiled):
    for (name, dtype), one in compiled.items():
        if dtype != torch.float64:
            for block in one.main_loops:
                assert ".f64" not in block, (name, dtype)


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Let launches on CPU tensors proceed as far as possible without a GPU: to the driver.

    Returns:
        The arguments of each call of Triton's launcher.
    """
    if importlib.util.find_spec("triton") is None:
        missing("Triton was not found")
    if backend.interpreted():
        pytest.skip("with TRITON_INTERPRET=1, Triton does not compile")
    from crsam_ext.triton_kernels import launch
    from triton import knobs
    from triton.runtime import driver

    launched = []
    monkeypatch.setattr(launch, "INTERPRETED_BLOCK", launch.DEFAULT_BLOCK)
    monkeypatch.setattr(launch, "_launchers", {})
    monkeypatch.setattr(driver, "_active", without_gpu(lambda *arguments: launched.append(arguments)))
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        yield launched
    launch._launchers.clear()
    for kernel in _kernels():
        kernel.device_caches.clear()


def _kernels():
    """Return all kernels as Triton functions."""
    from crsam_ext.triton_kernels import coefficients, fd_gram, grad_norm, perturb, step

    modules = (coefficients, fd_gram, grad_norm, perturb, step)
    return [f for module in modules for name, f in vars(module).items() if name.endswith("_kernel")]


def _run_all(sizes, offset, losses=False):
    """Launch each kernel once, and perturb_kernel with both signs."""
    case = Case(torch.float32, sizes=sizes, groups=[0] * len(sizes), offset=offset)
    operators = backend.TritonOperators()
    for operator in Case.OPERATORS:
        operator(case, operators)
    gram, counters = torch.ones(2, 9, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    operators.perturbation_scale(gram[:, 0].contiguous(), case.scale)
    operators.direction_weight(gram[:, 0].contiguous(), case.scale, case.direction.weight, None, 0.5)
    operators.coefficients(
        gram, [], case.scale, case.scale, case.scale, counters=counters, steps=[(torch.ones(3), torch.ones(3))],
        passes=3, regularizer="log", losses=gram[0, :3].unbind() if losses else None, grad_scale=None,
        max_regularizer_ratio=1.0 / len(sizes), max_grad_norm=1.0,
    )  # fmt: skip


SIZES = (((1, 3, 4097, 40000), 0), ((5,), 1), ((16,) * 16, 0))


def test_nothing_is_compiled_twice(launched, monkeypatch):
    """Neither other sizes, numbers of rows and addresses, nor later steps trigger recompilation."""
    from crsam_ext.triton_kernels import launch

    class Forgets(dict):
        def __setitem__(self, key, value):
            pass

    monkeypatch.setattr(launch, "_launchers", Forgets())  # so that Triton inspects the arguments of each launch
    for sizes, offset in SIZES:
        _run_all(sizes, offset)
    variants = {kernel.fn.__name__: len(kernel.device_caches[0][0]) for kernel in _kernels()}
    of_few_numbers = {"perturbation_scale_kernel", "direction_weight_kernel", "coefficients_kernel"}
    expected = {kernel.function for kernel in KERNELS.values()} | of_few_numbers
    # Two signs; fd_gram with and without ghat; the others with and without a direction; step_kernel for two rules.
    more = {"perturb_kernel": 2, "fd_gram_kernel": 2, "grad_norm_kernel": 2, "combine_kernel": 2, "step_kernel": 4}
    assert variants == {name: more.get(name, 1) for name in expected}


def test_launchers_are_cached_with_this_triton(launched):
    """Otherwise every launch would take 20 microseconds more; the tests below show whether a version can be added."""
    import triton
    from crsam_ext.triton_kernels import launch

    assert triton.__version__.startswith(tuple(f"{version}." for version in launch.KEPT_WITH))
    assert launch._keeps


def test_launches_with_another_triton_are_not_cached(launched, monkeypatch):
    from crsam_ext.triton_kernels import launch

    monkeypatch.setattr(launch, "_keeps", False)
    monkeypatch.setattr(launch, "_launchers", {})
    sizes, offset = SIZES[0]
    for _ in range(2):
        launched.clear()
        _run_all(sizes, offset)
        assert len(launched) == 16
    assert launch._launchers == {}


def test_cache_of_launchers_is_limited(launched, monkeypatch):
    """When the cache is full, all launchers are made again; every launch gets its own arguments."""
    from crsam_ext.triton_kernels import launch

    given, compiled = [], []

    class Kernel:
        def __init__(self):
            self.arg_names = ["x", "constant"]

        def __getitem__(self, grid):
            def first(*arguments, constant, **options):
                compiled.append(constant)
                given.append((arguments, constant))
                return {(grid[0], 1, 1): lambda *later: given.append((later[:-1], later[-1]))}

            return first

    kernel = Kernel()
    monkeypatch.setattr(launch, "_launchers", {})
    monkeypatch.setattr(launch, "_MAX_LAUNCHERS", 8)
    numbers = [*range(8), *range(8), 8, *range(3)]
    for number in numbers:
        launch._launch(kernel, (number,), 1, (f"argument {number}",), {"constant": number}, num_warps=4)
        assert len(launch._launchers) <= 8
    assert given == [((f"argument {number}",), number) for number in numbers]
    assert compiled == [*range(8), 8, *range(3)]


@pytest.mark.parametrize("losses", [False, True])
def test_cached_launches_equal_triton_launches(losses, launched):
    """They skip Triton's inspection of the arguments, and call its launcher with the same arguments."""
    from crsam_ext.triton_kernels import launch

    def comparable(x):
        if isinstance(x, torch.Tensor):
            return x.dtype, x.device
        if type(x) is tuple:
            return tuple(map(comparable, x))
        return x if isinstance(x, (bool, str)) else type(x)

    for sizes, offset in SIZES:
        by_run = []
        launch._launchers.clear()
        for _ in range(2):
            launched.clear()
            _run_all(sizes, offset, losses)
            by_run.append([(*arguments[:3], *map(comparable, arguments[3:])) for arguments in launched])
            assert len(launch._launchers) == len(launched) == 16
        assert by_run[0] == by_run[1]


def test_last_stage_of_sums_is_ordered(compiled):
    """The order is: partial sums, barrier, ticket, barrier, and then other blocks' partial sums, which are loaded past
    this multiprocessor's cache."""
    order = r"st\.global\.b64.*bar\.sync.*atom\.global\.gpu\.acq_rel.*bar\.sync.*ld\.global\.cg\.b64"
    for (name, dtype), one in compiled.items():
        if name in SUMS:
            assert re.search(order, one.ptx, re.DOTALL), (name, dtype)
