"""What the optimizer measured in its last step, left on the device until somebody looks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import COUNTERS, Coefficients, quadratic_form

__all__ = ["Stats"]


class Stats:
    """Measurements of the last step, and counters over all steps.

    With replicas that perturb with an e of their own, losses, ``grad_norm`` and the two curvatures are those of the
    rank's own batch; all else is reduced, and the same on all ranks.

    Tensors are float64 and 0-dim unless noted, on the device of the first parameters; None is what the step did not
    compute. Nothing is launched and nothing synchronises until a property is read.
    """

    def __init__(self) -> None:
        self.steps = 0  #: Steps taken or skipped: a host number.
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
        """The counters of all steps so far, int64, in the order of :data:`crsam_ext.ops.COUNTERS`."""
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
        """Enter a step.

        Args:
            losses: of its passes.
            squared_norm: [groups], of g0, if it is known otherwise than from ``gram``.
            gram: [groups, GRAM], see :meth:`crsam_ext.ops.Operators.fd_gram`.
            scale: [groups], with e = scale g0; None where e is no multiple of g0.
            coefficients: what was decided.
            grad_scale: what all gradients were multiplied with.
            reduced_norm: [groups], squared, of the regularized gradient, where that is a mean over replicas, or where
                it is made of one gradient and a direction, and clipped.
        """
        self._reduced_norm = reduced_norm
        self.steps += 1
        self.loss, self.loss_ascent, self.loss_descent = [*losses, None, None][:3]
        self._squared_norm, self._coefficients, self._grad_scale = squared_norm, coefficients, grad_scale
        self._gram, self._scale = gram, scale

    def snapshot(self) -> dict[str, Any]:
        """What the last step has entered, for :meth:`replay`."""
        return dict(vars(self))

    def replay(self, snapshot: dict[str, Any]) -> None:
        """Enter a step that a CUDA graph has repeated: its measurements are in the tensors of a snapshot."""
        vars(self).update(snapshot, steps=self.steps + 1)

    @property
    def skipped(self) -> Tensor:
        """Steps skipped because a gradient held a NaN or an infinity (int64)."""
        return self._counters[0]

    @property
    def curvature_dropped(self) -> Tensor:
        """Steps in which kappa <= 0, so that the log regularizer went without its curvature term (int64)."""
        return self._counters[1]

    @property
    def gradient_norm_dropped(self) -> Tensor:
        """Steps in which sigma <= 0, so that the log regularizer went without its gradient-norm term (int64)."""
        return self._counters[2]

    @property
    def capped(self) -> Tensor:
        """Steps in which the cap on the regularizer's gradient acted (int64)."""
        return self._counters[3]

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of the gradient at w; None for an adaptive perturbation, unless something needed the Gram matrix."""
        squared = self._squared_norm if self._gram is None else self._gram[:, 0]
        return None if squared is None else self._unscaled(squared.sum().sqrt())

    @property
    def directional_curvature(self) -> Tensor | None:
        r""":math:`v^T H v` along the perturbation, :math:`v = e/\|e\|`, from :math:`e \cdot d_1 / (2 \|e\|^2)`.

        None without the Gram matrix (the torch backend computes it only where the log form, a clip or a cap needs it)
        and for an adaptive perturbation.
        """
        if self._gram is None or self._scale is None:
            return None
        return self._unscaled((self._scale * self._gram[:, 1]).sum() / (2 * self._scale**2 @ self._gram[:, 0]))

    @property
    def normalized_curvature(self) -> Tensor | None:
        """The directional curvature over the norm of the gradient at w; None where the former is."""
        curvature, norm = self.directional_curvature, self.grad_norm
        return None if curvature is None or norm is None else curvature / norm

    @property
    def regularized_norm(self) -> Tensor | None:
        """Norm of the gradient that the update was made of, before it was clipped.

        None without the Gram matrix, unless the gradient was reduced over replicas or clipped in a step of one pass.
        """
        if self._reduced_norm is not None:
            return self._unscaled(self._reduced_norm.sum().sqrt())
        if self._gram is None or self._coefficients is None:
            return None
        a, b = self._coefficients.a, self._coefficients.b
        return self._unscaled(quadratic_form(self._gram, 1.0, b + 0.5, a + 0.5).sqrt())

    @property
    def a(self) -> Tensor | None:
        """Weight of the second difference, [groups]."""
        return self._of("a")

    @property
    def b(self) -> Tensor | None:
        """Weight of the first difference, [groups]."""
        return self._of("b")

    @property
    def kappa(self) -> Tensor | None:
        """Curvature of the loss along e, of the log regularizer."""
        return self._of("kappa")

    @property
    def sigma(self) -> Tensor | None:
        """Difference of the losses at w + e and w - e, of the log regularizer."""
        return self._of("sigma")

    @property
    def regularizer_ratio(self) -> Tensor | None:
        """Norm of a d2 + b d1 over that of the gradient at w + e, before the cap."""
        return self._of("regularizer_ratio")

    @property
    def clip_factor(self) -> Tensor | None:
        """What the gradient was multiplied with to respect max_grad_norm."""
        factor = self._of("factor")
        return factor if factor is None or self._grad_scale is None else factor * self._grad_scale

    def _unscaled(self, x: Tensor) -> Tensor:
        return x if self._grad_scale is None else x / self._grad_scale

    def _of(self, name: str) -> Tensor | None:
        return None if self._coefficients is None else getattr(self._coefficients, name)

    def as_dict(self) -> dict[str, Any]:
        """All values as Python numbers, per-group ones as lists. Synchronises with the device."""
        names = [name for name, member in vars(Stats).items() if isinstance(member, property)]
        values = {name: getattr(self, name) for name in ("steps", "loss", "loss_ascent", "loss_descent", *names)}
        return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in values.items()}

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """:meth:`as_dict` for a logger: only what the last step computed, and per-group values as "a/0", "a/1".

        Synchronises with the device.
        """
        values = {k: v for k, v in self.as_dict().items() if isinstance(v, (int, float, list))}
        lists = {name: value for name, value in values.items() if isinstance(value, list)}
        flat = {name: value for name, value in values.items() if not isinstance(value, list)}
        for name, value in lists.items():
            flat.update({name: value[0]} if len(value) == 1 else {f"{name}/{i}": v for i, v in enumerate(value)})
        return {prefix + name: float(value) for name, value in flat.items()}
