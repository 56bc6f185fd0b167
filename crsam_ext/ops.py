r"""The operators between the gradients of a CR-SAM step: their signatures and their mathematics.

Notation, as in the paper (Wu, Luo, Wunsch, AAAI 2024, arXiv 2312.13555). All parameters together are :math:`w`, and

.. math::
    g_0 = \nabla L(w), \quad g_+ = \nabla L(w + e), \quad g_- = \nabla L(w - e), \qquad
    d_1 = g_+ - g_-, \quad d_2 = (g_+ - g_0) + (g_- - g_0)

are ``grad``, ``grad_ascent``, ``grad_descent`` and the first and second difference. The base optimizer receives
:math:`\hat g = c\,(g_+ + a\,d_2 + b\,d_1)`, where ``c`` is the clip factor.

Conventions that hold for every operator:

- Tensors come as lists of *rows*: 1-D, contiguous, all of one device and one dtype (float64, float32, float16 or
  bfloat16). ``groups[i]`` says which parameter group row ``i`` belongs to; every per-group quantity is a sequence or a
  tensor with one entry a group.
- ``live`` is what the model reads. ``saved`` is :math:`w`, in the compute dtype: float64 for float64 rows, else
  float32. For float16 and bfloat16 it is the master copy, which outlives the step; for the others it is valid
  from ``perturb_(sign=+1)`` to the end of the step.
- Arithmetic is done in the compute dtype; sums over elements end in float64.
- An underscore ends the name of an operator that writes into its arguments; it returns nothing.
- Nothing here synchronises with the host: what is computed on the device stays there.

Each operator is one pass over its rows; ``KERNELS`` in :mod:`crsam_ext.backends.fused` has the bytes that it moves.
Saving :math:`w` at the beginning of each step rather than keeping a copy from the last one costs nothing in total (the
step need not write the copy) and honours every change that the user makes to a parameter between steps, also through
``p.data``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import host

if TYPE_CHECKING:
    from typing import Self  # from Python 3.11 on

__all__ = [
    "CLIP_EPSILON",
    "COUNTERS",
    "EPSILON",
    "GRAM",
    "PASSES",
    "REGULARIZERS",
    "Coefficients",
    "Direction",
    "Operators",
    "Options",
    "Regularizer",
    "pass_weights",
    "quadratic_form",
    "scalar",
]

#: What is added to the gradient norm before dividing by it, as in the published SAM and CR-SAM implementations.
EPSILON = 1e-12

#: What is added to the norm of the update's gradient before the clip divides by it, as in
#: :func:`torch.nn.utils.clip_grad_norm_`, so that the two can be exchanged.
CLIP_EPSILON = 1e-6

#: The gradients of a full step: g0, g+ and g-.
PASSES = 3

#: Entries of the Gram matrix of g0 and the differences: its upper triangle row by row, then h with each of them.
GRAM = PASSES * (PASSES + 1) // 2 + PASSES

#: What is counted over the steps, in the order of the counters that :meth:`Operators.coefficients` advances.
COUNTERS = ("skipped", "curvature_dropped", "gradient_norm_dropped", "capped")


def scalar(value: float | Tensor) -> Tensor:
    """A hyper-parameter as a tensor: a number as float64 on the CPU, whatever torch's default dtype and device are."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")


class Regularizer(NamedTuple):
    """What :class:`crsam_ext.CRSAM` must know of a regularizer; :meth:`Operators.coefficients` has its formula."""

    alpha: float  #: default weight of the curvature term
    max_ratio: float  #: default cap of the norm of its gradient, over the norm of g+
    #: a from alpha and kappa, and b from beta and sigma; None for a = alpha and b = beta.
    weight: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def measures(self) -> bool:
        """Whether kappa and sigma of a step are needed."""
        return self.weight is not None


REGULARIZERS = {
    "linear": Regularizer(alpha=0.1, max_ratio=math.inf),
    "log": Regularizer(alpha=0.01, max_ratio=1.0, weight=lambda weight, x: torch.where(x > 0, weight / x, 0.0)),
}


@dataclass(frozen=True)
class Options(ABC):
    """One parameter group's options of an update rule, under torch's names; a subclass for every rule."""

    #: The name of the rule: backends have its formula under this name.
    rule: ClassVar[str]
    #: Names of its state buffers.
    state: ClassVar[tuple[str, ...]]

    maximize: bool

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Self:
        return cls(*map(group.__getitem__, _names_of(cls)))

    @property
    @abstractmethod
    def numbers(self) -> tuple[float | Tensor, ...]:
        """The options in the order in which the kernels' rules read them, ``maximize`` first."""


@cache
def _names_of(options: type[Options]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(options))


class Coefficients(NamedTuple):
    """What :meth:`Operators.coefficients` decides for a step; every tensor float64 on one device, unless noted."""

    pass_weights: Tensor  #: [PASSES - 1, groups], c_i of g_i - g0 in ghat = c (g+ + sum of c_i (g_i - g0))
    factor: Tensor | None  #: 0-dim, the clip factor, over the scale of the gradients; None when there is neither
    ok: Tensor  #: 0-dim bool, False when a gradient held a NaN or an infinity: the step is skipped
    kappa: Tensor | None = None  #: 0-dim, curvature along e, of the log regularizer
    sigma: Tensor | None = None  #: 0-dim, loss difference along e, of the log regularizer
    regularizer_ratio: Tensor | None = None  #: 0-dim, norm of a d2 + b d1 over the norm of g+, before the cap
    capped: Tensor | None = None  #: 0-dim bool, whether the cap acted

    @property
    def a(self) -> Tensor:
        """[groups], weight of the second difference."""
        return (self.pass_weights[0] + self.pass_weights[1]) / 2

    @property
    def b(self) -> Tensor:
        """[groups], weight of the first difference."""
        return (self.pass_weights[0] - self.pass_weights[1]) / 2


class Direction(NamedTuple):
    """What a step without a perturbation adds to its gradient: rows of h, of the last step that had one."""

    rows: Sequence[Tensor]  #: in the compute dtype
    weight: Tensor  #: 0-dim float64, what h is multiplied with


def pass_weights(a: Tensor, b: Tensor) -> Tensor:
    """[PASSES - 1, groups], from a and b: a d2 + b d1 = (a + b) (g+ - g0) + (a - b) (g- - g0)."""
    return torch.stack([a + b, a - b])


def quadratic_form(gram: Tensor, x: float, y: Tensor | float, z: Tensor | float) -> Tensor:
    """Squared norm of x g0 + y d1 + z d2 over all groups, from the [groups, >=6] Gram matrix."""
    g00, g01, g02, g11, g12, g22 = gram[:, :6].unbind(1)
    form = x * x * g00 + y * y * g11 + z * z * g22 + 2 * (x * y * g01 + x * z * g02 + y * z * g12)
    return form.sum().clamp(min=0)


class Operators(ABC):
    """The operators. A backend implements them; :mod:`crsam_ext.backends` chooses the backend."""

    name: ClassVar[str]
    #: Rows of parameters with fewer elements than this are merged with their neighbours, their gradients gathered.
    #: 0 for kernels that see addresses: a row is a parameter, and its gradient may be contiguous in any shape.
    gather_below: int
    #: Whether :meth:`fd_gram` costs hardly more than the norms of the three gradients, and is always run.
    fuses_gram: ClassVar[bool]
    #: The functions of :mod:`crsam_ext.host` for its lists, there or compiled. Operators take any lists of tensors and
    #: groups; a ``host.Column`` or ``host.Groups`` they look at once.
    host: host.Host = host

    def selects(self, row: Tensor) -> bool:
        """Whether numbers must stay on the device of ``row``, so that a choice between two of them is an operation."""
        return True

    @abstractmethod
    def grad_norm(
        self,
        grads: Sequence[Tensor],
        groups: Sequence[int],
        num_groups: int,
        weights: Sequence[Tensor | None],
        direction: Direction | None = None,
    ) -> Tensor:
        r"""Squared norm of the gradient per group: :math:`\|g\|^2`, or :math:`\||w|\,g\|^2` where weights are given.

        Args:
            grads: rows of a gradient.
            groups: the group of each row.
            num_groups: how many groups there are.
            weights: for each row None, or the row of parameters that it is weighted with (ASAM), in its own dtype: w as
                the model reads it, that is, rounded where there is a master.
            direction: added to the gradient before it is squared; not together with weights.
        Returns:
            float64 tensor [num_groups]. Squared, so that groups, devices and processes add up. The first sums may be
            made in the compute dtype, where an element beyond 1.8e19 counts as infinite.
        """

    def perturbation_scale(self, squared_norm: Tensor, rho: Tensor) -> Tensor:
        r""":math:`\rho / (\|g_0\| + \varepsilon)` per group, with one norm over all groups.

        Args:
            squared_norm: float64 [groups], from :meth:`grad_norm` (weighted where the group is adaptive).
            rho: float64 [groups], the radius of each group.
        Returns:
            float64 tensor [groups].
        """
        return rho / (squared_norm.sum().sqrt() + EPSILON)

    def direction_weight(
        self,
        squared_norm: Tensor,
        squared_direction: Tensor,
        decay: Tensor,
        grad_scale: Tensor | None,
        max_ratio: float,
    ) -> Tensor:
        r""":math:`\omega = \min(\delta, r\,\|g_0\| / (\|h\| + \varepsilon))`: :math:`\|\omega h\| \le r \|g_0\|`.

        Args:
            squared_norm: float64 [groups], of g0, from :meth:`grad_norm`.
            squared_direction: float64 [groups], of h.
            decay: 0-dim float64, :math:`\delta`.
            grad_scale: 0-dim float64, what g0 was multiplied with, and so :math:`\omega` is too; or None.
            max_ratio: r.
        Returns:
            float64 0-dim tensor.
        """
        most = max_ratio * squared_norm.sum().sqrt() / (squared_direction.sum().sqrt() + EPSILON)
        return torch.minimum(most, decay if grad_scale is None else decay * grad_scale)

    @abstractmethod
    def perturb_(
        self,
        live: Sequence[Tensor],
        saved: Sequence[Tensor],
        grads: Sequence[Tensor],
        groups: Sequence[int],
        scale: Tensor,
        adaptive: Sequence[bool],
        sign: int,
        undo: list[tuple[Sequence[Tensor], Sequence[Tensor]]],
        stochastic: bool = False,
    ) -> None:
        r"""Write :math:`w \pm e` into ``live``, absolutely, from the saved :math:`w`.

        :math:`e = s\,g_0` (SAM, Foret et al. 2021) or :math:`e = s\,w^2 g_0` (ASAM, Kwon et al. 2021), elementwise,
        where :math:`s` is :meth:`perturbation_scale`. ``sign=+1`` begins a step and saves first: float64 and float32
        rows copy ``live`` into ``saved``; for the others ``saved`` is the master, and takes the value of ``live``
        only where it no longer rounds to it, that is, where someone changed the parameter since the last step.

        Args:
            live: rows of the parameters, written.
            saved: rows of w, written when ``sign`` is +1.
            grads: rows of g0.
            groups: the group of each row.
            scale: float64 [groups], s; negative for a group that is maximized.
            adaptive: for each group, whether e is that of ASAM.
            sign: +1 for w + e, -1 for w - e.
            undo: with ``sign=+1``, pairs of lists are appended: tensors of ``live`` and of ``saved``, rows or pieces of
                them. Wherever an exception or Ctrl-C has struck, copying the second into the first gives w back.
            stochastic: for float16 and bfloat16, step from w as the model reads it, and round the end up or down with
                the probability that makes the mean exact: else a step of less than half the distance to the next
                number is none. The random bits are a hash of w and g0, so both signs have the same.
        """

    @abstractmethod
    def fd_gram(
        self,
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        num_groups: int,
        weights: Sequence[Tensor | None],
    ) -> Tensor:
        r"""Gram matrix of :math:`(g_0, d_1, d_2)` per group, in one pass over the three gradients.

        The differences are formed elementwise before the products: subtracting inner products afterwards would lose
        all digits, since the differences are small against the gradients.

        Args:
            grads: for each pass, the rows of its gradient: g0, g+ and g-.
            groups, num_groups: as for :meth:`grad_norm`.
            weights: for each row None, or w in the compute dtype (ASAM).
        Returns:
            float64 tensor [num_groups, GRAM]: :math:`g_0 g_0, g_0 d_1, g_0 d_2, d_1 d_1, d_1 d_2, d_2 d_2`, then
            :math:`h g_0, h d_1, h d_2` with :math:`e = s h`; h is g0, or :math:`w^2 g_0` where weights are given.
        """

    @abstractmethod
    def fd_combine_(
        self,
        out: Sequence[Tensor],
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        num_groups: int,
        weights: Sequence[Tensor | None] | None,
        pass_weights: Tensor,
        factor: Tensor,
    ) -> Tensor | None:
        r"""Write :math:`c\,(g_+ + \sum_i c_i (g_i - g_0))` into ``out``: what a replica adds to a mean.

        Args:
            out: rows, written; they may be those of the last pass.
            grads: for each pass, the rows of its gradient: g0, g+ and g-.
            groups, num_groups: as for :meth:`grad_norm`.
            weights: as for :meth:`fd_gram`; None where the Gram matrix is not wanted.
            pass_weights: float64 [PASSES - 1, groups], see :class:`Coefficients`.
            factor: 0-dim float64, c.
        Returns:
            What :meth:`fd_gram` returns, where :attr:`fuses_gram`, else None.
        """

    @abstractmethod
    def fd_direction_(
        self,
        out: Sequence[Tensor],
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        pass_weights: Tensor,
        factor: Tensor,
        ok: Tensor,
    ) -> None:
        r"""Write :math:`h = c\,((g_+ - g_0) + \sum_i c_i (g_i - g_0))` into ``out``, what a perturbation adds to g0.

        Args:
            out: rows in the compute dtype, written; 0 where not ``ok``.
            grads: for each pass, the rows of its gradient: g0, g+ and g-. (Where :math:`c_i = 0` the last may be any.)
            groups: the group of each row.
            pass_weights: float64 [PASSES - 1, groups], see :class:`Coefficients`.
            factor: 0-dim float64, c.
            ok: 0-dim bool.
        """

    def coefficients(
        self,
        gram: Tensor | None,
        squared_norms: Sequence[Tensor],
        scale: Tensor,
        alpha: Tensor,
        beta: Tensor,
        *,
        counters: Tensor,
        steps: Sequence[tuple[Tensor, Tensor]],
        passes: int,
        regularizer: str,
        losses: tuple[Tensor, Tensor, Tensor] | None,
        grad_scale: Tensor | None,
        max_regularizer_ratio: float,
        max_grad_norm: float | None,
    ) -> Coefficients:
        r"""Decide a, b, the clip factor and whether the step is sound, from sums that are already on the device; count.

        ``linear``: :math:`a = \alpha, b = \beta`. ``log``: :math:`a = \alpha/\kappa, b = \beta/\sigma`, the gradient of
        :math:`\alpha \log \mathrm{Tr}\nabla^2 L + \beta \log \|\nabla L\|` with the trace along the gradient and

        .. math::
            \kappa &= L(w+e) + L(w-e) - 2L(w) \approx \tfrac12\, e \cdot d_1 \quad\text{(trapezoid)} \\
            \sigma &= L(w+e) - L(w-e) \approx 2\, e \cdot g_0 + \tfrac13\, e \cdot d_2 \quad\text{(Simpson)}

        A term whose logarithm does not exist (:math:`\kappa \le 0`, :math:`\sigma \le 0`) is dropped for the step. The
        regularizer's gradient :math:`a d_2 + b d_1` is capped at ``max_regularizer_ratio`` times :math:`\|g_+\|`.
        :math:`\|\hat g\|` is a quadratic form in the Gram matrix, since
        :math:`\hat g = g_0 + (\tfrac12 + b) d_1 + (\tfrac12 + a) d_2`: clipping costs no pass over the gradients.

        Args:
            gram: from :meth:`fd_gram`, or None where nothing asked for it.
            squared_norms: from :meth:`grad_norm`, one [groups] tensor for each pass that was reduced so.
            scale: float64 [groups], from :meth:`perturbation_scale`, not negative.
            alpha, beta: float64 [groups].
            counters: int64 [4], advanced: see :data:`COUNTERS`.
            steps: for each bucket, float32 [parameters] how many steps each has taken and float32 [parameters] 1 for
                those that take part in this one; advanced unless the step is skipped.
            passes: 3, 2 (plain SAM) or 1 (the base optimizer alone).
            regularizer: one of :data:`REGULARIZERS`.
            losses: L(w), L(w+e), L(w-e) as 0-dim float64 tensors to take kappa and sigma from, or None: from gradients.
            grad_scale: 0-dim float64, what all gradients (and so ``gram`` and norms) were multiplied with against
                underflow; ``factor`` takes it out again, and all else is as if it were not there.
            max_regularizer_ratio: the cap; ``math.inf`` for none. A finite one needs ``gram``.
            max_grad_norm: the largest norm of :math:`\hat g`, or None. Needs ``gram`` when ``passes`` is 3.
        """
        a, b = alpha, beta
        kappa = sigma = ratio = capped = factor = norm_hat = None
        sums = [norm.sum() for norm in squared_norms] + ([] if gram is None else [gram.sum()])
        ok = torch.isfinite(torch.stack(sums)).all()
        if grad_scale is not None:
            squared_norms = [norm / grad_scale**2 for norm in squared_norms]
            gram = None if gram is None else gram / grad_scale**2
            scale = scale * grad_scale
        weight = REGULARIZERS[regularizer].weight
        if passes == PASSES and weight is not None:
            if losses is not None:
                loss, ascent, descent = losses
                kappa, sigma = ascent + descent - 2 * loss, ascent - descent
            else:
                assert gram is not None
                kappa = (scale * gram[:, 7]).sum() / 2
                sigma = (scale * (2 * gram[:, 6] + gram[:, 8] / 3)).sum()
            a, b = weight(alpha, kappa), weight(beta, sigma)
        if gram is not None:
            ratio = (quadratic_form(gram, 0.0, b, a) / quadratic_form(gram, 1.0, 0.5, 0.5)).sqrt()
            capped = ratio > max_regularizer_ratio
            cap = torch.where(capped, max_regularizer_ratio / ratio, 1.0)
            a, b = a * cap, b * cap
            norm_hat = quadratic_form(gram, 1.0, b + 0.5, a + 0.5).sqrt()
        elif passes < PASSES:
            norm_hat = squared_norms[-1].sum().sqrt()
        if max_grad_norm is not None:
            assert norm_hat is not None
            factor = (max_grad_norm / (norm_hat + CLIP_EPSILON)).clamp(max=1.0)
        if grad_scale is not None:
            factor = 1 / grad_scale if factor is None else factor / grad_scale
        for taken, part in steps:
            taken.addcmul_(part, ok.to(part))
        never = torch.zeros_like(ok)
        dropped = [never, never] if kappa is None or sigma is None else [kappa <= 0, sigma <= 0]
        events = (*dropped, never if capped is None else capped)
        counters += torch.stack([~ok, *(ok & event for event in events)])
        return Coefficients(pass_weights(a, b), factor, ok, kappa, sigma, ratio, capped)

    @abstractmethod
    def step_(
        self,
        live: Sequence[Tensor],
        saved: Sequence[Tensor],
        state: Sequence[Sequence[Tensor | None]],
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        steps: Sequence[Tensor],
        options: Sequence[Options],
        coefficients: Coefficients,
        direction: Direction | None = None,
    ) -> None:
        r"""The step of an update rule from w with :math:`\hat g`; where not ``ok``, ``live`` becomes w.

        With :math:`g = \pm\hat g`, minus where the group is maximized:

        - "sgd", :class:`torch.optim.SGD`:

          .. math::
            g &\leftarrow g + \lambda w, \quad m \leftarrow \mu m + (1 - \tau) g \;(m \leftarrow g \text{ first}), \\
            w &\leftarrow w - \gamma\, m \quad\text{or, nesterov,}\quad w \leftarrow w - \gamma\,(g + \mu m)

        - "adam", :class:`torch.optim.AdamW`; Adam has :math:`g \leftarrow g + \lambda w` instead of the factor on w:

          .. math::
            m &\leftarrow \beta_1 m + (1-\beta_1) g, \quad v \leftarrow \beta_2 v + (1-\beta_2) g^2, \\
            w &\leftarrow (1 - \gamma\lambda)\,w - \frac{\gamma}{1-\beta_1^t}\,
                \frac{m}{\sqrt{v}/\sqrt{1-\beta_2^t} + \epsilon}

        Args:
            live: rows of the parameters, written.
            saved: rows of w; written for float16 and bfloat16. May be ``live`` itself when nothing was perturbed.
            state: for each of the rule's buffers its rows, written; None where the group has none.
            grads: the rows of g0, of (g0, g+) or of (g0, g+, g-): one list for each pass that was run.
            groups: the group of each row.
            steps: for each row a 0-dim tensor on its device, how many steps it has taken, this one included.
            options: for each group, all of one rule.
            coefficients: of this step.
            direction: added to g0 where that is the one gradient: :math:`\hat g = c\,(g_0 + \omega h)`, :math:`\omega`
                being its weight.
        """

    @abstractmethod
    def combine_(
        self,
        live: Sequence[Tensor],
        saved: Sequence[Tensor],
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        coefficients: Coefficients,
        direction: Direction | None = None,
    ) -> None:
        r"""For any other base optimizer: write :math:`\hat g` over the rows of the last pass, and w into ``live``.

        Arguments as for :meth:`step_`.
        """
