"""Attention against each row computed on its own in float64, over pages whose unused slots are NaN."""

from __future__ import annotations

from collections.abc import Sequence

import naive
import pytest
import torch
from torch import Tensor

from amem.kernels import triton as kernels
from amem.kernels.triton import attention_plan
from amem.kernels.triton.chip import Chip, TileShape

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 5e-6, F16: 3e-3, BF16: 2e-2}


def scattered(rows: int, length: int) -> Tensor:
    """`rows` ascending positions of a sequence, its last one among them."""
    return torch.cat([torch.randperm(length - 1)[: rows - 1].sort().values, torch.tensor([length - 1])])


def run(
    positions: Sequence[Tensor],
    device: torch.device,
    dtype: torch.dtype = F32,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    page: int = 16,
) -> float:
    """The worst error of one batch; sequence s has the rows positions[s]."""
    lengths = [int(found[-1]) + 1 if len(found) else 0 for found in positions]
    paged = naive.pages(lengths, kv_heads, dim, page, dtype, device)
    cu_rows = [0]
    for found in positions:
        cu_rows.append(cu_rows[-1] + len(found))
    where = torch.cat([*positions]).to(device)
    q = torch.randn(cu_rows[-1], heads, dim).to(dtype).to(device)
    plan = kernels.plan_attention(where, cu_rows, paged.block_table, page, dtype)
    out = kernels.paged_attention(q, paged.k_slots, paged.v_slots, plan)
    assert out.dtype == dtype
    assert out.shape == q.shape
    return naive.worst(out, naive.attention_of(q, where, cu_rows, paged))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_a_mixed_batch(dtype: torch.dtype, device: torch.device) -> None:
    """Decode, an empty sequence, a prefill from nothing, a suffix, and rows scattered over a blend."""
    batch = [torch.tensor([90]), torch.tensor([], dtype=torch.int64), torch.arange(33), torch.arange(50, 70)]
    assert run([*batch, scattered(40, 250)], device, dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (7, 1), (14, 2), (16, 1)], ids=str)
def test_groups_of_heads(heads: tuple[int, int], device: torch.device) -> None:
    assert run([scattered(30, 97), torch.tensor([40])], device, heads=heads[0], kv_heads=heads[1]) < 5e-6


@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
def test_head_dims(dim: int, device: torch.device) -> None:
    assert run([scattered(20, 70), torch.tensor([66])], device, dim=dim) < 5e-6


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128])
@pytest.mark.parametrize("page", [8, 64])
def test_edges_of_pages_and_tiles(length: int, page: int, device: torch.device) -> None:
    assert run([torch.arange(length), torch.tensor([length - 1])], device, kv_heads=1, page=page) < 5e-6


@pytest.mark.parametrize("page", [1, 3, 48, 128])
def test_any_page_size(page: int, device: torch.device) -> None:
    assert run([scattered(20, 150), torch.tensor([149])], device, page=page) < 5e-6


def test_decode_at_4097(device: torch.device) -> None:
    assert run([torch.tensor([4096])], device, BF16, heads=4, kv_heads=1, page=64) < 1e-2


def test_long_scattered_rows(device: torch.device) -> None:
    assert run([scattered(20, 2049)], device, BF16, heads=4, kv_heads=1, page=64) < 2e-2


def groups_of(positions: Tensor, cu_rows: list[int], table: Tensor) -> tuple[attention_plan.TileGroup, ...]:
    return kernels.plan_attention(positions, cu_rows, table, 16, BF16).groups(8, 2, 64)


@pytest.mark.parametrize("parts", [1, 2, 8, 32])
def test_keys_split_over_any_number_of_programs(
    parts: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More parts than tiles of keys leaves parts with nothing to do, which must weigh nothing."""
    monkeypatch.setattr(attention_plan, "_parts", lambda *_: parts)
    assert run([torch.tensor([130]), scattered(5, 200), torch.tensor([0])], device, heads=2, kv_heads=1) < 5e-6


def test_few_tiles_are_split_and_many_are_not(device: torch.device) -> None:
    chip, shape = Chip("sm_90", 132), TileShape(16, 64, 4, 3, 16)
    assert attention_plan._parts(chip, shape, 8, 32768) == 64
    assert attention_plan._parts(chip, shape, 16 * 8, 32768) == 16
    assert attention_plan._parts(chip, shape, 64 * 8, 32768) == 4
    assert attention_plan._parts(chip, shape, 300 * 8, 32768) == 1
    assert attention_plan._parts(chip, shape, 1, 200) == 1
    assert attention_plan._parts(chip, shape, 5000, 1 << 20) == 1


def test_every_row_lies_in_one_tile_and_deep_tiles_come_first(device: torch.device) -> None:
    rows = [1, 300, 0, 5, 40]
    cu_rows = [0, *torch.tensor(rows).cumsum(0).tolist()]
    positions = torch.cat([torch.arange(count) for count in rows]).to(device)
    covered: list[int] = []
    for group in groups_of(positions, cu_rows, torch.zeros(5, 20, dtype=torch.int64, device=device)):
        tiles = group.tiles.tolist()
        assert [tile[3] for tile in tiles] == [sum(t[2] for t in tiles[:i]) for i in range(len(tiles))]
        depth = [first - cu_rows[sequence] for sequence, first, _, _ in tiles]
        assert depth == sorted(depth, reverse=True)
        for sequence, first, count, _ in tiles:
            assert cu_rows[sequence] <= first < first + count <= cu_rows[sequence + 1]
            covered += range(first, first + count)
        assert group.rows == sum(tile[2] for tile in tiles)
    assert sorted(covered) == list(range(cu_rows[-1]))


def poisoned(device: torch.device, at: int, value: float, k_too: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows at positions 0..49 with and without one bad slot at position `at`: found, wanted, and their positions."""
    paged = naive.pages([50], 1, 64, 16, F32, device)
    positions = torch.arange(50, device=device)
    q = torch.randn(50, 2, 64, device=device)
    plan = kernels.plan_attention(positions, [0, 50], paged.block_table, 16, F32)
    wanted = kernels.paged_attention(q, paged.k_slots, paged.v_slots, plan)
    slot = int(paged.block_table[0, at // 16]) * 16 + at % 16
    paged.v_slots[slot] = value
    if k_too:
        paged.k_slots[slot] = value
    return kernels.paged_attention(q, paged.k_slots, paged.v_slots, plan), wanted, positions


@pytest.mark.parametrize("k_too", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_later_token_never_changes_an_earlier_row(value: float, k_too: bool, device: torch.device) -> None:
    found, wanted, positions = poisoned(device, 30, value, k_too)
    assert naive.worst(found[positions < 30], wanted[positions < 30].cpu()) < 1e-6
    assert not torch.isfinite(found[positions >= 30]).all(-1).any()


def test_strided_queries_and_slots(device: torch.device) -> None:
    """Queries and pages may be views into something wider."""
    paged = naive.pages([40], 2, 32, 16, F32, device)
    wide = torch.full((2, *paged.k_slots.shape[:1], 5, 32), float("nan"), device=device)
    wide[0, :, :2], wide[1, :, :2] = paged.k_slots, paged.v_slots
    q = torch.randn(20, 9, 32, device=device)[:, :4]
    positions = torch.arange(20, 40, device=device)
    plan = kernels.plan_attention(positions, [0, 20], paged.block_table, 16, F32)
    out = kernels.paged_attention(q, wide[0, :, :2], wide[1, :, :2], plan)
    assert naive.worst(out, naive.attention_of(q, positions, [0, 20], paged)) < 5e-6


def test_no_rows(device: torch.device) -> None:
    paged = naive.pages([0], 1, 16, 16, F32, device)
    positions = torch.zeros(0, dtype=torch.int64, device=device)
    plan = kernels.plan_attention(positions, [0, 0], paged.block_table, 16, F32)
    q = torch.zeros(0, 2, 16, device=device)
    assert kernels.paged_attention(q, paged.k_slots, paged.v_slots, plan).shape == q.shape
