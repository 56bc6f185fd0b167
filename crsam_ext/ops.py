r"""The operators of a CR-SAM step: their signatures and their mathematics.

The notation is that of the paper (Wu, Luo, Wunsch, AAAI 2024, arXiv 2312.13555). All parameters together are :math:`w`.
The gradients and their differences

.. math::
    g_0 = \nabla L(w), \quad g_+ = \nabla L(w + e), \quad g_- = \nabla L(w - e), \\
    d_1 = g_+ - g_-, \quad d_2 = (g_+ - g_0) + (g_- - g_0)

are called ``grad``, ``grad_ascent``, ``grad_descent``, first difference and second difference. The base optimizer
receives the regularized gradient :math:`\hat g = c\,(g_+ + a\,d_2 + b\,d_1)`, where ``c`` is the clip factor.

Conventions for all operators:

- Tensors are passed as lists of *rows*: 1-D, contiguous, with one device and one dtype (float64, float32, float16 or
  bfloat16). ``groups[i]`` is the parameter group of row ``i``. Every per-group quantity is a sequence or a tensor with
  one entry per group.
- ``live`` contains the parameters that the model reads. ``saved`` is :math:`w` in the compute dtype: float64 for
  float64 rows, otherwise float32. For float16 and bfloat16 it is the master copy, which persists between steps. For the
  other dtypes it is valid from ``perturb_(sign=+1)`` to the end of the step.
- Arithmetic uses the compute dtype; sums over elements end in float64.
- The name of an operator that writes into its arguments ends in an underscore, and the operator returns nothing. There
  are two exceptions: ``fd_combine_`` returns the Gram matrix, and ``coefficients`` advances counters.
- No operator synchronizes with the host: results stay on the device.

Each operator reads its rows once; ``KERNELS`` in :mod:`crsam_ext.backends.fused` has the bytes that it moves. :math:`w`
is saved at the beginning of each step, not kept from the previous step. This costs nothing in total, because the step
does not write the copy, and it respects every change that the user makes to a parameter between steps, including
changes through ``p.data``.
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
    from typing import Self  # needs Python 3.11

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

#: Added to the gradient norm before a division by it, as in the published SAM and CR-SAM implementations.
EPSILON = 1e-12

#: Added to the norm of the regularized gradient before the clip divides by it. The value is that of
#: :func:`torch.nn.utils.clip_grad_norm_`, so that both clips give the same result.
CLIP_EPSILON = 1e-6

#: The number of gradients of a full step: g0, g+ and g-.
PASSES = 3

#: The number of inner products of g0, d1 and d2: the upper triangle of their Gram matrix row by row, then h with each.
GRAM = PASSES * (PASSES + 1) // 2 + PASSES

#: The events that are counted, in the order of the counters that :meth:`Operators.coefficients` advances.
COUNTERS = ("skipped", "curvature_dropped", "gradient_norm_dropped", "capped")


def scalar(value: float | Tensor) -> Tensor:
    """Return a hyperparameter as a tensor; a number becomes float64 on the CPU, regardless of torch's defaults."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")


class Regularizer(NamedTuple):
    """The properties of a regularizer; :meth:`Operators.coefficients` has its formula."""

    alpha: float  #: default weight of the curvature term
    max_ratio: float  #: default cap on the norm of the regularizer's gradient, relative to the norm of g+
    #: Computes a from alpha and kappa, and b from beta and sigma; None means a = alpha and b = beta.
    weight: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def measures(self) -> bool:
        """Whether the regularizer needs kappa and sigma of the step."""
        return self.weight is not None


REGULARIZERS = {
    "linear": Regularizer(alpha=0.1, max_ratio=math.inf),
    "log": Regularizer(alpha=0.01, max_ratio=1.0, weight=lambda weight, x: torch.where(x > 0, weight / x, 0.0)),
}


@dataclass(frozen=True)
class Options(ABC):
    """The options of an update rule for one parameter group, under torch's names; each rule has a subclass."""

    #: The name under which backends have the formula of the rule.
    rule: ClassVar[str]
    #: The names of its state buffers.
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
    """The result of :meth:`Operators.coefficients`; all tensors are float64 on one device unless noted."""

    pass_weights: Tensor  #: [PASSES - 1, groups], c_i in ghat = c (g+ + sum of c_i (g_i - g0))
    factor: Tensor | None  #: 0-dim, the clip factor divided by the gradient scale; None if there is neither
    ok: Tensor  #: 0-dim bool, False if a gradient contains NaN or Inf, so that the step is skipped
    kappa: Tensor | None = None  #: 0-dim, curvature along e, for the log regularizer
    sigma: Tensor | None = None  #: 0-dim, loss difference along e, for the log regularizer
    regularizer_ratio: Tensor | None = None  #: 0-dim, norm of a d2 + b d1 divided by the norm of g+, before the cap
    capped: Tensor | None = None  #: 0-dim bool, whether the cap was applied

    @property
    def a(self) -> Tensor:
        """[groups], weight of the second difference."""
        return (self.pass_weights[0] + self.pass_weights[1]) / 2

    @property
    def b(self) -> Tensor:
        """[groups], weight of the first difference."""
        return (self.pass_weights[0] - self.pass_weights[1]) / 2


class Direction(NamedTuple):
    """The sharpness direction h of the last perturbed step; a step without a perturbation adds it to its gradient."""

    rows: Sequence[Tensor]  #: rows of h, in the compute dtype
    weight: Tensor  #: 0-dim float64, the factor of h


def pass_weights(a: Tensor, b: Tensor) -> Tensor:
    """Return the pass weights, [PASSES - 1, groups]: a d2 + b d1 = (a + b) (g+ - g0) + (a - b) (g- - g0)."""
    return torch.stack([a + b, a - b])


def quadratic_form(gram: Tensor, x: float, y: Tensor | float, z: Tensor | float) -> Tensor:
    """Return the squared norm of x g0 + y d1 + z d2 over all groups, from the Gram matrix, [groups, 6 or more]."""
    g00, g01, g02, g11, g12, g22 = gram[:, :6].unbind(1)
    form = x * x * g00 + y * y * g11 + z * z * g22 + 2 * (x * y * g01 + x * z * g02 + y * z * g12)
    return form.sum().clamp(min=0)


class Operators(ABC):
    """The interface of a backend; :mod:`crsam_ext.backends` chooses the backend."""

    name: ClassVar[str]
    #: Parameters with fewer elements than this share a row with their neighbors, and their gradients are gathered. 0
    #: for kernels that use addresses: every parameter is a row, and its gradient may be dense in any shape.
    gather_below: int
    #: Whether :meth:`fd_gram` costs little more than the norms of the three gradients, so that it always runs.
    fuses_gram: ClassVar[bool]
    #: The functions of :mod:`crsam_ext.host`, in Python or compiled. Operators accept plain lists of tensors and
    #: groups; a ``host.Column`` or ``host.Groups`` caches their metadata.
    host: host.Host = host

    def selects(self, row: Tensor) -> bool:
        """Return whether values on the device of ``row`` must not be read, so that ``where`` replaces a branch."""
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
        r"""Return the squared norm of the gradient per group: :math:`\|g\|^2`, or :math:`\||w|\,g\|^2` with weights.

        Args:
            grads: rows of a gradient.
            groups: the group of each row.
            num_groups: the number of groups.
            weights: for each row None, or the row of parameters that multiplies the gradient (ASAM), in its own dtype:
                w as the model reads it, which is rounded if there is a master.
            direction: added to the gradient before it is squared; cannot be combined with weights.
        Returns:
            float64 tensor [num_groups]. Squared norms can be added over groups, devices and processes. The first
            sums may use the compute dtype; in float32 an element beyond 1.8e19 overflows.
        """

    def perturbation_scale(self, squared_norm: Tensor, rho: Tensor) -> Tensor:
        r"""Return :math:`\rho / (\|g_0\| + \varepsilon)` per group, with one norm over all groups.

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
        r"""Return :math:`\omega = \min(\delta, r\,\|g_0\| / (\|h\| + \varepsilon))`, which limits the norm of
        :math:`\omega h` to :math:`r \|g_0\|`.

        Args:
            squared_norm: float64 [groups], of g0, from :meth:`grad_norm`.
            squared_direction: float64 [groups], of h.
            decay: 0-dim float64, :math:`\delta`.
            grad_scale: 0-dim float64, the scale of g0, which also multiplies :math:`\delta`; or None.
            max_ratio: :math:`r`.
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
        r"""Write :math:`w \pm e` into ``live``, computed from the saved :math:`w` and not from ``live``.

        :math:`e = s\,g_0` (SAM, Foret et al. 2021) or :math:`e = s\,w^2 g_0` (ASAM, Kwon et al. 2021), elementwise,
        where :math:`s` is :meth:`perturbation_scale`. ``sign=+1`` begins a step and saves w first: float64 and float32
        rows copy ``live`` into ``saved``. For the other dtypes ``saved`` is the master. It takes the value of ``live``
        only if it does not round to this value, that is, if the user changed the parameter since the last step.

        Args:
            live: rows of the parameters, written.
            saved: rows of w, written when ``sign`` is +1.
            grads: rows of g0.
            groups: the group of each row.
            scale: float64 [groups], s; negative for a group that is maximized.
            adaptive: for each group, whether to use the e of ASAM.
            sign: +1 for w + e, -1 for w - e.
            undo: with ``sign=+1``, the operator appends pairs of lists: tensors of ``live`` and of ``saved``, which are
                rows or parts of rows. After an exception or Ctrl-C, copying the second into the first restores w.
            stochastic: for float16 and bfloat16, start from w as the model reads it, and round the result up or down
                with probabilities that make the mean exact. Without it, a perturbation of less than half the distance
                to the next number has no effect. The random bits are a hash of w and g0, so both signs use the same.
        """

    @abstractmethod
    def fd_gram(
        self,
        grads: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        num_groups: int,
        weights: Sequence[Tensor | None],
    ) -> Tensor:
        r"""Return the Gram matrix of :math:`(g_0, d_1, d_2)` per group; each gradient is read once.

        The differences are computed elementwise, before the products. Subtracting inner products would lose all
        digits, because the differences are small compared to the gradients.

        Args:
            grads: for each pass, the rows of its gradient: g0, g+ and g-.
            groups, num_groups: as for :meth:`grad_norm`.
            weights: for each row None, or w in the compute dtype (ASAM).
        Returns:
            float64 tensor [num_groups, GRAM]: :math:`g_0 g_0, g_0 d_1, g_0 d_2, d_1 d_1, d_1 d_2, d_2 d_2`, then
            :math:`h g_0, h d_1, h d_2` with :math:`e = s h`; here h is g0, or :math:`w^2 g_0` with weights.
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
        r"""Write :math:`c\,(g_+ + \sum_i c_i (g_i - g_0))`, the contribution of a replica to a mean, into ``out``.

        Args:
            out: rows, written; they may be the rows of the last pass.
            grads: for each pass, the rows of its gradient: g0, g+ and g-.
            groups, num_groups: as for :meth:`grad_norm`.
            weights: as for :meth:`fd_gram`; None if the Gram matrix is not needed.
            pass_weights: float64 [PASSES - 1, groups], see :class:`Coefficients`.
            factor: 0-dim float64, c.
        Returns:
            The result of :meth:`fd_gram` if :attr:`fuses_gram`, otherwise None.
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
        r"""Write the sharpness direction :math:`h = c\,((g_+ - g_0) + \sum_i c_i (g_i - g_0))` into ``out``.

        Args:
            out: rows in the compute dtype, written; 0 if not ``ok``.
            grads: for each pass, the rows of its gradient: g0, g+ and g- (any tensors for g- if its :math:`c_i = 0`).
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
        r"""Compute a, b, the clip factor and whether the step is finite, from sums on the device; advance the counters.

        ``linear``: :math:`a = \alpha, b = \beta`. ``log``: :math:`a = \alpha/\kappa, b = \beta/\sigma`, the gradient of
        :math:`\alpha \log \mathrm{Tr}\nabla^2 L + \beta \log \|\nabla L\|` with the trace along the gradient and

        .. math::
            \kappa &= L(w+e) + L(w-e) - 2L(w) \approx \tfrac12\, e \cdot d_1 \quad\text{(trapezoid)} \\
            \sigma &= L(w+e) - L(w-e) \approx 2\, e \cdot g_0 + \tfrac13\, e \cdot d_2 \quad\text{(Simpson)}

        A term whose logarithm does not exist (:math:`\kappa \le 0`, :math:`\sigma \le 0`) is dropped for the step. The
        regularizer's gradient :math:`a d_2 + b d_1` is capped at ``max_regularizer_ratio`` times :math:`\|g_+\|`.
        :math:`\|\hat g\|` is a quadratic form in the Gram matrix, because
        :math:`\hat g = g_0 + (\tfrac12 + b) d_1 + (\tfrac12 + a) d_2`. So clipping does not read the gradients again.

        Args:
            gram: from :meth:`fd_gram`, or None if it was not computed.
            squared_norms: from :meth:`grad_norm`, a [groups] tensor for each pass whose norm was computed.
            scale: float64 [groups], from :meth:`perturbation_scale`, not negative.
            alpha, beta: float64 [groups].
            counters: int64 [4], advanced: see :data:`COUNTERS`.
            steps: for each bucket two float32 tensors [parameters]: the number of steps, advanced unless the step is
                skipped, and 1 for each parameter that takes part in the step.
            passes: 3, 2 (plain SAM) or 1 (the base optimizer alone).
            regularizer: a key of :data:`REGULARIZERS`.
            losses: L(w), L(w+e), L(w-e) as 0-dim float64 tensors, from which kappa and sigma are computed; None to
                compute them from the gradients.
            grad_scale: 0-dim float64, the scale of all gradients, and so of ``gram`` and the norms, that prevents
                underflow. ``factor`` divides by it; all other results do not depend on it.
            max_regularizer_ratio: the cap; ``math.inf`` for none. A finite cap needs ``gram``.
            max_grad_norm: the largest norm of :math:`\hat g`, or None. Needs ``gram`` if ``passes`` is 3.
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
        r"""Apply an update rule to w with :math:`\hat g`; if not ``ok``, only restore w in ``live``.

        With :math:`g = \pm\hat g`, negative if the group is maximized:

        - "sgd", :class:`torch.optim.SGD`:

          .. math::
            g &\leftarrow g + \lambda w, \quad m \leftarrow \mu m + (1 - \tau) g \;(m \leftarrow g \text{ first}), \\
            w &\leftarrow w - \gamma\, m \quad\text{or, nesterov,}\quad w \leftarrow w - \gamma\,(g + \mu m)

        - "adam", :class:`torch.optim.AdamW`; Adam uses :math:`g \leftarrow g + \lambda w` instead of the factor on w:

          .. math::
            m &\leftarrow \beta_1 m + (1-\beta_1) g, \quad v \leftarrow \beta_2 v + (1-\beta_2) g^2, \\
            w &\leftarrow (1 - \gamma\lambda)\,w - \frac{\gamma}{1-\beta_1^t}\,
                \frac{m}{\sqrt{v}/\sqrt{1-\beta_2^t} + \epsilon}

        Args:
            live: rows of the parameters, written.
            saved: rows of w; written for float16 and bfloat16. May be ``live`` itself if nothing was perturbed.
            state: for each buffer of the rule its rows, written; None for a row whose group has no such buffer.
            grads: the rows of g0, of (g0, g+) or of (g0, g+, g-): one list per pass of the step.
            groups: the group of each row.
            steps: for each row a 0-dim tensor on its device, the number of steps it has taken, including this one.
            options: for each group; all groups have the same rule.
            coefficients: coefficients of this step.
            direction: added to g0 if the step has one pass: :math:`\hat g = c\,(g_0 + \omega h)`, where
                :math:`\omega` is its weight.
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
        r"""Write :math:`\hat g` over the rows of the last pass, and w into ``live``, for any other base optimizer.

        The arguments are those of :meth:`step_`.
        """
