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
from amem.kernels.triton.chip import chip_of, narrow_tile

_LOG2_E = 1.4426950408889634


def paged_attention(q: Tensor, k_slots: Tensor, v_slots: Tensor, plan: TilePlan) -> Tensor:
    """See `amem.kernels.reference.paged_attention`; heads of q and of the slots must be contiguous."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for group in plan.groups(q.shape[1], k_slots.shape[1], q.shape[2]):
        attend_group(q, k_slots, v_slots, out, plan, group)
    return out


def attend_group(q: Tensor, k_slots: Tensor, v_slots: Tensor, out: Tensor, plan: TilePlan, group: TileGroup) -> None:
    """Fills the rows of `out` that lie in the tiles of `group`."""
    heads, head_dim = q.shape[1:]
    kv_heads, parts, tiles = k_slots.shape[1], group.parts, len(group.tiles)
    common = (q, k_slots, v_slots, out, plan.positions, plan.block_table, group.tiles, _LOG2_E / sqrt(head_dim))
    strides = (q.stride(0), k_slots.stride(0), v_slots.stride(0), plan.block_table.stride(0))
    sizes = {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "DIM": head_dim,
        "DIM_BLOCK": max(16, triton.next_power_of_2(head_dim)),
        "PAGE": plan.page_size,
    }
    shape, alone = group.shape, group.rows_per_tile == 1
    options = {"num_warps": shape.warps, "num_stages": shape.stages}
    made = {"SPLIT": parts > 1, "ALONE": alone, "QUERIES": shape.queries, "KEYS": shape.keys}
    part_out, part_weight, broken = _scratch(out, group, kv_heads)
    scratch = (part_out, part_weight, broken, group.rows)
    _attend[(tiles, kv_heads, parts)](*common, *strides, *scratch, **sizes, **made, **options)
    if parts > 1:
        join = {"HEADS": heads, "DIM": head_dim, "DIM_BLOCK": sizes["DIM_BLOCK"], "PARTS": parts}
        _join[(tiles, group.rows_per_tile * heads)](part_out, part_weight, out, group.tiles, group.rows, **join)
    if not alone:
        _mend[(tiles, kv_heads)](*common, *strides, broken, parts, **sizes, **_mending(plan, sizes))


def _scratch(out: Tensor, group: TileGroup, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and weights of the parts, [parts, rows, heads(, head_dim)], and a word per program: something broke."""
    part_out, part_weight = out, out
    if group.parts > 1:
        wide = (group.parts, group.rows, *out.shape[1:])
        part_out = torch.empty(wide, dtype=torch.float32, device=out.device)
        part_weight = torch.empty(wide[:-1], dtype=torch.float32, device=out.device)
    broken = torch.empty(len(group.tiles), kv_heads, group.parts, dtype=torch.int32, device=out.device)
    return part_out, part_weight, broken


def _mending(plan: TilePlan, sizes: dict[str, int]) -> dict[str, int]:
    shape = narrow_tile(chip_of(plan.positions.device), plan.dtype.itemsize, sizes["GROUP"], sizes["DIM"])
    return {
        "QUERIES": shape.queries,
        "KEYS": shape.keys,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
    }


@triton.jit(do_not_specialize=["rows", "table_row"])
def _attend(
    q,
    k,
    v,
    out,
    positions,
    tables,
    tiles,
    scale,
    q_row,
    k_slot,
    v_slot,
    table_row,
    part_out,
    part_weight,
    broken,
    rows,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    ALONE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    kv_head, part, parts = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    tile = tiles + tl.program_id(0) * 4
    table = tables + tl.load(tile).to(tl.int64) * table_row
    first, count = tl.load(tile + 1), tl.load(tile + 2)
    lane, dim = tl.arange(0, QUERIES), tl.arange(0, DIM_BLOCK)
    row, head = lane // GROUP, kv_head * GROUP + lane % GROUP
    live = row < count
    inside = live[:, None] & (dim < DIM)[None, :]
    place = (first + row).to(tl.int64) * q_row + head * DIM
    query = tl.load(q + place[:, None] + dim[None, :], mask=inside, other=0.0)
    position = tl.load(positions + first + row, mask=live, other=-1).to(tl.int32)
    start, stop = 0, tl.max(position, 0) + 1
    if SPLIT:
        span = tl.cdiv(tl.cdiv(stop, KEYS), parts) * KEYS
        start = part * span
        stop = tl.minimum(start + span, stop)
    cache = (k + kv_head * DIM, v + kv_head * DIM, k_slot, v_slot, table)
    found, weight, peak = _walk(query, position, cache, start, stop, scale, DIM, DIM_BLOCK, PAGE, QUERIES, KEYS)
    weight = tl.where(weight == 0.0, 1.0, weight)
    found = found / weight[:, None]
    if SPLIT:
        part_row = (part.to(tl.int64) * rows + tl.load(tile + 3) + row) * (KV_HEADS * GROUP) + head
        tl.store(part_out + part_row[:, None] * DIM + dim[None, :], found, mask=inside)
        tl.store(part_weight + part_row, peak + tl.log2(weight), mask=live)
    else:
        place = (first + row).to(tl.int64) * (KV_HEADS * GROUP * DIM) + head * DIM
        tl.store(out + place[:, None] + dim[None, :], found.to(out.dtype.element_ty), mask=inside)
    if not ALONE:
        bad = tl.max(tl.where(tl.abs(found) < float("inf"), 0, 1))
        tl.store(broken + (tl.program_id(0) * KV_HEADS + kv_head) * parts + part, bad)


@triton.jit
def _walk(
    query,
    position,
    cache,
    start,
    stop,
    scale,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Keys start..stop: the weighted sum of values, the sum of weights, and the largest score (base 2)."""
    k, v, k_slot, v_slot, table = cache
    precision: tl.constexpr = "ieee" if query.dtype == tl.float32 else "tf32"
    key, dim = tl.arange(0, KEYS), tl.arange(0, DIM_BLOCK)
    found = tl.zeros([QUERIES, DIM_BLOCK], tl.float32)
    weight = tl.zeros([QUERIES], tl.float32)
    peak = tl.full([QUERIES], -float("inf"), tl.float32)
    for base in tl.range(start, stop, KEYS):
        at = base + key
        slot = _slots(table, base, key, stop, PAGE, KEYS)
        keys = tl.load(k + (slot * k_slot)[None, :] + dim[:, None], mask=(dim < DIM)[:, None], other=0.0)
        score = tl.dot(query, keys, input_precision=precision) * scale
        score = tl.where(at[None, :] <= position[:, None], score, -float("inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)
        fade = tl.exp2(peak - anchor)
        share = tl.exp2(score - anchor[:, None])
        weight = weight * fade + tl.sum(share, 1)
        here = (at < stop)[:, None] & (dim < DIM)[None, :]
        values = tl.load(v + (slot * v_slot)[:, None] + dim[None, :], mask=here, other=0.0)
        found = tl.dot(share.to(query.dtype), values, found * fade[:, None], input_precision=precision)
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


@triton.jit(do_not_specialize=["table_row", "parts"])
def _mend(
    q,
    k,
    v,
    out,
    positions,
    tables,
    tiles,
    scale,
    q_row,
    k_slot,
    v_slot,
    table_row,
    broken,
    parts,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Does the rows of a tile again, each alone, where something in it is not finite.

    In a shared tile a row gives weight zero to what it may not see, and zero times NaN is NaN.
    """
    kv_head = tl.program_id(1)
    tile = tiles + tl.program_id(0) * 4
    bad = 0
    for part in range(parts):
        bad |= tl.load(broken + (tl.program_id(0) * KV_HEADS + kv_head) * parts + part)
    count = tl.where(bad > 0, tl.load(tile + 2), 0)
    table = tables + tl.load(tile).to(tl.int64) * table_row
    lane, dim = tl.arange(0, QUERIES), tl.arange(0, DIM_BLOCK)
    head = kv_head * GROUP + lane
    inside = (lane < GROUP)[:, None] & (dim < DIM)[None, :]
    cache = (k + kv_head * DIM, v + kv_head * DIM, k_slot, v_slot, table)
    for step in range(count):
        row = (tl.load(tile + 1) + step).to(tl.int64)
        stop = tl.load(positions + row).to(tl.int32) + 1
        place = row * q_row + head * DIM
        query = tl.load(q + place[:, None] + dim[None, :], mask=inside, other=0.0)
        position = tl.where(lane < GROUP, stop - 1, -1)
        found, weight, _ = _walk(query, position, cache, 0, stop, scale, DIM, DIM_BLOCK, PAGE, QUERIES, KEYS)
        found = found / tl.where(weight == 0.0, 1.0, weight)[:, None]
        place = row * (KV_HEADS * GROUP * DIM) + head * DIM
        tl.store(out + place[:, None] + dim[None, :], found.to(out.dtype.element_ty), mask=inside)
