"""Lightning: a callback that checks the settings of the Trainer and logs the measurements of the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

from ..amp import GradScaler
from ..optimizer import CRSAM

__all__ = ["CRSAMCallback", "CRSAMMixedPrecision"]


class CRSAMMixedPrecision(MixedPrecision):
    """Lightning's precision "16-mixed", with a GradScaler that takes closures.

    Use it as ``Trainer(plugins=[CRSAMMixedPrecision()])``.

    Args:
        device: device type of autocast and the scaler (default: "cuda").
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__("16-mixed", device, GradScaler(device))

    def optimizer_step(self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """Pass the closure on to the step. Lightning's own plugin would call it once, before the step."""
        loss = self.scaler.step(optimizer, partial(self._wrap_closure, model, optimizer, closure))
        self.scaler.update()
        return loss


class CRSAMCallback(Callback):
    """Logs ``optimizer.stats`` of every CRSAM, and rejects Trainer settings that are incompatible with several passes.

    In automatic optimization, Lightning passes ``training_step`` and backward to the optimizer as a closure, and CRSAM
    calls it once per pass. ``global_step``, batches and schedulers count steps. But ``training_step`` runs up to three
    times per step: log there only if ``self.optimizers().pass_index == 0``, or log the loss with this callback.

    With the strategy "ddp" and an optimizer with ``model=self``, the DistributedDataParallel around the module becomes
    the ``model``, so gradients are reduced once per step. The callback checks that the replicas are equal when training
    begins and ends.

    Args:
        prefix: prefix of the logged names (default: "crsam/"). With several CRSAM optimizers, an index follows it.
        every_n_steps: number of steps between logs; each log synchronizes once. None (default) takes the
            ``log_every_n_steps`` of the Trainer.
    """

    def __init__(self, prefix: str = "crsam/", every_n_steps: int | None = None) -> None:
        self.prefix, self.every_n_steps = prefix, every_n_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the wrapped model to the optimizers, and check that the replicas are equal."""
        for optimizer in _optimizers(trainer):
            if optimizer.stats.steps == 0:
                optimizer.follow_wrapper(trainer.strategy.model)
            optimizer.check_replicas()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the replicas are equal."""
        for optimizer in _optimizers(trainer):
            optimizer.check_replicas()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Raise ValueError if, with the settings of the Trainer, the passes would not be gradients of the same loss.

        This is checked before every batch, because other callbacks may change settings during training.
        """
        if not _optimizers(trainer) or not pl_module.automatic_optimization:
            return
        if trainer.gradient_clip_val:
            raise ValueError(
                "gradient_clip_val clips the gradient of each pass before the passes are combined: "
                "use CRSAM(max_grad_norm=...), which clips the gradient of the update"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "with accumulate_grad_batches (set by the Trainer or a GradientAccumulationScheduler) the later passes "
                "see the last batch only: use larger batches, or manual optimization with a closure over all of them"
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise ValueError(
                "precision='16-mixed' calls optimizer.step() without a closure: "
                "use 'bf16-mixed', or plugins=[CRSAMMixedPrecision()]"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the measurements."""
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
