"""For Lightning: a callback that checks the Trainer's settings and logs what the optimizer measured."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..optimizer import CRSAM

__all__ = ["CRSAMCallback"]


class CRSAMCallback(Callback):
    """Logs ``optimizer.stats`` of every CRSAM, and refuses settings of the Trainer that three passes do not go with.

    In automatic optimization Lightning hands ``training_step`` and backward to the optimizer as a closure, and CRSAM
    runs it once for each pass. ``global_step``, batches and schedulers count steps; what ``training_step`` itself logs
    or counts it sees three times: ask ``self.optimizers().pass_index == 0`` there, or log the loss with this callback.

    Args:
        prefix: of the logged names; with several CRSAM optimizers, their number follows it.
        every_n_steps: how often to log, with one synchronisation each time; if None, as the Trainer does.
    """

    def __init__(self, prefix: str = "crsam/", every_n_steps: int | None = None) -> None:
        self.prefix, self.every_n_steps = prefix, every_n_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ValueError for settings under which the passes would not be gradients of one loss."""
        if not _optimizers(trainer) or not pl_module.automatic_optimization:
            return
        if trainer.gradient_clip_val:
            raise ValueError(
                "gradient_clip_val clips the gradient of each pass, before they are combined; "
                "use CRSAM(max_grad_norm=...), which clips the gradient of the update"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "accumulate_grad_batches gives the later passes the last batch only; use larger batches, "
                "or manual optimization with a closure over all of them"
            )
        if trainer.precision == "16-mixed":
            raise ValueError("precision='16-mixed' calls optimizer.step() without a closure; use 'bf16-mixed'")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log."""
        every = self.every_n_steps or trainer.log_every_n_steps
        if not every or trainer.global_step % every:
            return
        found = _optimizers(trainer)
        for index, optimizer in enumerate(found):
            prefix = self.prefix if len(found) == 1 else f"{self.prefix}{index}/"
            values = optimizer.stats.scalars(prefix)
            trainer.callback_metrics.update({name: torch.tensor(v) for name, v in values.items()})
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)


def _optimizers(trainer: Trainer) -> list[CRSAM]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, CRSAM)]
