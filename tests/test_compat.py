"""Private interfaces of torch, Python and NumPy: each still behaves as this project requires."""

import random
import warnings
from operator import attrgetter

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from crsam_ext import _compat


def test_shared_storage_is_detected():
    x = torch.ones(4)
    assert not _compat.storage_is_shared(x.untyped_storage())
    for hold in (x.detach, lambda: x[1:], lambda: torch.nn.Parameter(x), x.numpy):
        holder = hold()
        assert _compat.storage_is_shared(x.untyped_storage())
        del holder
        assert not _compat.storage_is_shared(x.untyped_storage())


def test_storage_is_not_shared_without_torchs_use_count(monkeypatch):
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    x = torch.ones(4)
    view = x[1:]
    assert not _compat.storage_is_shared(view.untyped_storage())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_segment_is_a_separate_storage(dtype):
    """It is a separate storage over a part of the memory, and keeps that memory alive."""
    flat = torch.zeros(10, dtype=dtype)
    part = _compat.segment(flat, 3, 4)
    flat[4] = 1
    assert part.tolist() == [0, 1, 0, 0]
    assert part.storage_offset() == 0
    assert part.untyped_storage().nbytes() == 4 * part.element_size()
    part[0] = 2
    assert flat[3] == 2
    version = part._version
    flat.add_(1)
    assert part._version == version  # so that a user's change can be told from a step
    del flat
    assert part.tolist() == [3, 2, 1, 1]


def test_mark_stepped_satisfies_the_scheduler():
    optimizer = SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        StepLR(optimizer, 1).step()
    assert len(caught) == 1
    optimizer = SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    scheduler = StepLR(optimizer, 1)
    _compat.mark_stepped(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


def test_attributes_of_torchs_optimizer_are_known():
    """A new private attribute of torch's would be included in copies and pickles."""
    optimizer = SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    optimizer.register_step_post_hook(lambda *_: None)
    optimizer.mine = 1
    assert _compat.attributes_of(optimizer).keys() == {"defaults", "state", "param_groups", "mine"}


DRAWS = {
    "random": random.random,
    "gauss": lambda: random.gauss(0, 1),
    "shuffle": lambda: random.shuffle([1, 2, 3]),
    "getrandbits": lambda: random.getrandbits(1),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_mark_of_python_changes_with_each_draw(draw):
    assert _compat.mark_of_python() is not None, "random numbers are still replayed, but each step takes longer"
    for _ in range(4):  # of two normal variates, the second is stored for later
        state, before = random.getstate(), _compat.mark_of_python()
        assert _compat.mark_of_python() == before
        DRAWS[draw]()
        assert _compat.mark_of_python() != before
        random.setstate(state)
        assert _compat.mark_of_python() == before
        DRAWS[draw]()
    random.seed(1)
    assert _compat.mark_of_python() != before


def test_mark_of_python_is_none_on_other_implementations(monkeypatch):
    monkeypatch.setattr(_compat.sys.implementation, "name", "another")
    _compat._python_generator.cache_clear()
    try:
        assert _compat.mark_of_python() is None
    finally:
        _compat._python_generator.cache_clear()


@pytest.mark.parametrize("draw", [np.random.rand, lambda: np.random.randint(3), lambda: np.random.permutation(3)])
def test_mark_of_numpy_changes_with_each_draw(draw):
    for _ in range(3):
        state, before = np.random.get_state(), _compat.mark_of_numpy(np.random)
        assert _compat.mark_of_numpy(np.random) == before
        draw()
        assert _compat.mark_of_numpy(np.random) != before
        np.random.set_state(state)
        assert _compat.mark_of_numpy(np.random) == before
        draw()
    np.random.seed(1)
    assert _compat.mark_of_numpy(np.random) != before


def test_mark_of_another_generator_of_numpy_is_none():
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        assert _compat.mark_of_numpy(np.random) is None
    finally:
        np.random.set_bit_generator(before)


def test_relaxed_capture_restores_the_mode(monkeypatch):
    """The thread's capture mode is relaxed inside the context, and is restored afterwards, also after an exception."""
    modes = [0]  # global, the initial mode of a thread

    def exchange(mode):
        modes.append(mode._obj.value)
        mode._obj.value = modes[-2]

    monkeypatch.setattr(_compat, "_exchange_capture_mode", lambda: exchange)

    def fail():
        with _compat.relaxed_capture():
            assert modes == [0, 2]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert modes == [0, 2, 0]


def test_relaxed_capture_without_a_driver_does_nothing(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(_compat.ctypes, "CDLL", missing)
    _compat._exchange_capture_mode.cache_clear()
    try:
        with _compat.relaxed_capture():
            assert _compat._exchange_capture_mode() is None
    finally:
        _compat._exchange_capture_mode.cache_clear()


def test_compiled_from_returns_the_original():
    model = torch.nn.Linear(2, 2)
    assert _compat.compiled_from(torch.compile(model, backend="eager")) is model
    assert _compat.compiled_from(model) is model


@pytest.fixture
def ddp(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    torch.distributed.destroy_process_group()


def test_hooks_of_ddp_are_found(ddp):
    def hook(state, bucket):
        raise NotImplementedError

    assert _compat.hooks_of(ddp) == []
    ddp.register_comm_hook("state", hook)
    assert _compat.hooks_of(ddp) == [(hook, "state")]


def test_is_joining_detects_join(ddp):
    assert not _compat.is_joining(ddp)
    with ddp.join():
        assert _compat.is_joining(ddp)
    assert not _compat.is_joining(torch.nn.Linear(2, 2))


def test_is_part_of_zero_detects_its_constructor(ddp):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    seen = []

    class Asking(torch.optim.SGD):
        def __init__(self, *arguments, **options):
            seen.append(_compat.is_part_of_zero())
            super().__init__(*arguments, **options)

    ZeroRedundancyOptimizer(ddp.parameters(), Asking, lr=0.1)
    Asking(ddp.parameters(), lr=0.1)
    assert seen == [True, False]


def test_local_tensors_are_those_of_dtensors(ddp, monkeypatch):
    placed = distribute_tensor(torch.ones(3), init_device_mesh("cpu", (1,)), [Shard(0)])
    param = torch.nn.Parameter(placed)
    for _ in range(2):
        (here,) = _compat.local_tensors([param])
        assert type(here) is torch.Tensor
        assert here.data_ptr() == placed.to_local().data_ptr()
        monkeypatch.setattr(_compat, "_local_tensor_of", attrgetter("_of_another_name"))


def test_is_fsdp_flat_detects_flat_parameters():
    param = torch.nn.Parameter(torch.ones(2))
    assert not _compat.is_fsdp_flat(param)
    param._fsdp_flattened = True  # as FullyShardedDataParallel does; tests/test_replicas.py tests the real class
    assert _compat.is_fsdp_flat(param)
