"""The processes of a distributed run: how samples are split, how results are gathered, and which process writes.

``--batch-size`` is the global batch size, so a run can be resumed with another number of processes.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from .errors import Stopped, TrainingError

T = TypeVar("T")


def started() -> tuple[int, int]:
    """Return rank and number of processes from the environment variables of torchrun; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Ranks:
    """This process's place among the processes of the run.

    Args:
        rank: rank of this process.
        size: number of processes.
        store: key-value store that carries error messages between processes.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size, self._store = rank, size, store

    @classmethod
    def of_torchrun(cls, device: torch.device) -> Ranks:
        """Initialize the process group if torchrun started this process."""
        if started()[1] == 1:
            return ALONE
        store, rank, size = next(rendezvous("env://"))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
        return cls(rank, size, store)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Make all processes fail with the first error: each fails when it waits for a process that has ended.

        Raises:
            TrainingError: another process failed. Its message is used if it could leave one.
        """
        try:
            yield
        except (Stopped, ModuleNotFoundError):
            raise
        except TrainingError as error:
            self._leave_message(str(error))
            raise
        except Exception as error:
            if self._store is None:
                raise
            lost = "onnection" in str(error)  # gloo's message when a process has ended
            own = f"process {self.rank} failed: {type(error).__name__}: {error}"
            if lost:
                own = "another process of the run has ended; --resume continues from the last checkpoint"
            message = self._leave_message(own)
            if message == own and not lost:
                raise
            raise TrainingError(message) from error

    def _leave_message(self, message: str) -> str:
        """Leave a message for all processes. Return the first message that any process left."""
        if self._store is not None:
            with suppress(RuntimeError):  # the process that hosts the store has ended
                return self._store.compare_set("error", "", message).decode()
        return message

    def leave(self) -> None:
        """Wait for all processes at the end of the run, so that none exits while others still communicate with it."""
        if self.size > 1:
            dist.barrier()

    def first(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 only, and return its result, or raise its TrainingError, on all ranks."""
        if self.size == 1:
            return function()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = function()
            except TrainingError as error:
                told[1] = str(error)
        dist.broadcast_object_list(told)
        if told[1] is not None:
            raise TrainingError(told[1])
        result: T = told[0]
        return result

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def union(self, values: Iterable[T]) -> list[T]:
        """Return the values of all ranks without duplicates."""
        return list(dict.fromkeys(value for of_rank in self.gather(list(values)) for value in of_rank))

    def part(self, batch_size: int) -> int:
        """Return the number of samples of a global batch that belong to this rank.

        Raises:
            TrainingError: the batch cannot be split equally.
        """
        if batch_size % self.size:
            raise TrainingError(f"--batch-size {batch_size} cannot be divided equally among {self.size} processes")
        return batch_size // self.size

    def share(self, samples: Tensor) -> Tensor:
        """Return this rank's contiguous slice of the samples. The slices of all ranks, in order, are all samples."""
        start, stop = (len(samples) * rank // self.size for rank in (self.rank, self.rank + 1))
        return samples[start:stop]

    def ddp(self, model: nn.Module, device: torch.device) -> nn.Module | None:
        """Return a DistributedDataParallel around the model; None in a run of one process."""
        if self.size == 1:
            return None
        # Each rank keeps the running statistics of its own samples until :meth:`unify`; they are not sent in each pass.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.14
        devices: Any = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, **{name: False})  # type: ignore[arg-type]

    def unify(self, *models: nn.Module | None) -> None:
        """Set the running statistics of all ranks to their means over the ranks."""
        if self.size > 1:
            from timm.utils import distribute_bn

            for model in models:
                if model is not None:
                    distribute_bn(model, self.size, reduce=True)


ALONE = Ranks()  # a run of one process
