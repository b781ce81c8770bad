"""How far cached K and V lie from fresh ones: the signal of CacheBlend (Yao et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from amem.kernels.reference.rope_write import rotate


def deviation(
    k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor
) -> Tensor:
    """Squared distance between fresh and cached K plus that of V, summed over heads: [rows] float32.

    k, v: [rows, kv_heads, head_dim] fresh, k unrotated.  cos, sin: [rows, head_dim / 2] float32 of the positions.
    slots: [rows] int64.  k_slots, v_slots: [slots, kv_heads, head_dim] of one layer, k rotated.
    """
    k_gap = rotate(k, cos, sin).sub_(k_slots.index_select(0, slots))
    v_gap = v.float() - v_slots.index_select(0, slots)
    return k_gap.square_().sum((-2, -1)) + v_gap.square_().sum((-2, -1))
