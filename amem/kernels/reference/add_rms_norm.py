"""Residual addition and root-mean-square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised sum of x and residual, and the sum itself.

    x, residual: [rows, hidden] in one dtype; residual None means x alone.  weight: [hidden].
    Statistics are float32 and the weight is multiplied in x's dtype, which is how Llama was trained.
    """
    total = x if residual is None else x + residual
    if total.dtype == torch.float32:
        return functional.rms_norm(total, weight.shape, weight, eps), total
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(total.dtype), total
