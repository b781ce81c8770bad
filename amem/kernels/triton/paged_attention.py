"""Attention of rows over paged KV with a mask that is exact in positions: prefill, decode and scattered rows.

One kernel. A tile is some rows of one sequence times the query heads that share a KV head (grouped-query packing);
it walks the keys up to the largest position among its rows with an online softmax (Milakov and Gimelshein 2018,
Dao et al. 2022). Where there are too few tiles to fill the chip, each tile's keys are split over several programs and
a second kernel joins the parts by their log-sum-exp (Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

from math import sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from amem.kernels.triton.attention_plan import TileGroup, TilePlan

_LOG2_E = 1.4426950408889634


def paged_attention(q: Tensor, k_slots: Tensor, v_slots: Tensor, plan: TilePlan) -> Tensor:
    """See `amem.kernels.reference.paged_attention`; heads of q and of the slots must be contiguous."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for group in plan.groups(q.shape[1], k_slots.shape[1]):
        _run(q, k_slots, v_slots, out, plan, group)
    return out


def _run(q: Tensor, k_slots: Tensor, v_slots: Tensor, out: Tensor, plan: TilePlan, group: TileGroup) -> None:
    heads, head_dim = q.shape[1:]
    kv_heads, parts, tiles = k_slots.shape[1], group.parts, len(group.tiles)
    part_out, part_weight = out, out
    if parts > 1:
        part_out = torch.empty(parts, group.rows, heads, head_dim, dtype=torch.float32, device=q.device)
        part_weight = torch.empty(parts, group.rows, heads, dtype=torch.float32, device=q.device)
    _attend[(tiles, kv_heads, parts)](
        q,
        k_slots,
        v_slots,
        out,
        part_out,
        part_weight,
        plan.positions,
        plan.block_table,
        group.tiles,
        _LOG2_E / sqrt(head_dim),
        group.rows,
        q.stride(0),
        k_slots.stride(0),
        v_slots.stride(0),
        plan.block_table.stride(0),
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        DIM=head_dim,
        DIM_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        PAGE=plan.page_size,
        QUERIES=group.shape.queries,
        KEYS=group.shape.keys,
        PARTS=parts,
        num_warps=group.shape.warps,
        num_stages=group.shape.stages,
    )
    if parts > 1:
        _join[(tiles, group.rows_per_tile * heads)](
            part_out,
            part_weight,
            out,
            group.tiles,
            group.rows,
            HEADS=heads,
            DIM=head_dim,
            DIM_BLOCK=max(16, triton.next_power_of_2(head_dim)),
            PARTS=parts,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["rows", "table_row"])
def _attend(
    q,
    k,
    v,
    out,
    part_out,
    part_weight,
    positions,
    tables,
    tiles,
    scale,
    rows,
    q_row,
    k_slot,
    v_slot,
    table_row,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
):
    kv_head = tl.program_id(1)
    tile = tiles + tl.program_id(0) * 4
    table = tables + tl.load(tile).to(tl.int64) * table_row
    first, count = tl.load(tile + 1), tl.load(tile + 2)
    lane = tl.arange(0, QUERIES)
    row, head = lane // GROUP, kv_head * GROUP + lane % GROUP
    live = row < count
    dim = tl.arange(0, DIM_BLOCK)
    inside = live[:, None] & (dim < DIM)[None, :]
    place = (first + row).to(tl.int64) * q_row + head * DIM
    query = tl.load(q + place[:, None] + dim[None, :], mask=inside, other=0.0)
    position = tl.load(positions + first + row, mask=live, other=-1).to(tl.int32)
    start, stop = 0, tl.max(position, 0) + 1
    if PARTS > 1:
        span = tl.cdiv(tl.cdiv(stop, KEYS), PARTS) * KEYS
        start = tl.program_id(2) * span
        stop = tl.minimum(start + span, stop)
    k += kv_head * DIM
    v += kv_head * DIM
    where = (table, start, stop, k_slot, v_slot)
    found, weight, peak = _walk(query, position, k, v, where, scale, DIM, DIM_BLOCK, PAGE, QUERIES, KEYS, False)
    # a weight of zero does not silence a value that is not finite, so a tile that met one is walked with care
    if tl.max(tl.where(tl.abs(found) < float("inf"), 0, 1)) > 0:
        found, weight, peak = _walk(query, position, k, v, where, scale, DIM, DIM_BLOCK, PAGE, QUERIES, KEYS, True)
    weight = tl.where(weight == 0.0, 1.0, weight)
    found = found / weight[:, None]
    if PARTS == 1:
        place = (first + row).to(tl.int64) * (KV_HEADS * GROUP * DIM) + head * DIM
        tl.store(out + place[:, None] + dim[None, :], found.to(out.dtype.element_ty), mask=inside)
    else:
        part_row = (tl.program_id(2).to(tl.int64) * rows + tl.load(tile + 3) + row) * (KV_HEADS * GROUP) + head
        tl.store(part_out + part_row[:, None] * DIM + dim[None, :], found, mask=inside)
        tl.store(part_weight + part_row, peak + tl.log2(weight), mask=live)


@triton.jit
def _walk(
    query,
    position,
    k,
    v,
    where,
    scale,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """Keys start..stop: the weighted sum of values, the sum of weights, and the largest score (base 2)."""
    table, start, stop, k_slot, v_slot = where
    precision: tl.constexpr = "ieee" if query.dtype == tl.float32 else "tf32"
    key = tl.arange(0, KEYS)
    dim = tl.arange(0, DIM_BLOCK)
    found = tl.zeros([QUERIES, DIM_BLOCK], tl.float32)
    weight = tl.zeros([QUERIES], tl.float32)
    peak = tl.full([QUERIES], -float("inf"), tl.float32)
    for base in tl.range(start, stop, KEYS):
        at = base + key
        here = at < stop
        slot = _slots(table, base, key, stop, PAGE, KEYS)
        keys = tl.load(k + (slot * k_slot)[None, :] + dim[:, None], mask=(dim < DIM)[:, None], other=0.0)
        score = tl.dot(query, keys, input_precision=precision) * scale
        sees = at[None, :] <= position[:, None]
        score = tl.where(sees, score, -float("inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)
        fade = tl.exp2(peak - anchor)
        share = tl.exp2(score - anchor[:, None])
        weight = weight * fade + tl.sum(share, 1)
        values_at = v + (slot * v_slot)[:, None] + dim[None, :]
        values = tl.load(values_at, mask=here[:, None] & (dim < DIM)[None, :], other=0.0)
        found = found * fade[:, None]
        if CAREFUL:
            sound = tl.abs(values.to(tl.float32)) < float("inf")
            values = tl.where(sound, values, 0.0).to(query.dtype)
            broken = tl.max(tl.where(sound, 0, 1), 1) > 0
            meets = tl.max(tl.where(sees & broken[None, :], 1, 0), 1) > 0
            found = tl.where(meets[:, None], float("nan"), found)
        found = tl.dot(share.to(query.dtype), values, found, input_precision=precision)
        peak = higher
    return found, weight, peak


@triton.jit
def _slots(table, base, key, stop, PAGE: tl.constexpr, KEYS: tl.constexpr):
    """Slots of keys base..base+KEYS; those from `stop` on lie somewhere in the pool, and are masked by the caller."""
    if PAGE % KEYS == 0:
        return tl.load(table + base // PAGE).to(tl.int64) * PAGE + base % PAGE + key
    at = base + key
    page = tl.load(table + at // PAGE, mask=at < stop, other=0).to(tl.int64)
    return page * PAGE + at % PAGE


@triton.jit(do_not_specialize=["rows"])
def _join(
    part_out,
    part_weight,
    out,
    tiles,
    rows,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Joins the parts of one row and head by their log-sum-exp; an empty part weighs nothing."""
    tile = tiles + tl.program_id(0) * 4
    row, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    if row < tl.load(tile + 2):
        part, dim = tl.arange(0, PARTS), tl.arange(0, DIM_BLOCK)
        place = (part.to(tl.int64) * rows + tl.load(tile + 3) + row) * HEADS + head
        weight = tl.load(part_weight + place)
        weight = tl.exp2(weight - tl.max(weight, 0))
        weight = weight / tl.sum(weight, 0)
        found = tl.load(part_out + place[:, None] * DIM + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
        joined = tl.sum(found * weight[:, None], 0).to(out.dtype.element_ty)
        target = out + ((tl.load(tile + 1) + row).to(tl.int64) * HEADS + head) * DIM
        tl.store(target + dim, joined, mask=dim < DIM)
