"""Residual addition and root-mean-square normalisation, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `amem.kernels.reference.add_rms_norm`; the last dimension must be contiguous."""
    rows, width = x.shape
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x if residual is None else torch.empty_like(normed)
    added = x if residual is None else residual
    block = triton.next_power_of_2(width)
    _add_rms_norm[(rows,)](
        x,
        added,
        weight,
        normed,
        total,
        eps,
        x.stride(0),
        added.stride(0),
        WIDTH=width,
        BLOCK=block,
        ADD=residual is not None,
        num_warps=min(16, max(1, block // 512)),
    )
    return normed, total


@triton.jit
def _add_rms_norm(
    x,
    residual,
    weight,
    normed,
    total,
    eps,
    x_row,
    residual_row,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * residual_row + column, mask=inside, other=0.0).to(tl.float32)
        # the sum is rounded before its norm is taken, as the model was trained
        value = value.to(total.dtype.element_ty).to(tl.float32)
        tl.store(total + row * WIDTH + column, value.to(total.dtype.element_ty), mask=inside)
    scaled = value * tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    scaled = scaled.to(normed.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * WIDTH + column, (scaled * gain).to(normed.dtype.element_ty), mask=inside)
