"""The highest-scored rows of every segment by radix selection: no sort, no atomics, no word to the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 1024
_DIGIT_BITS = 8


def topk_rows(scores: Tensor, segments: Tensor, counts: Tensor, total: int | None = None) -> Tensor:
    """See `amem.kernels.reference.topk_rows`.

    total: how many rows come out, where the host knows; None asks the device, which waits for it.
    """
    taken = torch.zeros(len(scores), dtype=torch.int32, device=scores.device)
    if len(counts):
        _take[(len(counts),)](scores, segments, counts, taken, len(scores), ROWS=_ROWS, BITS=_DIGIT_BITS, num_warps=8)
    if total is None:
        total = int(((segments < 0) | (taken > 0)).sum())
    rows = torch.zeros(total, dtype=torch.int64, device=scores.device)
    _compact[(1,)](segments, taken, rows, len(scores), total, ROWS=_ROWS, num_warps=8)
    return rows


@triton.jit
def _keys(scores, row, inside):
    """Scores as unsigned integers of the same order: NaN above all, infinities as the largest finite numbers."""
    largest = 3.4028234663852886e38
    score = tl.load(scores + row, mask=inside, other=0.0)
    finite = tl.minimum(tl.maximum(score, -largest), largest)
    ranked = tl.where(score != score, float("inf"), tl.where(score == 0.0, 0.0, finite))
    bits = ranked.to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000).to(tl.uint32)


@triton.jit(do_not_specialize=["rows"])
def _take(scores, segments, counts, taken, rows, ROWS: tl.constexpr, BITS: tl.constexpr):
    """Marks the rows of one segment: finds its k-th largest key by digits, takes all above and the first ties."""
    segment = tl.program_id(0)
    lane = tl.arange(0, ROWS)
    digits = tl.arange(0, 1 << BITS)
    wanted = tl.load(counts + segment).to(tl.int32)
    border = tl.full((), 0, tl.uint32)
    for level in tl.static_range(32 // BITS):
        shift = 32 - BITS * (level + 1)
        found = tl.zeros([1 << BITS], tl.int32)
        for start in range(0, rows, ROWS):
            row = start + lane
            mine = (row < rows) & (tl.load(segments + row, mask=row < rows, other=-1) == segment)
            key = _keys(scores, row, row < rows)
            if level > 0:
                mine = mine & ((key >> (shift + BITS)) == (border >> (shift + BITS)))
            digit = ((key >> shift) & ((1 << BITS) - 1)).to(tl.int32)
            found += tl.histogram(digit, 1 << BITS, mask=mine)
        at_least = tl.cumsum(found, 0, reverse=True)
        chosen = tl.max(tl.where(at_least >= wanted, digits, 0), 0)
        wanted -= tl.sum(tl.where(digits > chosen, found, 0), 0)
        border = border | (chosen.to(tl.uint32) << shift)
    ties = 0
    for start in range(0, rows, ROWS):
        row = start + lane
        mine = (row < rows) & (tl.load(segments + row, mask=row < rows, other=-1) == segment)
        key = _keys(scores, row, row < rows)
        tied = (mine & (key == border)).to(tl.int32)
        early = (tied > 0) & (ties + tl.cumsum(tied, 0) <= wanted)
        tl.store(taken + row, ((key > border) | early).to(tl.int32), mask=mine)
        ties += tl.sum(tied, 0)


@triton.jit(do_not_specialize=["rows", "total"])
def _compact(segments, taken, out, rows, total, ROWS: tl.constexpr):
    """Writes the indices of rows that are taken or free, ascending."""
    lane = tl.arange(0, ROWS)
    before = 0
    for start in range(0, rows, ROWS):
        row = start + lane
        free = tl.load(segments + row, mask=row < rows, other=0) < 0
        keep = (free | (tl.load(taken + row, mask=row < rows, other=0) > 0)).to(tl.int32)
        place = before + tl.cumsum(keep, 0) - 1
        tl.store(out + place, row.to(tl.int64), mask=(keep > 0) & (place < total))
        before += tl.sum(keep, 0)
