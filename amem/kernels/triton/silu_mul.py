"""The gate of the MLP (SwiGLU), a tile of one row a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `amem.kernels.reference.silu_mul`; the last dimension must be contiguous."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (rows, triton.cdiv(width, _COLUMNS))
    _silu_mul[grid](gate_up, out, gate_up.stride(0), WIDTH=width, BLOCK=_COLUMNS, num_warps=4)
    return out


@triton.jit
def _silu_mul(gate_up, out, gate_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_row + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    # the gate is rounded before it multiplies, as two separate ops would
    gate = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + column, (gate * up).to(out.dtype.element_ty), mask=inside)
