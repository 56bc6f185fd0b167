"""How kernels are launched: on which device, and in blocks of which size."""

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

    vectors: int  #: of a tile, 128 bits each
    warps: int


# One vector a thread: on an H200 the fastest of the seven that `make gpu` tries, in float32 and in bfloat16. Exceptions
# are entered as (major compute capability, bytes of an element).
DEFAULT_BLOCK = Block(vectors=256, warps=8)
BLOCKS: dict[tuple[int, int], Block] = {}
# An interpreted operation costs nearly the same whether its tensors are long or short.
INTERPRETED_BLOCK = Block(vectors=4096, warps=8)

# Of a thread, at most: four programs of 256 threads on a multiprocessor, with one to five vectors a thread on the way,
# keep its memory busy. Where a kernel needs more, as Adam's with six streams and divisions does, two are enough.
REGISTERS = 64
MORE_REGISTERS = 128


def block_of(dtype: torch.dtype, device: torch.device) -> Block:
    """The block for rows of ``dtype`` on a device."""
    if device.type == "cpu":
        return INTERPRETED_BLOCK
    return BLOCKS.get((_major_capability(device), dtype.itemsize), DEFAULT_BLOCK)


@cache
def _major_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


_NOTHING = nullcontext()


def guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device the current one: Triton launches there."""
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
    """Launch a kernel that is one program, over a few numbers per group; ``tuples`` tells what is in its tuples."""
    _launch(kernel, (tuples, device, *constants.values()), 1, arguments, constants, num_warps=4)


# Launchers are kept with the versions of Triton for which tests/test_triton_machine_code.py has found that they are
# called as Triton itself calls them. With any other version, Triton makes every launch.
KEPT_WITH = ("3.6", "3.8")
_keeps = triton.__version__.rpartition(".")[0] in KEPT_WITH

_MAX_LAUNCHERS = 1024  # some 10 are in use in a training loop
_launchers: dict[tuple[Any, ...], Any] = {}  # of kernels that are compiled


def _launch(
    kernel: Any,
    key: tuple[Any, ...],
    programs: int,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    **options: Any,
) -> None:
    """Launch a kernel of `jit`, compiled the first time.

    Triton would look at all arguments in every launch to find out which code is for them: 20 microseconds. Here that
    depends on nothing but `key` and on which arguments are None.

    Args:
        key: what decides on constants and options; the device; of tuples among the arguments, what Triton looks at.
        programs: how many.
        arguments: for its parameters up to the constants, tensors always of the same dtype, integers below 2^31 unless
            the kernel says that they have 64 bits.
        constants: for the others, in their order.
        options: of the compiler.
    """
    key = (id(kernel), programs, *key, *map(type, arguments))
    launch_compiled = _launchers.get(key)
    if launch_compiled is not None:
        launch_compiled(*arguments, *constants.values())
        return
    assert list(constants) == kernel.arg_names[len(arguments) :], f"constants are not in order: {list(constants)}"
    compiled = kernel[(programs,)](*arguments, **constants, **options)
    if compiled is not None and _keeps:  # one that is interpreted is not compiled
        if len(_launchers) >= _MAX_LAUNCHERS:
            _launchers.clear()
        _launchers[key] = compiled[(programs, 1, 1)]


def jit(function: Any) -> Any:
    """A kernel that is compiled once per combination of dtypes and constants, whatever its numbers and addresses are.

    Triton would compile it anew for a number that is 1 or a multiple of 16, and for an address that is no multiple of
    16: training would stop for that at some later step. (What is in a tuple it looks at all the same: those hold what
    stays as long as an optimizer.)
    """
    annotations = function.__annotations__
    names = [name for name in inspect.signature(function).parameters if annotations.get(name) != "tl.constexpr"]
    return triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names)
