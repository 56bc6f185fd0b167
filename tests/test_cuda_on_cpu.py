"""The CUDA sources, compiled for a CPU: tests in addition to those that run with every backend.

Those tests run on this build as well, as backend "cuda_on_cpu". This file tests the order of threads, bytes, launches,
rows of unusual sizes and addresses, and the sanitizers, which must find planted faults.
"""

import re
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from crsam_ext import host
from crsam_ext.backends.cuda import CudaOperators
from crsam_ext.precision import PRECISIONS

from .cuda_on_cpu import build
from .cuda_on_cpu.build import counted
from .operator_cases import (
    RESNET50_SCALED,
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
from .reference import assert_close

pytestmark = pytest.mark.slow

# Values --------------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("rows", ROWS)
def test_values_equal_those_in_float64(rows, dtype, library):
    check_same_as_float64(CudaOperators(), dtype, **ROWS[rows])


def test_sums_of_a_hundred_million_elements_are_accurate(library):
    n, operators = 10**8, CudaOperators()
    grads = [torch.rand(n) + 0.5 for _ in range(3)]
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for block in zip(*(g.split(10**6) for g in grads), strict=True):
        g0, gp, gm = (g.double() for g in block)
        vectors = torch.stack([g0, gp - gm, gp + gm - 2 * g0])
        expected += vectors @ vectors.T
    norms = expected.diagonal().sqrt()
    found = operators.grad_norm([grads[0]], [0], 1, [None])
    assert found.item() == pytest.approx(expected[0, 0].item(), rel=1e-6)
    gram = operators.fd_gram([[g] for g in grads], [0], 1, [None])[0, :6]
    i, j = torch.triu_indices(3, 3)
    assert ((gram - expected[i, j]).abs() <= 1e-6 * norms[i] * norms[j]).all()


LISTS = ("live", "saved", "state[0]", "state[1]", "grads[0]", "grads[1]", "grads[2]")


@dtypes
@pytest.mark.parametrize("misaligned", LISTS)
def test_one_misaligned_list_is_not_accessed_wide(misaligned, dtype, library):
    """Wide accesses need aligned addresses in all lists of a row: the shim aborts at a misaligned access."""
    results = []
    for shift in (False, True):
        case = Case(dtype)
        if shift:
            lists = dict(zip(LISTS, (case.live, case.saved, case.first, case.second, *case.grads), strict=True))
            rows = lists[misaligned]
            rows[:] = [torch.cat([row[:1], row])[1:] for row in rows]
        results.append(run_all(CudaOperators(), case))
    for x, y in zip(*results, strict=True):  # the order of summation differs
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-6)


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
def test_each_operator_moves_the_expected_bytes(operator, variant, rows, shim):
    """Check the bytes read and written per element, and that there is one launch, whatever the number of rows."""
    for dtype in PRECISIONS:
        read, written = moved(variant, dtype)
        case, operators = Case(dtype, **ROWS[rows]), CudaOperators()
        elements = sum(p.numel() for p in case.live)
        assert counted(shim, lambda: operator(case, operators)) == [1, read * elements, written * elements]  # noqa: B023


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"regularizer": "log", "max_grad_norm": 1.0}], ids=["linear", "log"])
def test_a_step_makes_the_expected_launches(options, base, cuda_on_cpu, shim):
    launches, _, _ = counted(shim, stepping(base, options, backend="cuda"))
    assert launches == 7


@pytest.mark.parametrize(
    ("base", "options", "launches", "copies"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, 4, 7),
        (torch.optim.AdamW, {}, 4, 9),
        (torch.optim.SGD, {"momentum": 0.9, "max_grad_norm": 1.0}, 5, 9),
    ],
    ids=["sgd", "adamw", "clipped"],
)
def test_a_reuse_step_moves_the_expected_bytes(base, options, launches, copies, cuda_on_cpu, shim):
    """In units of the parameters' size, a step reads w, g0, h and the state, writes w and the state, and reads g0 again
    for its norm. Clipping reads g0 and h once more. A few numbers per group are added."""
    step = stepping(base, {**options, "interval": 100, "reuse": True}, backend="cuda")
    step()
    found, read, written = counted(shim, step)
    size = 4 * sum(torch.Size(shape).numel() for shape in RESNET50_SCALED)
    assert found == launches
    assert copies * size <= read + written <= copies * size + 4096


def test_table_is_only_copied_if_a_pointer_has_changed(library):
    """The profiler counts the copies that an operator makes."""
    case, operators = Case(torch.float32), CudaOperators()

    def copies(operator):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            operator(case, operators)
        return sum(event.count for event in profile.key_averages() if event.key == "aten::copy_")

    for operator in Case.OPERATORS:
        copies(operator)
        assert copies(operator) == 0
    case.grads[0][1] = case.grads[0][1].clone()
    for operator in Case.OPERATORS:
        assert copies(operator) == (operator is not Case.perturb_second)  # uses the table of the first one
        assert copies(operator) == 0


def test_cache_of_tables_is_limited(library):
    """The least recently used table is evicted and rebuilt later; results stay correct."""
    limit = int(re.search(r"kEntries = (\d+);", (build.SOURCES / "cuda" / "table_cache.h").read_text())[1])
    operators = CudaOperators()
    rows = [[torch.randn(5)] for _ in range(limit + 2)]

    def copies(index):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            squared = operators.grad_norm(rows[index], [0], 1, [None])
        assert_close(squared, rows[index][0].double().square().sum().reshape(1), 1e-6)
        return sum(event.count for event in profile.key_averages() if event.key == "aten::copy_")

    copies(0)  # the layout of the row is cached for all of them, in a separate table
    assert copies(0) == 0
    assert all(copies(index) == 1 for index in range(1, limit - 1))
    assert copies(0) == 0  # this use makes table 1 the least recently used
    assert copies(limit - 1) == copies(limit) == copies(limit + 1) == 1
    assert copies(0) == 0
    assert copies(1) == 1


# Framework integration -----------------------------------------------------------------------------------------------


def test_profiler_sees_the_operators(library):
    case, operators = Case(torch.float32), CudaOperators()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        case.grad_norm(operators)
        case.perturb_first(operators)
    assert {"crsam::grad_norm", "crsam::perturb_"} <= {event.key for event in profile.key_averages()}


def test_operators_increment_the_versions_that_they_write(library):
    check_versions(CudaOperators())


@pytest.mark.parametrize("launched", [False, True], ids=["before", "after"])
def test_interrupted_perturb_can_be_undone(launched, library, monkeypatch):
    operators = CudaOperators()
    check_interrupted_perturb(operators, operators._ops, launched, monkeypatch)


def test_schemas_and_fakes_are_valid(library):
    CudaOperators()  # registers the fakes
    check_schemas_and_fakes(torch.ops.crsam)


def test_operators_compile_without_a_graph_break(library):
    """torch.compile of a function that calls all operators makes one graph, which writes the same results."""
    case, expected, operators = Case(torch.float32), Case(torch.float32), CudaOperators()

    def body(case):
        return [operator(case, operators) for operator in Case.OPERATORS]

    returned = torch.compile(body, fullgraph=True, backend="aot_eager")(case)
    for x, y in zip(returned, body(expected), strict=True):
        assert x is y is None or torch.equal(x, y)
    for x, y in zip(case.tensors(), expected.tensors(), strict=True):
        assert torch.equal(x, y)


def test_same_lengths_in_other_groups_get_their_own_table(library):
    check_other_groups(CudaOperators())


@wrong_arguments
def test_arguments_are_checked(change, message, library):
    check_arguments(CudaOperators(), change, message)


@wrong_arguments_of_a_step
def test_arguments_of_a_step_are_checked(change, message, library):
    check_arguments_of_a_step(CudaOperators(), change, message)


def test_unknown_names_are_refused(library):
    check_unknown_names(CudaOperators())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("held_in", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_options_may_be_tensors(held_in, dtype, library):
    check_options_as_tensors(CudaOperators(), held_in, dtype)


# Faults --------------------------------------------------------------------------------------------------------------

PLAIN = ("-O0",)
ADDRESSES = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
THREADS = ("-O1", "-fsanitize=thread", "-DEMU_PARALLEL")


# ThreadSanitizer creates fibers slowly: tests that look for a fault use smaller blocks.
SHORT_BLOCKS = ("chunk_table.h", "constexpr int kThreads = 256;", "constexpr int kThreads = 64;")


def run_program(*flags, replaced=(), order=0):
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
            THREADS,
            ("reduce.cuh", "__threadfence();  // makes the partial sums of this block visible before its ticket", ""),
            "data race",
            id="fence-before-ticket",
        ),
        pytest.param(
            THREADS,
            ("reduce.cuh", "__threadfence();  // orders reads of other blocks' partial sums after their tickets", ""),
            "data race",
            id="fence-after-ticket",
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
    done = run_program(*flags, replaced=[replaced, SHORT_BLOCKS] if flags == THREADS else [replaced])
    assert done.returncode != 0
    assert report in done.stdout + done.stderr


# Host functions ------------------------------------------------------------------------------------------------------


GRADIENTS = {
    "its own": lambda p: torch.ones_like(p),
    "none": lambda p: None,
    "a view": lambda p: torch.ones(2, *p.shape)[1],
    "in another order": lambda p: torch.empty_strided(p.shape, (1, len(p)) if p.is_contiguous() else (len(p[0]), 1)),
    "of a graph": lambda p: torch.ones_like(p).requires_grad_(),
    "sparse": lambda p: torch.ones_like(p).to_sparse(),
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([*GRADIENTS, "its own"]), min_size=1, max_size=4), st.sampled_from([True, False]))
def test_python_and_compiled_functions_take_the_same_gradients(library, kinds, transposed):
    """Both take all gradients or none, as the same tensors, and p.grad is empty or unchanged."""
    results = []
    for module in (library, host):
        params = module.Column(Parameter(torch.ones(2, 3).t() if transposed else torch.ones(2, 3)) for _ in kinds)
        for p, kind in zip(params, kinds, strict=True):
            p.grad = GRADIENTS[kind](p)
        before = [p.grad for p in params]
        taken = module.take_gradients(params, False)
        results.append(taken is not None)
        after = [p.grad for p in params]
        assert all(x is y for x, y in zip(before, after if taken is None else taken, strict=True))
        assert taken is None or after == [None] * len(params)
        assert taken is None or taken.kind == (torch.float32, torch.device("cpu"))
    assert results[0] == results[1] == (set(kinds) <= {"its own"})


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
def test_functions_over_all_parameters_agree(compiled, library):
    """They assign and clear gradients, bump versions, and report addresses, shapes, strides and dtypes."""
    module = library if compiled else host
    params = module.Column(Parameter(torch.ones(shape)) for shape in ((2, 3), (), (4,)))
    grads = [torch.ones(2, 3), None, torch.zeros(4)]
    module.set_gradients(params, grads)
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    module.clear_gradients(list(params))
    assert [p.grad for p in params] == [None] * 3
    versions = [p._version for p in params]
    module.mark_written(params, [params[0], None])
    assert [p._version for p in params] == [versions[0] + 2, *(v + 1 for v in versions[1:])]
    places = module.places(params)
    assert module.places(params) == places
    params[0].data = params[0].data.view(3, 2)
    assert module.places(params) != places
    params[0].data = params[0].data.view(2, 3)
    assert module.places(params) == places
    params[0].data = torch.as_strided(params[0].data, (2, 3), (1, 2))
    assert module.places(params) != places
    params[0].data = torch.as_strided(params[0].data, (2, 3), (3, 1))
    params[1].data = torch.ones(())
    assert module.places(params) != places


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
def test_column_reports_its_metadata(compiled, library):
    module = library if compiled else host
    tensors = [torch.ones(2, 3), torch.ones(0), torch.ones(4)]
    column = module.Column(tensors)
    assert list(column) == tensors
    assert len(column) == 3
    assert column[-1] is tensors[2]
    assert struct.unpack("3q", column.numels) == (6, 0, 4)
    assert struct.unpack("3q", column.addresses) == (tensors[0].data_ptr(), 0, tensors[2].data_ptr())
    assert column.kind == (torch.float32, torch.device("cpu"))
    mixed = (torch.ones(2).double(), None, torch.ones(2, 3).t())
    assert [module.Column([*tensors, other]).kind for other in mixed] == [None] * 3
    assert module.Column([]).kind is None
    assert module.Column([None]).kind is None
    nothing = module.Column([None])
    assert nothing.numels == nothing.addresses == struct.pack("q", 0)
    groups = module.Groups([2, 0, 1])
    assert list(groups) == [2, 0, 1]
    assert struct.unpack("3q", groups.numbers) == (2, 0, 1)
    assert groups.limits == (0, 2)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
def test_gradients_that_share_memory_are_detected(compiled, library):
    module = library if compiled else host
    x, y, z = torch.ones(3), torch.ones(3), torch.ones(3)
    empty = [torch.ones(0), torch.ones(0), None]
    assert module.share_memory([x, y], [z, y.view(3, 1)])
    assert module.share_memory([x, y], [y.view(3, 1), z])
    assert not module.share_memory([x, y, *empty], [z, *empty])
    assert module.share_memory(module.Column([x, y]), module.Column([z, y]))
    assert module.repeats_memory([x, z, x.view(3, 1)])
    assert not module.repeats_memory([x, y, x[1:], *empty])
    assert module.repeats_memory(module.Column([x, x]))


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
def test_some_gradients_are_not_taken(compiled, library):
    """If one is missing, is a part of a larger tensor, or shares the parameter's memory, all stay in p.grad."""
    module = library if compiled else host
    params = module.Column(Parameter(torch.ones(3)) for _ in range(3))
    for last in (None, torch.ones(4)[:3], params[2].detach()):
        for p, g in zip(params, (torch.ones(3), torch.ones(3), last), strict=True):
            p.grad = g
        assert module.take_gradients(params, False) is None
        assert [p.grad is None for p in params] == [False, False, last is None]
    params[2].grad = torch.ones(3)
    assert len(module.take_gradients(params, False)) == 3
    assert [p.grad for p in params] == [None] * 3


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
@pytest.mark.parametrize(
    "change",
    [
        lambda groups, state: groups.append([Parameter(torch.ones(1))]),
        lambda groups, state: groups[0].reverse(),
        lambda groups, state: groups[1].append(groups[0].pop()),
        lambda groups, state: setattr(groups[0][0], "data", torch.ones(2)),
        lambda groups, state: setattr(groups[0][0], "data", groups[0][0].data.view(2, 1)),
        lambda groups, state: setattr(groups[1][0], "data", groups[1][0].data.t()),
        lambda groups, state: setattr(groups[1][0], "data", groups[1][0].data.view(torch.int32)),
        lambda groups, state: state[groups[0][0]].update(m=torch.zeros(2)),
        lambda groups, state: state[groups[0][0]].update(v=state[groups[0][0]].pop("m")),
        lambda groups, state: state.pop(groups[0][0]),
        lambda groups, state: state.update({groups[0][1]: {}}),
    ],
)
def test_fingerprint_reports_changes(change, compiled, library):
    module = library if compiled else host
    params = [Parameter(torch.ones(shape), requires_grad=False) for shape in (2, 2, (2, 2))]
    groups, state = [params[:2], params[2:]], {params[0]: {"m": torch.zeros(2)}, "steps": 1}
    kept = [*params, dict(state[params[0]])]  # so that no address is reused
    before = module.fingerprint(groups, state)
    state["steps"] = 2
    assert module.fingerprint(groups, state) == before
    change(groups, state)
    assert module.fingerprint(groups, state) != before
    assert kept


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
def test_unbind_returns_views(compiled, library):
    """It returns a view of each number at the right address, even if the tensor is a part of another."""
    module = library if compiled else host
    for numbers in (torch.arange(7, dtype=torch.float64)[2:6], torch.tensor([True, False])):
        parts = module.unbind(numbers)
        assert [part.item() for part in parts] == numbers.tolist()
        assert [part.data_ptr() for part in parts] == [numbers[i].data_ptr() for i in range(len(numbers))]
        assert {(part.shape, part.dtype) for part in parts} == {(torch.Size(), numbers.dtype)}


def test_other_objects_in_a_list_of_tensors_are_refused(library):
    with pytest.raises(TypeError, match="a list of tensors contains an object that is neither a tensor nor None"):
        CudaOperators().grad_norm([1.0], [0], 1, [None])
    with pytest.raises(RuntimeError, match=r"grad_norm: grads\[0\] is None"):
        CudaOperators().grad_norm([None], [0], 1, [None])


def test_fakes_come_with_the_schemas():
    """A program that only imports the extension can trace its operators."""
    program = """
import torch
from torch._subclasses import FakeTensorMode
from tests.cuda_on_cpu import build
build.library()
with FakeTensorMode():
    x = torch.ones(3, dtype=torch.float64)
    assert torch.ops.crsam.perturbation_scale(x, x, 0.0).shape == (3,)
    assert torch.ops.crsam.grad_norm([x], [0], 2, [None], [], None).shape == (2,)
    assert torch.ops.crsam.fd_gram([x] * 3, [0], 2, [None]).shape == (2, 9)
    torch.ops.crsam.perturb_([x], [x], [x], [0], x[:1], [False], 1)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
