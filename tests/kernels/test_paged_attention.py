"""Rows see exactly the keys up to their position, whatever lies around them."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from amem import kernels

Rows = list[NDArray[np.int64]]
PAGE = 16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Case:
    """Sequences with the given positions, in shuffled pages of a pool that is NaN wherever nothing was written."""

    def __init__(
        self,
        positions: Rows,
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        page: int = PAGE,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.positions, self.page, self.dtype = positions, page, dtype
        lengths = [int(p[-1]) + 1 if len(p) else 0 for p in positions]
        blocks = [-(-length // page) for length in lengths]
        pages = np.random.default_rng(seed).permutation(sum(blocks) + 3)
        self.table = np.zeros((len(positions), max(blocks)), dtype=np.int64)
        self.k = torch.full((len(pages) * page, kv_heads, dim), torch.nan, dtype=dtype)
        self.v = torch.full_like(self.k, torch.nan)
        self.sequences: list[tuple[Tensor, Tensor]] = []
        taken = 0
        for index, length in enumerate(lengths):
            self.table[index, : blocks[index]] = pages[taken : taken + blocks[index]]
            taken += blocks[index]
            k, v = (torch.randn(length, kv_heads, dim, generator=generator).to(dtype) for _ in range(2))
            at = np.arange(length)
            slots = torch.from_numpy(self.table[index][at // page] * page + at % page)
            self.k[slots], self.v[slots] = k, v
            self.sequences.append((k, v))
        self.cu = tuple(np.cumsum([0, *map(len, positions)]).tolist())
        self.q = torch.randn(self.cu[-1], heads, dim, generator=generator).to(dtype)

    def plan(self) -> kernels.AttentionPlan:
        flat = torch.from_numpy(np.concatenate(self.positions))
        return kernels.plan_attention(flat, self.cu, torch.from_numpy(self.table), self.page, self.dtype)

    def run(self) -> Tensor:
        return kernels.paged_attention(self.q, self.k, self.v, self.plan())

    def expected(self) -> Tensor:
        """Row by row, head by head, in float64."""
        out = torch.empty(self.q.shape, dtype=torch.float64)
        for index, (k, v) in enumerate(self.sequences):
            for row, position in enumerate(self.positions[index].tolist(), self.cu[index]):
                out[row] = attend(self.q[row].double(), k[: position + 1].double(), v[: position + 1].double())
        return out

    def assert_exact(self) -> None:
        torch.testing.assert_close(self.run().double(), self.expected(), rtol=0, atol=TOLERANCE[self.dtype])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: [heads, dim], k, v: [keys, kv_heads, dim] -> [heads, dim]."""
    group = q.shape[0] // k.shape[1]
    out = torch.empty_like(q)
    for head in range(q.shape[0]):
        keys, values = k[:, head // group], v[:, head // group]
        out[head] = torch.softmax(keys @ q[head] / q.shape[1] ** 0.5, 0) @ values
    return out


def span(start: int, stop: int) -> NDArray[np.int64]:
    return np.arange(start, stop)


def scattered(length: int, count: int, seed: int = 0) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(seed).choice(length, count, replace=False))


SHAPES: dict[str, Rows] = {
    "first token": [span(0, 1)],
    "decode": [span(40, 41)],
    "page edges": [span(15, 16), span(16, 17), span(0, 16), span(0, 17), span(31, 33)],
    "prefill": [span(0, 45)],
    "suffix": [span(33, 70)],
    "scattered": [scattered(90, 13)],
    "mixed and ragged": [span(7, 8), scattered(61, 20), span(0, 5), span(50, 60), span(99, 100)],
    "empty sequence between": [span(3, 4), span(0, 0), span(0, 3)],
}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_equals_a_loop_in_float64(shape: str, dtype: torch.dtype) -> None:
    Case(SHAPES[shape], heads=4, kv_heads=2, dim=32, dtype=dtype).assert_exact()


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (7, 1, 80), (14, 2, 96), (1, 1, 16), (6, 2, 40)])
@pytest.mark.parametrize("page", [1, 8, 16, 64])
def test_head_groups_and_page_sizes(heads: int, kv_heads: int, dim: int, page: int) -> None:
    Case(SHAPES["mixed and ragged"], heads, kv_heads, dim, torch.float32, page).assert_exact()


def test_4097_tokens_over_several_tiles() -> None:
    case = Case([scattered(4097, 1100)], heads=2, kv_heads=1, dim=32, dtype=torch.float32)
    assert len(case.plan().spans[0].tiles) > 1
    case.assert_exact()
    Case([span(4096, 4097), span(4090, 4097)], heads=2, kv_heads=1, dim=32, dtype=torch.float32).assert_exact()


def test_pages_in_one_run_are_read_in_place() -> None:
    case = Case([span(20, 50)], heads=2, kv_heads=1, dim=32, dtype=torch.float32)
    moved = case.table[0].copy()
    order = np.argsort(np.argsort(moved)) + moved.min()
    k, v = case.k.clone(), case.v.clone()
    for old, new in zip(moved, range(len(moved)), strict=True):
        k[new * PAGE : (new + 1) * PAGE] = case.k[old * PAGE : (old + 1) * PAGE]
        v[new * PAGE : (new + 1) * PAGE] = case.v[old * PAGE : (old + 1) * PAGE]
    scattered_pages = case.run()
    case.k, case.v, case.table = k, v, np.arange(len(order))[None]
    assert case.plan().spans[0].pages is None
    torch.testing.assert_close(case.run(), scattered_pages, rtol=0, atol=0)


@pytest.mark.parametrize("shape", ["prefill", "suffix", "scattered"])
def test_nan_behind_a_row_never_reaches_it(shape: str) -> None:
    """A key that turned NaN spoils the rows from its position on, and no earlier one."""
    case = Case(SHAPES[shape], heads=4, kv_heads=2, dim=32, dtype=torch.float32)
    clean = case.run()
    poisoned = int(case.positions[0][len(case.positions[0]) // 2])
    slot = int(case.table[0][poisoned // PAGE]) * PAGE + poisoned % PAGE
    case.k[slot], case.v[slot] = torch.nan, torch.nan
    found = case.run()
    before = torch.from_numpy(case.positions[0]) < poisoned
    torch.testing.assert_close(found[before], clean[before], rtol=0, atol=1e-6)
    assert bool(found[~before].isnan().all())


def test_huge_scores_stay_finite() -> None:
    case = Case([scattered(90, 13)], heads=4, kv_heads=2, dim=32, dtype=torch.float32)
    case.q *= 1e6
    assert bool(case.run().isfinite().all())


def test_a_bottom_right_mask_would_be_seen() -> None:
    """The mask by index that public CacheBlend code uses lets scattered rows see their future."""
    case = Case([scattered(90, 13)], heads=4, kv_heads=2, dim=32, dtype=torch.float32)
    plan = case.plan()
    tile = plan.spans[0].tiles[0]
    rows, length = tile.stop - tile.start, tile.length
    visible = torch.arange(length) <= torch.arange(rows)[:, None] + length - rows
    leaky = torch.zeros(rows, length).masked_fill_(~visible, -torch.inf)
    wrong = replace(plan, spans=(replace(plan.spans[0], tiles=(replace(tile, mask=leaky),)),))
    out = kernels.paged_attention(case.q, case.k, case.v, wrong)
    assert float((out - case.run())[:-1].abs().amax((1, 2)).min()) > 0.01


def test_tiles_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["amem.kernels.reference.paged_attention"], "ROWS_PER_TILE", 5)
    Case(SHAPES["mixed and ragged"], heads=4, kv_heads=2, dim=32, dtype=torch.float32).assert_exact()
