"""Any other optimizer: it makes its update itself, with the regularized gradient in ``p.grad``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..flat import Plan
from ..ops import Coefficients, Operators
from .update import Update

__all__ = ["WrappedUpdate", "combine"]


def combine(
    operators: Operators, plan: Plan, saved: Sequence[Tensor], grads: list[Sequence[Tensor]], c: Coefficients
) -> None:
    """Write w into the parameters, and the regularized gradient over that of the last pass, whose rows may change."""
    if operators.host.repeats_memory(grads[-1]):  # one tensor is the gradient of two parameters
        grads[-1] = [g.clone() for g in grads[-1]]
    operators.combine_(plan.live, saved, grads, plan.groups, c)


class WrappedUpdate(Update):
    """It owns its state, of which nothing is flat.

    Args:
        step: has the optimizer make its step.
    """

    native = False

    def __init__(self, step: Callable[[], None]) -> None:
        self.buffers, self._step = None, step

    def apply(
        self, operators: Operators, plan: Plan, saved: Sequence[Tensor], grads: list[Sequence[Tensor]], c: Coefficients
    ) -> None:
        if len(grads) == 1 and c.factor is None:
            return  # the gradient is what it is, and w where it is
        if len(grads) == 1:  # combine_ writes over the gradient of the last pass, which p.grad will hold
            grads[0] = [g.clone() for g in grads[0]]
        combine(operators, plan, saved, grads, c)

    def finish(self, ok: Tensor, give_gradients: Callable[[], None]) -> bool:
        if not bool(ok):  # the one synchronisation: nobody can undo what the optimizer has done
            return False
        give_gradients()
        self._step()
        return True
