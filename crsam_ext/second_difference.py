"""The second difference that a step keeps for those after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .flat import Bucket, Gradients, Slot
from .precision import compute_dtype
from .shards import as_shard_of, local

__all__ = ["SECOND_DIFFERENCE", "SecondDifference"]

#: Its name in the state of a parameter.
SECOND_DIFFERENCE = "second_difference"

State = Mapping[Tensor, Mapping[str, Any]]


class SecondDifference:
    """The second difference of the last step that had all three gradients, for steps that leave out the third.

    There d2 = g+ + g- - 2 g0 is taken to be what it was, and so the gradient at w - e is g0 - (g+ - g0) + d2. It is
    kept in the state of the parameter, in the compute dtype, and belongs to losses that are not scaled.
    """

    def __init__(self) -> None:
        # Of parameters without a state so far: many optimizers make theirs only where there is none at all.
        self._unpublished: dict[Tensor, Tensor] = {}

    def keep(
        self,
        state: State,
        buckets: Sequence[Bucket],
        grads: Sequence[Sequence[Gradients]],
        ok: Tensor,
        grad_scale: Tensor | None,
        mean_of: Callable[[list[Tensor]], None] | None = None,
    ) -> None:
        """Take d2 of a step; :meth:`publish` follows when the base optimizer has made its state.

        Args:
            state: of the optimizer.
            buckets: of the parameters.
            grads: for each of the three passes and each bucket, its gradients.
            ok: 0-dim bool, False on the device if the step is skipped: then nothing is taken.
            grad_scale: 0-dim, what the gradients were multiplied with.
            mean_of: makes tensors their means over the replicas: what is kept is the same on all.
        """
        for slots, (g0, gp, gm) in _complete(buckets, grads):
            new = torch._foreach_add(torch._foreach_sub(gp, g0), torch._foreach_sub(gm, g0))
            if grad_scale is not None:
                torch._foreach_div_(new, grad_scale.to(new[0]))
            if mean_of is not None:
                mean_of(list(new))
            here = ok.to(new[0].device, non_blocking=True)
            for slot, d2 in zip(slots, new, strict=True):
                old = self._of(state, slot.param)
                if old is None:
                    old = self._unpublished[slot.param] = torch.zeros_like(d2)
                torch.where(here, d2, old, out=old)

    def enter(self, buckets: Sequence[Bucket]) -> None:
        """Take zeros for every parameter: what counts as d2 until there has been one."""
        for bucket in buckets:
            for slot in bucket.slots:
                self._unpublished.setdefault(slot.param, torch.zeros_like(slot.view(bucket.saved)))

    def publish(self, state: MutableMapping[Tensor, Any]) -> None:
        """Enter what was kept into the state."""
        for param, d2 in self._unpublished.items():
            state[param].setdefault(SECOND_DIFFERENCE, as_shard_of(param, d2))
        self._unpublished.clear()

    def descent(
        self,
        state: State,
        buckets: Sequence[Bucket],
        grads: Sequence[Sequence[Gradients]],
        grad_scale: Tensor | None,
    ) -> list[Gradients]:
        """The gradient at w - e, for each bucket, of a step that has the other two; arguments as for :meth:`keep`."""
        guess: dict[Slot, Tensor] = {}
        for slots, (g0, gp) in _complete(buckets, grads):
            kept = [self._of(state, slot.param) for slot in slots]
            d2 = [torch.zeros_like(g) if x is None else x.to(g.device) for x, g in zip(kept, g0, strict=True)]
            if grad_scale is not None:
                d2 = list(torch._foreach_mul(d2, grad_scale.to(d2[0])))
            down = torch._foreach_sub(g0, gp)
            torch._foreach_add_(down, d2)
            torch._foreach_add_(down, g0)
            guess.update({slot: g.to(slot.dtype) for slot, g in zip(slots, down, strict=True)})
        return [[guess.get(slot) for slot in bucket.slots] for bucket in buckets]

    def _of(self, state: State, param: Tensor) -> Tensor | None:
        kept = state.get(param, {}).get(SECOND_DIFFERENCE, self._unpublished.get(param))
        return None if kept is None else local(kept)


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
