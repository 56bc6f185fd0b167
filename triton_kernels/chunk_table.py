"""The chunk table, which describes the tensors of a launch, and functions that read and write chunks.

A row is one contiguous run of parameters with its addresses and metadata. The table of rows is an int64 tensor [rows,
COLUMNS]. Rows are cut into chunks, and a launch has one program per chunk, so one launch processes any number of
tensors of any size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from crsam_ext import ops
from crsam_ext.precision import PRECISIONS

# Elements of a chunk. It is short enough to keep all multiprocessors busy to the end and to sum in float32, and long
# enough to amortize reading the row and the reduction at the end of a program.
CHUNK = tl.constexpr(1 << 14)

PASSES = tl.constexpr(ops.PASSES)  # maximum number of gradients of a step
GRAM = tl.constexpr(ops.GRAM)
BUFFERS = tl.constexpr(2)  # maximum number of state buffers of an update rule

# The columns of the table. Operators set unused columns to 0.
LIVE = tl.constexpr(0)  # address of the parameters that the model reads
SAVED = tl.constexpr(1)  # address of w in the compute dtype; may equal LIVE
DIRECTION = tl.constexpr(2)  # address of the direction that is added to a gradient, in the compute dtype
STATE = tl.constexpr(3)  # address of each buffer of the update rule, in the compute dtype
GRADS = tl.constexpr(STATE.value + BUFFERS.value)  # address of the gradient of each pass
STEP = tl.constexpr(GRADS.value + PASSES.value)  # address of a float32: the steps of the row, including this one
NUMEL = tl.constexpr(STEP.value + 1)
GROUP = tl.constexpr(STEP.value + 2)
ADAPTIVE = tl.constexpr(STEP.value + 3)  # 1 to use the e of ASAM
ALIGNED = tl.constexpr(STEP.value + 4)  # 1 if all addresses except STEP are multiples of 16
COLUMNS = tl.constexpr(STEP.value + 5)


class Table(NamedTuple):
    """The chunk table of a launch: tensors on its device, and counts."""

    rows: Tensor  #: int64 [rows, COLUMNS], ordered by group
    chunks: Tensor  #: int32 [chunks, 2]: row, and index of the chunk in its row; in the order of the rows
    group_begin: Tensor  #: int64 [groups + 1], the first chunk of each group
    tickets: Tensor  #: int32 [groups], 0 between launches
    partial: Tensor  #: float64 [GRAM chunks], the partial sums of the programs
    num_chunks: int
    num_groups: int


#: The Triton dtypes of rows.
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
    """The row of this program, as a pointer into the table, and the index of the program's chunk in this row."""
    chunk = chunks + 2 * tl.program_id(0).to(tl.int64)
    return rows + tl.load(chunk).to(tl.int64) * COLUMNS, tl.load(chunk + 1)


@triton.jit
def pointers_to(address, where, dtype: tl.constexpr, width: tl.constexpr, first: tl.constexpr, count: tl.constexpr):
    """Pointers [VECTORS, count] to `count` elements of each vector, starting at its element `first`."""
    begin, vector = where
    start = address.to(tl.pointer_type(dtype))  # a new cast for each access, because the hint is attached to it
    if width > 1:
        start = tl.multiple_of(start, 16)
    return start + begin + (vector * width + first + tl.arange(0, count)[None, :])


@triton.jit
def load(address, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """Load a tile [VECTORS, width] and widen it. Streaming (evict first): no operator reads an element twice."""
    pointers = pointers_to(address, where, dtype, width, 0, width)
    return tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first").to(compute_dtype(dtype))


@triton.jit
def store(address, where, mask, x, dtype: tl.constexpr, width: tl.constexpr):
    """Round a tile to `dtype` and store it."""
    x = x.to(dtype)
    if width * dtype.primitive_bitwidth <= 128:
        tl.store(pointers_to(address, where, dtype, width, 0, width), x, mask=mask, cache_modifier=".cs")
    else:
        # Masters of 16-bit rows have 256 bits per thread. In a single store, Triton would first exchange them between
        # threads through shared memory, so that a warp writes 512 contiguous bytes.
        HALF: tl.constexpr = width // 2
        halves = tl.permute(tl.reshape(x, [x.shape[0], 2, HALF]), 0, 2, 1)
        low, high = tl.split(halves)
        tl.store(pointers_to(address, where, dtype, width, 0, HALF), low, mask=mask, cache_modifier=".cs")
        tl.store(pointers_to(address, where, dtype, width, HALF, HALF), high, mask=mask, cache_modifier=".cs")


@triton.jit
def addresses(column, COUNT: tl.constexpr):
    """Load the addresses in COUNT columns of a row, from a pointer to the first of these columns."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.load(column + i),)
    return found


@triton.jit
def load_all(addresses, where, mask, dtype: tl.constexpr, width: tl.constexpr):
    """Load one tile from each address."""
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
    """Iterate sums = body(arguments, sums, where, mask, dtype, width) over all elements of a chunk; return the sums.

    The elements are processed in tiles [VECTORS, width], one vector per thread. The width is the number of elements in
    128 bits if the row is aligned, and 1 otherwise and for the remainder. The mask [VECTORS, 1] is constant within a
    vector: if a vector could be masked in part, Triton would move it element by element. The loop over tiles is
    unrolled UNROLL times.
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
