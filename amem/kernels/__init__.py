"""Every op twice: `reference/<op>.py` in torch (the specification and the CPU product), `triton/<op>.py`.

The one place that chooses between them, by where the tensors lie. Triton is imported only when a GPU asks for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from amem.kernels import reference

__all__ = [
    "AttentionPlan",
    "KernelError",
    "add_rms_norm",
    "deviation",
    "paged_attention",
    "plan_attention",
    "rope_write",
    "rotate_scatter",
    "silu_mul",
    "topk_rows",
]


class KernelError(RuntimeError):
    """No kernel of ours runs this op on this device."""


class AttentionPlan(Protocol):
    """What paged_attention has to know of a batch; made once, used by every layer with the same rows."""

    @property
    def page_size(self) -> int: ...


def _op(name: str, tensor: Tensor) -> Callable[..., Any]:
    if tensor.device.type == "cpu":
        implementation: Callable[..., Any] = getattr(reference, name)
        return implementation
    room = importlib.import_module("amem.kernels.triton")
    kernel: Callable[..., Any] | None = getattr(room, name, None)
    if kernel is None:
        raise KernelError(f"{name} has no kernel for {tensor.device}; run with device='cpu'")
    return kernel


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    normed: tuple[Tensor, Tensor] = _op("add_rms_norm", x)(x, residual, weight, eps)
    return normed


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    out: Tensor = _op("silu_mul", gate_up)(gate_up)
    return out


def rope_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor, heads: int
) -> Tensor:
    """See `reference.rope_write`."""
    q: Tensor = _op("rope_write", qkv)(qkv, cos, sin, slots, k_slots, v_slots, heads)
    return q


def rotate_scatter(
    k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor
) -> None:
    """See `reference.rotate_scatter`."""
    _op("rotate_scatter", k_slots)(k, v, cos, sin, slots, k_slots, v_slots)


def deviation(
    k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor
) -> Tensor:
    """See `reference.deviation`."""
    gaps: Tensor = _op("deviation", k)(k, v, cos, sin, slots, k_slots, v_slots)
    return gaps


def topk_rows(scores: Tensor, segments: Tensor, counts: Tensor, total: int | None = None) -> Tensor:
    """See `reference.topk_rows`."""
    rows: Tensor = _op("topk_rows", scores)(scores, segments, counts, total)
    return rows


def plan_attention(
    positions: Tensor, cu_rows: Sequence[int], block_table: Tensor, page_size: int, dtype: torch.dtype
) -> AttentionPlan:
    """See `reference.plan_attention`."""
    plan: AttentionPlan = _op("plan_attention", positions)(positions, cu_rows, block_table, page_size, dtype)
    return plan


def paged_attention(q: Tensor, k_slots: Tensor, v_slots: Tensor, plan: AttentionPlan) -> Tensor:
    """See `reference.paged_attention`."""
    out: Tensor = _op("paged_attention", q)(q, k_slots, v_slots, plan)
    return out
