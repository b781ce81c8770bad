"""Normalisation of a sum, with the roundings of the reference."""

from __future__ import annotations

import naive
import pytest
import torch

from amem.kernels import reference
from amem.kernels import triton as kernels

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
WIDTHS = [1, 3, 64, 192, 500, 4096]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("adds", [False, True])
def test_against_float64(width: int, adds: bool, device: torch.device) -> None:
    x, residual, weight = torch.randn(3, width), torch.randn(3, width), torch.randn(width)
    total = x.double() + residual.double() if adds else x.double()
    wanted = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    given = residual.to(device) if adds else None
    normed, summed = kernels.add_rms_norm(x.to(device), given, weight.to(device), 1e-5)
    assert naive.worst(normed, wanted) < 1e-5
    assert naive.worst(summed, total) < 1e-6


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("width", WIDTHS)
def test_rounds_where_the_reference_does(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """The sum has the same bits; the norm may differ in its last one, where float32 sums differ in order."""
    x, residual = torch.randn(3, width).to(dtype), (100 * torch.randn(3, width)).to(dtype)
    weight = torch.randn(width).to(dtype)
    wanted, total = reference.add_rms_norm(x, residual, weight, 1e-6)
    normed, summed = kernels.add_rms_norm(x.to(device), residual.to(device), weight.to(device), 1e-6)
    assert torch.equal(summed.cpu(), total)
    steps = (normed.cpu().view(torch.int16).int() - wanted.view(torch.int16).int()).abs()
    assert int(steps.max()) <= 1
    assert float((steps > 0).float().mean()) < 0.02


def test_without_a_residual_the_sum_is_the_input(device: torch.device) -> None:
    x = torch.randn(2, 64, device=device)
    assert kernels.add_rms_norm(x, None, torch.ones(64, device=device), 1e-5)[1] is x


def test_rows_of_zeros_stay_finite(device: torch.device) -> None:
    x = torch.zeros(2, 64, device=device)
    assert torch.equal(kernels.add_rms_norm(x, x, torch.ones(64, device=device), 1e-5)[0], x)


def test_a_row_knows_nothing_of_its_neighbours(device: torch.device) -> None:
    """Rows stand apart in memory, with NaN between them."""
    wide = torch.full((4, 80), float("nan"), device=device)
    wide[:, :60] = torch.randn(4, 60)
    weight = torch.randn(60, device=device)
    wanted, _ = reference.add_rms_norm(wide[:, :60].cpu(), None, weight.cpu(), 1e-5)
    assert naive.worst(kernels.add_rms_norm(wide[:, :60], None, weight, 1e-5)[0], wanted) < 1e-5


def test_no_rows(device: torch.device) -> None:
    x = torch.zeros(0, 64, device=device)
    assert kernels.add_rms_norm(x, x, torch.ones(64, device=device), 1e-5)[0].shape == (0, 64)
