"""For Hugging Face transformers: a Trainer that takes the passes of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..noise import SharedNoise
from ..optimizer import CRSAM

__all__ = ["CRSAMTrainer"]


class CRSAMTrainer(Trainer):
    """Hugging Face's Trainer with CRSAM as its optimizer: forward and backward of a batch once for each pass.

    Give it ``optimizers=(optimizer, None)``, or ``optimizer_cls_and_kwargs=(CRSAM, {...})``, which divides parameters
    into those with and without weight decay, but takes the key ``model`` for itself. The reported loss is that at w.
    The Trainer's ``max_grad_norm`` clips the regularized gradient, as CRSAM's own does with less work. In several
    processes an optimizer with ``model=`` reduces gradients once a step: the Trainer's DistributedDataParallel becomes
    that model. Whether the replicas are equal is seen in the first step and at the end of the training.

    Raises:
        TypeError: in the first step, for another optimizer.
        ValueError: then, for gradient accumulation: every pass needs the whole batch.
    """

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """All passes of a batch but the update, which the Trainer's own ``optimizer.step()`` makes."""
        optimizer = self._crsam()
        if optimizer.stats.steps == 0:
            optimizer.follow_wrapper(model)
            optimizer.check_replicas()
        calls = (optimizer.first_step, optimizer.second_step)[: optimizer.passes - 1]
        noise = SharedNoise({torch.device(self.args.device)}) if calls and optimizer.replay_rng else None
        try:
            with optimizer.no_sync():
                loss = last = super().training_step(model, inputs, num_items_in_batch)
            for call in calls:
                call(zero_grad=True, loss=last)
                if noise is not None:
                    noise.repeat()
                with optimizer.no_sync():
                    last = super().training_step(model, inputs, num_items_in_batch)
        except BaseException:
            optimizer.restore()
            raise
        if noise is not None:
            noise.end()
        scaler = self.accelerator.scaler
        if calls and (self.args.max_grad_norm or scaler is not None):  # which act on the regularized gradient
            optimizer.combine(last, None if scaler is None else scaler.get_scale())
        else:
            optimizer.give_loss(last)
        return loss

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As the Trainer does; then see whether the replicas are equal."""
        result = super().train(*arguments, **options)
        self._crsam().check_replicas()
        return result

    def _crsam(self) -> CRSAM:
        wrapped = self.optimizer
        optimizer = getattr(wrapped, "optimizer", wrapped)  # Accelerate's wrapper has no first_step
        if not isinstance(optimizer, CRSAM):
            raise TypeError(f"CRSAMTrainer needs CRSAM as its optimizer, but has {type(optimizer).__name__}")
        if self.args.gradient_accumulation_steps != 1:
            raise ValueError("gradient_accumulation_steps must be 1: every pass needs the whole batch")
        return optimizer
