"""The second difference that a step keeps for those after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .flat import Bucket, Gradients, Slot
from .precision import compute_dtype

__all__ = ["SecondDifference"]


class SecondDifference:
    """The second difference of the last step that had all three gradients, for steps that leave out the third.

    There d2 = g+ + g- - 2 g0 is taken to be what it was, and so the gradient at w - e is g0 - (g+ - g0) + d2.
    """

    def __init__(self) -> None:
        #: For each parameter d2 in the compute dtype, for losses that are not scaled.
        self.values: dict[Tensor, Tensor] = {}

    def keep(
        self, buckets: Sequence[Bucket], grads: Sequence[Sequence[Gradients]], ok: Tensor, grad_scale: Tensor | None
    ) -> None:
        """Take d2 of a step.

        Args:
            buckets: of the parameters.
            grads: for each of the three passes and each bucket, its gradients.
            ok: 0-dim bool, False on the device if the step is skipped: then nothing is taken.
            grad_scale: 0-dim, what the gradients were multiplied with.
        """
        for slots, (g0, gp, gm) in _complete(buckets, grads):
            new = torch._foreach_add(torch._foreach_sub(gp, g0), torch._foreach_sub(gm, g0))
            if grad_scale is not None:
                torch._foreach_div_(new, grad_scale.to(new[0]))
            here = ok.to(new[0].device, non_blocking=True)
            for slot, d2 in zip(slots, new, strict=True):
                old = self.values.get(slot.param)
                if old is None:
                    old = self.values[slot.param] = torch.zeros_like(d2)
                torch.where(here, d2, old, out=old)

    def descent(
        self, buckets: Sequence[Bucket], grads: Sequence[Sequence[Gradients]], grad_scale: Tensor | None
    ) -> list[Gradients]:
        """The gradient at w - e, for each bucket, of a step that has the other two; arguments as for :meth:`keep`."""
        guess: dict[Slot, Tensor] = {}
        for slots, (g0, gp) in _complete(buckets, grads):
            d2 = [
                self.values.get(slot.param, torch.zeros_like(g)).to(g.device) for slot, g in zip(slots, g0, strict=True)
            ]
            if grad_scale is not None:
                d2 = list(torch._foreach_mul(d2, grad_scale.to(d2[0])))
            down = torch._foreach_sub(g0, gp)
            torch._foreach_add_(down, d2)
            torch._foreach_add_(down, g0)
            guess.update({slot: g.to(slot.dtype) for slot, g in zip(slots, down, strict=True)})
        return [[guess.get(slot) for slot in bucket.slots] for bucket in buckets]


def _complete(
    buckets: Sequence[Bucket], grads: Sequence[Sequence[Gradients]]
) -> Iterator[tuple[list[Slot], list[list[Tensor]]]]:
    """For each bucket the slots with a gradient in every pass, and for each pass these gradients, in compute dtype."""
    for bucket, *by_pass in zip(buckets, *grads, strict=True):
        pairs = zip(bucket.slots, zip(*by_pass, strict=True), strict=True)
        found = {slot: of_slot for slot, of_slot in pairs if all(g is not None for g in of_slot)}
        if found:
            wide = compute_dtype(bucket.dtype)
            yield list(found), [[g.to(wide) for g in of_pass] for of_pass in zip(*found.values(), strict=True)]
