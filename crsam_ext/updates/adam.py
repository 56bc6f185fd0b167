"""The update of torch.optim.Adam and AdamW."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops import Options
from .update import RuleUpdate

__all__ = ["AdamOptions", "AdamUpdate"]


@dataclass(frozen=True)
class AdamOptions(Options):
    """Options of a parameter group of :class:`torch.optim.Adam` or, with ``decoupled_weight_decay``, AdamW."""

    rule = "adam"
    state = ("exp_avg", "exp_avg_sq")

    lr: float | Tensor
    betas: tuple[float | Tensor, float | Tensor]
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool

    @property
    def numbers(self) -> tuple[float | Tensor, ...]:
        return self.maximize, self.lr, *self.betas, self.eps, self.weight_decay, self.decoupled_weight_decay


class AdamUpdate(RuleUpdate):
    """The update of Adam and AdamW, with the state ``exp_avg``, ``exp_avg_sq`` and ``step``."""

    group_options = AdamOptions
    counts_steps = True
