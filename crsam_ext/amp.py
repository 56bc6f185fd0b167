"""Mixed precision with float16: a GradScaler that takes closures."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from .optimizer import CRSAM

__all__ = ["GradScaler"]


class GradScaler(torch.amp.GradScaler):
    """A :class:`torch.amp.GradScaler` whose ``step`` takes closures for :class:`crsam_ext.CRSAM`.

    The loss scale cancels in the perturbation, and is divided out of the gradient inside the fused update. An overflow
    in any pass skips the step, and ``update()`` lowers the scale. To clip, use ``max_grad_norm``, which bounds the
    norm of the unscaled gradient.

    Example::

        scaler = crsam_ext.GradScaler()

        def closure():
            with torch.autocast("cuda", torch.float16):
                loss = criterion(model(x), y)
            scaler.scale(loss).backward()
            return loss

        loss = scaler.step(optimizer, closure)
        scaler.update()
    """

    def step(self, optimizer: Optimizer, closure: Any = None, **options: Any) -> Any:
        """Take a step. For an optimizer other than CRSAM, do what torch's GradScaler does.

        Args:
            optimizer: the optimizer.
            closure: as for :meth:`crsam_ext.CRSAM.step`, except that it calls ``scaler.scale(loss).backward()``.
                Without a closure, finish the step that ``first_step`` or ``combine`` began.
            options: ``parallel`` and ``sync_perturbation``, as for :meth:`crsam_ext.CRSAM.step`.
        Returns:
            What the closure returned at w.
        Raises:
            RuntimeError: if a closure is given and ``unscale_`` or ``step`` has been called for this optimizer since
                the last ``update``. Other errors are those of :meth:`crsam_ext.CRSAM.step`.
        """
        if not self._enabled or not isinstance(optimizer, CRSAM):
            return super().step(optimizer) if closure is None else super().step(optimizer, closure)
        state = self._per_optimizer_states[id(optimizer)]
        if closure is None and state["stage"] is not OptState.READY:  # after combine() and unscale_()
            return super().step(optimizer)
        if state["stage"] is not OptState.READY:
            raise RuntimeError("step(optimizer, closure) called after unscale_() or step(): call update() first")
        if self._scale is None:  # nothing has been scaled yet
            self._lazy_init_scale_growth_tracker(optimizer.param_groups[0]["params"][0].device)
        scale = self._get_scale_async()
        assert scale is not None
        found_inf = torch.zeros((), dtype=torch.float32, device=scale.device)
        loss = optimizer.step(closure, grad_scaling=(scale, found_inf), **options)
        state["found_inf_per_device"] = {found_inf.device: found_inf}
        state["stage"] = OptState.STEPPED
        return loss
