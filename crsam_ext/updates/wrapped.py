"""The update of any other optimizer, which takes its own step with the regularized gradient in ``p.grad``."""

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
    """Write w into the parameters, and the regularized gradient into the rows of the last pass or a copy of them."""
    if operators.host.repeats_memory(grads[-1]):  # two parameters have the same tensor as gradient
        grads[-1] = [g.clone() for g in grads[-1]]
    operators.combine_(plan.live, saved, grads, plan.groups, c, direction)


class WrappedUpdate(Update):
    """The update of an optimizer that owns its state. None of that state is flat.

    Args:
        step: calls ``step()`` of the optimizer.
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
            return  # p.grad and the parameters already have the right values
        if not moved:  # combine_ overwrites the last gradient, which p.grad must keep
            grads[0] = [g.clone() for g in grads[0]]
        assert not isinstance(plan, OwnPlan)  # the state is not sharded here
        combine(operators, plan, saved, grads, c, direction)

    def finish(self, ok: Tensor, give_gradients: Callable[[], None]) -> bool:
        if not bool(ok):  # synchronizes: a step that the optimizer has taken cannot be undone
            return False
        give_gradients()
        self._step()
        return True


class ProvisionalState:
    """State that was created before the first step of training, because a checkpoint needs a state to load into.

    A wrapped optimizer creates its state in its first step, so it takes a step with an lr of 0. When training begins,
    the state created by that step is removed, unless a checkpoint was loaded into it. The same applies to a native
    state whose presence shows that a step was taken.
    """

    def __init__(self) -> None:
        # By key of the state: the value, and its tensors with their versions at creation.
        self._made: dict[Any, tuple[Any, list[tuple[Tensor, int]]]] = {}

    def make(self, state: MutableMapping[Any, Any], groups: Sequence[dict[str, Any]], step: Callable[[], None]) -> None:
        """Create the state by calling ``step``, then restore parameters and options.

        Args:
            state: the state of the optimizer.
            groups: the parameter groups.
            step: creates the state.
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
        """Remove the created state. Return whether any of it remains because a checkpoint was loaded into it."""
        stays = False
        for key, (value, versions) in self._made.items():
            if state.get(key) is value and all(x._version == version for x, version in versions):
                del state[key]
            else:
                stays = True
        self._made = {}
        return stays


def _versions(value: Any) -> list[tuple[Tensor, int]]:
    """Return the tensors of a state value and their versions, which change with every write.

    For a DTensor it is its local shard, into which torch.distributed.checkpoint writes.
    """
    values = value.values() if isinstance(value, dict) else (value,)
    shards = [local(x) for x in values if isinstance(x, Tensor)]
    return [(x, x._version) for x in shards]
