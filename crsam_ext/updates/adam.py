"""torch.optim.Adam and AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..flat import Plan
from ..ops import AdamOptions, Coefficients, Operators
from .update import Update

__all__ = ["AdamUpdate"]


class AdamUpdate(Update):
    """``exp_avg``, ``exp_avg_sq`` and ``step`` are the state."""

    counts_steps = True

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.options = [AdamOptions.from_group(group) for group in groups]
        self.buffers = [("exp_avg", "exp_avg_sq")] * len(groups)

    def apply(
        self, operators: Operators, plan: Plan, saved: Sequence[Tensor], grads: list[Sequence[Tensor]], c: Coefficients
    ) -> None:
        m, v = plan.buffers["exp_avg"], plan.buffers["exp_avg_sq"]
        operators.adamw_step_(plan.live, saved, m, v, grads, plan.groups, plan.steps, self.options, c)
