"""Compiles every kernel that a model will need before the first request waits for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from amem.kernels.triton.add_rms_norm import add_rms_norm
from amem.kernels.triton.attention_plan import MOST_PARTS, plan_attention
from amem.kernels.triton.deviation import deviation
from amem.kernels.triton.paged_attention import attend_group
from amem.kernels.triton.rope_write import rope_write
from amem.kernels.triton.rotate_scatter import rotate_scatter
from amem.kernels.triton.silu_mul import silu_mul
from amem.kernels.triton.topk_rows import topk_rows


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What kernels are specialised on. width: of the MLP, one of gate and up."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    width: int
    page_size: int
    dtype: torch.dtype


def warm_up(
    shape: ModelShape, device: torch.device, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Runs every variant once on a few rows. progress: called with (steps done, steps in all)."""
    steps = [*_row_steps(shape, device), *_attention_steps(shape, device)]
    for done, step in enumerate(steps):
        progress(done, len(steps))
        step()
    progress(len(steps), len(steps))


def _row_steps(shape: ModelShape, device: torch.device) -> Iterator[Callable[[], object]]:
    def zeros(*sizes: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.zeros(*sizes, dtype=dtype, device=device)

    x, weight = zeros(1, shape.hidden), zeros(shape.hidden)
    yield lambda: add_rms_norm(x, None, weight, 1e-5)
    yield lambda: add_rms_norm(x, x, weight, 1e-5)
    gate_up = zeros(1, 2 * shape.width)
    yield lambda: silu_mul(gate_up)
    qkv = zeros(1, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    angle = zeros(1, shape.head_dim // 2, dtype=torch.float32)
    slot = zeros(1, dtype=torch.int64)
    pool = zeros(2, 2, shape.page_size, shape.kv_heads, shape.head_dim)
    yield lambda: rope_write(qkv, angle, angle, slot, pool[0, 0], pool[0, 1], shape.heads)
    chunk = zeros(2, 1, shape.kv_heads, shape.head_dim)
    yield lambda: rotate_scatter(chunk, chunk, angle, angle, slot, pool[:, 0], pool[:, 1])
    k, v = qkv[:, -2 * shape.kv_heads : -shape.kv_heads], qkv[:, -shape.kv_heads :]
    yield lambda: deviation(k, v, angle, angle, slot, pool[0, 0], pool[0, 1])
    score = zeros(1, dtype=torch.float32)
    yield lambda: topk_rows(score, slot, slot, 0)


def _attention_steps(shape: ModelShape, device: torch.device) -> Iterator[Callable[[], object]]:
    """One row alone and two in a tile, with their keys split every way that a plan can choose."""
    pool = torch.zeros(2, 2 * shape.page_size, shape.kv_heads, shape.head_dim, dtype=shape.dtype, device=device)
    q = torch.zeros(3, shape.heads, shape.head_dim, dtype=shape.dtype, device=device)
    positions = torch.zeros(3, dtype=torch.int64, device=device)
    table = torch.zeros(2, 1, dtype=torch.int64, device=device)
    plan = plan_attention(positions, (0, 1, 3), table, shape.page_size, shape.dtype)
    for group in plan.groups(shape.heads, shape.kv_heads, shape.head_dim):
        for power in range(MOST_PARTS.bit_length()):
            split = replace(group, parts=1 << power)
            yield partial(attend_group, q, pool[0], pool[1], torch.empty_like(q), plan, split)
