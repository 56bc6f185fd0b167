"""Any other optimizer: it makes its update itself, with the regularized gradient in ``p.grad``."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..flat import Plan
from ..ops import Coefficients, Direction, Operators
from ..sharded_state import OwnPlan
from ..shards import local
from .update import Update

__all__ = ["ProvisionalState", "WrappedUpdate", "combine"]


def combine(
    operators: Operators,
    plan: Plan,
    saved: Sequence[Tensor],
    grads: list[Sequence[Tensor]],
    c: Coefficients,
    direction: Direction | None = None,
) -> None:
    """Write w into the parameters, and the regularized gradient over that of the last pass, whose rows may change."""
    if operators.host.repeats_memory(grads[-1]):  # one tensor is the gradient of two parameters
        grads[-1] = [g.clone() for g in grads[-1]]
    operators.combine_(plan.live, saved, grads, plan.groups, c, direction)


class WrappedUpdate(Update):
    """It owns its state, of which nothing is flat.

    Args:
        step: has the optimizer make its step.
    """

    native = False

    def __init__(self, step: Callable[[], None]) -> None:
        self.buffers, self._step = None, step

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
        if not moved and c.factor is None and direction is None:
            return  # the gradient is what it is, and w where it is
        if not moved:  # combine_ writes over the gradient of the last pass, which p.grad will hold
            grads[0] = [g.clone() for g in grads[0]]
        assert not isinstance(plan, OwnPlan)  # whose state is another optimizer's
        combine(operators, plan, saved, grads, c, direction)

    def finish(self, ok: Tensor, give_gradients: Callable[[], None]) -> bool:
        if not bool(ok):  # the one synchronisation: nobody can undo what the optimizer has done
            return False
        give_gradients()
        self._step()
        return True


class ProvisionalState:
    """The state that an optimizer of any kind has made without a step of training, for whoever asks for its state.

    Only a wrapped optimizer knows what its state is, and makes it in a step. So it takes one, with rates of 0; when
    training begins, what that has left is removed, unless a checkpoint was loaded over it. So is a state that shows by
    its presence that there has been a step.
    """

    def __init__(self) -> None:
        # For each key of the state that was made the value, and its tensors in the versions that were made.
        self._made: dict[Any, tuple[Any, list[tuple[Tensor, int]]]] = {}

    def make(self, state: MutableMapping[Any, Any], groups: Sequence[dict[str, Any]], step: Callable[[], None]) -> None:
        """Have the state made; parameters and options stay as they are.

        Args:
            state: of the optimizer.
            groups: its parameter groups.
            step: makes the state.
        """
        before = set(state)
        options = [dict(group) for group in groups]
        values = [[local(param).detach().clone() for param in group["params"]] for group in groups]
        try:
            step()
        finally:
            for group, old, copies in zip(groups, options, values, strict=True):
                group.clear()
                group.update(old)
                torch._foreach_copy_([local(param) for param in group["params"]], copies)
        self._made = {key: (value, _versions(value)) for key, value in state.items() if key not in before}

    def drop(self, state: MutableMapping[Any, Any]) -> bool:
        """Remove from the state what was made; returns whether any of it stays, as a checkpoint was loaded over it."""
        stays = False
        for key, (value, versions) in self._made.items():
            if state.get(key) is value and all(x._version == version for x, version in versions):
                del state[key]
            else:
                stays = True
        self._made = {}
        return stays


def _versions(value: Any) -> list[tuple[Tensor, int]]:
    """The tensors of a value of the state, and what shows whether someone writes into them.

    Of a DTensor that is its shard, into which torch.distributed.checkpoint writes.
    """
    values = value.values() if isinstance(value, dict) else (value,)
    shards = [local(x) for x in values if isinstance(x, Tensor)]
    return [(x, x._version) for x in shards]
