"""TensorBoard: write the measurements of the optimizer."""

from __future__ import annotations

from torch.utils.tensorboard import SummaryWriter

from ..optimizer import CRSAM

__all__ = ["write_stats"]


def write_stats(writer: SummaryWriter, optimizer: CRSAM, step: int | None = None, prefix: str = "crsam/") -> None:
    """Write ``optimizer.stats`` of the last step as scalars. Synchronizes with the device once.

    Args:
        writer: the writer.
        optimizer: the optimizer.
        step: number of the step; None (default) takes the number of steps of the optimizer.
        prefix: prefix of the tags (default: "crsam/").
    """
    step = optimizer.stats.steps if step is None else step
    for tag, value in optimizer.stats.scalars(prefix).items():
        writer.add_scalar(tag, value, step)
