"""Launches kernels on the right device and with the right block size."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from .chunk_table import DTYPES, Table


class Block(NamedTuple):
    """The shape of a program."""

    vectors: int  #: vectors of 128 bits in a tile
    warps: int


# One vector per thread. On an H200, this is the fastest of the seven blocks that `make gpu` tries, in float32 and in
# bfloat16. Exceptions have the key (major compute capability, bytes per element).
DEFAULT_BLOCK = Block(vectors=256, warps=8)
BLOCKS: dict[tuple[int, int], Block] = {}
# The cost of an interpreted operation hardly depends on the length of its tensors.
INTERPRETED_BLOCK = Block(vectors=4096, warps=8)

# Maximum number of registers per thread. Four programs of 256 threads per multiprocessor, with one to five vectors per
# thread in flight, saturate its memory. For a kernel that needs more registers, such as Adam's with six streams and
# divisions, two programs are enough.
REGISTERS = 64
MORE_REGISTERS = 128


def block_of(dtype: torch.dtype, device: torch.device) -> Block:
    """Return the block for rows of ``dtype`` on a device."""
    if device.type == "cpu":
        return INTERPRETED_BLOCK
    return BLOCKS.get((_major_capability(device), dtype.itemsize), DEFAULT_BLOCK)


@cache
def _major_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


_NOTHING = nullcontext()


def guard(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which the device is current, because Triton launches on the current device."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


def launch(
    kernel: Any, table: Table, dtype: torch.dtype, *arguments: Any, registers: int = REGISTERS, **constants: Any
) -> None:
    """Launch a kernel with one program per chunk."""
    device = table.rows.device
    block = block_of(dtype, device)
    key = (dtype, device, block, *constants.values())
    constants["dtype"], constants["VECTORS"] = DTYPES[dtype], block.vectors
    _launch(kernel, key, table.num_chunks, arguments, constants, num_warps=block.warps, maxnreg=registers)


def launch_one(kernel: Any, tuples: tuple[Any, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel with one program; ``tuples`` is the part of the key that describes its tuple arguments."""
    _launch(kernel, (tuples, device, *constants.values()), 1, arguments, constants, num_warps=4)


# Launchers are cached only for the versions of Triton with which tests/test_triton_machine_code.py has confirmed that
# they are called as Triton calls them. With other versions, Triton performs every launch.
KEPT_WITH = ("3.6", "3.8")
_keeps = triton.__version__.rpartition(".")[0] in KEPT_WITH

_MAX_LAUNCHERS = 1024  # a training loop uses about 10
_launchers: dict[tuple[Any, ...], Any] = {}  # launchers of compiled kernels


def _launch(
    kernel: Any,
    key: tuple[Any, ...],
    programs: int,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    **options: Any,
) -> None:
    """Launch a kernel made by `jit`; the first launch compiles it.

    In every launch, Triton inspects all arguments to choose a specialization, which takes 20 microseconds. Here the
    specialization depends only on `key`, the number of programs and the types of the arguments (None or not).

    Args:
        key: everything that determines constants and options, the device, and the properties of tuple arguments that
            Triton specializes on.
        programs: the number of programs.
        arguments: values of all parameters before the constants. A tensor always has the same dtype, and an integer is
            below 2^31 unless the kernel declares 64 bits.
        constants: values of the remaining parameters, in their order.
        options: options of the compiler.
    """
    key = (id(kernel), programs, *key, *map(type, arguments))
    launch_compiled = _launchers.get(key)
    if launch_compiled is not None:
        launch_compiled(*arguments, *constants.values())
        return
    assert list(constants) == kernel.arg_names[len(arguments) :], f"constants are not in order: {list(constants)}"
    compiled = kernel[(programs,)](*arguments, **constants, **options)
    if compiled is not None and _keeps:  # None in interpreter mode
        if len(_launchers) >= _MAX_LAUNCHERS:
            _launchers.clear()
        _launchers[key] = compiled[(programs, 1, 1)]


def jit(function: Any) -> Any:
    """Create a kernel that is compiled once per combination of dtypes and constants, for all numbers and addresses.

    By default, Triton specializes on numbers that are 1 or multiples of 16, and on addresses that are multiples of 16.
    Training would then stop for a recompilation at some later step. (Triton always specializes on the values in tuples;
    the tuples here do not change during the lifetime of an optimizer.)
    """
    annotations = function.__annotations__
    names = [name for name in inspect.signature(function).parameters if annotations.get(name) != "tl.constexpr"]
    return triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names)
