"""The sharpness direction h, which a perturbation adds to the gradient, reused in the steps between perturbations.

A step that perturbs computes the regularized gradient ghat and keeps h = ghat - g0. With v = g0/|g0| and the Hessian H
at w, the h of SAM is rho H v + O(rho^2), so it changes as slowly as the curvature and the direction of the gradient. A
step between perturbations takes one pass and uses

    ghat = g0 + omega h,    omega = min(DECAY^j, MAX_RATIO |g0| / |h|),  j steps after the perturbation

(LookSAM, Liu et al., CVPR 2022, keeps the part of h that is orthogonal to g0.) An old h does not change with the
parameters: it pushes them in the same direction in every step, and only g0 pushes back. Two bounds limit this. In
experiments, neither was sufficient alone:

- Near a minimum, |h| is a multiple of |g0|, and the push would move the parameters far away. With
  |omega h| <= |g0| / 2, ghat is within 30 degrees of g0, so every step is a descent step on its own batch for any h.
- The gradients of batches average out over steps, but h does not. The weights add up to less than 1 / (1 - DECAY) = 10.

docs/reuse.md describes the effect of both bounds and of alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .flat import FlatParameters, Plan
from .ops import Direction, Operators

__all__ = ["DECAY", "DIRECTION", "MAX_RATIO", "SharpnessDirection"]

#: Key of the direction in the state of a parameter.
DIRECTION = "sharpness_direction"

#: The weight of h is at most DECAY to the power of the age of h.
DECAY = 0.9

#: The norm of omega h is at most this multiple of the norm of the gradient.
MAX_RATIO = 0.5


class SharpnessDirection:
    """The direction h of the last perturbed step, in a flat buffer of every bucket, and its norm.

    It is stored in the compute dtype, without the loss scale.
    """

    def __init__(self) -> None:
        # [groups], the squared norm of h; None if h was loaded. Always the same tensor, because CUDA graphs read it.
        self._squared_norm: Tensor | None = None
        self._age = 0
        self._decays: dict[tuple[int, torch.device], Tensor] = {}  # by age and device
        self._replayed: Tensor | None = None  # the decay, in the tensor that a CUDA graph reads

    def begin_step(self, age: int) -> None:
        """Begin a step; ``age`` is the number of steps since h was computed, 0 in a step that computes it."""
        self._age = age

    def prepare_replay(self, age: int, device: torch.device) -> None:
        """Write the decay into the tensor that CUDA graphs read, before a step is captured or replayed."""
        if self._replayed is None:
            self._replayed = torch.empty((), dtype=torch.float64, device=device)
        self._replayed.fill_(DECAY**age)

    def _decay(self, device: torch.device) -> Tensor:
        """Return the decay, 0-dim on the device, cached by age to avoid a kernel launch."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            assert self._replayed is not None
            return self._replayed
        key = self._age, device
        if key not in self._decays:
            decay = torch.tensor(DECAY**self._age, dtype=torch.float64, device="cpu")
            self._decays[key] = decay.to(device, non_blocking=True)
        return self._decays[key]

    def added(
        self,
        operators: Operators,
        flat: FlatParameters,
        plans: Sequence[Plan],
        squared_norm: Tensor,
        grad_scale: Tensor | None,
    ) -> list[Direction | None]:
        """Return h and its weight omega for each plan, in a step of one pass.

        Args:
            operators: the operators of the backend.
            flat, plans: buffers and plans of the parameters.
            squared_norm: [groups], the squared norm of g0.
            grad_scale: 0-dim, the loss scale of g0.
        """
        if self._squared_norm is None or len(self._squared_norm) != len(squared_norm):
            self._squared_norm = self._measure(operators, flat, squared_norm)
        decay = self._decay(squared_norm.device)
        weight = operators.direction_weight(squared_norm, self._squared_norm, decay, grad_scale, MAX_RATIO)
        return [Direction(plan.buffers[DIRECTION], weight) if plan.rows else None for plan in plans]

    def keep(
        self,
        operators: Operators,
        flat: FlatParameters,
        plans: Sequence[Plan],
        grads: Sequence[Sequence[Sequence[Tensor]]],
        pass_weights: Tensor,
        factor: Tensor,
        ok: Tensor,
        mean_of: Callable[[list[Tensor]], None] | None,
    ) -> None:
        """Compute h from the gradients of a perturbed step.

        h is 0 for parameters that take no part in the step, and for all parameters if the step is skipped.

        Args:
            operators: the operators of the backend.
            flat, plans: buffers and plans of the parameters.
            grads: rows of the gradients, by plan and pass (two or three passes).
            pass_weights, ok: see :class:`crsam_ext.ops.Coefficients`.
            factor: 0-dim, the factor by which h is multiplied.
            mean_of: replaces tensors by their means over the replicas.
        """
        written: list[Tensor] = []
        for bucket, plan, by_pass in zip(flat.buckets, plans, grads, strict=True):
            if len(plan.slots) < len(bucket.slots):
                bucket.buffers[DIRECTION].zero_()
            if plan.rows:
                rows = plan.buffers[DIRECTION]
                three = [*by_pass, by_pass[-1]][:3]  # with two passes, the weights of the differences are 0
                operators.fd_direction_(rows, three, plan.groups, pass_weights, factor, ok)
                written += rows
        if mean_of is not None:
            mean_of(written)
        groups = pass_weights[0]
        squared_norm = self._measure(operators, flat, groups)
        if self._squared_norm is None or self._squared_norm.shape != groups.shape:
            self._squared_norm = squared_norm
        else:
            self._squared_norm.copy_(squared_norm)

    @staticmethod
    def _measure(operators: Operators, flat: FlatParameters, groups: Tensor) -> Tensor:
        """Return the squared norm of h, [groups], over all parameters, including those that take no part in a step."""
        norms: list[Tensor | None] = []
        for bucket in flat.buckets:
            parts = {group: part for group, part in bucket.of_groups(bucket.buffers[DIRECTION]).items() if len(part)}
            rows = list(parts.values())
            norms.append(operators.grad_norm(rows, list(parts), len(groups), [None] * len(rows)) if rows else None)
        return flat.total(norms, tuple(groups.shape))
