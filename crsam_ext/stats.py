"""Measurements of the last step, which stay on the device until they are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import COUNTERS, Coefficients, quadratic_form

__all__ = ["Stats"]


class Stats:
    """Measurements of the last step, and counters over all steps.

    Tensors are float64 and 0-dim unless noted, on the device of the first parameters. A value is None if the step did
    not compute it. Nothing is launched before a property is read, and only ``as_dict`` and ``scalars`` synchronize.

    If each replica perturbs with its own e, the losses, ``grad_norm`` and the two curvatures are those of the rank's
    own batch. All other values are reduced, and are the same on all ranks.
    """

    def __init__(self) -> None:
        self.steps = 0  #: Steps taken or skipped, a number on the host.
        self.loss: Any = None  #: Loss at w, as the closure returned it.
        self.loss_ascent: Any = None  #: Loss at w + e.
        self.loss_descent: Any = None  #: Loss at w - e.
        self._counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device="cpu")
        self._squared_norm: Tensor | None = None
        self._coefficients: Coefficients | None = None
        self._grad_scale: Tensor | None = None
        self._gram: Tensor | None = None
        self._scale: Tensor | None = None
        self._reduced_norm: Tensor | None = None

    def counters(self, device: torch.device) -> Tensor:
        """Return the counters over all steps, int64, in the order of :data:`crsam_ext.ops.COUNTERS`."""
        if self._counters.device != device:
            self._counters = self._counters.to(device)
        return self._counters

    def record(
        self,
        losses: list[Any],
        squared_norm: Tensor | None,
        gram: Tensor | None,
        scale: Tensor | None,
        coefficients: Coefficients,
        grad_scale: Tensor | None,
        reduced_norm: Tensor | None = None,
    ) -> None:
        """Record a step.

        Args:
            losses: the losses of its passes.
            squared_norm: [groups], the squared norm of g0; None if only ``gram`` has it.
            gram: [groups, GRAM], see :meth:`crsam_ext.ops.Operators.fd_gram`.
            scale: [groups], with e = scale g0; None if e is not a multiple of g0.
            coefficients: the coefficients of the step.
            grad_scale: the loss scale of all gradients.
            reduced_norm: [groups], the squared norm of the regularized gradient, if that was reduced over replicas, or
                if it is the sum of one gradient and a direction and was clipped.
        """
        self._reduced_norm = reduced_norm
        self.steps += 1
        self.loss, self.loss_ascent, self.loss_descent = [*losses, None, None][:3]
        self._squared_norm, self._coefficients, self._grad_scale = squared_norm, coefficients, grad_scale
        self._gram, self._scale = gram, scale

    def snapshot(self) -> dict[str, Any]:
        """Return the measurements of the last step, for :meth:`replay`."""
        return dict(vars(self))

    def replay(self, snapshot: dict[str, Any]) -> None:
        """Record a step that a CUDA graph replayed: it wrote its measurements into the tensors of ``snapshot``."""
        vars(self).update(snapshot, steps=self.steps + 1)

    @property
    def skipped(self) -> Tensor:
        """Number of steps skipped because a gradient had a NaN or Inf (int64)."""
        return self._counters[0]

    @property
    def curvature_dropped(self) -> Tensor:
        """Number of steps in which the log regularizer dropped its curvature term because kappa <= 0 (int64)."""
        return self._counters[1]

    @property
    def gradient_norm_dropped(self) -> Tensor:
        """Number of steps in which the log regularizer dropped its gradient-norm term because sigma <= 0 (int64)."""
        return self._counters[2]

    @property
    def capped(self) -> Tensor:
        """Number of steps in which the cap reduced the norm of a d2 + b d1 (int64)."""
        return self._counters[3]

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of the gradient at w. None with ``adaptive``, unless the step computed the Gram matrix."""
        squared = self._squared_norm if self._gram is None else self._gram[:, 0]
        return None if squared is None else self._unscaled(squared.sum().sqrt())

    @property
    def directional_curvature(self) -> Tensor | None:
        r"""Curvature :math:`v^T H v` along :math:`v = e/\|e\|`, estimated as :math:`e \cdot d_1 / (2 \|e\|^2)`.

        None with ``adaptive``, and if the step did not compute the Gram matrix. The torch backend computes that only if
        the log regularizer, a clip or a cap needs it.
        """
        if self._gram is None or self._scale is None:
            return None
        return self._unscaled((self._scale * self._gram[:, 1]).sum() / (2 * self._scale**2 @ self._gram[:, 0]))

    @property
    def normalized_curvature(self) -> Tensor | None:
        """Directional curvature divided by the norm of the gradient at w; None if the directional curvature is."""
        curvature, norm = self.directional_curvature, self.grad_norm
        return None if curvature is None or norm is None else curvature / norm

    @property
    def regularized_norm(self) -> Tensor | None:
        """Norm of the regularized gradient before it was clipped.

        None without the Gram matrix, unless the gradient was reduced over replicas, or clipped in a step of one pass.
        """
        if self._reduced_norm is not None:
            return self._unscaled(self._reduced_norm.sum().sqrt())
        if self._gram is None or self._coefficients is None:
            return None
        a, b = self._coefficients.a, self._coefficients.b
        return self._unscaled(quadratic_form(self._gram, 1.0, b + 0.5, a + 0.5).sqrt())

    @property
    def a(self) -> Tensor | None:
        """Coefficient of the second difference, [groups]."""
        return self._of("a")

    @property
    def b(self) -> Tensor | None:
        """Coefficient of the first difference, [groups]."""
        return self._of("b")

    @property
    def kappa(self) -> Tensor | None:
        """L(w + e) + L(w - e) - 2 L(w), or its estimate from gradients; None without the log regularizer."""
        return self._of("kappa")

    @property
    def sigma(self) -> Tensor | None:
        """L(w + e) - L(w - e), or its estimate from gradients; None without the log regularizer."""
        return self._of("sigma")

    @property
    def regularizer_ratio(self) -> Tensor | None:
        """Norm of a d2 + b d1 divided by the norm of the gradient at w + e, before the cap."""
        return self._of("regularizer_ratio")

    @property
    def clip_factor(self) -> Tensor | None:
        """Factor that clipped the gradient to max_grad_norm; 1 if it was not larger."""
        factor = self._of("factor")
        return factor if factor is None or self._grad_scale is None else factor * self._grad_scale

    def _unscaled(self, x: Tensor) -> Tensor:
        return x if self._grad_scale is None else x / self._grad_scale

    def _of(self, name: str) -> Tensor | None:
        return None if self._coefficients is None else getattr(self._coefficients, name)

    def as_dict(self) -> dict[str, Any]:
        """Return all values as Python numbers, per-group values as lists. Synchronizes with the device."""
        names = [name for name, member in vars(Stats).items() if isinstance(member, property)]
        values = {name: getattr(self, name) for name in ("steps", "loss", "loss_ascent", "loss_descent", *names)}
        return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in values.items()}

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """Return the numbers of :meth:`as_dict` for a logger, without None; per-group values become "a/0", "a/1".

        Synchronizes with the device. ``prefix`` is prepended to every name.
        """
        values = {k: v for k, v in self.as_dict().items() if isinstance(v, (int, float, list))}
        lists = {name: value for name, value in values.items() if isinstance(value, list)}
        flat = {name: value for name, value in values.items() if not isinstance(value, list)}
        for name, value in lists.items():
            flat.update({name: value[0]} if len(value) == 1 else {f"{name}/{i}": v for i, v in enumerate(value)})
        return {prefix + name: float(value) for name, value in flat.items()}
