"""What an update is."""

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
    """The update of a base optimizer, for a step: its options of each group, its state, and how it is applied."""

    #: Whether the update is computed here, on flat state.
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
            operators: compute it.
            plan: the rows of parameters and state.
            saved: rows of w.
            grads: for each pass the rows of its gradient.
            c: the weights of the gradients.
            direction: is added to the gradient, where there is one pass.
            moved: whether the parameters were perturbed, and are not w.
        """

    def finish(self, ok: Tensor, give_gradients: Callable[[], None]) -> bool:
        """Do what is left when all plans are updated.

        Args:
            ok: 0-dim bool, False where the step is skipped.
            give_gradients: makes the regularized gradient ``p.grad``.
        Returns:
            Whether ``p.grad`` was written.
        """
        return False


class RuleUpdate(Update):
    """An update that the operators make, by one of their rules.

    Args:
        groups: parameter groups.
    """

    #: The options of a group, which name the rule and its state.
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
