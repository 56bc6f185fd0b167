"""The updates of base optimizers: fused on flat state for SGD, Adam and AdamW; any other optimizer takes its own step.

An :class:`Update` describes a base optimizer to the rest of the package: its options per group, the names of its state,
and how it is applied.
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
    """Return the update of a base optimizer, with the current options of the groups.

    Args:
        base: the base optimizer.
        groups: the parameter groups.
        step: calls ``step()`` of the base optimizer, with the gradients in ``p.grad``.
    """
    native = _NATIVE.get(type(base))
    if native is None or any(group.get("amsgrad") or group.get("differentiable") for group in groups):
        return WrappedUpdate(step)
    return native(groups)
