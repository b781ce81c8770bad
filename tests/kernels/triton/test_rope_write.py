"""Fresh queries and keys rotated, K and V written to their slots and nowhere else."""

from __future__ import annotations

import naive
import pytest
import torch
from torch import Tensor

from amem.kernels import triton as kernels

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 2e-6, F16: 4e-3, BF16: 3.2e-2}


def run(rows: int, heads: int, kv_heads: int, dim: int, device: torch.device, dtype: torch.dtype = F32) -> float:
    slots_there = rows + 9
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim).to(dtype)
    cos, sin = naive.angles(torch.randint(0, 100_000, (rows,)), dim)
    slots = torch.randperm(slots_there)[:rows]
    k_slots = torch.full((slots_there, kv_heads, dim), float("nan"), dtype=dtype)
    k_found, v_found = k_slots.to(device), k_slots.clone().to(device)
    given = (qkv.to(device), cos.to(device), sin.to(device), slots.to(device))
    q = kernels.rope_write(*given, k_found, v_found, heads)
    turned = naive.rotate(qkv, cos, sin)
    k, v = k_found.cpu(), v_found.cpu()
    others = torch.ones(slots_there, dtype=torch.bool).scatter_(0, slots, torch.zeros(rows, dtype=torch.bool))
    assert q.dtype == dtype
    assert torch.isnan(k[others]).all()
    assert torch.isnan(v[others]).all()
    assert torch.equal(v[slots], qkv[:, heads + kv_heads :])
    errors = [naive.worst(q, turned[:, :heads]), naive.worst(k[slots], turned[:, heads : heads + kv_heads])]
    return max(errors)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_rows(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    assert run(rows, 4, 2, 64, device, dtype) <= TOLERANCE[dtype]


@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (7, 1), (14, 2), (12, 4), (6, 3)], ids=str)
def test_head_counts(heads: tuple[int, int], device: torch.device) -> None:
    assert run(5, *heads, 32, device) <= 2e-6


@pytest.mark.parametrize("dim", [2, 8, 64, 80, 96, 128, 256])
def test_head_dims(dim: int, device: torch.device) -> None:
    assert run(5, 2, 1, dim, device) <= 2e-6


def test_pages_that_are_views(device: torch.device) -> None:
    """K and V of one layer stand inside a pool of layers; nothing beside them is touched."""
    pool = torch.full((2, 2, 30, 2, 16), float("nan"), device=device)
    qkv = torch.randn(4, 6, 16, device=device)
    cos, sin = (table.to(device) for table in naive.angles(torch.arange(4), 16))
    slots = torch.tensor([3, 29, 0, 17], device=device)
    kernels.rope_write(qkv, cos, sin, slots, pool[1, 0], pool[1, 1], 2)
    assert torch.isnan(pool[0]).all()
    assert torch.equal(pool[1, 1, slots], qkv[:, 4:])
    assert naive.worst(pool[1, 0, slots], naive.rotate(qkv[:, 2:4].cpu(), cos.cpu(), sin.cpu())) < 2e-6
    assert int(torch.isnan(pool[1]).all(-1).all(-1).sum()) == 2 * 26


def test_a_value_that_is_not_finite_stays_what_it_is(device: torch.device) -> None:
    values: Tensor = torch.tensor([float("inf"), float("-inf"), 0.0, 1.0])
    qkv = torch.cat([torch.zeros(1, 2, 4), values.expand(1, 1, 4)], 1).to(device)
    cos, sin = (table.to(device) for table in naive.angles(torch.tensor([5]), 4))
    k_slots, v_slots = torch.zeros(2, 1, 4, device=device), torch.zeros(2, 1, 4, device=device)
    kernels.rope_write(qkv, cos, sin, torch.tensor([1], device=device), k_slots, v_slots, 1)
    assert torch.equal(v_slots[1, 0].cpu(), values)
