"""Loading of a stored chunk: keys rotated once to their new position, K and V scattered, all layers in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from amem.kernels.triton.rotation import copy_into, heads_per_program, rotate_into

_TOKEN_BYTES = 32  # tokens of a program times their element size: fewer of them where registers run out


def rotate_scatter(
    k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor
) -> None:
    """See `amem.kernels.reference.rotate_scatter`; k and v on the device of the slots, heads contiguous."""
    layers, tokens, kv_heads, head_dim = k.shape
    group = heads_per_program(kv_heads)
    block = _TOKEN_BYTES // k_slots.element_size()
    _rotate_scatter[(triton.cdiv(tokens, block), kv_heads // group, layers)](
        k,
        v,
        cos,
        sin,
        slots,
        k_slots,
        v_slots,
        tokens,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        cos.stride(0),
        k_slots.stride(0),
        k_slots.stride(1),
        v_slots.stride(0),
        v_slots.stride(1),
        HALF=head_dim // 2,
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        GROUP=group,
        TOKENS=block,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["tokens"])
def _rotate_scatter(
    k,
    v,
    cos,
    sin,
    slots,
    k_slots,
    v_slots,
    tokens,
    k_layer,
    k_token,
    v_layer,
    v_token,
    angle_row,
    k_slots_layer,
    k_slot,
    v_slots_layer,
    v_slot,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.program_id(1) * GROUP
    layer = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = head * (2 * HALF) + tl.arange(0, HALF_BLOCK)
    pair = tl.arange(0, HALF_BLOCK)
    inside = (token < tokens)[:, None] & (pair < HALF)[None, :]
    wide = token.to(tl.int64)
    slot = tl.load(slots + token, mask=token < tokens, other=0).to(tl.int64)
    angle = (wide * angle_row)[:, None] + pair[None, :]
    cosine = tl.load(cos + angle, mask=inside, other=0.0)
    sine = tl.load(sin + angle, mask=inside, other=0.0)
    k_from = k + layer * k_layer + (wide * k_token)[:, None] + column[None, :]
    v_from = v + layer * v_layer + (wide * v_token)[:, None] + column[None, :]
    k_to = k_slots + layer * k_slots_layer + (slot * k_slot)[:, None] + column[None, :]
    v_to = v_slots + layer * v_slots_layer + (slot * v_slot)[:, None] + column[None, :]
    for step in tl.static_range(GROUP):
        rotate_into(k_from + step * 2 * HALF, k_to + step * 2 * HALF, cosine, sine, inside, HALF)
        copy_into(v_from + step * 2 * HALF, v_to + step * 2 * HALF, inside, HALF)
