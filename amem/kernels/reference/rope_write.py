"""Rotation of fresh queries and keys, and the write of K and V to their slots."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (i, i + half) of the last dimension in float32 (the rotate-half layout of Hugging Face Llama).

    x: [..., rows, heads, head_dim].  cos, sin: [rows, head_dim / 2] float32.  Returns float32, shaped like x.
    """
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    low, high = x[..., :half].float(), x[..., half:].float()
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    torch.mul(low, cos, out=out[..., :half]).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=out[..., half:]).addcmul_(low, sin)
    return out


def rope_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor, heads: int
) -> Tensor:
    """Writes rotated K and plain V of every row to its slot; returns the rotated queries [rows, heads, head_dim].

    qkv: [rows, heads + 2 * kv_heads, head_dim], queries first, then keys, then values.
    cos, sin: [rows, head_dim / 2] float32 of each row's position.  slots: [rows] int64, no slot twice.
    k_slots, v_slots: [slots, kv_heads, head_dim] of one layer, written in place, in their own dtype.
    """
    kv_heads = k_slots.shape[1]
    rotated = rotate(qkv[:, : heads + kv_heads], cos, sin)
    k_slots.index_copy_(0, slots, rotated[:, heads:].to(k_slots.dtype))
    v_slots.index_copy_(0, slots, qkv[:, heads + kv_heads :].to(v_slots.dtype))
    return rotated[:, :heads].to(qkv.dtype)
