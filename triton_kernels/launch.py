"""How kernels are launched: on which device, and in blocks of which size."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .chunk_table import Table

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


class Block(NamedTuple):
    """The shape of a program."""

    vectors: int  #: of a tile, 128 bits each
    warps: int


# One vector a thread. Chosen by reasoning, not measured yet. Exceptions are entered as (major compute capability, bytes
# of an element).
DEFAULT_BLOCK = Block(vectors=256, warps=8)
BLOCKS: dict[tuple[int, int], Block] = {}
# An interpreted operation costs nearly the same whether its tensors are long or short.
INTERPRETED_BLOCK = Block(vectors=4096, warps=8)

# Of a thread, at most: four programs of 256 threads on a multiprocessor, with one to five vectors a thread on the way,
# keep its memory busy. Adam, with six streams and divisions, needs more, and two are enough.
REGISTERS = 64
REGISTERS_OF_ADAM = 128


def block_of(dtype: torch.dtype, device: torch.device) -> Block:
    """The block for rows of ``dtype`` on a device."""
    if device.type == "cpu":
        return INTERPRETED_BLOCK
    return BLOCKS.get((torch.cuda.get_device_capability(device)[0], dtype.itemsize), DEFAULT_BLOCK)


def guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device the current one: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch(
    kernel: Any, table: Table, dtype: torch.dtype, *arguments: Any, registers: int = REGISTERS, **constants: Any
) -> None:
    """Launch a kernel with one program per chunk."""
    block = block_of(dtype, table.rows.device)
    _forget_globals(kernel)
    kernel[(len(table.chunks),)](
        *arguments,
        dtype=DTYPES[dtype],
        VECTORS=block.vectors,
        num_warps=block.warps,
        maxnreg=registers,
        **constants,
    )


def launch_one(kernel: Any, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel that is one program, over a few numbers per group."""
    _forget_globals(kernel)
    kernel[(1,)](*arguments, num_warps=4, **constants)


def _forget_globals(kernel: Any) -> None:
    """Triton compares, at every launch, all globals that a kernel was compiled with: microseconds each. Ours stay."""
    getattr(kernel, "used_global_vals", {}).clear()


def jit(function: Any) -> Any:
    """A kernel that is compiled once per combination of dtypes and constants, whatever its numbers and addresses are.

    Triton would compile it anew for a number that is 1 or a multiple of 16, and for an address that is no multiple of
    16: training would stop for that at some later step. (What is in a tuple it looks at all the same: those hold what
    stays as long as an optimizer.)
    """
    annotations = function.__annotations__
    names = [name for name in inspect.signature(function).parameters if annotations.get(name) != "tl.constexpr"]
    return triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names)
