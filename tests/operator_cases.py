"""Arguments for all operators at once, rows of awkward sizes and addresses, and what every fused backend is asked."""

import pytest
import torch
from torch.nn import Parameter

from crsam_ext import CRSAM
from crsam_ext.backends.torch import TorchOperators
from crsam_ext.ops import AdamOptions, Coefficients, SGDOptions
from crsam_ext.precision import compute_dtype

SIZES = (1, 3, 4097, 40000)
GROUPS = (0, 1, 1, 0)
SGD = SGDOptions(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01, nesterov=True, maximize=False)
ADAMW = AdamOptions(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, decoupled_weight_decay=True, maximize=False)
dtypes = pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16],
    ids=lambda d: str(d).removeprefix("torch."),
)


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


def check_same_as_float64(operators, dtype, **rows):
    """All operators in a row, against the torch backend in float64, which other tests hold to the reference."""
    found, expected = (
        run_all(operators, Case(dtype, **rows)),
        run_all(TorchOperators(), Case(dtype, **rows).in_float64()),
    )
    tolerance = 40 * torch.finfo(compute_dtype(dtype)).eps
    narrow = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0  # where the last word is a rounding
    for x, y in zip(found, expected, strict=True):
        assert torch.allclose(x, y, rtol=tolerance + narrow, atol=tolerance * max(1.0, y.abs().max().item()))


#: Operator, then bytes read and written an element in float32 and in bfloat16.
BYTES = [
    (Case.grad_norm, (4, 0), (2, 0)),
    (Case.perturb_first, (8, 8), (8, 2)),  # bfloat16: live, master and gradient are read, live is written
    (Case.perturb_second, (8, 4), (6, 2)),
    (Case.fd_gram, (12, 0), (6, 0)),
    (Case.sgd_step, (20, 8), (14, 10)),
    (Case.adamw_step, (24, 12), (18, 14)),
    (Case.combine, (16, 8), (10, 4)),
]
each_operator = pytest.mark.parametrize(
    ("operator", "float32", "bfloat16"), BYTES, ids=lambda x: getattr(x, "__name__", None)
)


def stepping(base, options, **more):
    """A function that makes a step of a small network, after a first one."""
    params = [Parameter(torch.randn(shape)) for shape in RESNET50_SCALED]
    optimizer = CRSAM(params, base, lr=0.1, **options, **more)

    def closure():
        for p in params:
            p.grad = torch.randn_like(p)

    optimizer.step(closure)
    return lambda: optimizer.step(closure)


def check_versions(operators):
    """The version of what an operator writes goes up by one, and no other."""
    case = Case(torch.float32)
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


def check_interrupted_perturb(operators, namespace, launched, monkeypatch):
    """Ctrl-C on either side of the launch: undo learns of all rows or of none."""
    case, perturb_ = Case(torch.float32), namespace.perturb_

    def interrupted(*arguments):
        if launched:
            perturb_(*arguments)
        raise KeyboardInterrupt

    w, undo = [p.clone() for p in case.live], []
    monkeypatch.setattr(namespace, "perturb_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        operators.perturb_(case.live, case.saved, case.grads[0], case.groups, case.scale, [False] * 2, 1, undo)
    assert len(undo) == int(launched)
    for live, saved in undo:
        torch._foreach_copy_(live, saved)
    assert all(torch.equal(p, x) for p, x in zip(case.live, w, strict=True))


def check_schemas_and_fakes(namespace):
    """What torch.library asks of every operator."""
    case, check = Case(torch.float32), torch.library.opcheck
    c, groups = case.coefficients, case.groups
    check(namespace.grad_norm, (case.grads[0], groups, 2, case.none))
    check(namespace.perturbation_scale, (case.scale, case.scale.clone(), 1e-12))
    check(namespace.perturb_, (case.live, case.saved, case.grads[0], groups, case.scale, [False, True], 1))
    check(namespace.fd_gram, (*case.grads, groups, 2, case.none))
    gram, norms, half = torch.ones(2, 9, dtype=torch.float64), [torch.ones(2, dtype=torch.float64)], case.scale[0]
    counters, taken, part = torch.zeros(4, dtype=torch.int64), [torch.ones(3)], [torch.ones(3)]
    first = (case.scale, c.a, c.b, counters)
    check(namespace.coefficients, (gram, norms, *first, taken, part, 3, True, [], half, 1.0, 1.0))
    check(namespace.coefficients, (gram, [], *first, taken, part, 3, False, [half] * 3, None, 1.0, 1.0))
    check(namespace.coefficients, (None, norms, *first, [], [], 1, False, [], None, 1.0, 1.0))
    numbers = [0.1, 0.9, 0.1, 0.01, 1.0, 0.0] * 2
    rest = (c.a, c.b, c.factor, c.ok)
    momentum, step = (case.live, case.saved, case.first), (groups, case.steps, numbers, [None] * 12)
    check(namespace.sgd_step_, (*momentum, *case.grads, *step, *rest))
    numbers = [0.1, 0.9, 0.99, 1e-8, 0.01, 1.0, 0.0] * 2
    moments, step = (*momentum, case.second), (groups, case.steps, numbers, [None] * 14)
    check(namespace.adamw_step_, (*moments, *case.grads, *step, *rest))
    check(namespace.combine_, (case.live, case.saved, *case.grads, groups, c.a, c.b, c.factor))


def check_other_groups(operators):
    """Tables are kept: rows of the same lengths in other groups must not get each other's."""
    grads = [torch.full((5,), float(i)) for i in (1, 2, 3)]
    for groups in ([0, 0, 1], [0, 1, 1], [1, 1, 1], [2, 0, 1]):
        expected = [sum(5.0 * i**2 for i, group in zip((1, 2, 3), groups, strict=True) if group == k) for k in range(3)]
        assert operators.grad_norm(grads, groups, 3, [None] * 3).tolist() == expected


#: What is changed in the arguments of perturb_, and what it says then.
wrong_arguments = pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: case.groups.__setitem__(0, 2), "group 2 is not one of 2"),
        (lambda case: case.groups.pop(), "groups has 3 entries, not 4"),
        (lambda case: case.grads[0].pop(), "grads has 3 entries, not 4"),
        (lambda case: case.grads[0].__setitem__(1, torch.zeros(4)), "grads has 4 elements, not 3"),
        (lambda case: case.grads[0].__setitem__(1, torch.zeros(3).double()), "grads is Double, not Float"),
        (lambda case: case.grads[0].__setitem__(1, torch.zeros(6)[::2]), "grads is not contiguous"),
        (lambda case: setattr(case, "scale", case.scale.float()), "scale is Float, not Double"),
    ],
)


def check_arguments(operators, change, message):
    """An argument that is wrong is an error that says how."""
    case = Case(torch.float32)
    change(case)
    with pytest.raises(RuntimeError, match=message):
        case.perturb_first(operators)


def check_options_as_tensors(operators, held_in, dtype):
    """A number and a tensor that holds it make the same step."""
    lr, betas = (0.125, (0.875, 0.75)) if held_in == torch.float32 else (0.1, (0.9, 0.999))  # exact in float32
    options = {"weight_decay": 0.25, "eps": 2.0**-20, "decoupled_weight_decay": True, "maximize": False}
    number = AdamOptions(lr=lr, betas=betas, **options)
    beta1, beta2 = (torch.tensor(beta, dtype=held_in) for beta in betas)
    tensor = AdamOptions(lr=torch.tensor(lr, dtype=held_in), betas=(beta1, beta2), **options)
    results = []
    for option in (number, tensor):
        case = Case(dtype)
        operators.adamw_step_(
            case.live, case.saved, case.first, case.second, case.grads, case.groups, case.steps, [option] * 2,
            case.coefficients,
        )  # fmt: skip
        results.append(case.tensors())
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
