"""Pieces that the kernels over heads share: rotation of pairs, and how many heads a program takes."""

from __future__ import annotations

import triton
import triton.language as tl


def heads_per_program(*heads: int) -> int:
    """The largest power of two up to 4 that divides every head count, so that no head needs a mask."""
    return next(size for size in (4, 2, 1) if all(count % size == 0 for count in heads))


@triton.jit
def rotate_into(source, target, cosine, sine, inside, HALF: tl.constexpr):
    """Rotates pairs (i, i + HALF) in float32 and rounds them once. source, target: pointers to i."""
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    element = target.dtype.element_ty
    tl.store(target, (low * cosine - high * sine).to(element), mask=inside)
    tl.store(target + HALF, (high * cosine + low * sine).to(element), mask=inside)


@triton.jit
def copy_into(source, target, inside, HALF: tl.constexpr):
    """Copies both halves of heads. source, target: pointers into the first half."""
    element = target.dtype.element_ty
    tl.store(target, tl.load(source, mask=inside, other=0.0).to(element), mask=inside)
    tl.store(target + HALF, tl.load(source + HALF, mask=inside, other=0.0).to(element), mask=inside)
