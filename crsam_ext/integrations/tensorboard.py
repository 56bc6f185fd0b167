"""For TensorBoard: write what the optimizer measured."""

from __future__ import annotations

from torch.utils.tensorboard import SummaryWriter

from ..optimizer import CRSAM

__all__ = ["write_stats"]


def write_stats(writer: SummaryWriter, optimizer: CRSAM, step: int | None = None, prefix: str = "crsam/") -> None:
    """Write ``optimizer.stats`` of the last step as scalars, with one synchronisation.

    Args:
        writer: where to.
        optimizer: whose.
        step: number of the step; how many the optimizer has taken if None.
        prefix: of the tags.
    """
    step = optimizer.stats.steps if step is None else step
    for tag, value in optimizer.stats.scalars(prefix).items():
        writer.add_scalar(tag, value, step)
