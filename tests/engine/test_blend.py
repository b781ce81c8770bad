"""Blends keep their identities, their budgets and their hands off rows that were not chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from amem.engine.batch import Batch, BlendRows, SequenceRows, StepOutput
from amem.engine.blend import FIDELITY, POLICIES, BlendError, plan_blend, resolve_policy
from amem.engine.config import BlendConfig
from amem.engine.runner import Runner
from amem.engine.types import Fidelity

Make = Callable[..., Any]
Ids = NDArray[np.int64]
CHECKED = ["gradual", "oracle_layer1", "prior_gradual"]
CHUNK, CHUNKS, QUESTION = 20, 4, 9
PREFIX = 6
LENGTH = PREFIX + CHUNK * CHUNKS + QUESTION
LAYERS = 12


@pytest.fixture(scope="module")
def deep(make_checkpoint: Make) -> Path:
    return Path(make_checkpoint(num_hidden_layers=LAYERS))


@pytest.fixture
def deep_runner(deep: Path, make_runner: Make) -> Runner:
    runner: Runner = make_runner(deep)
    return runner


class Prompt:
    """A prefix, chunks loaded from KV that was computed behind the prefix alone, and a question."""

    def __init__(self, runner: Runner, seed: int = 0, first_page: int = 0) -> None:
        self.runner = runner
        self.ids: Ids = np.random.default_rng(seed).integers(0, 101, LENGTH)
        self.pages = np.arange(first_page, first_page + 8)
        self.candidate = np.zeros(LENGTH, dtype=np.bool_)
        self.candidate[PREFIX : LENGTH - QUESTION] = True
        self.chunk = np.where(self.candidate, (np.arange(LENGTH) - PREFIX) // CHUNK, -1)
        self.prior = np.zeros(LENGTH, dtype=np.float32)
        scratch = np.arange(120, 128)
        for number in range(CHUNKS):
            at = np.arange(PREFIX + number * CHUNK, PREFIX + (number + 1) * CHUNK)
            alone = np.concatenate([self.ids[:PREFIX], self.ids[at]])
            rows = SequenceRows(alone, np.arange(len(alone)), scratch, sample=False, capture=(PREFIX, len(alone)))
            kv = runner.forward(Batch((rows,))).captured[0]
            assert kv is not None
            runner.load_chunk(kv, at, self.pages)
            contexts = [self.ids[:PREFIX], np.random.default_rng(number).integers(0, 101, 25)]
            self.prior[at] = runner.sensitivity(self.ids[at], contexts).prior.numpy()
        runner.forward(Batch((SequenceRows(self.ids[:PREFIX], np.arange(PREFIX), self.pages, sample=False),)))
        self.before = runner.read_pages(self.pages)
        self.loaded = self.kv()

    def reload(self) -> None:
        """Puts the loaded KV back where a blend has overwritten it."""
        with torch.inference_mode():
            self.runner.pool.data[:, :, torch.from_numpy(self.pages)] = self.before

    def rows(self, policy: str, ratio: float, **fields: Any) -> SequenceRows:
        take = slice(PREFIX, LENGTH)
        blend = BlendRows(policy, ratio, self.candidate[take], self.chunk[take], self.prior[take], **fields)
        return SequenceRows(self.ids[take], np.arange(PREFIX, LENGTH), self.pages, blend=blend)

    def blend(self, policy: str, ratio: float, **fields: Any) -> StepOutput:
        return self.runner.forward(Batch((self.rows(policy, ratio, **fields),)))

    def exact(self) -> Tensor:
        pages = self.pages + 60
        return self.runner.forward(Batch((SequenceRows(self.ids, np.arange(LENGTH), pages),))).logits[0]

    def kv(self) -> Tensor:
        """[layers, 2, positions, kv_heads, head_dim]"""
        return self.runner.read_pages(self.pages).flatten(2, 3)[:, :, :LENGTH]


def squared_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).square().mean())


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"reuse"}))
def test_all_rows_chosen_is_full_prefill(deep_runner: Runner, policy: str) -> None:
    prompt = Prompt(deep_runner)
    found = prompt.blend(policy, 1.0)
    assert float((found.logits[0] - prompt.exact()).abs().max()) < 1e-4
    assert found.kept[0].tolist() == list(range(PREFIX, LENGTH - QUESTION))
    assert found.blend_row_layers[0] == pytest.approx(CHUNK * CHUNKS * deep_runner.row_cost)
    exact = deep_runner.read_pages(prompt.pages + 60).flatten(2, 3)[:, :, :LENGTH]
    assert float((prompt.kv() - exact).abs().max()) < 1e-4


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_ratio_0_is_reuse_with_rows_untouched(deep_runner: Runner, policy: str) -> None:
    prompt = Prompt(deep_runner)
    found = prompt.blend(policy, 0.0)
    loaded = slice(PREFIX, LENGTH - QUESTION)
    assert torch.equal(prompt.kv()[:, :, loaded], prompt.loaded[:, :, loaded])
    assert found.kept[0].size == 0
    assert found.blend_row_layers.tolist() == [0]
    # the question alone over the loaded pages
    plain = Prompt(deep_runner)
    start = LENGTH - QUESTION
    question = SequenceRows(plain.ids[start:], np.arange(start, LENGTH), plain.pages)
    alone = deep_runner.forward(Batch((question,)))
    assert float((found.logits - alone.logits).abs().max()) < 1e-4
    assert found.row_layers == pytest.approx(alone.row_layers)
    assert float((found.logits[0] - prompt.exact()).abs().max()) > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("policy", ["gradual", "prior_gradual"])
def test_half_precision_blends_within_their_noise(
    deep: Path, deep_runner: Runner, make_runner: Make, policy: str, dtype: str
) -> None:
    """All rows chosen: as near to full prefill as that is to float32. A few rows: far nearer than none."""
    runner = make_runner(deep, dtype=dtype)
    prompt = Prompt(runner)
    exact = prompt.exact()
    noise = squared_error(exact, Prompt(deep_runner).exact())
    reuse = squared_error(prompt.blend("reuse", 0.0).logits[0], exact)
    assert squared_error(prompt.blend(policy, 1.0).logits[0], exact) <= noise < reuse / 10


def test_stored_kv_that_turned_nan_is_recomputed_first(deep_runner: Runner) -> None:
    prompt = Prompt(deep_runner)
    exact = prompt.exact()
    bad = [30, 77]
    with torch.inference_mode():
        for position in bad:
            deep_runner.pool.data[:, :, int(prompt.pages[position // 16]), position % 16] = torch.nan
    found = prompt.blend("oracle_layer1", 0.5)
    assert set(bad) <= set(found.kept[0].tolist())
    assert bool(found.finite[0])
    assert squared_error(found.logits[0], exact) < squared_error(
        Prompt(deep_runner).blend("reuse", 0).logits[0], exact
    )


def test_reuse_recomputes_nothing_whatever_the_ratio(deep_runner: Runner) -> None:
    assert Prompt(deep_runner).blend("reuse", 0.5).blend_row_layers.tolist() == [0]


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"reuse"}))
def test_rows_that_were_not_chosen_keep_their_loaded_kv(deep_runner: Runner, policy: str) -> None:
    prompt = Prompt(deep_runner)
    found = prompt.blend(policy, 0.2)
    kept = set(found.kept[0].tolist())
    untouched = [p for p in range(PREFIX, LENGTH - QUESTION) if p not in kept]
    assert 8 <= len(kept) <= 16
    after = prompt.kv()
    assert torch.equal(after[-1][:, untouched], prompt.loaded[-1][:, untouched])
    assert float((after[-1][:, sorted(kept)] - prompt.loaded[-1][:, sorted(kept)]).abs().amax((0, 2, 3)).min()) > 0


@pytest.mark.parametrize("policy", [*CHECKED, "random", "prior", "epic"])
@pytest.mark.parametrize("ratio", [0.05, 0.15, 0.3, 0.8])
@pytest.mark.parametrize("share", ["global", "chunk"])
def test_budgets_are_spent_and_charged(deep: Path, make_runner: Make, policy: str, ratio: float, share: str) -> None:
    """The mean share over the layers behind the first is the ratio; every check is on the bill."""
    runner = make_runner(deep, blend=BlendConfig(share=share))
    prompt = Prompt(runner)
    found = prompt.blend(policy, ratio)
    plan = plan_blend(prompt.rows(policy, ratio).blend, LAYERS, runner.config.blend, keep_last=True)
    live = plan.counts.sum(1)
    n, qkv = CHUNK * CHUNKS, runner.model.config.qkv_share
    assert abs(float(live[1:].mean()) - ratio * n) <= 1
    assert bool((np.diff(live) <= 0).all())
    entered = np.concatenate([live[:1], live[:-1]])
    bill = float((live + (entered - live) * qkv)[:-1].sum() + entered[-1] * qkv)
    assert found.blend_row_layers[0] == pytest.approx(bill, rel=1e-6)
    assert len(found.kept[0]) == live[-1]
    if policy == "gradual":
        assert bill > (1 + ratio * (LAYERS - 2)) * n


def test_gradual_filtering_is_nested_and_takes_the_deviant(deep_runner: Runner) -> None:
    """With one budget, oracle_layer1 takes the rows whose layer-1 K and V lie farthest from the loaded ones."""
    prompt = Prompt(deep_runner)
    prompt.exact()
    exact = deep_runner.read_pages(prompt.pages + 60).flatten(2, 3)[1, :, :LENGTH]
    gap = (exact - prompt.loaded[1]).square().sum((0, 2, 3))[PREFIX : LENGTH - QUESTION]
    expected = sorted((gap.topk(12).indices + PREFIX).tolist())
    assert prompt.blend("oracle_layer1", 12 / 80).kept[0].tolist() == expected


def test_prior_takes_the_highest_prior_and_ties_go_first(deep_runner: Runner) -> None:
    prompt = Prompt(deep_runner)
    prompt.prior[:] = 0
    prompt.prior[[30, 50, 70]] = [3, np.nan, 1]
    assert prompt.blend("prior", 5 / 80).kept[0].tolist() == [6, 7, 30, 50, 70]


def test_chunks_get_their_own_share_if_asked(deep: Path, make_runner: Make) -> None:
    counts = {}
    for share in ("global", "chunk"):
        prompt = Prompt(make_runner(deep, blend=BlendConfig(share=share)))
        prompt.prior[PREFIX : PREFIX + CHUNK] = 1e6
        kept = prompt.blend("prior", 0.2).kept[0]
        counts[share] = np.bincount((kept - PREFIX) // CHUNK, minlength=CHUNKS).tolist()
    assert counts == {"global": [16, 0, 0, 0], "chunk": [4, 4, 4, 4]}


def test_epic_takes_the_first_rows_of_every_chunk(deep_runner: Runner) -> None:
    kept = Prompt(deep_runner).blend("epic", 0.1).kept[0]
    assert ((kept - PREFIX) % CHUNK).tolist() == [0, 1] * CHUNKS


def test_random_follows_its_seed(deep_runner: Runner) -> None:
    prompt = Prompt(deep_runner)
    once, again, other = (prompt.blend("random", 0.3, seed=seed).kept[0].tolist() for seed in (1, 1, 2))
    assert once == again
    assert once != other


@pytest.mark.parametrize("policy", ["gradual", "random", "prior_gradual"])
def test_error_falls_with_the_ratio_on_average(deep_runner: Runner, policy: str) -> None:
    ratios = [0.0, 0.15, 0.5, 1.0]
    sums = np.zeros(len(ratios))
    for seed in range(5):
        prompt = Prompt(deep_runner, seed)
        exact = prompt.exact()
        for index, ratio in enumerate(ratios):
            prompt.reload()
            sums[index] += squared_error(prompt.blend(policy, ratio).logits[0], exact)
    assert bool((np.diff(sums) < 0).all()), sums
    assert sums[-1] < 1e-8


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_blends_in_one_batch_do_not_touch_each_other(deep_runner: Runner, policy: str) -> None:
    """Two blends of different ratios, a decode and a prefill in one step, each as if it were alone."""
    alone = [Prompt(deep_runner, 0).blend(policy, 0.2), Prompt(deep_runner, 1, 8).blend("gradual", 0.5)]
    other: Ids = np.random.default_rng(9).integers(0, 101, 30)
    plain = SequenceRows(other, np.arange(30), np.arange(16, 24))
    alone.append(deep_runner.forward(Batch((plain,))))
    one, two = Prompt(deep_runner, 0), Prompt(deep_runner, 1, 8)
    last = SequenceRows(other[-1:], np.array([29]), np.arange(16, 24))
    batch = Batch(
        (one.rows(policy, 0.2), replace(plain, block_table=np.arange(30, 38)), two.rows("gradual", 0.5), last)
    )
    found = deep_runner.forward(batch)
    for mixed, single in zip([0, 2, 1, 3], [*alone, alone[2]], strict=True):
        assert float((found.logits[mixed] - single.logits[0]).abs().max()) < 1e-4
    for mixed, single in ((0, alone[0]), (2, alone[1])):
        assert found.kept[mixed].tolist() == single.kept[0].tolist()
        assert found.row_layers[mixed] == pytest.approx(single.row_layers[0])
        assert found.blend_row_layers[mixed] == pytest.approx(single.blend_row_layers[0])
    assert found.kept[1].size == found.kept[3].size == 0


def test_a_blend_may_be_run_in_spans(deep_runner: Runner) -> None:
    """Chunk rows in one step without a sample, the question in the next."""
    prompt = Prompt(deep_runner)
    rows = prompt.rows("gradual", 1.0)
    cut = 47
    assert rows.blend is not None
    parts = []
    for part in (slice(0, cut), slice(cut, None)):
        blend = replace(rows.blend, candidate=rows.blend.candidate[part], chunk=rows.blend.chunk[part])
        cut_rows = SequenceRows(rows.token_ids[part], rows.positions[part], rows.block_table, bool(parts), blend)
        parts.append(deep_runner.forward(Batch((cut_rows,))))
    assert float((parts[1].logits[0] - prompt.exact()).abs().max()) < 1e-4


def test_a_batch_of_nothing_but_reuse_runs_no_row(deep_runner: Runner) -> None:
    prompt = Prompt(deep_runner)
    rows = replace(prompt.rows("reuse", 0.0), sample=False)
    assert rows.blend is not None
    everything = replace(rows.blend, candidate=np.ones_like(rows.blend.candidate))
    found = deep_runner.forward(Batch((replace(rows, blend=everything),)))
    assert found.row_layers.tolist() == [0]
    assert found.logits.shape == (0, 101)
    assert torch.equal(prompt.kv(), prompt.loaded)


def test_a_sampled_row_runs_even_if_it_is_a_candidate(deep_runner: Runner) -> None:
    prompt = Prompt(deep_runner)
    rows = prompt.rows("reuse", 0.0)
    assert rows.blend is not None
    everything = replace(rows.blend, candidate=np.ones_like(rows.blend.candidate))
    found = deep_runner.forward(Batch((replace(rows, blend=everything),)))
    assert found.logits.shape == (1, 101)
    assert found.row_layers.tolist() == [LAYERS]


def test_checked_rows_are_written_if_asked(deep: Path, make_runner: Make) -> None:
    """With write_checked, layer 1 holds exact K and V of every row that its check measured."""
    prompt = Prompt(make_runner(deep, blend=BlendConfig(write_checked=True)))
    prompt.blend("gradual", 0.2)
    found = prompt.kv()[1]
    prompt.exact()
    exact = prompt.runner.read_pages(prompt.pages + 60).flatten(2, 3)[1, :, :LENGTH]
    assert float((found - exact).abs().max()) < 1e-4
    assert float((prompt.loaded[1] - exact).abs().max()) > 1e-2


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_shallow_models_blend_too(make_checkpoint: Make, make_runner: Make, policy: str, layers: int) -> None:
    runner = make_runner(make_checkpoint(num_hidden_layers=layers))
    ids: Ids = np.arange(40)
    full = runner.forward(Batch((SequenceRows(ids, np.arange(40), np.arange(3)),)))
    candidate = ids < 30
    blend = BlendRows(policy, 0.5, candidate, np.where(candidate, 0, -1), np.ones(40, dtype=np.float32))
    found = runner.forward(Batch((SequenceRows(ids, np.arange(40), np.arange(3), blend=blend),)))
    assert float((found.logits - full.logits).abs().max()) < 1e-4


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_outside_0_to_1_is_refused(deep_runner: Runner, ratio: float) -> None:
    with pytest.raises(BlendError, match="0 to 1"):
        Prompt(deep_runner).blend("gradual", ratio)


def test_unknown_policies_and_missing_priors_are_refused(deep_runner: Runner) -> None:
    prompt = Prompt(deep_runner)
    with pytest.raises(BlendError, match="no policy 'best'; there are: epic, gradual"):
        prompt.blend("best", 0.1)
    rows = prompt.rows("prior_gradual", 0.1)
    assert rows.blend is not None
    with pytest.raises(BlendError, match="needs a write-time prior"):
        deep_runner.forward(Batch((replace(rows, blend=replace(rows.blend, prior=None)),)))


def test_a_policy_without_its_prior_becomes_gradual() -> None:
    assert resolve_policy("prior_gradual", has_prior=False) == "gradual"
    assert resolve_policy("prior_gradual", has_prior=True) == "prior_gradual"
    assert resolve_policy("reuse", has_prior=False) == "reuse"
    with pytest.raises(BlendError):
        resolve_policy("best", has_prior=True)


def test_fidelity_levels_rise() -> None:
    assert set(FIDELITY) == set(Fidelity)
    ratios = [FIDELITY[level][1] for level in (Fidelity.FAST, Fidelity.BALANCED, Fidelity.HIGH, Fidelity.EXACT)]
    assert ratios == sorted(set(ratios))
    assert all(policy in POLICIES for policy, _ in FIDELITY.values())
    assert ratios[-1] == 1.0
