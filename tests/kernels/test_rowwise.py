"""Normalisation, gate and row selection against plain arithmetic, and the choice of the room."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from amem import kernels

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "hidden"), [(0, 8), (1, 64), (5, 123), (9, 41)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_rms_norm(rows: int, hidden: int, with_residual: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(hidden)
    x, residual = torch.randn(2, rows, hidden).to(dtype).unbind()
    weight = torch.rand(hidden).to(dtype)
    before = x.clone()
    normed, total = kernels.add_rms_norm(x, residual if with_residual else None, weight, 1e-5)
    expected = x + residual if with_residual else x
    wide = expected.double()
    wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert torch.equal(total, expected)
    assert torch.equal(x, before)
    torch.testing.assert_close(normed.double(), wide, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_casts_where_llama_casts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    judge = LlamaRMSNorm(96, 1e-5).to(dtype)
    with torch.no_grad():
        judge.weight.normal_()
    x = torch.randn(50, 96).to(dtype) * 3
    assert torch.equal(kernels.add_rms_norm(x, None, judge.weight, 1e-5)[0], judge(x))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (1, 1), (7, 33)])
def test_silu_mul(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(rows, 2 * width).to(dtype)
    before = gate_up.clone()
    gate, up = gate_up.double().chunk(2, -1)
    found = kernels.silu_mul(gate_up)
    torch.testing.assert_close(found.double(), gate * torch.sigmoid(gate) * up, rtol=0, atol=TOLERANCE[dtype])
    assert torch.equal(gate_up, before)


def by_loop(scores: Tensor, segments: Tensor, counts: Tensor) -> list[int]:
    taken = [row for row, segment in enumerate(segments.tolist()) if segment < 0]
    for segment, count in enumerate(counts.tolist()):
        rows = [row for row, found in enumerate(segments.tolist()) if found == segment]
        rows.sort(key=lambda row: (-np.nan_to_num(float(scores[row]), nan=np.inf), row))
        taken += rows[:count]
    return sorted(taken)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_topk_rows_equals_a_loop(data: st.DataObject) -> None:
    segments = data.draw(st.lists(st.integers(-1, 3), max_size=30))
    few = st.sampled_from([0.0, 1.0, 2.0, float("nan"), float("inf")])
    scores = torch.tensor(data.draw(st.lists(few, min_size=len(segments), max_size=len(segments))))
    counts = torch.tensor([data.draw(st.integers(0, segments.count(s))) for s in range(4)])
    found = kernels.topk_rows(scores.float(), torch.tensor(segments, dtype=torch.int64), counts)
    assert found.tolist() == by_loop(scores, torch.tensor(segments), counts)


def test_topk_rows_without_segments_takes_every_row() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert kernels.topk_rows(torch.rand(4), torch.full((4,), -1), none).tolist() == [0, 1, 2, 3]
    assert kernels.topk_rows(torch.zeros(0), none, none).tolist() == []


def test_a_cpu_never_imports_triton() -> None:
    code = (
        "import sys, torch; from amem import kernels; kernels.silu_mul(torch.zeros(2, 4));"
        "sys.exit(any(name.startswith(('triton', 'amem.kernels.triton')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
