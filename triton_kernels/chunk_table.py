"""What a kernel is told about the tensors it works on; how a program finds its part, reads and writes memory.

A row is one contiguous run of parameters and all that belongs to it. The table of rows is an int64 tensor [rows,
COLUMNS] of addresses and numbers; rows are cut into chunks, and a launch has one program per chunk, so that one launch
serves any number of tensors of any size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Elements of a chunk: short enough to keep all multiprocessors busy to the end and to sum in float32, long enough to
# pay for reading the row and for the reduction at the end of a program.
CHUNK = tl.constexpr(1 << 14)

# The columns of the table. Operators leave 0 what they do not use.
LIVE = tl.constexpr(0)  # address of what the model reads
SAVED = tl.constexpr(1)  # of w in the compute dtype; may be that of `live`
FIRST = tl.constexpr(2)  # of momentum_buffer or exp_avg, in the compute dtype
SECOND = tl.constexpr(3)  # of exp_avg_sq, in the compute dtype
GRAD = tl.constexpr(4)
GRAD_ASCENT = tl.constexpr(5)
GRAD_DESCENT = tl.constexpr(6)
STEP = tl.constexpr(7)  # of a float32: how many steps the row has taken, this one included
NUMEL = tl.constexpr(8)
GROUP = tl.constexpr(9)
ADAPTIVE = tl.constexpr(10)  # 1 where e is that of ASAM
ALIGNED = tl.constexpr(11)  # 1 where every address above, step aside, is a multiple of 16
COLUMNS = tl.constexpr(12)


class Table(NamedTuple):
    """What describes a launch: tensors on its device, and a number."""

    rows: Tensor  #: int64 [rows, COLUMNS], ordered by group
    chunks: Tensor  #: int32 [chunks, 2]: row, and index of the chunk in its row; in the order of the rows
    group_begin: Tensor  #: int64 [groups + 1], the first chunk of each group
    tickets: Tensor  #: int32 [groups], 0 between launches
    partial: Tensor  #: float64 [9 chunks], where programs leave their sums
    num_chunks: int


@triton.constexpr_function
def compute_dtype(dtype: Any) -> Any:
    """Arithmetic is done in float64 for float64, in float32 for all others."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def chunk_of(rows, chunks):
    """The row of this program, as a pointer into the table, and which of its chunks the program works on."""
    chunk = chunks + 2 * tl.program_id(0).to(tl.int64)
    return rows + tl.load(chunk).to(tl.int64) * COLUMNS, tl.load(chunk + 1)


@triton.jit
def pointers_to(address, where, dtype: tl.constexpr, width: tl.constexpr, first: tl.constexpr, count: tl.constexpr):
    """Pointers [VECTORS, count] to `count` elements of each vector, from its element `first` on."""
    begin, vector = where
    start = address.to(tl.pointer_type(dtype))  # a cast for each access, as the hint sticks to it
    if width > 1:
        start = tl.multiple_of(start, 16)
    return start + begin + (vector * width + first + tl.arange(0, count)[None, :])


@triton.jit
def load(address, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """A tile [VECTORS, width] of a row, widened. Streaming (evict first): no operator reads an element twice."""
    pointers = pointers_to(address, where, dtype, width, 0, width)
    return tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first").to(compute_dtype(dtype))


@triton.jit
def store(address, where, mask, x, dtype: tl.constexpr, width: tl.constexpr):
    """Writes a tile of a row, rounded to `dtype`."""
    x = x.to(dtype)
    if width * dtype.primitive_bitwidth <= 128:
        tl.store(pointers_to(address, where, dtype, width, 0, width), x, mask=mask, cache_modifier=".cs")
    else:
        # Masters of 16-bit rows: 256 bits a thread. As one store, Triton would pass them on to other threads first,
        # through shared memory, so that a warp writes 512 contiguous bytes.
        HALF: tl.constexpr = width // 2
        halves = tl.permute(tl.reshape(x, [x.shape[0], 2, HALF]), 0, 2, 1)
        low, high = tl.split(halves)
        tl.store(pointers_to(address, where, dtype, width, 0, HALF), low, mask=mask, cache_modifier=".cs")
        tl.store(pointers_to(address, where, dtype, width, HALF, HALF), high, mask=mask, cache_modifier=".cs")


@triton.jit
def for_each(body: tl.constexpr, arguments, sums, row, index, dtype: tl.constexpr, VECTORS: tl.constexpr):
    """sums = body(arguments, sums, where, mask, dtype, width) over all elements of a chunk; returns the last sums.

    They come in tiles [VECTORS, width], one vector a thread. Where the row is aligned, width is as many elements as fit
    into 128 bits; else, and for the last few, it is 1. The mask [VECTORS, 1] is constant over a vector: if part of one
    could be masked, Triton would move it element by element.
    """
    WIDTH: tl.constexpr = 128 // dtype.primitive_bitwidth
    begin = index.to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(row + NUMEL) - begin, CHUNK).to(tl.int32)
    vectors = count // WIDTH * tl.load(row + ALIGNED).to(tl.int32)
    lane = tl.arange(0, VECTORS)[:, None]
    for first in range(0, vectors, VECTORS):
        sums = body(arguments, sums, (begin, first + lane), first + lane < vectors, dtype, WIDTH)
    for first in range(vectors * WIDTH, count, VECTORS):
        sums = body(arguments, sums, (begin, first + lane), first + lane < count, dtype, 1)
    return sums
