"""The second difference d2, which a step keeps for later steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .flat import Bucket, Gradients, Slot
from .precision import compute_dtype
from .shards import as_shard_of, local

__all__ = ["SECOND_DIFFERENCE", "SecondDifference"]

#: Key of the second difference in the state of a parameter.
SECOND_DIFFERENCE = "second_difference"

State = Mapping[Tensor, Mapping[str, Any]]


class SecondDifference:
    """The second difference of the last step with three passes, for steps that take only two.

    Those steps assume that d2 = g+ + g- - 2 g0 has not changed, which gives the gradient at w - e as
    g0 - (g+ - g0) + d2. d2 is stored in the state of the parameter, in the compute dtype, without the loss scale.
    """

    def __init__(self) -> None:
        # For parameters without state: many optimizers create their state only if it is empty.
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
        """Store d2 of a step. Call :meth:`publish` after the base optimizer has created its state.

        Args:
            state: state of the optimizer.
            buckets: buckets of the parameters.
            grads: for each of the three passes, the gradients by bucket.
            ok: 0-dim bool on the device, False if the step is skipped; d2 then keeps its value.
            grad_scale: 0-dim, the loss scale of the gradients.
            mean_of: replaces tensors by their means over the replicas, so that d2 is the same on all.
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
        """Store zeros for every parameter, the initial value of d2."""
        for bucket in buckets:
            for slot in bucket.slots:
                self._unpublished.setdefault(slot.param, torch.zeros_like(slot.view(bucket.saved)))

    def publish(self, state: MutableMapping[Tensor, Any]) -> None:
        """Move d2 of parameters that had no state into their state."""
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
        """Return the extrapolated gradient at w - e, by bucket, of a step of two passes; see :meth:`keep`."""
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
    """Yield, for each bucket, the slots with a gradient in every pass and, by pass, the gradients in compute dtype."""
    for bucket, *by_pass in zip(buckets, *grads, strict=True):
        pairs = zip(bucket.slots, zip(*by_pass, strict=True), strict=True)
        found = {slot: of_slot for slot, of_slot in pairs if all(g is not None for g in of_slot)}
        if found:
            wide = compute_dtype(bucket.dtype)
            yield list(found), [[g.to(wide) for g in of_pass] for of_pass in zip(*found.values(), strict=True)]
