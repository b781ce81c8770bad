"""How far cached K and V lie from fresh ones, summed over heads in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from amem.kernels.triton.rotation import heads_per_program

_ROWS = 16


def deviation(
    k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor
) -> Tensor:
    """See `amem.kernels.reference.deviation`; heads of k, v and the slots must be contiguous."""
    rows, kv_heads, head_dim = k.shape
    gaps = torch.empty(rows, dtype=torch.float32, device=k.device)
    _deviation[(triton.cdiv(rows, _ROWS),)](
        k,
        v,
        cos,
        sin,
        slots,
        k_slots,
        v_slots,
        gaps,
        rows,
        k.stride(0),
        v.stride(0),
        cos.stride(0),
        k_slots.stride(0),
        v_slots.stride(0),
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        GROUP=heads_per_program(kv_heads),
        ROWS=_ROWS,
        num_warps=4,
    )
    return gaps


@triton.jit
def _squares(fresh, cached, inside):
    gap = fresh - tl.load(cached, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, gap * gap, 0.0)


@triton.jit(do_not_specialize=["rows"])
def _deviation(
    k,
    v,
    cos,
    sin,
    slots,
    k_slots,
    v_slots,
    gaps,
    rows,
    k_row,
    v_row,
    angle_row,
    k_slot,
    v_slot,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, HALF_BLOCK)
    inside = (row < rows)[:, None] & (pair < HALF)[None, :]
    wide = row.to(tl.int64)
    slot = tl.load(slots + row, mask=row < rows, other=0).to(tl.int64)
    angle = (wide * angle_row)[:, None] + pair[None, :]
    cosine = tl.load(cos + angle, mask=inside, other=0.0)
    sine = tl.load(sin + angle, mask=inside, other=0.0)
    k_new = k + (wide * k_row)[:, None] + pair[None, :]
    v_new = v + (wide * v_row)[:, None] + pair[None, :]
    k_old = k_slots + (slot * k_slot)[:, None] + pair[None, :]
    v_old = v_slots + (slot * v_slot)[:, None] + pair[None, :]
    gap = tl.zeros([ROWS, HALF_BLOCK], tl.float32)
    for head in range(0, KV_HEADS, GROUP):
        for step in tl.static_range(GROUP):
            at = (head + step) * (2 * HALF)
            low = tl.load(k_new + at, mask=inside, other=0.0).to(tl.float32)
            high = tl.load(k_new + at + HALF, mask=inside, other=0.0).to(tl.float32)
            gap += _squares(low * cosine - high * sine, k_old + at, inside)
            gap += _squares(high * cosine + low * sine, k_old + at + HALF, inside)
            low = tl.load(v_new + at, mask=inside, other=0.0).to(tl.float32)
            high = tl.load(v_new + at + HALF, mask=inside, other=0.0).to(tl.float32)
            gap += _squares(low, v_old + at, inside)
            gap += _squares(high, v_old + at + HALF, inside)
    tl.store(gaps + row, tl.sum(gap, 1), mask=row < rows)
