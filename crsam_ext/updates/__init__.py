"""How a base optimizer's update is made: on flat state for SGD, Adam and AdamW, by the optimizer itself otherwise.

An :class:`Update` is what the rest of the package knows of a base optimizer: its options of each group, the names of
its state, and how it is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import SGD, Adam, AdamW, Optimizer

from .adam import AdamOptions, AdamUpdate
from .sgd import SGDOptions, SGDUpdate
from .update import RuleUpdate, Update
from .wrapped import ProvisionalState, WrappedUpdate

__all__ = ["AdamOptions", "ProvisionalState", "SGDOptions", "Update", "WrappedUpdate", "update_of"]

_NATIVE: dict[type[Optimizer], type[RuleUpdate]] = {
    SGD: SGDUpdate,
    Adam: AdamUpdate,
    AdamW: AdamUpdate,
}


def update_of(base: Optimizer, groups: Sequence[Mapping[str, Any]], step: Callable[[], None]) -> Update:
    """The update of a base optimizer, with the options that the groups have now.

    Args:
        base: the base optimizer.
        groups: parameter groups.
        step: has the base optimizer make a step with the gradients in ``p.grad``.
    """
    native = _NATIVE.get(type(base))
    if native is None or any(group.get("amsgrad") or group.get("differentiable") for group in groups):
        return WrappedUpdate(step)
    return native(groups)
