"""The sharpness direction: what a perturbation adds to the gradient, kept for the steps between perturbations.

A step that perturbs ends with ghat, and leaves h = ghat - g0 behind. With v = g0/|g0| and the Hessian H at w, SAM's h
is rho H v + O(rho^2): it changes as slowly as the curvature and the direction of the gradient do. A step between does
without a perturbation, and takes

    ghat = g0 + omega h,    omega = min(DECAY^j, MAX_RATIO |g0| / |h|),  j steps after the perturbation

(LookSAM, Liu et al., CVPR 2022, keeps the part of h that is orthogonal to g0.) An old h is wrong in one respect: it
does not change with the parameters. It pushes them the same way in every step, and nothing pushes back but g0. Two
bounds keep that in check, and either alone has failed:

- Where |h| is a multiple of |g0|, as it is near a minimum, the push ends far away. With |omega h| <= |g0| / 2, ghat is
  within 30 degrees of g0, so that a step between goes downhill on its own batch, whatever h is.
- Gradients of batches average out over steps, and h does not. The weights add up to less than 1 / (1 - DECAY) = 10.

docs/reuse.md has what both do, and other guards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .flat import FlatParameters, Plan
from .ops import Direction, Operators

__all__ = ["DECAY", "DIRECTION", "MAX_RATIO", "SharpnessDirection"]

#: Its name in the state of a parameter.
DIRECTION = "sharpness_direction"

#: The weight of h is at most this to the power of its age.
DECAY = 0.9

#: The norm of what is added to a gradient is at most this multiple of the gradient's.
MAX_RATIO = 0.5


class SharpnessDirection:
    """The direction h of the last step that perturbed, in a flat buffer of every bucket, and its norm.

    It is kept in the compute dtype, and belongs to losses that are not scaled.
    """

    def __init__(self) -> None:
        # [groups], of h as it is in the buffers; None where it was loaded. One tensor: CUDA graphs know its address.
        self._squared_norm: Tensor | None = None
        self._age = 0
        self._decays: dict[tuple[int, torch.device], Tensor] = {}  # by age
        self._replayed: Tensor | None = None  # the decay that a CUDA graph reads

    def begin_step(self, age: int) -> None:
        """Call before a step; ``age`` is how many steps ago h was made, 0 in one that makes it."""
        self._age = age

    def prepare_replay(self, age: int, device: torch.device) -> None:
        """Call before a CUDA graph captures or repeats a step: it reads the decay from the same tensor each time."""
        if self._replayed is None:
            self._replayed = torch.empty((), dtype=torch.float64, device=device)
        self._replayed.fill_(DECAY**age)

    def _decay(self, device: torch.device) -> Tensor:
        """0-dim, on the device without a launch."""
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
        """What is added to the gradients of each plan in a step between.

        Args:
            operators: compute it.
            flat, plans: of the parameters.
            squared_norm: [groups], of g0.
            grad_scale: 0-dim, what g0 was multiplied with.
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
        """Make h of the gradients of a step that has perturbed.

        Of a parameter that takes no part in it, and of all if the step is skipped, h is 0.

        Args:
            operators: compute it.
            flat, plans: of the parameters.
            grads: for each plan and each of the two or three passes its rows.
            pass_weights, ok: see :class:`crsam_ext.ops.Coefficients`.
            factor: 0-dim, what h is multiplied with.
            mean_of: makes tensors their means over the replicas.
        """
        written: list[Tensor] = []
        for bucket, plan, by_pass in zip(flat.buckets, plans, grads, strict=True):
            if len(plan.slots) < len(bucket.slots):
                bucket.buffers[DIRECTION].zero_()
            if plan.rows:
                rows = plan.buffers[DIRECTION]
                three = [*by_pass, by_pass[-1]][:3]  # of two passes, the weights of the differences are 0
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
        """[groups], the squared norm of h: of all of it, whatever takes part in a step."""
        norms: list[Tensor | None] = []
        for bucket in flat.buckets:
            parts = {group: part for group, part in bucket.of_groups(bucket.buffers[DIRECTION]).items() if len(part)}
            rows = list(parts.values())
            norms.append(operators.grad_norm(rows, list(parts), len(groups), [None] * len(rows)) if rows else None)
        return flat.total(norms, tuple(groups.shape))
