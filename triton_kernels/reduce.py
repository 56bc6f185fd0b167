"""Sums over all elements of a group, with the same bits in every run."""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_table import GROUP

LANES = tl.constexpr(128)  # number of partial sums or groups that are read at a time


@triton.jit
def group_sum(sums, row, group_begin, tickets, num_groups, partial, out, COUNT: tl.constexpr):
    """Sum `sums` over all threads of all programs whose chunks are in the same group; write out[group * COUNT + k].

    Every thread has summed its elements in the compute dtype; all further sums are in float64. A program writes its
    partial sums, then takes a ticket of its group. The program with the last ticket, whichever it is, adds the partial
    sums of all programs in the order of the chunks. So the result does not depend on the order in which programs run,
    and one launch is enough.
    """
    program = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(COUNT):
        tl.store(partial + program * COUNT + k, tl.sum(sums[k].to(tl.float64), 0))
    column = tl.arange(0, triton.next_power_of_2(COUNT))[None, :]
    lane = tl.arange(0, LANES)[:, None]

    if program == 0:  # no other program writes the sums of groups without rows
        for first in range(0, num_groups, LANES):
            group = (first + lane).to(tl.int64)
            known = group < num_groups
            begin = tl.load(group_begin + group, mask=known, other=0)
            empty = begin == tl.load(group_begin + group + 1, mask=known, other=-1)
            tl.store(out + group * COUNT + column, column * 0.0, mask=empty & (column < COUNT))

    group = tl.load(row + GROUP)
    begin, end = tl.load(group_begin + group), tl.load(group_begin + group + 1)
    tl.debug_barrier()  # all threads finish their writes before one of them takes the ticket
    if tl.atomic_add(tickets + group, 1, sem="acq_rel", scope="gpu") == end - begin - 1:
        total = column * 0.0 + tl.zeros([LANES, 1], tl.float64)
        for first in range(begin, end, LANES):
            chunk = first + lane
            total += tl.load(
                partial + chunk * COUNT + column,
                mask=(chunk < end) & (column < COUNT),
                other=0,
                cache_modifier=".cg",  # bypass L1, which may contain stale values
            )
        tl.store(out + group * COUNT + column, tl.sum(total, 0, keep_dims=True), mask=column < COUNT)
        tl.store(tickets + group, 0)
