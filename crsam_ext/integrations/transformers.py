"""Hugging Face transformers: a Trainer that takes all passes of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..noise import SharedNoise
from ..optimizer import CRSAM

__all__ = ["CRSAMTrainer"]


class CRSAMTrainer(Trainer):
    """Hugging Face's Trainer for CRSAM, which runs forward and backward of a batch once per pass.

    Pass it ``optimizers=(optimizer, None)`` or ``optimizer_cls_and_kwargs=(CRSAM, {...})``. In the second form, Hugging
    Face selects the parameters that get weight decay, and reserves the key ``model``. The reported loss is that at w.
    The Trainer's ``max_grad_norm`` clips the regularized gradient; CRSAM's own does the same at a lower
    cost. In several processes, if the optimizer has a ``model``, the DistributedDataParallel of the Trainer replaces
    it, so that gradients are reduced once per step. The Trainer checks that the replicas are equal in the first step
    and at the end of training.

    Raises:
        TypeError: in the first step, if the optimizer is not CRSAM.
        ValueError: in the first step, if gradient accumulation is on: every pass needs the whole batch.
    """

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Take all passes of a batch. The Trainer then calls ``optimizer.step()``, which updates w."""
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
        if calls and (self.args.max_grad_norm or scaler is not None):  # both act on the regularized gradient
            optimizer.combine(last, None if scaler is None else scaler.get_scale())
        else:
            optimizer.give_loss(last)
        return loss

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train as the Trainer does, then check that the replicas are equal."""
        result = super().train(*arguments, **options)
        self._crsam().check_replicas()
        return result

    def _crsam(self) -> CRSAM:
        wrapped = self.optimizer
        optimizer = getattr(wrapped, "optimizer", wrapped)  # unwrap Accelerate's wrapper, which has no first_step
        if not isinstance(optimizer, CRSAM):
            raise TypeError(f"CRSAMTrainer needs CRSAM as its optimizer, but has {type(optimizer).__name__}")
        if self.args.gradient_accumulation_steps != 1:
            raise ValueError(
                "gradient_accumulation_steps must be 1, because every pass needs the whole batch: use larger batches"
            )
        return optimizer
