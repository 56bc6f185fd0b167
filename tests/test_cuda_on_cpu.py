"""The CUDA sources, compiled for a CPU: what the tests of every backend do not ask.

Those tests run on this build as well, as backend "cuda_on_cpu". Here are the order of threads, bytes and launches, rows
of awkward sizes and addresses, and the sanitizers, which must see faults that are planted.
"""

import subprocess

import pytest
import torch
from torch.nn import Parameter

from crsam_ext import CRSAM
from crsam_ext.backends.cuda import CudaOperators
from crsam_ext.backends.torch import TorchOperators
from crsam_ext.ops import AdamOptions, Coefficients, SGDOptions, compute_dtype

from .cuda_on_cpu import build
from .cuda_on_cpu.build import counted

SIZES = (1, 3, 4097, 40000)
GROUPS = (0, 1, 1, 0)
SGD = SGDOptions(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01, nesterov=True, maximize=False)
ADAMW = AdamOptions(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, decoupled_weight_decay=True, maximize=False)
dtypes = pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16],
    ids=lambda d: str(d).removeprefix("torch."),
)


class Case:
    """Arguments of all operators, made from one seed."""

    def __init__(self, dtype, sizes=SIZES, groups=GROUPS, offset=0):
        generator = torch.Generator().manual_seed(1)
        self.groups, self.keeps_master = list(groups), False

        def rows(row_dtype):
            made = []
            for n in sizes:
                row = torch.empty(n + offset, dtype=row_dtype)[offset:]
                made.append(row.copy_(torch.randn(n, dtype=torch.float64, generator=generator)))
            return made

        wide = compute_dtype(dtype)
        self.live, self.grads = rows(dtype), [rows(dtype) for _ in range(3)]
        self.saved, self.first, self.second = rows(wide), rows(wide), rows(wide)
        for v in self.second:
            v.abs_()
        for w, p in zip(self.saved, self.live, strict=True):
            w.copy_(p)
        self.scale = torch.tensor([0.3, 0.2], dtype=torch.float64)
        steps = torch.ones(())
        self.steps = [steps] * len(sizes)
        self.coefficients = Coefficients(
            torch.tensor([0.1, 0.2], dtype=torch.float64),
            torch.tensor([0.3, 0.05], dtype=torch.float64),
            torch.tensor(0.7, dtype=torch.float64),
            torch.tensor(True),
        )
        self.none = [None] * len(sizes)

    def in_float64(self):
        """The same numbers in float64; updates are entered into ``saved`` where that was a master."""
        self.keeps_master = self.live[0].dtype.itemsize == 2
        for name in ("live", "saved", "first", "second"):
            setattr(self, name, [row.double() for row in getattr(self, name)])
        self.grads = [[row.double() for row in rows] for rows in self.grads]
        return self

    def grad_norm(self, operators):
        return operators.grad_norm(self.grads[0], self.groups, 2, self.none)

    def perturb_first(self, operators):
        operators.perturb_(self.live, self.saved, self.grads[0], self.groups, self.scale, [False, False], 1, [])

    def perturb_second(self, operators):
        operators.perturb_(self.live, self.saved, self.grads[0], self.groups, self.scale, [False, False], -1, [])

    def fd_gram(self, operators):
        return operators.fd_gram(*self.grads, self.groups, 2, self.none)

    def sgd_step(self, operators):
        operators.sgd_step_(
            self.live, self.saved, self.first, self.grads, self.groups, self.steps, [SGD, SGD], self.coefficients
        )

    def adamw_step(self, operators):
        operators.adamw_step_(
            self.live, self.saved, self.first, self.second, self.grads, self.groups, self.steps, [ADAMW, ADAMW],
            self.coefficients,
        )  # fmt: skip

    def combine(self, operators):
        operators.combine_(self.live, self.saved, self.grads, self.groups, self.coefficients)

    OPERATORS = (grad_norm, perturb_first, perturb_second, fd_gram, sgd_step, adamw_step, combine)

    def tensors(self):
        lists = (self.live, self.saved, self.first, self.second, *self.grads)
        return [row for rows in lists for row in rows]


def run_all(operators, case):
    """Everything that the operators have written and returned, in float64."""
    returned = []
    for operator in Case.OPERATORS:
        returned.append(operator(case, operators))
        if case.keeps_master and operator in (Case.sgd_step, Case.adamw_step):
            torch._foreach_copy_(case.saved, case.live)
    return [x.double().clone() for x in (*case.tensors(), *(r for r in returned if r is not None))]


# Values --------------------------------------------------------------------------------------------------------------

RESNET50_SCALED = [
    (64, 3, 7, 7),
    (64,),
    (64,),
    (16, 64, 1, 1),
    (16, 16, 3, 3),
    (64, 16, 1, 1),
    (64,),
    (250, 128),
    (250,),
]
ROWS = {
    "odd": {"sizes": SIZES},
    "misaligned": {"sizes": SIZES, "offset": 1},
    "resnet": {"sizes": [torch.Size(s).numel() for s in RESNET50_SCALED], "groups": [0, 1, 0, 0, 1, 0, 1, 0, 1]},
    "tiny": {"sizes": [1 + i % 7 for i in range(2000)], "groups": [i % 2 for i in range(2000)]},
}


@dtypes
@pytest.mark.parametrize("rows", ROWS)
def test_same_as_float64(rows, dtype, library):
    """All operators in a row, against the torch backend in float64, which other tests hold to the reference."""
    found = run_all(CudaOperators(), Case(dtype, **ROWS[rows]))
    expected = run_all(TorchOperators(), Case(dtype, **ROWS[rows]).in_float64())
    tolerance = 40 * torch.finfo(compute_dtype(dtype)).eps
    narrow = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0  # where the last word is a rounding
    for x, y in zip(found, expected, strict=True):
        assert torch.allclose(x, y, rtol=tolerance + narrow, atol=tolerance * max(1.0, y.abs().max().item()))


def test_sums_of_a_hundred_million_elements(library):
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
    gram = operators.fd_gram(*([g] for g in grads), [0], 1, [None])[0, :6]
    i, j = torch.triu_indices(3, 3)
    assert ((gram - expected[i, j]).abs() <= 1e-6 * norms[i] * norms[j]).all()


LISTS = ("live", "saved", "first", "second", "grad", "grad_ascent", "grad_descent")


@dtypes
@pytest.mark.parametrize("misaligned", LISTS)
def test_one_list_misaligned(misaligned, dtype, library):
    """Wide accesses need all addresses of a row aligned: the shim aborts at one that is not."""
    results = []
    for shift in (False, True):
        case = Case(dtype)
        if shift:
            lists = dict(zip(LISTS, (case.live, case.saved, case.first, case.second, *case.grads), strict=True))
            rows = lists[misaligned]
            rows[:] = [torch.cat([row[:1], row])[1:] for row in rows]
        results.append(run_all(CudaOperators(), case))
    for x, y in zip(*results, strict=True):  # sums are made in another order
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
@pytest.mark.parametrize(
    ("operator", "float32", "bfloat16"),
    [
        (Case.grad_norm, (4, 0), (2, 0)),
        (Case.perturb_first, (8, 8), (8, 2)),  # bfloat16: live, master and gradient are read, live is written
        (Case.perturb_second, (8, 4), (6, 2)),
        (Case.fd_gram, (12, 0), (6, 0)),
        (Case.sgd_step, (20, 8), (14, 10)),
        (Case.adamw_step, (24, 12), (18, 14)),
        (Case.combine, (16, 8), (10, 4)),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_bytes(operator, float32, bfloat16, rows, shim):
    """Bytes read and written an element, and one launch, whatever the number of rows."""
    for dtype, (read, written) in ((torch.float32, float32), (torch.bfloat16, bfloat16)):
        case, operators = Case(dtype, **ROWS[rows]), CudaOperators()
        elements = sum(p.numel() for p in case.live)
        assert counted(shim, lambda: operator(case, operators)) == [1, read * elements, written * elements]  # noqa: B023


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"regularizer": "log", "max_grad_norm": 1.0}], ids=["linear", "log"])
def test_launches_of_a_step(options, base, cuda_on_cpu, shim):
    params = [Parameter(torch.randn(shape)) for shape in RESNET50_SCALED]
    optimizer = CRSAM(params, base, lr=0.1, backend="cuda", **options)

    def closure():
        for p in params:
            p.grad = torch.randn_like(p)

    optimizer.step(closure)
    launches, _, _ = counted(shim, lambda: optimizer.step(closure))
    assert launches == (7 if options else 8)


def test_table_is_copied_when_a_pointer_has_changed(library):
    """And not in every step: the copies that an operator makes, as the profiler counts them."""
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
        assert copies(operator) == (operator is not Case.perturb_second)  # which takes the table of the first one
        assert copies(operator) == 0


# Manners -------------------------------------------------------------------------------------------------------------


def test_versions_of_what_is_written(library):
    case, operators = Case(torch.float32), CudaOperators()
    written = {
        Case.perturb_first: {"live", "saved"},
        Case.perturb_second: {"live", "saved"},
        Case.sgd_step: {"live", "saved", "first"},
        Case.adamw_step: {"live", "saved", "first", "second"},
        Case.combine: {"live"},
    }
    for operator in Case.OPERATORS:
        lists = {name: getattr(case, name) for name in ("live", "saved", "first", "second")}
        before = {name: [t._version for t in tensors] for name, tensors in lists.items()}
        operator(case, operators)
        for name, tensors in lists.items():
            bumped = {t._version - v for t, v in zip(tensors, before[name], strict=True)}
            assert bumped == {int(name in written.get(operator, ()))}, (operator.__name__, name)


@pytest.mark.parametrize("launched", [False, True], ids=["before", "after"])
def test_interrupted_perturb_can_be_undone(launched, library, monkeypatch):
    """Ctrl-C on either side of the launch: undo learns of all rows or of none."""
    case, perturb_ = Case(torch.float32), torch.ops.crsam.perturb_

    def interrupted(*arguments):
        if launched:
            perturb_(*arguments)
        raise KeyboardInterrupt

    w, undo = [p.clone() for p in case.live], []
    monkeypatch.setattr(torch.ops.crsam, "perturb_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        CudaOperators().perturb_(case.live, case.saved, case.grads[0], case.groups, case.scale, [False] * 2, 1, undo)
    assert len(undo) == (len(w) if launched else 0)
    for live, saved in undo:
        live.copy_(saved)
    assert all(torch.equal(p, x) for p, x in zip(case.live, w, strict=True))


def test_schemas_and_fakes(library):
    CudaOperators()  # registers the fakes
    case = Case(torch.float32)
    check, operators = torch.library.opcheck, torch.ops.crsam
    c, scale = case.coefficients, case.scale
    check(operators.grad_norm, (case.grads[0], case.groups, 2, case.none))
    check(operators.perturbation_scale, (scale, scale.clone(), 1e-12))
    check(operators.perturb_, (case.live, case.saved, case.grads[0], case.groups, scale, [False, True], 1))
    check(operators.fd_gram, (*case.grads, case.groups, 2, case.none))
    gram, counters = torch.rand(2, 9, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    steps = [torch.zeros(4)], [torch.ones(4)]
    check(operators.coefficients, (gram, [], scale, scale, scale, counters, *steps, 3, True, [], scale[0], 1.0, 1.0))
    check(operators.coefficients, (None, [scale], scale, scale, scale, counters, [], [], 1, False, [], None, 1.0, 1.0))
    gradients, decision = (*case.grads, case.groups, case.steps), (c.a, c.b, c.factor, c.ok)
    sgd = [0.1, 0.9, 0.1, 0.01, 1.0, 0.0] * 2
    check(operators.sgd_step_, (case.live, case.saved, case.first, *gradients, sgd, [None] * 12, *decision))
    adam, moments = [0.1, 0.9, 0.99, 1e-8, 0.01, 1.0, 0.0] * 2, (case.first, case.second)
    check(operators.adamw_step_, (case.live, case.saved, *moments, *gradients, adam, [None] * 14, *decision))
    check(operators.combine_, (case.live, case.saved, *case.grads, case.groups, c.a, c.b, c.factor))


def test_compiled_without_a_graph_break(library):
    """torch.compile of a function that calls all operators: one graph, and what they write is written."""
    case, expected, operators = Case(torch.float32), Case(torch.float32), CudaOperators()

    def body(case):
        return [operator(case, operators) for operator in Case.OPERATORS]

    returned = torch.compile(body, fullgraph=True, backend="aot_eager")(case)
    for x, y in zip(returned, body(expected), strict=True):
        assert x is y is None or torch.equal(x, y)
    for x, y in zip(case.tensors(), expected.tensors(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: case.groups.__setitem__(0, 2), "group 2 is not one of 2"),
        (lambda case: case.groups.pop(), "groups has 3 entries, not 4"),
        (lambda case: case.grads[0].__setitem__(1, torch.zeros(4)), "grads has 4 elements, not 3"),
        (lambda case: case.grads[0].__setitem__(1, torch.zeros(3).double()), "grads is Double, not Float"),
        (lambda case: case.grads[0].__setitem__(1, torch.zeros(6)[::2]), "grads is not contiguous"),
    ],
)
def test_arguments_are_checked(change, message, library):
    case = Case(torch.float32)
    change(case)
    with pytest.raises(RuntimeError, match=message):
        case.perturb_first(CudaOperators())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("held_in", "lr", "betas"),
    [(torch.float32, 0.125, (0.875, 0.75)), (torch.float64, 0.1, (0.9, 0.999))],  # the first ones are exact in float32
    ids=["float32", "float64"],
)
def test_options_as_tensors(held_in, lr, betas, dtype, library):
    """A number and a tensor that holds it make the same step."""
    options = {"weight_decay": 0.25, "eps": 2.0**-20, "decoupled_weight_decay": True, "maximize": False}
    number = AdamOptions(lr=lr, betas=betas, **options)
    beta1, beta2 = (torch.tensor(beta, dtype=held_in) for beta in betas)
    tensor = AdamOptions(lr=torch.tensor(lr, dtype=held_in), betas=(beta1, beta2), **options)
    results = []
    for option in (number, tensor):
        case = Case(dtype)
        CudaOperators().adamw_step_(
            case.live, case.saved, case.first, case.second, case.grads, case.groups, case.steps, [option] * 2,
            case.coefficients,
        )  # fmt: skip
        results.append(case.tensors())
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


# Faults --------------------------------------------------------------------------------------------------------------

PLAIN = ("-O0",)
ADDRESSES = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
THREADS = ("-O1", "-fsanitize=thread", "-DEMU_PARALLEL")


# ThreadSanitizer is slow in making fibers: where the fault is what matters, blocks are shorter.
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
            ("reduce.cuh", "__threadfence();  // what the block has summed is seen before its ticket", ""),
            "data race",
            id="fence-before-ticket",
        ),
        pytest.param(
            THREADS,
            ("reduce.cuh", "__threadfence();  // other blocks' partial sums are read after their tickets", ""),
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
