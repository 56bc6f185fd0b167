"""The interface of an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..flat import Plan, StateLayout
from ..ops import Coefficients, Direction, Operators, Options
from ..sharded_state import OwnPlan

__all__ = ["RuleUpdate", "Update"]


class Update(StateLayout, ABC):
    """The update of a base optimizer in one step: its options per group, its state, and how it is applied."""

    #: Whether the operators of this package compute the update, on flat state.
    native: ClassVar[bool] = True

    @abstractmethod
    def apply(
        self,
        operators: Operators,
        plan: Plan | OwnPlan,
        saved: Sequence[Tensor],
        grads: list[Sequence[Tensor]],
        c: Coefficients,
        direction: Direction | None,
        moved: bool,
    ) -> None:
        """Update the parameters of a plan.

        Args:
            operators: the operators of the backend.
            plan: the rows of parameters and state.
            saved: the rows of w.
            grads: for each pass the rows of its gradient.
            c: the weights of the gradients.
            direction: the direction that is added to the gradient in a step of one pass, or None.
            moved: whether the parameters were perturbed, so that they differ from w.
        """

    def finish(self, ok: Tensor, give_gradients: Callable[[], None]) -> bool:
        """Complete the update after all plans have been applied.

        Args:
            ok: 0-dim bool, False if the step is skipped.
            give_gradients: writes the regularized gradient into ``p.grad``.
        Returns:
            Whether ``p.grad`` was written.
        """
        return False


class RuleUpdate(Update):
    """An update that the operators compute, by one of their rules.

    Args:
        groups: the parameter groups.
    """

    #: The class of the options of a group, which names the rule and its state.
    group_options: ClassVar[type[Options]]

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.options = [self.group_options.from_group(group) for group in groups]
        self.buffers = [self.group_options.state] * len(groups)

    def apply(
        self,
        operators: Operators,
        plan: Plan | OwnPlan,
        saved: Sequence[Tensor],
        grads: list[Sequence[Tensor]],
        c: Coefficients,
        direction: Direction | None,
        moved: bool,
    ) -> None:
        state = [plan.buffers.get(name) or [None] * len(plan.rows) for name in self.group_options.state]
        operators.step_(plan.live, saved, state, grads, plan.groups, plan.steps, self.options, c, direction)
