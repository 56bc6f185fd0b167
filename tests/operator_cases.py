"""Arguments for all operators, with rows of unusual sizes and addresses, and the checks that every fused backend must
pass."""

import re

import pytest
import torch
from torch.nn import Parameter

from crsam_ext import CRSAM
from crsam_ext.backends.fused import KERNELS
from crsam_ext.backends.torch import TorchOperators
from crsam_ext.ops import Coefficients, Direction
from crsam_ext.precision import compute_dtype, has_master
from crsam_ext.updates import AdamOptions, SGDOptions

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
        self.out, self.kept = rows(dtype), rows(wide)
        for v in self.second:
            v.abs_()
        for w, p in zip(self.saved, self.live, strict=True):
            w.copy_(p)
        self.scale = torch.tensor([0.3, 0.2], dtype=torch.float64)
        steps = torch.ones(())
        self.steps = [steps] * len(sizes)
        self.coefficients = Coefficients(
            torch.tensor([[0.4, 0.25], [-0.2, 0.15]], dtype=torch.float64),
            torch.tensor(0.7, dtype=torch.float64),
            torch.tensor(True),
        )
        self.none = [None] * len(sizes)
        self.direction = Direction(rows(wide), torch.tensor(0.6, dtype=torch.float64))

    def in_float64(self):
        """Return the same numbers in float64. If ``saved`` is a master, the updates are written to it."""
        self.keeps_master = has_master(self.live[0].dtype)
        for name in ("live", "saved", "first", "second", "out", "kept"):
            setattr(self, name, [row.double() for row in getattr(self, name)])
        self.direction = self.direction._replace(rows=[row.double() for row in self.direction.rows])
        self.grads = [[row.double() for row in rows] for rows in self.grads]
        return self

    def grad_norm(self, operators):
        return operators.grad_norm(self.grads[0], self.groups, 2, self.none)

    def perturb_first(self, operators):
        operators.perturb_(self.live, self.saved, self.grads[0], self.groups, self.scale, [False, False], 1, [])

    def perturb_second(self, operators):
        operators.perturb_(self.live, self.saved, self.grads[0], self.groups, self.scale, [False, False], -1, [])

    def fd_gram(self, operators):
        return operators.fd_gram(self.grads, self.groups, 2, self.none)

    def fd_combine(self, operators):
        weights = self.coefficients.pass_weights, self.scale[0]
        operators.fd_combine_(self.out, self.grads, self.groups, 2, self.none, *weights)

    def step(self, operators, state, options):
        operators.step_(
            self.live, self.saved, state, self.grads, self.groups, self.steps, [options] * 2, self.coefficients
        )

    def sgd_step(self, operators):
        self.step(operators, [self.first], SGD)

    def adam_step(self, operators):
        self.step(operators, [self.first, self.second], ADAMW)

    def combine(self, operators):
        operators.combine_(self.live, self.saved, self.grads, self.groups, self.coefficients)

    def norm_with_direction(self, operators):
        return operators.grad_norm(self.grads[0], self.groups, 2, self.none, self.direction)

    def fd_direction(self, operators):
        c = self.coefficients
        operators.fd_direction_(self.kept, self.grads, self.groups, c.pass_weights, c.factor, c.ok)

    def step_between(self, operators, state, options):
        arguments = [self.groups, self.steps, [options] * 2, self.coefficients, self.direction]
        operators.step_(self.live, self.saved, state, self.grads[:1], *arguments)

    def sgd_step_between(self, operators):
        self.step_between(operators, [self.first], SGD)

    def adam_step_between(self, operators):
        self.step_between(operators, [self.first, self.second], ADAMW)

    def combine_between(self, operators):
        operators.combine_(self.live, self.saved, self.grads[:1], self.groups, self.coefficients, self.direction)

    OPERATORS = (
        grad_norm, perturb_first, perturb_second, fd_gram, fd_direction, sgd_step, adam_step, fd_combine, combine,
        norm_with_direction, sgd_step_between, adam_step_between, combine_between,
    )  # fmt: skip

    def tensors(self):
        lists = (self.live, self.saved, self.first, self.second, self.out, self.kept, self.direction.rows, *self.grads)
        return [row for rows in lists for row in rows]


def run_all(operators, case):
    """Run all operators and return everything that they write and return, in float64."""
    returned = []
    for operator in Case.OPERATORS:
        returned.append(operator(case, operators))
        if case.keeps_master and "step" in operator.__name__:
            torch._foreach_copy_(case.saved, case.live)
    return [x.double().clone() for x in (*case.tensors(), *(r for r in returned if r is not None))]


def check_same_as_float64(operators, dtype, **rows):
    """Compare all operators with the torch backend in float64, which other tests compare with the reference."""
    found, expected = (
        run_all(operators, Case(dtype, **rows)),
        run_all(TorchOperators(), Case(dtype, **rows).in_float64()),
    )
    tolerance = 40 * torch.finfo(compute_dtype(dtype)).eps
    narrow = torch.finfo(dtype).eps / 2 if has_master(dtype) else 0  # the last operation rounds to dtype
    for x, y in zip(found, expected, strict=True):
        assert torch.allclose(x, y, rtol=tolerance + narrow, atol=tolerance * max(1.0, y.abs().max().item()))


#: Each operator of a case, its name and variant in `KERNELS`.
VARIANTS = [
    (Case.grad_norm, ("grad_norm",)),
    (Case.perturb_first, ("perturb_", 1)),
    (Case.perturb_second, ("perturb_", -1)),
    (Case.fd_gram, ("fd_gram",)),
    (Case.fd_combine, ("fd_combine_",)),
    (Case.sgd_step, ("step_", 3, 1)),
    (Case.adam_step, ("step_", 3, 2)),
    (Case.combine, ("combine_", 3)),
    (Case.fd_direction, ("fd_direction_",)),
    (Case.norm_with_direction, ("grad_norm", 1)),
    (Case.sgd_step_between, ("step_", 1, 1, 1)),
    (Case.adam_step_between, ("step_", 1, 2, 1)),
    (Case.combine_between, ("combine_", 1, 1)),
]
each_operator = pytest.mark.parametrize(("operator", "variant"), VARIANTS, ids=lambda x: getattr(x, "__name__", None))


def moved(variant, dtype):
    """Return the bytes that an operator reads and writes per element."""
    name, *which = variant
    return KERNELS[name].nbytes(dtype, *which)


def stepping(base, options, **more):
    """Return a function that makes a step of a small network; the first step is already done."""
    params = [Parameter(torch.randn(shape)) for shape in RESNET50_SCALED]
    optimizer = CRSAM(params, base, lr=0.1, **options, **more)

    def closure():
        for p in params:
            p.grad = torch.randn_like(p)

    optimizer.step(closure)
    return lambda: optimizer.step(closure)


def check_versions(operators):
    """Check that an operator increments the versions of the tensors that it writes by one, and no other version."""
    case = Case(torch.float32)
    written = {
        Case.perturb_first: {"live", "saved"},
        Case.perturb_second: {"live", "saved"},
        Case.sgd_step: {"live", "saved", "first"},
        Case.adam_step: {"live", "saved", "first", "second"},
        Case.combine: {"live"},
        Case.fd_direction: {"kept"},
        Case.sgd_step_between: {"live", "saved", "first"},
        Case.adam_step_between: {"live", "saved", "first", "second"},
        Case.combine_between: {"live"},
    }
    for operator in Case.OPERATORS:
        lists = {name: getattr(case, name) for name in ("live", "saved", "first", "second", "kept")}
        before = {name: [t._version for t in tensors] for name, tensors in lists.items()}
        operator(case, operators)
        for name, tensors in lists.items():
            bumped = {t._version - v for t, v in zip(tensors, before[name], strict=True)}
            assert bumped == {int(name in written.get(operator, ()))}, (operator.__name__, name)


def check_interrupted_perturb(operators, namespace, launched, monkeypatch):
    """Check Ctrl-C before and after the launch: undo contains all rows or none."""
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
    """Check every operator with torch.library.opcheck."""
    case, check = Case(torch.float32), torch.library.opcheck
    c, groups = case.coefficients, case.groups
    flat = [row for rows in case.grads for row in rows]
    added = case.direction.rows, case.direction.weight
    for direction in (([], None), added):
        check(namespace.grad_norm, (case.grads[0], groups, 2, case.none, *direction))
    direction_arguments = ([torch.empty_like(h) for h in case.kept], flat, groups, c.pass_weights, c.factor, c.ok)
    check(namespace.fd_direction_, direction_arguments)
    check(namespace.perturbation_scale, (case.scale, case.scale.clone(), 1e-12))
    for grad_scale in (None, case.direction.weight):
        numbers = case.scale, case.scale.clone(), case.direction.weight.clone()
        check(namespace.direction_weight, (*numbers, grad_scale, 0.5, 1e-12))
    check(namespace.perturb_, (case.live, case.saved, case.grads[0], groups, case.scale, [False, True], 1))
    check(namespace.fd_gram, (flat, groups, 2, case.none))
    out = [torch.empty_like(g) for g in case.grads[0]]
    check(namespace.fd_combine_, (out, flat, groups, 2, case.none, c.pass_weights, case.scale[0]))
    gram, norms, half = torch.ones(2, 9, dtype=torch.float64), [torch.ones(2, dtype=torch.float64)], case.scale[0]
    counters, taken, part = torch.zeros(4, dtype=torch.int64), [torch.ones(3)], [torch.ones(3)]
    first = (case.scale, case.scale.clone(), case.scale.clone(), counters)
    check(namespace.coefficients, (gram, norms, *first, taken, part, "log", [], half, 1.0, 1.0))
    check(namespace.coefficients, (gram, [], *first, taken, part, "linear", [half] * 3, None, 1.0, 1.0))
    check(namespace.coefficients, (None, norms, *first, [], [], "linear", [], None, 1.0, 1.0))
    rest = (c.pass_weights, c.factor, c.ok)
    for state, options in (([*case.first], SGD), ([*case.first, *case.second], ADAMW)):
        numbers = [float(x) for x in options.numbers] * 2
        arguments = (case.live, case.saved, state, flat, groups, case.steps, options.rule, numbers)
        check(namespace.step_, (*arguments, [None] * len(numbers), *rest, [], None))
        between = (case.live, case.saved, state, case.grads[0], groups, case.steps, options.rule, numbers)
        check(namespace.step_, (*between, [None] * len(numbers), *rest, *added))
    *earlier, last = case.grads
    earlier = [row for rows in earlier for row in rows]
    check(namespace.combine_, (case.live, case.saved, earlier, last, groups, c.pass_weights, c.factor, [], None))
    check(namespace.combine_, (case.live, case.saved, [], last, groups, c.pass_weights, None, *added))


def check_other_groups(operators):
    """Check that a cached table is not used for rows of the same lengths in other groups."""
    grads = [torch.full((5,), float(i)) for i in (1, 2, 3)]
    for groups in ([0, 0, 1], [0, 1, 1], [1, 1, 1], [2, 0, 1]):
        expected = [sum(5.0 * i**2 for i, group in zip((1, 2, 3), groups, strict=True) if group == k) for k in range(3)]
        assert operators.grad_norm(grads, groups, 3, [None] * 3).tolist() == expected


#: Changes of the arguments of perturb_, and the resulting messages.
wrong_arguments = pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: case.groups.__setitem__(0, 2), "perturb_: groups[0] is 2, not from 0 to 1"),
        (lambda case: case.groups.pop(), "perturb_: groups has 3 entries, not 4"),
        (lambda case: case.grads[0].pop(), "perturb_: grads has 3 entries, not 4"),
        (lambda case: case.grads[0].__setitem__(1, torch.zeros(4)), "perturb_: grads[1] has 4 elements, not 3"),
        (lambda case: case.grads[0].__setitem__(1, torch.zeros(3).double()), "perturb_: grads[1] is Double, not Float"),
        (lambda case: case.grads[0].__setitem__(1, torch.zeros(6)[::2]), "perturb_: grads[1] is not contiguous"),
        (lambda case: setattr(case, "scale", case.scale.float()), "perturb_: scale is Float, not Double"),
    ],
)


def check_arguments(operators, change, message):
    """Check that an invalid argument raises an error that describes it."""
    case = Case(torch.float32)
    change(case)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        case.perturb_first(operators)


#: The same for step_, some of whose arguments are lists of lists.
wrong_arguments_of_a_step = pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: case.grads[2].__setitem__(3, torch.zeros(4)), "step_: grads[2][3] has 4 elements, not 40000"),
        (lambda case: case.grads[1].__setitem__(0, torch.zeros(1).half()), "step_: grads[1][0] is Half, not Float"),
        (lambda case: case.grads.pop(), "step_: grads has 2 entries, not 1 or 3"),
        (lambda case: case.second.__setitem__(2, torch.zeros(3)), "step_: state[1][2] has 3 elements, not 4097"),
        (lambda case: setattr(case, "first", case.first[:3]), "step_: state[0] has 3 entries, not 4"),
        (lambda case: case.steps.__setitem__(1, torch.zeros(2)), "step_: steps[1] has 2 elements, not 1"),
        (lambda case: case.direction.rows.pop(), "step_: direction has 3 entries, not 4"),
        (lambda case: case.direction.rows.__setitem__(0, torch.zeros(1).half()), "step_: direction[0] is Half, not F"),
    ],
)


def check_arguments_of_a_step(operators, change, message):
    """Check that the message names the row in a list of lists."""
    case = Case(torch.float32)
    change(case)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        operators._ops.step_(
            case.live, case.saved, [case.first, case.second], case.grads, case.groups, case.steps, "adam",
            [0.1] * 14, [None] * 14, case.coefficients.pass_weights, None, case.coefficients.ok, case.direction.rows,
            case.direction.weight,
        )  # fmt: skip


def check_unknown_names(operators):
    """Check the errors for an unknown rule and an unknown regularizer."""
    case, scale = Case(torch.float32), Case(torch.float32).scale
    with pytest.raises(RuntimeError, match="step_: unknown rule lion"):
        operators._ops.step_(
            case.live, case.saved, [], case.grads, case.groups, case.steps, "lion", [], [],
            case.coefficients.pass_weights, None, case.coefficients.ok, [], None,
        )  # fmt: skip
    counters = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="coefficients: unknown regularizer cubic"):
        operators._ops.coefficients(
            None, [scale], scale, scale, scale, counters, [], [], "cubic", [], None, 1.0, 1.0
        )  # fmt: skip


def check_options_as_tensors(operators, held_in, dtype):
    """Check that a number and a tensor with the same value make the same step."""
    lr, betas = (0.125, (0.875, 0.75)) if held_in == torch.float32 else (0.1, (0.9, 0.999))  # exact in float32
    options = {"weight_decay": 0.25, "eps": 2.0**-20, "decoupled_weight_decay": True, "maximize": False}
    number = AdamOptions(lr=lr, betas=betas, **options)
    beta1, beta2 = (torch.tensor(beta, dtype=held_in) for beta in betas)
    tensor = AdamOptions(lr=torch.tensor(lr, dtype=held_in), betas=(beta1, beta2), **options)
    results = []
    for option in (number, tensor):
        case = Case(dtype)
        case.step(operators, [case.first, case.second], option)
        results.append(case.tensors())
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
