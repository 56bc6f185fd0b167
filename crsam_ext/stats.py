"""What the optimizer measured in its last step, left on the device until somebody looks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .ops import Coefficients

__all__ = ["Stats"]


@dataclass(eq=False)
class Stats:
    """Measurements of the last step, and counters over all steps.

    Tensors are float64 and 0-dim unless noted, on the device of the first parameters; None is what the step did not
    compute. Reading one with ``float()`` synchronises; :meth:`as_dict` reads all.
    """

    #: Steps taken or skipped. A host number: knowing it needs no device.
    steps: int = 0
    #: Steps skipped because a gradient held a NaN or an infinity (0-dim int64).
    skipped: Tensor | int = 0
    #: Steps in which kappa <= 0, so that the log regularizer went without its curvature term (0-dim int64).
    curvature_dropped: Tensor | int = 0
    #: Steps in which sigma <= 0, so that it went without its gradient-norm term (0-dim int64).
    gradient_norm_dropped: Tensor | int = 0
    #: Steps in which the cap on the regularizer's gradient acted (0-dim int64).
    capped: Tensor | int = 0

    #: Losses at w, w+e, w-e, as the closure returned them.
    loss: Tensor | float | None = None
    loss_ascent: Tensor | float | None = None
    loss_descent: Tensor | float | None = None
    #: Norm of the gradient g0 at w; of |w| g0 where the perturbation is adaptive.
    grad_norm: Tensor | None = None
    #: Weights of the second and of the first difference, [groups].
    a: Tensor | None = None
    b: Tensor | None = None
    #: Curvature and loss difference along e, of the log regularizer.
    kappa: Tensor | None = None
    sigma: Tensor | None = None
    #: Norm of the regularizer's gradient over that of the gradient at w+e, before the cap.
    regularizer_ratio: Tensor | None = None
    #: What the gradient was multiplied with to respect max_grad_norm.
    clip_factor: Tensor | None = None

    def record(self, losses: list[Any], squared_norm: Tensor, c: Coefficients) -> None:
        """Enter a step. Launches a few 0-dim operations and never reads their results."""
        self.steps += 1
        self.loss, self.loss_ascent, self.loss_descent = [*losses, None, None][:3]
        self.grad_norm = squared_norm.sum().sqrt()
        self.a, self.b, self.kappa, self.sigma = c.a, c.b, c.kappa, c.sigma
        self.regularizer_ratio, self.clip_factor = c.regularizer_ratio, c.factor
        self.skipped = self.skipped + (~c.ok).long()
        if c.kappa is not None and c.sigma is not None:
            self.curvature_dropped = self.curvature_dropped + (c.ok & (c.kappa <= 0)).long()
            self.gradient_norm_dropped = self.gradient_norm_dropped + (c.ok & (c.sigma <= 0)).long()
        if c.capped is not None:
            self.capped = self.capped + (c.ok & c.capped).long()

    def as_dict(self) -> dict[str, Any]:
        """All values as Python numbers, per-group ones as lists. Synchronises with the device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
