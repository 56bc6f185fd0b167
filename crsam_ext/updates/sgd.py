"""The update of torch.optim.SGD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..ops import Options
from .update import RuleUpdate

__all__ = ["SGDOptions", "SGDUpdate"]


@dataclass(frozen=True)
class SGDOptions(Options):
    """Options of a parameter group of :class:`torch.optim.SGD`."""

    rule = "sgd"
    state = ("momentum_buffer",)

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool

    @property
    def numbers(self) -> tuple[float | Tensor, ...]:
        return self.maximize, self.lr, self.momentum, self.dampening, self.weight_decay, self.nesterov


class SGDUpdate(RuleUpdate):
    """The update of SGD, with the state ``momentum_buffer`` in groups with momentum."""

    group_options = SGDOptions

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(groups)
        self.buffers = [SGDOptions.state if group["momentum"] else () for group in groups]
        # In torch, dampening does not apply to the first momentum, so the update depends on whether a momentum exists.
        self.shows_steps = any(group["momentum"] and group["dampening"] for group in groups)

    def steps_taken(self, state: Mapping[str, Any]) -> float:
        return 0.0 if state.get("momentum_buffer") is None else 1.0
