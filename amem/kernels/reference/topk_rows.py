"""The highest-scored rows of every segment, the same ones on every run."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_rows(scores: Tensor, segments: Tensor, counts: Tensor, total: int | None = None) -> Tensor:
    """Ascending indices of every row outside a segment and of the `counts[s]` best rows of each segment s.

    scores: [rows] float32; a NaN ranks first.  segments: [rows] int64, -1 for a row that is always taken.
    counts: [segments] int64.  Ties go to the earlier row. Returns int64.
    total: how many rows come out, which spares a GPU the question; ValueError here if it is wrong.
    """
    order = torch.sort(scores.nan_to_num(nan=torch.inf), descending=True, stable=True).indices
    by_segment = torch.sort(segments[order], stable=True)
    order = order[by_segment.indices]
    starts = torch.searchsorted(by_segment.values, by_segment.values)
    rank = torch.arange(len(scores), device=scores.device) - starts
    free = by_segment.values < 0
    taken = free | (rank < counts[by_segment.values.clamp(min=0)]) if len(counts) else free
    rows = torch.sort(order[taken]).values
    if total is not None and len(rows) != total:
        raise ValueError(f"total: {len(rows)} rows are taken, not {total}; counts must not exceed their segments")
    return rows
