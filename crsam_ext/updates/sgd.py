"""torch.optim.SGD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..flat import Plan
from ..ops import Coefficients, Operators, SGDOptions
from .update import Update

__all__ = ["SGDUpdate"]


class SGDUpdate(Update):
    """``momentum_buffer`` is the state of a group with momentum."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.options = [SGDOptions.from_group(group) for group in groups]
        self.buffers = [("momentum_buffer",) if options.momentum else () for options in self.options]

    def steps_taken(self, state: Mapping[str, Any]) -> float:
        # torch's first momentum is the gradient itself, undamped: it matters whether there has been one.
        return 0.0 if state.get("momentum_buffer") is None else 1.0

    def apply(
        self, operators: Operators, plan: Plan, saved: Sequence[Tensor], grads: list[Sequence[Tensor]], c: Coefficients
    ) -> None:
        m = plan.buffers.get("momentum_buffer") or [None] * len(plan.rows)
        operators.sgd_step_(plan.live, saved, m, grads, plan.groups, plan.steps, self.options, c)
