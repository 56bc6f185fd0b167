"""The sharpness direction: what a perturbation adds to the gradient, kept for the steps between perturbations.

A step that perturbs ends with ghat, and leaves h = ghat - g0 behind. With v = g0/|g0| and the Hessian H at w, SAM's h
is rho H v + O(rho^2): it changes as slowly as the curvature and the direction of the gradient do. The step that comes
j steps later does without a perturbation, and takes

    ghat = g0 + DECAY^j h

(LookSAM, Liu et al., CVPR 2022, keeps the part of h that is orthogonal to g0.) An old h is wrong in one respect: it
does not change with the parameters. It pushes them the same way in every step, and nothing pushes back but g0. The
decay bounds how far: the weights add up to less than 1 / (1 - DECAY) = 10, however rare perturbations are.
docs/reuse.md compares it with other guards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .flat import Bucket, Plan
from .ops import Direction, Operators

__all__ = ["DECAY", "DIRECTION", "SharpnessDirection"]

#: Its name in the state of a parameter.
DIRECTION = "sharpness_direction"

#: The weight of h is multiplied with it from step to step.
DECAY = 0.9


class SharpnessDirection:
    """The direction h of the last step that perturbed, in a flat buffer of every bucket, and its weight in this step.

    It is kept in the compute dtype, and belongs to losses that are not scaled.
    """

    def __init__(self) -> None:
        self.age = 0  #: how many steps ago h was made; 0 in a step that makes it
        self._weight: Tensor | None = None

    def begin_step(self, age: int, device: torch.device) -> None:
        """Call before each step, and before a CUDA graph repeats one: kernels read the weight from the device.

        Args:
            age: how many steps ago h was made.
            device: on which the weight is kept.
        """
        self.age = age
        if self._weight is None or self._weight.device != device:
            self._weight = torch.zeros((), dtype=torch.float64, device=device)
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._weight.fill_(DECAY**age)

    def of(self, plan: Plan, grad_scale: Tensor | None) -> Direction:
        """What is added to gradients of a plan, which were multiplied with ``grad_scale``."""
        assert self._weight is not None
        weight = self._weight if grad_scale is None else self._weight * grad_scale
        return Direction(plan.buffers[DIRECTION], weight)

    def keep(
        self,
        operators: Operators,
        buckets: Sequence[Bucket],
        plans: Sequence[Plan],
        grads: Sequence[Sequence[Sequence[Tensor]]],
        pass_weights: Tensor,
        factor: Tensor,
        ok: Tensor,
    ) -> list[Tensor]:
        """Make h of the gradients of a step that has perturbed.

        Of a parameter that takes no part in it, and of all if the step is skipped, h is 0.

        Args:
            operators: compute it.
            buckets, plans: of the parameters.
            grads: for each plan and each of the two or three passes its rows.
            pass_weights, ok: see :class:`crsam_ext.ops.Coefficients`.
            factor: 0-dim, what h is multiplied with.
        Returns:
            The rows that were written.
        """
        written: list[Tensor] = []
        for bucket, plan, by_pass in zip(buckets, plans, grads, strict=True):
            if len(plan.params) < len(bucket.slots):
                bucket.buffers[DIRECTION].zero_()
            if plan.rows:
                rows = plan.buffers[DIRECTION]
                three = [*by_pass, by_pass[-1]][:3]  # of two passes, the weights of the differences are 0
                operators.fd_direction_(rows, three, plan.groups, pass_weights, factor, ok)
                written += rows
        return written
