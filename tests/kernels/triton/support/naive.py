"""What every kernel has to give, in float64 and in the plainest words; and inputs that punish a careless kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, sqrt

import torch
from torch import Tensor


def angles(positions: Tensor, head_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine, [positions, head_dim / 2] float32."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turned = positions.cpu().double()[:, None] * frequencies
    return turned.cos().float().to(positions.device), turned.sin().float().to(positions.device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [..., rows, heads, head_dim]; pairs (i, i + half) are turned."""
    half = x.shape[-1] // 2
    low, high = x[..., :half].double(), x[..., half:].double()
    cosine, sine = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], -1)


def attention(q: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: [rows, heads, dim]; k, v: [length, kv_heads, dim]. A row sees keys 0..its position, each row on its own."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for row, position in enumerate(positions.tolist()):
        keys = k[: position + 1].double().repeat_interleave(group, 1)
        values = v[: position + 1].double().repeat_interleave(group, 1)
        scores = torch.einsum("hd,khd->hk", q[row].double(), keys) / sqrt(q.shape[-1])
        rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values))
    return torch.stack(rows) if rows else q.double()


def topk_rows(scores: Tensor, segments: Tensor, counts: Tensor) -> list[int]:
    """NaN first, then the largest finite number or infinity, ties to the earlier row."""
    largest = torch.finfo(torch.float32).max
    rank = [float("inf") if s != s else min(max(s, -largest), largest) for s in scores.tolist()]
    owner = segments.tolist()
    taken = [row for row, segment in enumerate(owner) if segment < 0]
    for segment, count in enumerate(counts.tolist()):
        own = [row for row, found in enumerate(owner) if found == segment]
        taken += sorted(own, key=lambda row: (-rank[row], row))[:count]
    return sorted(taken)


@dataclass(frozen=True)
class Paged:
    """KV of sequences in shuffled pages. k, v: per sequence [length, kv_heads, dim]; slots of nobody hold NaN."""

    k_slots: Tensor
    v_slots: Tensor
    block_table: Tensor
    k: list[Tensor]
    v: list[Tensor]


def pages(
    lengths: Sequence[int], kv_heads: int, dim: int, page: int, dtype: torch.dtype, device: torch.device
) -> Paged:
    """Poison fills every slot that is not a token's (NaN), and pads the table (page numbers far outside the pool)."""
    blocks = [ceil(length / page) for length in lengths]
    total = sum(blocks) + 3
    order = torch.randperm(total)
    table = torch.full((len(lengths), max([1, *blocks]) + 1), 1 << 40)
    k_slots = torch.full((total * page, kv_heads, dim), float("nan"), dtype=dtype)
    v_slots = k_slots.clone()
    k, v, used = [], [], 0
    for row, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
        own = order[used : used + count]
        used += count
        table[row, :count] = own
        slots = (own[:, None] * page + torch.arange(page)).flatten()[:length]
        k.append(torch.randn(length, kv_heads, dim).to(dtype))
        v.append(torch.randn(length, kv_heads, dim).to(dtype))
        k_slots[slots], v_slots[slots] = k[-1], v[-1]
    return Paged(k_slots.to(device), v_slots.to(device), table.to(device), k, v)


def attention_of(q: Tensor, positions: Tensor, cu_rows: Sequence[int], paged: Paged) -> Tensor:
    """The whole batch, [rows, heads, dim] float64."""
    q, positions = q.cpu(), positions.cpu()
    spans = zip(pairwise(cu_rows), paged.k, paged.v, strict=True)
    return torch.cat([attention(q[a:b], positions[a:b], k, v) for (a, b), k, v in spans])


def worst(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference; NaN where either holds one."""
    return float((found.cpu().double() - wanted.double()).abs().max()) if found.numel() else 0.0
