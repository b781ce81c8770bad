"""Any split of a prompt and any mix of a batch give the same logits; pages hold what was asked, and only that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from amem.engine.batch import Batch, BlendRows, ChunkKV, SequenceRows, StepOutput
from amem.engine.config import ConfigError, EngineConfig
from amem.engine.model import load_model
from amem.engine.runner import Runner, RunnerError

Make = Callable[..., Any]
Ids = NDArray[np.int64]
PAGES = np.random.default_rng(0).permutation(128)


def ids_of(count: int, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(0, 101, count)


def table(first: int, blocks: int = 8) -> Ids:
    """Pages first..first+blocks of a shuffled pool."""
    return PAGES[first : first + blocks]


def span(ids: Ids, start: int, stop: int, pages: Ids, **fields: Any) -> SequenceRows:
    return SequenceRows(ids[start:stop], np.arange(start, stop), pages, **fields)


def step(runner: Runner, *sequences: SequenceRows) -> StepOutput:
    return runner.forward(Batch(sequences))


def prefill(runner: Runner, ids: Ids, pages: Ids) -> Tensor:
    return step(runner, span(ids, 0, len(ids), pages)).logits[0]


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) < 1e-4
    best = expected.topk(2).values
    if float(best[0] - best[1]) > 1e-3:
        assert int(found.argmax()) == int(expected.argmax())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 99), max_size=6, unique=True).map(sorted))
def test_any_split_of_a_prompt_gives_the_same_logits(runner: Runner, cuts: list[int]) -> None:
    ids = ids_of(100)
    whole = prefill(runner, ids, table(0))
    for start, stop in zip([0, *cuts], [*cuts, 100], strict=True):
        found = step(runner, span(ids, start, stop, table(10)))
    assert_same(found.logits[0], whole)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), min_size=2, max_size=6))
def test_any_mix_of_a_batch_gives_the_same_logits(runner: Runner, lengths: list[tuple[int, int]]) -> None:
    alone, together = [], []
    for seed, (before, now) in enumerate(lengths):
        ids, pages = ids_of(before + now, seed), table(8 * seed)
        if before:
            step(runner, span(ids, 0, before, pages, sample=False))
        alone.append(step(runner, span(ids, before, before + now, pages)).logits[0])
        together.append(span(ids, before, before + now, pages))
    for found, expected in zip(step(runner, *together).logits, alone, strict=True):
        assert_same(found, expected)


def test_a_later_token_never_changes_an_earlier_row(runner: Runner) -> None:
    ids, changed = ids_of(80), ids_of(80)
    changed[50] = (changed[50] + 1) % 101
    prefill(runner, ids, table(0))
    prefill(runner, changed, table(10))
    one, other = (runner.read_pages(pages).flatten(2, 3)[:, :, :80] for pages in (table(0), table(10)))
    assert float((one[:, :, :50] - other[:, :, :50]).abs().max()) < 1e-5
    assert float((one[-1, :, 50:] - other[-1, :, 50:]).abs().amax((0, 2, 3)).min()) > 1e-4


def test_only_sampled_sequences_have_logits_in_order(runner: Runner) -> None:
    ids = [ids_of(20, seed) for seed in range(3)]
    alone = [prefill(runner, found, table(8 * seed)) for seed, found in enumerate(ids)]
    found = step(
        runner,
        span(ids[0], 0, 20, table(0)),
        span(ids[1], 0, 20, table(8), sample=False),
        span(ids[2], 0, 20, table(16)),
    )
    assert found.logits.shape == (2, 101)
    assert_same(found.logits[0], alone[0])
    assert_same(found.logits[1], alone[2])
    assert step(runner, span(ids[1], 0, 20, table(8), sample=False)).logits.shape == (0, 101)


def test_rows_that_no_logits_need_are_not_charged_their_last_layer(runner: Runner) -> None:
    ids, share = ids_of(40), runner.model.config.qkv_share
    found = step(runner, span(ids, 0, 40, table(0)), span(ids, 0, 10, table(8), sample=False))
    assert runner.row_cost == pytest.approx(3 + share)
    assert found.row_layers == pytest.approx([3 * 40 + 39 * share + 1, 10 * runner.row_cost])
    assert found.blend_row_layers.tolist() == [0, 0]
    assert step(runner, span(ids, 39, 40, table(0))).row_layers == pytest.approx([4])


def test_nan_in_unused_slots_does_not_leak(checkpoint: Path, make_runner: Make) -> None:
    ids = ids_of(70)
    clean = make_runner(checkpoint)
    expected = [prefill(clean, ids, table(0)), step(clean, span(ids, 30, 55, table(0))).logits[0]]
    runner = make_runner(checkpoint)
    runner.pool.data.fill_(torch.nan)
    assert_same(prefill(runner, ids, table(0)), expected[0])
    assert_same(step(runner, span(ids, 30, 55, table(0))).logits[0], expected[1])


def test_non_finite_logits_are_reported_for_their_sequence_alone(runner: Runner) -> None:
    ids = ids_of(40)
    prefill(runner, ids, table(0))
    prefill(runner, ids, table(8))
    page = runner.pool.data[:, :, int(table(8)[1])]
    page.fill_(torch.nan)
    found = step(runner, span(ids, 39, 40, table(0)), span(ids, 39, 40, table(8)))
    assert found.finite.tolist() == [True, False]
    assert bool(found.logits[0].isfinite().all())


def captured(runner: Runner, ids: Ids, start: int, stop: int, pages: Ids) -> ChunkKV:
    kv = step(runner, span(ids, 0, len(ids), pages, sample=False, capture=(start, stop))).captured[0]
    assert kv is not None
    return kv


def test_a_chunk_at_its_own_place_is_a_prefix_hit(runner: Runner) -> None:
    ids = ids_of(90)
    whole = prefill(runner, ids, table(0))
    kv = captured(runner, ids[:70], 20, 70, table(10))
    step(runner, span(ids, 0, 20, table(20), sample=False))
    runner.load_chunk(kv, np.arange(20, 70), table(20))
    assert_same(step(runner, span(ids, 70, 90, table(20))).logits[0], whole)


def test_captured_keys_are_unrotated_and_loading_rotates_them_once(runner: Runner) -> None:
    """In layer 0 K and V depend on the token alone, so a chunk loaded anywhere equals the chunk computed there."""
    ids = ids_of(40)
    kv = captured(runner, ids, 5, 35, table(0))
    runner.load_chunk(kv, np.arange(300, 330), table(10, 24))
    moved = np.concatenate([ids_of(300, 1), ids[5:35]])
    step(runner, span(moved, 0, 330, table(40, 24), sample=False))
    loaded, fresh = (
        runner.read_pages(pages).flatten(2, 3)[:, :, 300:330] for pages in (table(10, 24), table(40, 24))
    )
    assert float((loaded[0] - fresh[0]).abs().max()) < 1e-5
    assert float((loaded[3] - fresh[3]).abs().max()) > 0.01


def test_a_read_only_chunk_is_loaded_and_not_written(runner: Runner, tmp_path: Path) -> None:
    kv = captured(runner, ids_of(40), 8, 40, table(0))
    path = tmp_path / "kv"
    torch.stack([kv.k, kv.v]).numpy().tofile(path)
    path.chmod(0o400)
    mapped = torch.from_file(str(path), shared=False, size=2 * kv.k.numel()).view(2, *kv.k.shape)
    before = path.read_bytes()
    runner.load_chunk(ChunkKV(mapped[0], mapped[1]), np.arange(32), table(10))
    runner.load_chunk(kv, np.arange(32), table(20))
    assert torch.equal(runner.read_pages(table(10)), runner.read_pages(table(20)))
    assert path.read_bytes() == before


def test_chosen_rows_of_a_chunk_are_loaded_and_no_others(runner: Runner) -> None:
    kv = captured(runner, ids_of(40), 8, 40, table(0))
    runner.load_chunk(kv, np.arange(10, 42), table(10), rows=np.array([0, 3, 31]))
    runner.load_chunk(kv, np.arange(10, 42), table(20))
    some, every = (runner.read_pages(pages).flatten(2, 3) for pages in (table(10), table(20)))
    assert torch.equal(some[:, :, [10, 13, 41]], every[:, :, [10, 13, 41]])
    assert sorted(set(some.nonzero()[:, 2].tolist())) == [10, 13, 41]


def test_zeroed_pages_are_zero_and_their_neighbours_untouched(runner: Runner) -> None:
    prefill(runner, ids_of(64), np.arange(4))
    before = runner.read_pages(np.arange(4))
    runner.zero_pages(np.array([1, 3]))
    after = runner.read_pages(np.arange(4))
    assert not bool(after[:, :, [1, 3]].any())
    assert torch.equal(after[:, :, [0, 2]], before[:, :, [0, 2]])


def test_the_pool_has_the_budgeted_pages(checkpoint: Path, make_runner: Make) -> None:
    page = 4 * 2 * 16 * 2 * 16 * 4
    runner = make_runner(checkpoint, num_pages=None, kv_bytes=10 * page + page - 1)
    assert runner.num_pages == 10
    assert runner.pool.data.nbytes == 10 * page
    with pytest.raises(ConfigError, match=f"one of this model needs {page}"):
        make_runner(checkpoint, num_pages=None, kv_bytes=page - 1)


GOOD = SequenceRows(np.arange(5), np.arange(5), np.arange(2))
BLEND = BlendRows("reuse", 0.0, np.zeros(5, dtype=np.bool_), np.full(5, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": np.arange(4)}, "4 ids for 5 positions"),
        ({"token_ids": np.arange(0), "positions": np.arange(0)}, "at least one"),
        ({"positions": np.array([0, 1, 1, 2, 3])}, "rise"),
        ({"positions": np.array([4, 3, 2, 1, 0])}, "rise"),
        ({"positions": np.arange(-1, 4)}, "do not fit"),
        ({"positions": np.arange(30, 35)}, "do not fit 2 pages"),
        ({"positions": np.arange(510, 515), "block_table": np.arange(64)}, "beyond the context of 512"),
        ({"block_table": np.array([128, 0])}, "pages must lie in 0 to 127"),
        ({"block_table": np.array([-1, 0])}, "pages must lie"),
        ({"token_ids": np.full(5, 101)}, "token ids must lie in 0 to 100"),
        ({"token_ids": np.full(5, -1)}, "token ids must lie"),
        ({"capture": (3, 7)}, "cannot be captured"),
        ({"capture": (0, 2), "blend": BLEND}, "cannot be captured"),
    ],
)
def test_rows_that_break_the_contract_are_refused(runner: Runner, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RunnerError, match=message):
        step(runner, replace(GOOD, **change))
    assert not bool(runner.pool.data.any())


def test_a_batch_of_nothing_is_refused(runner: Runner) -> None:
    with pytest.raises(RunnerError, match="at least one sequence"):
        runner.forward(Batch(()))


def test_a_chunk_of_another_shape_is_refused(runner: Runner) -> None:
    kv = ChunkKV(torch.zeros(4, 5, 2, 16), torch.zeros(4, 5, 2, 16))
    with pytest.raises(RunnerError, match="was expected"):
        runner.load_chunk(kv, np.arange(6), np.arange(2))
    with pytest.raises(RunnerError, match="was expected"):
        runner.load_chunk(ChunkKV(kv.k, kv.v[:3]), np.arange(5), np.arange(2))
    with pytest.raises(RunnerError, match="do not fit"):
        runner.load_chunk(kv, np.arange(30, 35), np.arange(2))


def test_sensitivity_is_the_change_of_layer_1(checkpoint: Path, runner: Runner) -> None:
    """Against full forwards: the mean squared distance of layer 1's unrotated K and V from those behind its own."""
    chunk = ids_of(12, 1)
    contexts = [ids_of(9, 2), ids_of(3, 3), ids_of(30, 4)]
    chunks = [captured(runner, np.concatenate([c, chunk]), len(c), len(c) + 12, table(0)) for c in contexts]
    gaps = [((kv.k[1] - chunks[0].k[1]) ** 2 + (kv.v[1] - chunks[0].v[1]) ** 2).sum((1, 2)) for kv in chunks[1:]]
    before = runner.pool.data.clone()
    found = runner.sensitivity(chunk, contexts)
    torch.testing.assert_close(found.prior, torch.stack(gaps).mean(0), rtol=1e-4, atol=1e-6)
    assert found.row_layers == pytest.approx(36 + (42 + 36) * runner.model.config.qkv_share)
    assert torch.equal(runner.pool.data, before)


def test_sensitivity_neither_averages_nor_charges_its_own_context_again(runner: Runner) -> None:
    own, other = ids_of(9, 2), ids_of(20, 3)
    found, plain = (runner.sensitivity(ids_of(12, 1), contexts) for contexts in ([own, own, other], [own, other]))
    torch.testing.assert_close(found.prior, plain.prior)
    assert found.row_layers == plain.row_layers
    with pytest.raises(RunnerError, match="two different contexts"):
        runner.sensitivity(ids_of(12, 1), [own, own])


def test_sensitivity_needs_something_to_compare(checkpoint: Path, make_runner: Make) -> None:
    runner = make_runner(checkpoint)
    with pytest.raises(RunnerError, match="two different contexts"):
        runner.sensitivity(ids_of(5), [ids_of(3)])
    with pytest.raises(RunnerError, match="beyond the context"):
        runner.sensitivity(ids_of(5), [ids_of(3), ids_of(510)])


def test_two_engines_live_in_one_process(checkpoint: Path) -> None:
    config = EngineConfig(model=str(checkpoint), num_pages=8)
    model = load_model(config)
    one, other = Runner(config, model), Runner(config, model)
    prefill(one, ids_of(20), np.arange(2))
    assert not bool(other.pool.data.any())
