"""The gate of the MLP."""

from __future__ import annotations

import naive
import pytest
import torch

from amem.kernels import reference
from amem.kernels import triton as kernels


@pytest.mark.parametrize("width", [1, 63, 1024, 1025, 2500])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_against_float64(rows: int, width: int, device: torch.device) -> None:
    gate_up = 3 * torch.randn(rows, 2 * width)
    gate, up = gate_up.double().chunk(2, -1)
    out = kernels.silu_mul(gate_up.to(device))
    assert out.shape == (rows, width)
    assert naive.worst(out, gate * torch.sigmoid(gate) * up) < 2e-6 * 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_where_the_reference_does(dtype: torch.dtype, device: torch.device) -> None:
    gate_up = (3 * torch.randn(4, 2000)).to(dtype)
    wanted = reference.silu_mul(gate_up.clone())
    steps = (
        kernels.silu_mul(gate_up.to(device)).cpu().view(torch.int16).int() - wanted.view(torch.int16).int()
    ).abs()
    assert int(steps.max()) <= 1
    assert float((steps > 0).float().mean()) < 0.01


def test_extreme_gates(device: torch.device) -> None:
    gate = torch.tensor([[-1e4, -100.0, -0.0, 0.0, 100.0, 1e4]])
    out = kernels.silu_mul(torch.cat([gate, torch.ones_like(gate)], 1).to(device))
    assert torch.equal(out.cpu(), torch.tensor([[0.0, 0.0, 0.0, 0.0, 100.0, 1e4]]))


def test_strided_rows(device: torch.device) -> None:
    wide = torch.full((3, 130), float("nan"), device=device)
    wide[:, :100] = torch.randn(3, 100)
    assert (
        naive.worst(kernels.silu_mul(wide[:, :100]), reference.silu_mul(wide[:, :100].cpu().clone()).double()) < 1e-6
    )
