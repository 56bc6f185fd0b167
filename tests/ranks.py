"""Processes of a gloo group on this machine, which run functions of tests."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # DistributedDataParallel imports it: do so once, before the forks
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

LIMIT = 120  # seconds that a test may take

# The processes are forks of a server that has imported this module and done nothing else. Forks of the process that
# runs the tests could not call backward() if an earlier test made autograd start a thread.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])


class Ranks:
    """Processes that are forked once and then call functions as ``function(rank, size, *arguments)`` on all ranks.

    Args:
        size: number of processes.
        seconds: timeout of a collective that other ranks have not joined.
    """

    def __init__(self, size, seconds=20):
        self.size, self._folder = size, tempfile.TemporaryDirectory()
        store = Path(self._folder.name, "store")
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = SERVER.Pipe()
            process = SERVER.Process(target=_serve, args=(rank, size, str(store), seconds, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, function, *arguments):
        """Return the result of each rank; an exception on a rank fails the test with its traceback."""
        results = self.attempt(function, *arguments)
        failures = [f"rank {rank}:\n{r.told}" for rank, r in enumerate(results) if isinstance(r, Failure)]
        assert not failures, "\n".join(failures)
        return results

    def attempt(self, function, *arguments):
        """Return the result of each rank, or a :class:`Failure` where the function raised."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(LIMIT):
                self.close()
                raise AssertionError(f"rank {rank} has not answered for {LIMIT} seconds")
            results.append(pickle.loads(pipe.recv_bytes()))
        return results

    def close(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


class Collectives(TorchDispatchMode):
    """Counts collectives by name, including those that DistributedDataParallel calls from C++."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        space, _, name = function._schema.name.partition("::")
        if space == "c10d":
            self.counts[name] += 1
        return function(*arguments, **(options or {}))

    @property
    def count(self):
        """Return the number of all-reduces."""
        return sum(count for name, count in self.counts.items() if "allreduce" in name)


class Failure:
    """The exception that a function raised on a rank."""

    def __init__(self, error):
        self.kind, self.message = type(error).__name__, str(error)
        self.told = "".join(traceback.format_exception(error))


def _serve(rank, size, store, seconds, pipe):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            result = function(rank, size, *arguments)
        except BaseException as error:
            result = Failure(error)
        pipe.send_bytes(pickle.dumps(result))
