"""What an update is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from ..flat import Plan, StateLayout
from ..ops import Coefficients, Operators

__all__ = ["Update"]


class Update(StateLayout, ABC):
    """The update of a base optimizer, for a step: its options of each group, its state, and how it is applied."""

    #: Whether the update is computed here, on flat state.
    native: ClassVar[bool] = True

    @abstractmethod
    def apply(
        self, operators: Operators, plan: Plan, saved: Sequence[Tensor], grads: list[Sequence[Tensor]], c: Coefficients
    ) -> None:
        """Update the parameters of a plan.

        Args:
            operators: compute it.
            plan: the rows of parameters and state.
            saved: rows of w.
            grads: for each pass the rows of its gradient.
            c: the weights of the gradients.
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
