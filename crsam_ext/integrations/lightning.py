"""For Lightning: a callback that checks the Trainer's settings and logs what the optimizer measured."""

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
    """Lightning's "16-mixed" with a GradScaler that takes closures: ``Trainer(plugins=[CRSAMMixedPrecision()])``.

    Args:
        device: type of the device for autocast and scaler.
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__("16-mixed", device, GradScaler(device))

    def optimizer_step(self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """Step with the closure, which Lightning's own plugin would call once, before the step."""
        loss = self.scaler.step(optimizer, partial(self._wrap_closure, model, optimizer, closure))
        self.scaler.update()
        return loss


class CRSAMCallback(Callback):
    """Logs ``optimizer.stats`` of every CRSAM, and refuses settings of the Trainer that three passes do not go with.

    In automatic optimization Lightning hands ``training_step`` and backward to the optimizer as a closure, and CRSAM
    runs it once for each pass. ``global_step``, batches and schedulers count steps; what ``training_step`` itself logs
    or counts it sees three times: ask ``self.optimizers().pass_index == 0`` there, or log the loss with this callback.

    With the strategy "ddp", an optimizer with ``model=self`` reduces gradients once a step: the DistributedDataParallel
    around the module becomes that model. Whether the replicas are equal is seen when training begins and ends.

    Args:
        prefix: of the logged names; with several CRSAM optimizers, their number follows it.
        every_n_steps: how often to log, with one synchronisation each time; if None, as the Trainer does.
    """

    def __init__(self, prefix: str = "crsam/", every_n_steps: int | None = None) -> None:
        self.prefix, self.every_n_steps = prefix, every_n_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the strategy's model to the optimizers, and see whether the replicas are equal."""
        for optimizer in _optimizers(trainer):
            if optimizer.stats.steps == 0:
                optimizer.follow_wrapper(trainer.strategy.model)
            optimizer.check_replicas()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether the replicas are equal."""
        for optimizer in _optimizers(trainer):
            optimizer.check_replicas()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Raise ValueError for settings under which the passes would not be gradients of one loss.

        Before every batch, because other callbacks change settings during the training.
        """
        if not _optimizers(trainer) or not pl_module.automatic_optimization:
            return
        if trainer.gradient_clip_val:
            raise ValueError(
                "gradient_clip_val clips the gradient of each pass, before they are combined; "
                "use CRSAM(max_grad_norm=...), which clips the gradient of the update"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "accumulate_grad_batches, set by the Trainer or by a GradientAccumulationScheduler, gives the later "
                "passes the last batch only; use larger batches, or manual optimization with a closure over all of them"
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise ValueError(
                "precision='16-mixed' calls optimizer.step() without a closure; "
                "use 'bf16-mixed', or plugins=[CRSAMMixedPrecision()]"
            )

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
