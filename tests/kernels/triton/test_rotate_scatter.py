"""Stored chunks on their way into pages."""

from __future__ import annotations

import naive
import pytest
import torch

from amem.kernels import triton as kernels

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 2e-6, F16: 4e-3, BF16: 3.2e-2}


def run(
    tokens: int, kv_heads: int, dim: int, device: torch.device, stored: torch.dtype = F32, pool: torch.dtype = F32
) -> float:
    layers, slots_there = 3, tokens + 7
    k, v = (torch.randn(layers, tokens, kv_heads, dim).to(stored) for _ in range(2))
    cos, sin = naive.angles(torch.randint(0, 100_000, (tokens,)), dim)
    slots = torch.randperm(slots_there)[:tokens]
    pages = torch.full((2, layers, slots_there, kv_heads, dim), float("nan"), dtype=pool, device=device)
    given = [tensor.to(device) for tensor in (k, v, cos, sin, slots)]
    kernels.rotate_scatter(*given, pages[0], pages[1])
    k_found, v_found = pages.cpu()
    others = torch.ones(slots_there, dtype=torch.bool).scatter_(0, slots, torch.zeros(tokens, dtype=torch.bool))
    assert torch.isnan(k_found[:, others]).all()
    assert torch.isnan(v_found[:, others]).all()
    assert torch.equal(v_found[:, slots], v.to(pool))
    return naive.worst(k_found[:, slots], naive.rotate(k, cos, sin))


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 50])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_tokens(tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    assert run(tokens, 2, 64, device, dtype, dtype) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kv_heads", [1, 3, 4, 8])
def test_head_counts(kv_heads: int, device: torch.device) -> None:
    assert run(5, kv_heads, 32, device) <= 2e-6


@pytest.mark.parametrize("dim", [2, 80, 96, 128, 256])
def test_head_dims(dim: int, device: torch.device) -> None:
    assert run(5, 2, dim, device) <= 2e-6


@pytest.mark.parametrize("stored", [F16, BF16])
def test_stored_narrower_than_the_pool(stored: torch.dtype, device: torch.device) -> None:
    assert run(5, 2, 64, device, stored, F32) <= 2e-6


def test_layers_far_apart(device: torch.device) -> None:
    """K and V of a layer alternate in the pool, and the chunk is a slice of a longer one."""
    pool = torch.full((3, 2, 40, 2, 16), float("nan"), device=device)
    k, v = (torch.randn(3, 20, 2, 16, device=device)[:, 4:14] for _ in range(2))
    cos, sin = (table.to(device) for table in naive.angles(torch.arange(10) + 77, 16))
    slots = torch.arange(39, 29, -1, device=device)
    kernels.rotate_scatter(k, v, cos, sin, slots, pool[:, 0], pool[:, 1])
    assert torch.equal(pool[:, 1, slots], v)
    assert naive.worst(pool[:, 0, slots], naive.rotate(k.cpu(), cos.cpu(), sin.cpu())) < 2e-6
    assert torch.isnan(pool[:, :, :30]).all()
