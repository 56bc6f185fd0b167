"""Images from processes that prepare them: PyTorch's DataLoader, told by the main process what each batch consists of.

A request says what is wanted of which samples, and the answer depends on the request alone. So the workers, which start
once, know nothing of epochs, resuming or ranks, and how many there are changes nothing.
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

# Batches that each worker is ahead. Two keep it busy: one is being prepared while another waits to be used. As means of
# many files, batches take nearly equal times, so more would mostly fill /dev/shm, where all of them are.
PREFETCH = 2


class Source(Protocol):
    """Images and their classes."""

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """The class of an image."""

    def name(self, index: int) -> str:
        """What messages call an image."""

    def pixels(self, index: int) -> Tensor | None:
        """Its pixels, uint8 (height, width, 3); None if they cannot be read."""


class Request(NamedTuple):
    """A batch that is wanted: of an epoch of training, or to test (None)."""

    epoch: int | None
    size: int  #: of the images, in pixels
    indices: list[int]


class Answer(NamedTuple):
    """That batch."""

    pixels: Tensor  #: uint8 (N, size, size, 3)
    labels: Tensor  #: int64 (N,)
    bad: list[str]  #: names of the files that could not be read, in training all that were tried


class Images(Dataset[Any]):
    """What becomes of a request.

    Args:
        train: the images to train with. The next readable one takes the place of one that is bad.
        val: the images to test. A bad one is black.
        augment: takes the pixels of a training image and a size; draws from the global generators.
        crop: the same for an image to test, without drawing.
        seed: of the run.
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
        """The batch, or the error that ends the run: raised in a worker it would come as the text of a traceback."""
        bad: dict[str, None] = {}
        get = self._to_test if request.epoch is None else self._to_train
        try:
            pixels, labels = zip(*(get(index, request, bad) for index in request.indices), strict=True)
        except TrainingError as error:
            return error
        # In a worker this is in shared memory from the start.
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
    """The requests of the iteration that is beginning."""

    def __init__(self) -> None:
        self.pending: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.pending)


class Pool:
    """The processes that answer requests. They start at the first request and live as long as this.

    Args:
        images: what answers.
        workers: number of processes; with 0 the answers are made here.
        timeout: seconds to wait for an answer of a worker.
        pinned: whether answers come in pinned memory.
    """

    def __init__(self, images: Images, workers: int, timeout: float, pinned: bool = False) -> None:
        self._requests, self._iterations = _Requests(), 0
        self._processes: list[BaseProcess] = []
        # Left to PyTorch, which asks them to end, and then sends SIGTERM, this might take 10 seconds for each.
        finalize(self, _kill, self._processes, os.getpid()).atexit = False
        # Forked, processes share the arrays of names. Elsewhere than on Linux, forking is not safe.
        forked: dict[str, Any] = {"multiprocessing_context": "fork"} if sys.platform == "linux" else {}
        several: dict[str, Any] = {
            "num_workers": workers,
            "timeout": timeout,
            "prefetch_factor": PREFETCH,
            "persistent_workers": True,
            "worker_init_fn": _ignore_signals,
        }
        self._loader: DataLoader[Any] = _quietly(
            DataLoader,
            images,
            batch_size=None,  # a request is a batch already
            sampler=self._requests,
            collate_fn=_unchanged,
            pin_memory=pinned,
            generator=torch.Generator(),  # what the loader draws for itself is not drawn from the global one
            **(several | forked if workers else {}),
        )

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """The answers, in the order of the requests. Another call ends this one, which need not have come to its end.

        Raises:
            TrainingError: no image can be read, a worker has died, or gave no answer in time.
        """
        self._iterations += 1
        iteration, self._requests.pending = self._iterations, requests
        try:
            for answer in self._started():
                if isinstance(answer, TrainingError):
                    raise answer
                yield answer
                if iteration != self._iterations:
                    raise RuntimeError("the images of another iteration have been asked for")
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
    """What an error of the DataLoader means: that a worker has died, which may be raised anywhere, or gave no answer.

    Returns:
        An error of one line with advice; None for other errors.
    """
    message = str(error)
    if "DataLoader timed out" in message:
        seconds = message.partition("after ")[2].partition(" ")[0]
        return TrainingError(
            f"a process that prepares images gave none for {seconds} seconds: a file cannot be read to its end, or the "
            "file system is slow; give a longer --data-timeout, or fewer --workers"
        )
    if "DataLoader worker" in message and "pid" in message:
        return TrainingError(
            "a process that prepares images has died, perhaps for lack of memory or of room in /dev/shm: give fewer "
            f"--workers, or a smaller --batch-size ({message.splitlines()[0]})"
        )
    return None


def _quietly(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Without the warning that there are more workers than cores, which ``--workers`` asks for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        return function(*arguments, **options)


def _unchanged(answer: Any) -> Any:
    return answer


def _ignore_signals(worker: int) -> None:
    """Signals to the whole group of processes are for the main one, which needs its workers to finish its step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


_ALL_PROCESSES: WeakSet[BaseProcess] = WeakSet()
_OWNER = os.getpid()


def _kill(processes: Iterable[BaseProcess], owner: int) -> None:
    """End workers that the process ``owner`` has started. PyTorch and Python would send SIGTERM, which they ignore."""
    if os.getpid() != owner or threading.current_thread() is not threading.main_thread():
        return  # in a worker that has this pool as well, or where nothing can be done about signals
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's takes it for an accident
    try:
        for process in processes:
            process.kill()
        for process in processes:
            process.join(5)
    finally:
        signal.signal(signal.SIGCHLD, handler)


# Before those of multiprocessing, which was imported earlier.
@atexit.register
def kill_all() -> None:
    """End all workers: what leaves the interpreter by ``os._exit`` calls it first."""
    _kill(list(_ALL_PROCESSES), _OWNER)
