"""Row selection: exactly the reference's rows, whatever the scores."""

from __future__ import annotations

import naive
import pytest
import torch
from torch import Tensor

from amem.kernels import reference
from amem.kernels import triton as kernels

INF, NAN = float("inf"), float("nan")


def check(scores: Tensor, segments: Tensor, counts: Tensor, device: torch.device) -> None:
    wanted = naive.topk_rows(scores, segments, counts)
    assert reference.topk_rows(scores, segments, counts).tolist() == wanted
    given = (scores.to(device), segments.to(device), counts.to(device))
    for total in (None, len(wanted)):
        found = kernels.topk_rows(*given, total)
        assert found.dtype == torch.int64
        assert found.tolist() == wanted


@pytest.mark.parametrize("rows", [1, 2, 1023, 1024, 1025, 2500])
def test_rows(rows: int, device: torch.device) -> None:
    segments = torch.randint(-1, 3, (rows,))
    check(torch.randn(rows).square(), segments, torch.tensor([rows // 5, 0, 1]), device)


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 100])
def test_counts_at_and_above_the_size(count: int, device: torch.device) -> None:
    check(torch.randn(10), torch.tensor([0] * 7 + [1] * 3), torch.tensor([count, 2]), device)


def test_ties_go_to_the_earlier_row_across_blocks(device: torch.device) -> None:
    """Three values among 2,100 rows: the border of every segment lies in a tie."""
    scores = torch.randint(0, 3, (2100,)).float()
    check(scores, torch.randint(0, 2, (2100,)), torch.tensor([500, 777]), device)


def test_scores_of_every_kind(device: torch.device) -> None:
    scores = torch.tensor([1.0, NAN, -INF, INF, 0.0, -0.0, -1.0, 3.4028234663852886e38, 1e-45, -1e-45, NAN, -2.5])
    for count in range(13):
        check(scores, torch.zeros(12, dtype=torch.int64), torch.tensor([count]), device)


def test_neighbours_in_bits(device: torch.device) -> None:
    """Scores that differ in the last digit only."""
    scores = (torch.randperm(300) + 0x3F800000).to(torch.int32).view(torch.float32)
    check(scores, torch.zeros(300, dtype=torch.int64), torch.tensor([77]), device)


def test_no_segments_and_no_rows(device: torch.device) -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    check(torch.randn(5), torch.full((5,), -1), nothing, device)
    check(torch.zeros(0), nothing, torch.tensor([3]), device)
