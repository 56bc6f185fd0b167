"""The Triton kernels, interpreted on the CPU: tests in addition to those that run with every backend.

Those tests also run with backend "triton_interpreted". This file tests bytes and launches, the order of
programs, rows of unusual sizes and addresses, many groups, and caches. See tests/test_triton_interpreted.py.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from crsam_ext.triton_kernels import launch, operators, update_math
from torch.nn import Parameter
from triton.runtime import interpreter

from crsam_ext import CRSAM, extension
from crsam_ext.backends.torch import TorchOperators
from crsam_ext.backends.triton import TritonOperators

from . import triton_interpreted
from .operator_cases import (
    ROWS,
    Case,
    check_arguments,
    check_arguments_of_a_step,
    check_interrupted_perturb,
    check_options_as_tensors,
    check_other_groups,
    check_same_as_float64,
    check_schemas_and_fakes,
    check_unknown_names,
    check_versions,
    dtypes,
    each_operator,
    moved,
    run_all,
    stepping,
    wrong_arguments,
    wrong_arguments_of_a_step,
)  # fmt: skip

# A program takes about 10 ms, so there are fewer small rows than elsewhere.
FEWER = {**ROWS, "tiny": {"sizes": [1 + i % 7 for i in range(20)], "groups": [i % 2 for i in range(20)]}}


@pytest.fixture
def small_blocks(monkeypatch):
    """Use the block size of a GPU, so that loops over a chunk have more than one iteration."""
    monkeypatch.setattr(launch, "INTERPRETED_BLOCK", launch.DEFAULT_BLOCK)


@pytest.fixture
def launches(monkeypatch):
    """Return a list to which the name of each launched kernel is appended."""
    names, call = [], interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return names


# Values --------------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("rows", FEWER)
def test_values_equal_those_in_float64(rows, dtype):
    check_same_as_float64(TritonOperators(), dtype, **FEWER[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_values_equal_those_in_float64_in_small_blocks(offset, dtype, small_blocks):
    check_same_as_float64(TritonOperators(), dtype, sizes=(3, 3000), groups=(0, 1), offset=offset)


def test_any_order_of_programs_gives_the_same_bits(monkeypatch):
    results = [run_all(TritonOperators(), Case(torch.float32)) for _ in range(2)]
    forward = interpreter.InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "set_grid_idx",
        lambda self, x, y, z: forward(self, self.grid_dim[0] - 1 - x, y, z),
    )
    results.append(run_all(TritonOperators(), Case(torch.float32)))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_groups_without_rows_are_accepted():
    """There are more groups than are written at a time, most of them empty."""
    rows, groups = [torch.ones(3), torch.ones(5), torch.ones(7)], [299, 0, 140]
    found = TritonOperators().grad_norm(rows, groups, 300, [None] * 3)
    expected = torch.zeros(300, dtype=torch.float64)
    expected[[299, 0, 140]] = torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64)
    assert torch.equal(found, expected)
    gram = TritonOperators().fd_gram([rows] * 3, groups, 300, [None] * 3)
    assert torch.equal(gram[:, 0], expected)
    assert torch.equal(gram[expected == 0], torch.zeros(297, 9, dtype=torch.float64))


def test_more_chunks_than_are_summed_at_a_time_are_accepted():
    rows = [torch.full((1 + i % 3,), float(i)) for i in range(300)]
    found = TritonOperators().grad_norm(rows, [0] * 300, 1, [None] * 300)
    assert found.item() == sum(i * i * (1 + i % 3) for i in range(300))


@pytest.mark.parametrize("bad", [None, math.nan, math.inf], ids=["finite", "nan", "inf"])
@pytest.mark.parametrize("regularizer", ["linear", "log"])
@pytest.mark.parametrize("groups", [1, 300])
def test_coefficients_equal_those_of_torch(groups, regularizer, bad):
    """The decisions equal those of the torch backend, for every combination of optional arguments."""

    def vector(low):
        return torch.rand(groups, dtype=torch.float64) + low

    g = torch.randn(groups, 4, 3, dtype=torch.float64)
    basis = torch.stack([g[:, 0], 0.1 * g[:, 1], 0.01 * g[:, 2], g[:, 0] * g[:, 3] ** 2], 1)
    products = basis @ basis.mT
    gram = torch.cat(
        [products[:, 0, :3], products[:, 1, 1:3], products[:, 2, 2:3], products[:, 3, :3]], 1
    ).contiguous()  # fmt: skip
    if bad is not None:
        gram[groups - 1, 4] = bad
    norms = [vector(0.5) for _ in range(3)]
    scale, alpha, beta = vector(0.0), vector(0.1), vector(0.1)
    losses = tuple(torch.tensor(x, dtype=torch.float64) for x in (1.0, 1.5, 0.75))
    scaled = torch.tensor(1.75, dtype=torch.float64)
    for passes, given, cap, clip, grad_scale in itertools.product(
        (3, 1), (losses, None), (math.inf, 0.01), (None, 0.1), (None, scaled)
    ):
        arguments = (None, norms[:1]) if passes == 1 else (gram, norms)
        results = []
        for backend in (TorchOperators(), TritonOperators()):
            counters = torch.zeros(4, dtype=torch.int64)
            steps = [(torch.arange(n).float(), (torch.arange(n) % 2).float()) for n in (1, 200, 3)]
            c = backend.coefficients(
                *arguments, scale, alpha, beta, counters=counters, steps=steps, passes=passes,
                regularizer=regularizer, losses=given, grad_scale=grad_scale, max_regularizer_ratio=cap,
                max_grad_norm=clip,
            )  # fmt: skip
            results.append((*c, counters, *(taken for taken, _ in steps)))
        for x, y in zip(*results, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12, equal_nan=True)


@triton.jit
def one_minus_power_kernel(x, t, out, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out + lane, update_math.one_minus_power(tl.load(x + lane), tl.load(t + lane)))


def test_one_minus_power_is_accurate():
    """1 - beta^t has full precision for any beta, from the first step to the last."""
    rests = [1.0, 0.5, 0.1, 1e-3, 1e-8, 2.0**-60, 0.0]
    pairs = [(x, t) for x in rests for t in (1.0, 2.0, 10.0, 1e6)]
    pairs += [pairs[0]] * (32 - len(pairs))
    x, t = torch.tensor(pairs, dtype=torch.float64).T.contiguous()
    out = torch.empty_like(x)
    one_minus_power_kernel[(1,)](x, t, out, N=32)
    for (rest, step), found in zip(pairs, out.tolist(), strict=True):
        expected = 1.0 if rest == 1 else -math.expm1(step * math.log1p(-rest))
        assert found == pytest.approx(expected, rel=1e-15, abs=0), (rest, step)


# Cost ----------------------------------------------------------------------------------------------------------------


class Traffic:
    """Counts bytes that are read from and written to some tensors."""

    def __init__(self, tensors, monkeypatch):
        self.ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
        self.read = self.written = 0
        load, store = interpreter._interpreter.load, interpreter._interpreter.store

        def counted_load(pointers, mask, other, dtype):
            self.read += self.among(pointers, mask) * np.dtype(dtype).itemsize
            return load(pointers, mask, other, dtype)

        def counted_store(pointers, values, mask):
            self.written += self.among(pointers, mask) * values.dtype.itemsize
            return store(pointers, values, mask)

        monkeypatch.setattr(interpreter._interpreter, "load", counted_load)
        monkeypatch.setattr(interpreter._interpreter, "store", counted_store)

    def among(self, pointers, mask):
        addresses = pointers[np.broadcast_to(mask.astype(bool), pointers.shape)]
        return sum(int(((addresses >= begin) & (addresses < end)).sum()) for begin, end in self.ranges)


@pytest.mark.parametrize("rows", ["odd", "misaligned"])
@each_operator
def test_each_operator_moves_the_expected_bytes(operator, variant, rows, launches):
    """Check the bytes read and written per element, and that there is one launch, whatever the number of rows."""
    for dtype in (torch.float32, torch.bfloat16):
        read, written = moved(variant, dtype)
        case = Case(dtype, **ROWS[rows])
        elements = sum(p.numel() for p in case.live)
        launches.clear()
        with pytest.MonkeyPatch.context() as patch:
            traffic = Traffic(case.tensors(), patch)
            operator(case, TritonOperators())
        assert len(launches) == 1
        assert (traffic.read, traffic.written) == (read * elements, written * elements)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"regularizer": "log", "max_grad_norm": 1.0}], ids=["linear", "log"])
def test_a_step_makes_the_expected_launches(options, base, launches):
    step = stepping(base, options, backend="triton")
    launches.clear()
    step()
    assert len(launches) == 7


def test_tables_are_copied_when_an_address_changes(monkeypatch):
    case, backend, copied = Case(torch.float32), TritonOperators(), []
    cache = operators.TableCache()
    monkeypatch.setattr(operators, "_cache", cache)
    frombuffer = torch.frombuffer
    monkeypatch.setattr(torch, "frombuffer", lambda *args, **kwargs: copied.append(args) or frombuffer(*args, **kwargs))
    case.sgd_step(backend)
    assert len(copied) == 3  # rows, layout, options
    case.sgd_step(backend)
    assert len(copied) == 3
    case.grads[1][0] = case.grads[1][0].clone()
    case.sgd_step(backend)
    assert len(copied) == 4
    for _ in range(cache.LIMIT):
        case.grads[1][0] = torch.empty_like(case.grads[1][0]) if _ % 2 else case.grads[1][0].clone()
        cache.get(_, case.live[0].device, lambda: bytes(8))
    assert len(cache._entries) == cache.LIMIT


# Framework integration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_compiled_host_functions_make_the_same_steps(base, library, monkeypatch):
    """This includes another memory layout and a gradient in one pass only; `library` is the extension."""
    results = []
    for reason in (None, "the extension was not built"):
        monkeypatch.setattr(extension, "why_missing", lambda: reason)  # noqa: B023
        torch.manual_seed(0)
        conv = torch.randn(3, 2, 3, 3).to(memory_format=torch.channels_last)
        params = [Parameter(conv), Parameter(torch.randn(17)), Parameter(torch.randn(()))]
        groups = [{"params": params[1:], "adaptive": True}, {"params": params[:1], "lr": 0.2}]
        optimizer = CRSAM(groups, base, lr=0.1, backend="triton")
        assert (optimizer.operators.host is library) == (reason is None)
        passes = itertools.count()

        def closure():
            for p in params:  # noqa: B023
                p.grad = torch.randn_like(p)
            if next(passes) % 5 == 4:  # noqa: B023
                params[1].grad = None  # noqa: B023

        for _ in range(3):
            optimizer.step(closure)
        results.append([*params, *(p.grad for p in params)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_operators_increment_the_versions_that_they_write():
    check_versions(TritonOperators())


@pytest.mark.parametrize("launched", [False, True], ids=["before", "after"])
def test_interrupted_perturb_can_be_undone(launched, monkeypatch):
    backend = TritonOperators()
    check_interrupted_perturb(backend, backend._ops, launched, monkeypatch)


def test_schemas_and_fakes_are_valid():
    TritonOperators()  # registers the operators
    check_schemas_and_fakes(torch.ops.crsam_triton)


def test_same_lengths_in_other_groups_get_their_own_table():
    check_other_groups(TritonOperators())


@wrong_arguments
def test_arguments_are_checked(change, message):
    check_arguments(TritonOperators(), change, message)


def test_dtypes_are_checked():
    rows = [torch.ones(3, dtype=torch.int32)]
    with pytest.raises(RuntimeError, match="grad_norm: rows are Int, not float64, float32, float16 or bfloat16"):
        TritonOperators().grad_norm(rows, [0], 1, [None])


def test_empty_arguments_are_accepted():
    """There may be no rows, or rows without elements."""
    backend, scale, none = TritonOperators(), torch.ones(2, dtype=torch.float64), [torch.empty(0)]
    backend.perturb_(none, none, none, [1], scale, [False, True], 1, [])
    assert torch.equal(backend.grad_norm(none, [1], 2, [None]), torch.zeros(2, dtype=torch.float64))
    assert torch.equal(backend.fd_gram([none] * 3, [1], 2, [None]), torch.zeros(2, 9, dtype=torch.float64))
    torch.ops.crsam_triton.perturb_([], [], [], [], scale, [False, False], 1)
    torch.ops.crsam_triton.combine_([], [], [], [], [], scale, None, [], None)


@wrong_arguments_of_a_step
def test_arguments_of_a_step_are_checked(change, message):
    check_arguments_of_a_step(TritonOperators(), change, message)


def test_unknown_names_are_refused():
    check_unknown_names(TritonOperators())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("held_in", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_options_may_be_tensors(held_in, dtype):
    check_options_as_tensors(TritonOperators(), held_in, dtype)


# The interpreter -----------------------------------------------------------------------------------------------------


def test_interpreter_still_truncates():
    """This is the reason why tests patch it."""
    x = np.array([1.0 + 2.0**-7 - 2.0**-20], np.float32)  # just below a bfloat16 number
    bits = triton_interpreted.unpatched["_convert_float"](x, tl.float32, tl.bfloat16, None)
    if bits.view(np.uint16).item() == triton_interpreted.round_to_bfloat16(x).item():
        pytest.fail("Triton's interpreter rounds float32 to bfloat16 now: remove the patch in triton_interpreted.py")


def test_patched_interpreter_rounds_to_bfloat16():
    x = torch.cat([torch.randn(1000), torch.tensor([math.inf, -math.inf, 0.0, -0.0, 3.4e38, 1e-40])])
    bits = triton_interpreted.round_to_bfloat16(x.numpy())
    assert np.array_equal(bits, x.bfloat16().view(torch.uint16).numpy())
    assert math.isnan(torch.from_numpy(triton_interpreted.round_to_bfloat16(np.float32([np.nan]))).view(torch.bfloat16))
