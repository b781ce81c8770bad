"""Rotation, page writes, chunk loading and deviation against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amem import kernels

HEADS, KV_HEADS, DIM = 4, 2, 20
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = list(TOLERANCE)


def angles(positions: Tensor, dim: int = DIM) -> tuple[Tensor, Tensor]:
    turns = torch.outer(positions.double(), 100.0 ** -(torch.arange(dim // 2).double() / (dim // 2)))
    return turns.cos().float(), turns.sin().float()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As complex numbers in float64: pair i is (x[i], x[i + half])."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = turned * torch.complex(cos.double(), sin.double()).unsqueeze(-2)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 17, 130])
def test_rope_write(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    qkv = torch.randn(rows, HEADS + 2 * KV_HEADS, DIM).to(dtype)
    cos, sin = angles(torch.arange(rows) * 3 + 5)
    k_slots, v_slots = torch.full((2, 200, KV_HEADS, DIM), torch.nan, dtype=dtype).unbind()
    slots = torch.randperm(200)[:rows]
    q = kernels.rope_write(qkv, cos, sin, slots, k_slots, v_slots, HEADS)
    expected = rotated(qkv[:, : HEADS + KV_HEADS], cos, sin)
    assert q.dtype == dtype
    torch.testing.assert_close(q.double(), expected[:, :HEADS], rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(k_slots[slots].double(), expected[:, HEADS:], rtol=0, atol=TOLERANCE[dtype])
    assert torch.equal(v_slots[slots], qkv[:, HEADS + KV_HEADS :])
    untouched = torch.ones(200, dtype=torch.bool).index_fill_(0, slots, False)
    assert bool(k_slots[untouched].isnan().all())
    assert bool(v_slots[untouched].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 16, 33])
def test_rotate_scatter(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    k, v = torch.randn(2, 3, tokens, KV_HEADS, DIM).to(dtype).unbind()
    before = k.clone(), v.clone()
    k_slots, v_slots = torch.full((2, 3, 64, KV_HEADS, DIM), torch.nan, dtype=dtype).unbind()
    cos, sin = angles(torch.arange(tokens) + 1000)
    slots = torch.randperm(64)[:tokens]
    kernels.rotate_scatter(k, v, cos, sin, slots, k_slots, v_slots)
    torch.testing.assert_close(k_slots[:, slots].double(), rotated(k, cos, sin), rtol=0, atol=TOLERANCE[dtype])
    assert torch.equal(v_slots[:, slots], v)
    assert int(k_slots.isnan().all(-1).sum()) == 3 * (64 - tokens) * KV_HEADS
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


def test_a_key_is_rounded_once() -> None:
    """bfloat16 keys after loading are the nearest to the rotation in float64, not a rounding of a rounding."""
    torch.manual_seed(0)
    k = torch.randn(1, 500, KV_HEADS, DIM).bfloat16()
    cos, sin = angles(torch.arange(500) * 7)
    k_slots, v_slots = torch.zeros(2, 1, 500, KV_HEADS, DIM, dtype=torch.bfloat16).unbind()
    kernels.rotate_scatter(k, k, cos, sin, torch.arange(500), k_slots, v_slots)
    nearest = rotated(k, cos, sin).float().bfloat16()
    assert float((k_slots != nearest).float().mean()) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_deviation(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    k, v = torch.randn(2, rows, KV_HEADS, DIM).to(dtype).unbind()
    k_slots, v_slots = torch.randn(2, 64, KV_HEADS, DIM).to(dtype).unbind()
    cos, sin = angles(torch.arange(rows) + 30)
    slots = torch.randperm(64)[:rows]
    found = kernels.deviation(k, v, cos, sin, slots, k_slots, v_slots)
    k_gap = rotated(k, cos, sin) - k_slots[slots].double()
    v_gap = v.double() - v_slots[slots].double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), k_gap.square().sum((1, 2)) + v_gap.square().sum((1, 2)), rtol=1e-5, atol=0
    )


def test_what_was_just_written_does_not_deviate() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(30, HEADS + 2 * KV_HEADS, DIM)
    cos, sin = angles(torch.arange(30))
    k_slots, v_slots = torch.zeros(2, 30, KV_HEADS, DIM).unbind()
    slots = torch.arange(30)
    kernels.rope_write(qkv, cos, sin, slots, k_slots, v_slots, HEADS)
    k, v = qkv[:, HEADS : HEADS + KV_HEADS], qkv[:, HEADS + KV_HEADS :]
    assert float(kernels.deviation(k, v, cos, sin, slots, k_slots, v_slots).max()) == 0
