"""Worker processes that prepare images: PyTorch's DataLoader, driven by requests of the main process.

A request describes one batch, and its answer depends on the request alone. So the workers, which start once, need no
knowledge of epochs, resuming or ranks, and their number does not change the batches.
"""

import atexit
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol, TypeVar
from weakref import WeakSet, finalize

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .errors import TrainingError
from .randomness import reseed, seed_of

T = TypeVar("T")

# Batches that each worker prepares ahead. Two keep it busy: it prepares one while the other waits to be used. A batch
# averages over many files, so all take similar times, and more batches would mostly fill /dev/shm.
PREFETCH = 2


class Source(Protocol):
    """Images and their classes."""

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """Return the class number of an image."""

    def name(self, index: int) -> str:
        """Return the name of an image, for messages."""

    def pixels(self, index: int) -> Tensor | None:
        """Return the pixels of an image, uint8 (height, width, 3); None if they cannot be read."""


class Request(NamedTuple):
    """A request for a batch: of an epoch of training, or for validation (``epoch`` is None)."""

    epoch: int | None
    size: int  #: image size in pixels
    indices: list[int]


class Answer(NamedTuple):
    """The batch that answers a request."""

    pixels: Tensor  #: uint8 (N, size, size, 3)
    labels: Tensor  #: int64 (N,)
    bad: list[str]  #: names of all files that could not be read


class Images(Dataset[Any]):
    """Answers requests.

    Args:
        train: the training images. An unreadable image is replaced by the next readable one.
        val: the validation images. An unreadable image becomes black.
        augment: takes the pixels of a training image and a size; draws from the global generators.
        crop: the same for a validation image, without random numbers.
        seed: the seed of the run.
    """

    def __init__(
        self,
        train: Source,
        val: Source,
        augment: Callable[[Tensor, int], Tensor],
        crop: Callable[[Tensor, int], Tensor],
        seed: int,
    ) -> None:
        self.train, self.val = train, val
        self._augment, self._crop, self._seed = augment, crop, seed

    def __getitem__(self, request: Request) -> Answer | TrainingError:
        """Return the batch, or the error that ends the run: raised in a worker, it would arrive as a traceback."""
        bad: dict[str, None] = {}
        get = self._to_test if request.epoch is None else self._to_train
        try:
            pixels, labels = zip(*(get(index, request, bad) for index in request.indices), strict=True)
        except TrainingError as error:
            return error
        # In a worker, default_collate allocates the batch in shared memory.
        return Answer(default_collate(list(pixels)), torch.tensor(labels), list(bad))

    def _to_train(self, index: int, request: Request, bad: dict[str, None]) -> tuple[Tensor, int]:
        assert request.epoch is not None
        count = len(self.train)
        for here in itertools.chain(range(index, count), range(index)):
            pixels = self.train.pixels(here)
            if pixels is not None:
                reseed(seed_of(self._seed, request.epoch, index))
                return self._augment(pixels, request.size), self.train.label(here)
            bad[self.train.name(here)] = None
        raise TrainingError(f"none of the {count} training images can be read")

    def _to_test(self, index: int, request: Request, bad: dict[str, None]) -> tuple[Tensor, int]:
        pixels = self.val.pixels(index)
        if pixels is None:
            bad[self.val.name(index)] = None
            return torch.zeros(request.size, request.size, 3, dtype=torch.uint8), self.val.label(index)
        return self._crop(pixels, request.size), self.val.label(index)


class _Requests(Sampler[Request]):
    """The requests of the next iteration."""

    def __init__(self) -> None:
        self.pending: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.pending)


class Pool:
    """The worker processes that answer requests. They start with the first request and live as long as this object.

    Args:
        images: the data set that answers requests.
        workers: number of processes; with 0, the main process prepares the batches.
        timeout: seconds to wait for an answer from a worker.
        pinned: whether answers are in pinned memory.
    """

    def __init__(self, images: Images, workers: int, timeout: float, pinned: bool = False) -> None:
        self._requests, self._iterations = _Requests(), 0
        self._processes: list[BaseProcess] = []
        # PyTorch would ask the workers to end and then send SIGTERM, which may take 10 seconds for each.
        finalize(self, _kill, self._processes, os.getpid()).atexit = False
        # Forked processes share the arrays of names. Forking is safe on Linux only.
        forked: dict[str, Any] = {"multiprocessing_context": "fork"} if sys.platform == "linux" else {}
        several: dict[str, Any] = {
            "num_workers": workers,
            "timeout": timeout,
            "prefetch_factor": PREFETCH,
            "persistent_workers": True,
            "worker_init_fn": ignore_signals,
        }
        self._loader: DataLoader[Any] = _quietly(
            DataLoader,
            images,
            batch_size=None,  # a request is already a batch
            sampler=self._requests,
            collate_fn=_unchanged,
            pin_memory=pinned,
            generator=torch.Generator(),  # so that the loader does not draw from the global generator
            **(several | forked if workers else {}),
        )

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Yield the answers in the order of the requests. A new call ends an earlier iteration, even an unfinished one.

        Raises:
            TrainingError: no image can be read, or a worker died or gave no answer in time.
        """
        self._iterations += 1
        iteration, self._requests.pending = self._iterations, requests
        try:
            for answer in self._started():
                if isinstance(answer, TrainingError):
                    raise answer
                yield answer
                if iteration != self._iterations:
                    raise RuntimeError("another iteration over the images has started and ended this one")
        except RuntimeError as error:
            mended = explained(error)
            if mended is None:
                raise
            _kill(self._processes, os.getpid())
            raise mended from error

    def _started(self) -> Iterator[Any]:
        before = multiprocessing.active_children()
        iterator = _quietly(iter, self._loader)
        started = [process for process in multiprocessing.active_children() if process not in before]
        self._processes += started
        _ALL_PROCESSES.update(started)
        return iterator


def explained(error: RuntimeError) -> TrainingError | None:
    """Translate an error of the DataLoader: a worker died, or gave no answer in time.

    PyTorch raises the error of a dead worker wherever the main process happens to be.

    Returns:
        A one-line error with advice; None for other errors.
    """
    message = str(error)
    if "DataLoader timed out" in message:
        seconds = message.partition("after ")[2].partition(" ")[0]
        return TrainingError(
            f"a worker process delivered no images for {seconds} seconds: a file cannot be read to its end, or the "
            "file system is slow; use a longer --data-timeout or fewer --workers"
        )
    if "DataLoader worker" in message and "pid" in message:
        return TrainingError(
            "a worker process died, perhaps because memory or /dev/shm is full: use fewer --workers or a smaller "
            f"--batch-size ({message.splitlines()[0]})"
        )
    return None


def _quietly(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call a function without the warning about more workers than cores: the user chose ``--workers``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        return function(*arguments, **options)


def _unchanged(answer: Any) -> Any:
    return answer


def ignore_signals(worker: int) -> None:
    """Ignore signals to the whole process group: the main process handles them, and needs workers for its last step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


_ALL_PROCESSES: WeakSet[BaseProcess] = WeakSet()
_OWNER = os.getpid()


def _kill(processes: Iterable[BaseProcess], owner: int) -> None:
    """Kill workers started by the process ``owner``. PyTorch and Python would send SIGTERM, which workers ignore."""
    if os.getpid() != owner or threading.current_thread() is not threading.main_thread():
        return  # in a forked worker, or in a thread, which cannot set signal handlers
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report a crash
    try:
        for process in processes:
            process.kill()
        for process in processes:
            process.join(5)
    finally:
        signal.signal(signal.SIGCHLD, handler)


# Runs before the handlers of multiprocessing, which was imported earlier.
@atexit.register
def kill_all() -> None:
    """Kill all workers. Code that ends the process with ``os._exit`` must call this first."""
    _kill(list(_ALL_PROCESSES), _OWNER)
