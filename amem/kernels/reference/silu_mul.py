"""The gate of the MLP (SwiGLU, Shazeer 2020)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up: [rows, 2 * width], the gate first. Returns [rows, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)
