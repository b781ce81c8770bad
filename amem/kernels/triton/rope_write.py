"""Rotation of fresh queries and keys and the write of K and V to their slots, in one pass over QKV."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from amem.kernels.triton.rotation import copy_into, heads_per_program, rotate_into

_ROWS = 16


def rope_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor, heads: int
) -> Tensor:
    """See `amem.kernels.reference.rope_write`; heads of qkv and of the slots must be contiguous."""
    rows, _, head_dim = qkv.shape
    kv_heads = k_slots.shape[1]
    q = torch.empty(rows, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    group = heads_per_program(heads, kv_heads)
    _rope_write[(triton.cdiv(rows, _ROWS), (heads + 2 * kv_heads) // group)](
        qkv,
        cos,
        sin,
        slots,
        q,
        k_slots,
        v_slots,
        rows,
        qkv.stride(0),
        cos.stride(0),
        k_slots.stride(0),
        v_slots.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        GROUP=group,
        ROWS=_ROWS,
        num_warps=4,
    )
    return q


@triton.jit(do_not_specialize=["rows"])
def _rope_write(
    qkv,
    cos,
    sin,
    slots,
    q,
    k_slots,
    v_slots,
    rows,
    qkv_row,
    angle_row,
    k_slot,
    v_slot,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(1) * GROUP
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, HALF_BLOCK)
    inside = (row < rows)[:, None] & (column < HALF)[None, :]
    wide = row.to(tl.int64)
    source = qkv + (wide * qkv_row)[:, None] + head * (2 * HALF) + column[None, :]
    if head < HEADS + KV_HEADS:
        angle = (wide * angle_row)[:, None] + column[None, :]
        cosine = tl.load(cos + angle, mask=inside, other=0.0)
        sine = tl.load(sin + angle, mask=inside, other=0.0)
        if head < HEADS:
            target = q + (wide * (HEADS * 2 * HALF))[:, None] + head * (2 * HALF) + column[None, :]
            for step in tl.static_range(GROUP):
                rotate_into(source + step * 2 * HALF, target + step * 2 * HALF, cosine, sine, inside, HALF)
        else:
            slot = tl.load(slots + row, mask=row < rows, other=0).to(tl.int64)
            place = k_slots + (slot * k_slot)[:, None] + (head - HEADS) * (2 * HALF) + column[None, :]
            for step in tl.static_range(GROUP):
                rotate_into(source + step * 2 * HALF, place + step * 2 * HALF, cosine, sine, inside, HALF)
    else:
        slot = tl.load(slots + row, mask=row < rows, other=0).to(tl.int64)
        place = v_slots + (slot * v_slot)[:, None] + (head - HEADS - KV_HEADS) * (2 * HALF) + column[None, :]
        for step in tl.static_range(GROUP):
            copy_into(source + step * 2 * HALF, place + step * 2 * HALF, inside, HALF)
