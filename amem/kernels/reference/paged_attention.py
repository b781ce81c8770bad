"""Attention of rows over paged KV, with a mask that is exact in positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

# Short tiles let scattered rows skip the keys behind them: a third less time than 512 for 344 of 2,080 rows.
ROWS_PER_TILE = 64


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows start..stop of a batch, which look at the first `length` keys of their sequence.

    mask: [rows, length], 0 where a row may look and -inf elsewhere; None where it may look at all, or if `causal`.
    """

    start: int
    stop: int
    length: int
    mask: Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence: where its keys lie, and the tiles of its rows. `pages` is None where the slots are one run."""

    first_slot: int
    length: int
    pages: Tensor | None
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What paged_attention has to know of a batch; made once, used by every layer with the same rows."""

    positions: Tensor
    page_size: int
    spans: tuple[Span, ...]


def plan_attention(
    positions: Tensor, cu_rows: Sequence[int], block_table: Tensor, page_size: int, dtype: torch.dtype
) -> AttentionPlan:
    """The tiles and masks of a batch, for queries of `dtype`.

    positions: [rows] int64, ascending within a sequence, whose rows are cu_rows[s]..cu_rows[s+1].
    block_table: [sequences, blocks] int64 page numbers, padded with anything.
    """
    host: NDArray[np.int64] = positions.numpy()
    tables: NDArray[np.int64] = block_table.numpy()
    spans = tuple(
        _span(host, start, stop, tables[index], page_size, dtype)
        for index, (start, stop) in enumerate(pairwise(cu_rows))
        if stop > start
    )
    return AttentionPlan(positions, page_size, spans)


def paged_attention(q: Tensor, k_slots: Tensor, v_slots: Tensor, plan: AttentionPlan) -> Tensor:
    """Row r attends to the keys at positions 0..positions[r] of its own sequence, and to nothing else.

    q: [rows, heads, head_dim], rotated.  k_slots, v_slots: [slots, kv_heads, head_dim] of one layer.
    Softmax scale is head_dim ** -0.5. Returns [rows, heads, head_dim] in q's dtype. What lies in slots that a row
    may not see, even NaN, never reaches it.
    """
    out = torch.empty_like(q)
    for span in plan.spans:
        k, v = _gather(k_slots, span, plan.page_size), _gather(v_slots, span, plan.page_size)
        for tile in span.tiles:
            rows = _attend(q[tile.start : tile.stop], k[: tile.length], v[: tile.length], tile)
            if (tile.causal or tile.mask is not None) and not isfinite(float(rows.sum(dtype=torch.float32))):
                rows = _attend_row_by_row(q, k, v, plan.positions, tile)
            out[tile.start : tile.stop] = rows
    return out


def _span(
    positions: NDArray[np.int64], start: int, stop: int, table: NDArray[np.int64], page_size: int, dtype: torch.dtype
) -> Span:
    length = int(positions[stop - 1]) + 1
    pages = table[: -(-length // page_size)]
    one_run = bool((pages[1:] - pages[:-1] == 1).all())
    if length == stop - start:
        tiles: tuple[Tile, ...] = (Tile(start, stop, length, None, length > 1),)
    else:
        edges = range(start, stop, ROWS_PER_TILE)
        tiles = tuple(_tile(positions, edge, min(edge + ROWS_PER_TILE, stop), dtype) for edge in edges)
    return Span(int(pages[0]) * page_size, length, None if one_run else torch.from_numpy(pages), tiles)


def _tile(positions: NDArray[np.int64], start: int, stop: int, dtype: torch.dtype) -> Tile:
    length = int(positions[stop - 1]) + 1
    if stop - start == 1:
        return Tile(start, stop, length, None, False)
    mask = torch.zeros(stop - start, length, dtype=dtype)
    mask.masked_fill_(torch.arange(length) > torch.from_numpy(positions[start:stop, None]), -torch.inf)
    return Tile(start, stop, length, mask, False)


def _gather(slots: Tensor, span: Span, page_size: int) -> Tensor:
    """The span's keys or values in order of position: [length, kv_heads, head_dim]."""
    if span.pages is None:
        return slots[span.first_slot : span.first_slot + span.length]
    paged = slots.view(-1, page_size, *slots.shape[1:])
    return paged.index_select(0, span.pages).flatten(0, 1)[: span.length]


def _attend(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> Tensor:
    heads_first = functional.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k.transpose(0, 1).unsqueeze(0),
        v.transpose(0, 1).unsqueeze(0),
        attn_mask=tile.mask,
        is_causal=tile.causal,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return heads_first.squeeze(0).transpose(0, 1)


def _attend_row_by_row(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, tile: Tile) -> Tensor:
    """A masked weight of zero does not silence a NaN value, so a tile that met one is cut at each row's position."""
    alone = Tile(0, 1, 0, None, False)
    ends = (positions[tile.start : tile.stop] + 1).tolist()
    rows = [_attend(q[row : row + 1], k[:end], v[:end], alone) for row, end in enumerate(ends, tile.start)]
    return torch.cat(rows)
