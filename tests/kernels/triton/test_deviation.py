"""Distance of cached K and V from fresh ones."""

from __future__ import annotations

import naive
import pytest
import torch

from amem.kernels import triton as kernels

F32, BF16 = torch.float32, torch.bfloat16


def run(rows: int, kv_heads: int, dim: int, device: torch.device, dtype: torch.dtype = F32) -> float:
    """Worst relative error. K and V are views into QKV, and slots of other rows hold NaN."""
    qkv = torch.randn(rows, 5 + 2 * kv_heads, dim).to(dtype)
    k, v = qkv[:, 5 : 5 + kv_heads], qkv[:, 5 + kv_heads :]
    cos, sin = naive.angles(torch.randint(0, 100_000, (rows,)), dim)
    slots = torch.randperm(rows + 5)[:rows]
    k_slots, v_slots = (torch.full((rows + 5, kv_heads, dim), float("nan"), dtype=dtype) for _ in range(2))
    k_slots[slots], v_slots[slots] = (torch.randn(rows, kv_heads, dim).to(dtype) for _ in range(2))
    k_gap = naive.rotate(k, cos, sin) - k_slots[slots].double()
    wanted = k_gap.square().sum((1, 2)) + (v.double() - v_slots[slots].double()).square().sum((1, 2))
    on_device = qkv.to(device)
    k, v = on_device[:, 5 : 5 + kv_heads], on_device[:, 5 + kv_heads :]
    tables = [tensor.to(device) for tensor in (cos, sin, slots, k_slots, v_slots)]
    found = kernels.deviation(k, v, *tables)
    assert found.dtype == F32
    return naive.worst(found.cpu().double() / wanted, torch.ones(rows)) if rows else 0.0


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 60])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    assert run(rows, 2, 64, device, dtype) < 2e-6


@pytest.mark.parametrize("kv_heads", [1, 3, 8])
@pytest.mark.parametrize("dim", [2, 80, 128])
def test_heads(kv_heads: int, dim: int, device: torch.device) -> None:
    assert run(5, kv_heads, dim, device) < 2e-6


def test_a_row_that_did_not_change_lies_at_zero(device: torch.device) -> None:
    qkv = torch.randn(6, 6, 32, device=device).bfloat16()
    cos, sin = (table.to(device) for table in naive.angles(torch.arange(6), 32))
    slots = torch.arange(6, device=device)
    k_slots, v_slots = (torch.zeros(6, 2, 32, device=device) for _ in range(2))
    kernels.rope_write(qkv, cos, sin, slots, k_slots, v_slots, 2)
    assert float(kernels.deviation(qkv[:, 2:4], qkv[:, 4:], cos, sin, slots, k_slots, v_slots).max()) < 1e-9
