"""The gradients at w + e and w - e, computed together on one device by ``torch.func.vmap``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from .flat import FlatParameters, Gradients

__all__ = ["gradients_at"]

# Names of the buffers in which normalization layers keep their running statistics.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class _Loss(nn.Module):
    """The loss as a module, so that ``functional_call`` can replace the parameters of the model."""

    def __init__(self, model: nn.Module, closure: Callable[[], Any]) -> None:
        super().__init__()
        self.model, self.closure = model, closure

    def forward(self) -> Any:
        return self.closure()


def gradients_at(
    points: Mapping[Tensor, Tensor], model: nn.Module, closure: Callable[[], Tensor], flat: FlatParameters
) -> list[tuple[Tensor, list[Gradients]]]:
    """Compute losses and gradients at several points together.

    Args:
        points: for each parameter its values at all points, [points, *shape].
        model: the model that has these parameters.
        closure: computes the loss of the batch by calling ``model``, without ``backward()``.
        flat: the flat buffers of the parameters.
    Returns:
        For each point the loss (0-dim) and, by bucket and slot, the gradients in the layout of the parameters.
    Raises:
        ValueError: if a parameter of the optimizer does not belong to the model.
    """
    names: dict[Tensor, str] = {param: f"model.{name}" for name, param in model.named_parameters()}
    for param in points:
        if param not in names:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} does not belong to the model given as parallel="
            )
    loss = _Loss(model, closure)
    parameters = {names[param]: values for param, values in points.items()}
    # Each point updates its own copy of the running statistics, which is discarded: only the first pass counts.
    count = len(next(iter(points.values())))
    statistics = {
        f"model.{name}": buffer.expand(count, *buffer.shape).clone()
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] in _STATISTICS
    }

    def compute(parameters: dict[str, Tensor], statistics: dict[str, Tensor]) -> Tensor:
        return functional_call(loss, {**parameters, **statistics})

    with torch.enable_grad():
        grads, losses = vmap(grad_and_value(compute), randomness="same")(parameters, statistics)
    return [
        (
            losses[index],
            [
                [
                    slot.lay_out(grads[names[slot.param]][index]) if slot.param in points else None
                    for slot in bucket.slots
                ]
                for bucket in flat.buckets
            ],
        )
        for index in range(count)
    ]
