"""The processes of a run that torchrun has started: which samples each takes, what is added up, and who writes.

``--batch-size`` is that of all processes together, so a run can be resumed with another number of them.
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
    """The number of this process and how many there are, as torchrun has told: 0 and 1 without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Ranks:
    """This process among those of the run.

    Args:
        rank: its number.
        size: how many there are.
        store: through which they tell each other why they fail.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size, self._store = rank, size, store

    @classmethod
    def of_torchrun(cls, device: torch.device) -> Ranks:
        """Meet the other processes, where torchrun has started this one."""
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
        """Within, the first error of a process is that of all: they fail as soon as they wait for one that has ended.

        Raises:
            TrainingError: another process failed, and its message, if it could leave one.
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
            lost = "onnection" in str(error)  # gloo's words for a process that has gone
            own = f"process {self.rank} failed: {type(error).__name__}: {error}"
            if lost:
                own = "another process of the run has ended; with --resume it goes on after the last checkpoint"
            message = self._leave_message(own)
            if message == own and not lost:
                raise
            raise TrainingError(message) from error

    def _leave_message(self, message: str) -> str:
        """Leave a message for all processes; returns the first that was left."""
        if self._store is not None:
            with suppress(RuntimeError):  # the process that keeps the store has gone
                return self._store.compare_set("error", "", message).decode()
        return message

    def leave(self) -> None:
        """Call when the run is over: nobody ends while others still talk to it."""
        if self.size > 1:
            dist.barrier()

    def first(self, function: Callable[[], T]) -> T:
        """What a function returns in the first process, in all; so is the TrainingError that it raises."""
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
        """The values of all processes."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def union(self, values: Iterable[T]) -> list[T]:
        """The values of all processes, each once."""
        return list(dict.fromkeys(value for of_rank in self.gather(list(values)) for value in of_rank))

    def part(self, batch_size: int) -> int:
        """How many samples of a batch are this process's.

        Raises:
            TrainingError: if the processes cannot have equal parts.
        """
        if batch_size % self.size:
            raise TrainingError(f"--batch-size {batch_size} cannot be divided among {self.size} processes")
        return batch_size // self.size

    def share(self, samples: Tensor) -> Tensor:
        """Those of some samples that are this process's: a slice; those of all ranks in turn are all."""
        start, stop = (len(samples) * rank // self.size for rank in (self.rank, self.rank + 1))
        return samples[start:stop]

    def ddp(self, model: nn.Module, device: torch.device) -> nn.Module | None:
        """A DistributedDataParallel around the model; None in a run of one process."""
        if self.size == 1:
            return None
        # Running statistics are those of a rank's own samples until :meth:`unify`, and not sent in each pass.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.14
        devices: Any = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, **{name: False})  # type: ignore[arg-type]

    def unify(self, *models: nn.Module | None) -> None:
        """Give all processes the same running statistics: the means over them."""
        if self.size > 1:
            from timm.utils import distribute_bn

            for model in models:
                if model is not None:
                    distribute_bn(model, self.size, reduce=True)


ALONE = Ranks()  # a run of one process
