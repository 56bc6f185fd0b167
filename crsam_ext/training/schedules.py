"""Schedules of the learning rate, rho, alpha and beta, per step: timm's schedulers, and rho proportional to lr."""

import math
from argparse import Namespace

from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from crsam_ext import CRSAM, Scheduled

from .errors import TrainingError
from .options import SCHEDULED


class Schedules:
    r"""Sets the scheduled options of all parameter groups for a step.

    With T steps, the first W of them warm-up steps, and :math:`s = (t - W) / (T - W)`, the learning rate of step t is

    ============  ==================================================================
    ``t < W``     peak t / W
    ``cosine``    min + (peak - min) (1 + cos(pi s)) / 2
    ``linear``    min + (peak - min) (1 - s)
    ``step``      peak 0.1\ :sup:`floor(t / (T/3))`
    ============  ==================================================================

    Other options have no warm-up. ``proportional`` is min_rho + (rho - min_rho) (lr - min_lr) / (peak - min_lr) (GSAM,
    Zhuang et al. 2022), clamped to [min_rho, rho]: during warm-up the rate can be less than min_lr.

    Args:
        optimizer: its groups hold the peak values, or held them before its state was loaded.
        options: the options of the run.
        steps_per_epoch: steps in an epoch.

    Raises:
        TrainingError: the warm-up is not shorter than the run.
    """

    def __init__(self, optimizer: CRSAM, options: Namespace, steps_per_epoch: int) -> None:
        total, warmup = options.epochs * steps_per_epoch, warmup_steps(options, steps_per_epoch)
        self._schedulers = [_scheduler(optimizer, options.schedule, total, warmup, options.min_lr)]
        self._optimizer, self._options, self._proportional = optimizer, options, False
        for option in SCHEDULED:
            kind = getattr(options, f"{option}_schedule")
            if kind == "proportional":
                self._proportional = True
            elif kind != "constant":
                minimum = options.min_rho if option == "rho" else 0.0
                self._schedulers.append(_scheduler(Scheduled(optimizer, option), kind, total, 0, minimum))

    def set(self, step: int) -> None:
        """Set the values for a step, counted from 0 over the whole run. They depend on the step number alone."""
        for scheduler in self._schedulers:
            scheduler.step_update(step)
        if self._proportional:
            o = self._options
            for group in self._optimizer.param_groups:
                part = (group["lr"] - o.min_lr) / (o.lr - o.min_lr) if o.lr > o.min_lr else 1.0
                group["rho"] = o.min_rho + (o.rho - o.min_rho) * min(max(part, 0.0), 1.0)


def warmup_steps(options: Namespace, steps_per_epoch: int) -> int:
    """Return the number of warm-up steps, from ``--warmup-steps`` or ``--warmup-epochs``.

    Raises:
        TrainingError: the warm-up is not shorter than the run.
    """
    total = options.epochs * steps_per_epoch
    warmup: int = options.warmup_steps or round(options.warmup_epochs * steps_per_epoch)
    if warmup >= total:
        raise TrainingError(f"the warm-up of {warmup} steps must be shorter than the run of {total} steps")
    return warmup


def _scheduler(optimizer: Optimizer, kind: str, total: int, warmup: int, minimum: float) -> Scheduler:
    common = {"warmup_t": warmup, "t_in_epochs": False}
    if kind == "cosine":
        return CosineLRScheduler(optimizer, total - warmup, lr_min=minimum, warmup_prefix=True, **common)
    if kind == "linear":
        return PolyLRScheduler(optimizer, total - warmup, power=1.0, lr_min=minimum, warmup_prefix=True, **common)
    third = math.inf if kind == "constant" else total / 3
    return StepLRScheduler(optimizer, decay_t=third, decay_rate=0.1, warmup_prefix=False, **common)
