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

from crsam_ext import ops
from crsam_ext.precision import PRECISIONS

# Elements of a chunk: short enough to keep all multiprocessors busy to the end and to sum in float32, long enough to
# pay for reading the row and for the reduction at the end of a program.
CHUNK = tl.constexpr(1 << 14)

PASSES = tl.constexpr(ops.PASSES)  # gradients of a step at most
GRAM = tl.constexpr(ops.GRAM)
BUFFERS = tl.constexpr(2)  # of an update rule's state at most

# The columns of the table. Operators leave 0 what they do not use.
LIVE = tl.constexpr(0)  # address of what the model reads
SAVED = tl.constexpr(1)  # of w in the compute dtype; may be that of `live`
DIRECTION = tl.constexpr(2)  # of what is added to a gradient, in the compute dtype
STATE = tl.constexpr(3)  # of each buffer of the update rule, in the compute dtype
GRADS = tl.constexpr(STATE.value + BUFFERS.value)  # of each pass
STEP = tl.constexpr(GRADS.value + PASSES.value)  # of a float32: how many steps the row has taken, this one included
NUMEL = tl.constexpr(STEP.value + 1)
GROUP = tl.constexpr(STEP.value + 2)
ADAPTIVE = tl.constexpr(STEP.value + 3)  # 1 where e is that of ASAM
ALIGNED = tl.constexpr(STEP.value + 4)  # 1 where every address above, step aside, is a multiple of 16
COLUMNS = tl.constexpr(STEP.value + 5)


class Table(NamedTuple):
    """What describes a launch: tensors on its device, and a number."""

    rows: Tensor  #: int64 [rows, COLUMNS], ordered by group
    chunks: Tensor  #: int32 [chunks, 2]: row, and index of the chunk in its row; in the order of the rows
    group_begin: Tensor  #: int64 [groups + 1], the first chunk of each group
    tickets: Tensor  #: int32 [groups], 0 between launches
    partial: Tensor  #: float64 [GRAM chunks], where programs leave their sums
    num_chunks: int
    num_groups: int


#: The dtypes of rows, as Triton knows them.
DTYPES = {dtype: getattr(tl, str(dtype).removeprefix("torch.")) for dtype in PRECISIONS}
_PRECISIONS = {DTYPES[dtype]: precision for dtype, precision in PRECISIONS.items()}


@triton.constexpr_function
def compute_dtype(dtype: Any) -> Any:
    """The dtype in which rows of ``dtype`` are computed."""
    return DTYPES[_PRECISIONS[dtype].compute]


@triton.constexpr_function
def digits(dtype: Any) -> Any:
    """See `Precision`."""
    return _PRECISIONS[dtype].digits


@triton.constexpr_function
def smallest_exponent(dtype: Any) -> Any:
    """See `Precision`."""
    return _PRECISIONS[dtype].smallest_exponent


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
def addresses(column, COUNT: tl.constexpr):
    """The addresses in some columns of a row, from a pointer to the first of them."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.load(column + i),)
    return found


@triton.jit
def load_all(addresses, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """A tile of each of some rows."""
    tiles = ()
    for i in tl.static_range(len(addresses)):
        tiles = tiles + (load(addresses[i], where, mask, dtype, width),)
    return tiles


@triton.jit
def for_each(
    body: tl.constexpr,
    arguments,
    sums,
    row,
    index,
    dtype: tl.constexpr,
    VECTORS: tl.constexpr,
    UNROLL: tl.constexpr = 1,
):
    """sums = body(arguments, sums, where, mask, dtype, width) over all elements of a chunk; returns the last sums.

    They come in tiles [VECTORS, width], one vector a thread. Where the row is aligned, width is as many elements as fit
    into 128 bits; else, and for the last few, it is 1. The mask [VECTORS, 1] is constant over a vector: if part of one
    could be masked, Triton would move it element by element. UNROLL tiles are worked on at a time.
    """
    WIDTH: tl.constexpr = 128 // dtype.primitive_bitwidth
    begin = index.to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(row + NUMEL) - begin, CHUNK).to(tl.int32)
    vectors = count // WIDTH * tl.load(row + ALIGNED).to(tl.int32)
    lane = tl.arange(0, VECTORS)[:, None]
    for first in tl.range(0, vectors, VECTORS, loop_unroll_factor=UNROLL):
        sums = body(arguments, sums, (begin, first + lane), first + lane < vectors, dtype, WIDTH)
    for first in range(vectors * WIDTH, count, VECTORS):
        sums = body(arguments, sums, (begin, first + lane), first + lane < count, dtype, 1)
    return sums
