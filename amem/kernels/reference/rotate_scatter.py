"""Loading of a stored chunk: keys rotated once to their new position, K and V scattered to pages."""

from __future__ import annotations

from torch import Tensor

from amem.kernels.reference.rope_write import rotate


def rotate_scatter(
    k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor
) -> None:
    """Writes a chunk's K, rotated in float32 and rounded once, and its V to slots, layer by layer.

    k, v: [layers, tokens, kv_heads, head_dim], k unrotated; only read, so they may be mapped from a file.
    cos, sin: [tokens, head_dim / 2] float32 of the new positions.  slots: [tokens] int64, no slot twice.
    k_slots, v_slots: [layers, slots, kv_heads, head_dim], written in place.
    """
    for layer in range(k.shape[0]):
        k_slots[layer].index_copy_(0, slots, rotate(k[layer], cos, sin).to(k_slots.dtype))
        v_slots[layer].index_copy_(0, slots, v[layer].to(v_slots.dtype))
