"""The benches run what they say they run: no side borrows KV from another, and the arithmetic is right."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from amem.bench import cost, report
from amem.bench.harness import EXACT, Harness, divergence, tenant, wilson
from amem.engine.config import EngineConfig
from amem.engine.types import PromptTokens, Report
from amem.memory.plan import PlacedBatch, PlacedMemory

DEMO = Path(cost.__file__).parents[1] / "models" / "demo"


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    harness = Harness(EngineConfig(str(DEMO), num_pages=256, ram_bytes=64 << 20))
    yield harness
    harness.close()


def test_every_side_of_the_cost_bench_really_runs(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple[str, str], cost.Side] = {}
    ran = cost._run_side

    def noted(*given: object) -> cost.Side:
        side = seen[str(given[3]), str(given[4])] = ran(*given)
        return side

    monkeypatch.setattr(cost, "_run_side", noted)
    ticks: list[None] = []
    result = cost.run(harness, cost.CostOptions(96, 2), lambda: ticks.append(None))
    assert len(ticks) == 2 * len(cost.SIDES) * len(cost.REGIMES)
    for (_, name), side in seen.items():
        for number, answer in enumerate(side.answers):
            prompt = answer.report.prompt
            loaded = prompt.gpu + prompt.cpu + prompt.disk + prompt.recomputed
            assert answer.report.completion_tokens > 0
            assert (side.write_tokens > 0) == (name == "amem")
            assert (loaded > 0) <= (name == "amem")
            if name == "re-prefill":
                assert prompt.fresh == prompt.total
                assert answer.report.charged > 0.9 * prompt.total
            elif number:
                assert prompt.prefix + loaded > 0
    assert [row[:2] for row in result.rows] == [(regime, side) for regime in cost.REGIMES for side in cost.SIDES]
    assert len(result.targets) == 4
    assert json.loads(json.dumps(result.data))["write"][cost.REGIMES[0]]["tokens"] > 0


def test_logits_are_those_of_the_first_token(harness: Harness) -> None:
    """The answer begins with the best of them, whatever else was computed around it."""
    text = PlacedMemory(_Text("m", "Ann lives in Oslo."))
    segments = harness.segments("Where does Ann live?", PlacedBatch((text,)))
    one = harness.ask(segments, tenant("logits"), EXACT, max_tokens=1)
    best = int(one.logits.argmax())
    said = "" if best in harness.engine.model.eos_token_ids else harness.chat.tokenizer.decode([best])
    assert one.text == said.strip()
    assert not harness.engine.first


class _Text:
    def __init__(self, name: str, text: str) -> None:
        self.id, self.text = name, text


def test_divergence_is_kl_in_nats() -> None:
    full, other = torch.tensor([0.0, 0.0]), torch.tensor([math.log(3.0), 0.0])
    assert divergence(full, other) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2.0))
    assert divergence(full, full) == 0.0


def test_the_interval_is_wilsons() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)


def test_quantiles_are_interpolated() -> None:
    assert report.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert report.quantile([0.0, 1.0], 0.95) == pytest.approx(0.95)
    with pytest.raises(ValueError, match="nothing"):
        report.quantile([], 0.5)


def test_break_even_counts_the_write(harness: Harness) -> None:
    def side(charged: list[float], write: float = 0.0) -> cost.Side:
        blank = Report(PromptTokens(), 0, 0.0, 0.0, 0.0, "", None, 0.0, 0.0, 0.0, 0.0)
        one = harness.ask(harness.segments("Hi?", None), tenant("even"), EXACT, max_tokens=1)
        answers = tuple(replace(one, report=replace(blank, charged=value)) for value in charged)
        return cost.Side(answers, write)

    sides = {"amem": side([1.0] * 6, 20.0), "re-prefill": side([10.0] * 6)}
    assert cost._break_even(sides) == 3
    assert cost._limit(sides) == 10.0
    assert cost._break_even(sides | {"amem": side([1.0] * 6, 60.0)}) is None


def test_a_target_is_met_on_its_own_side() -> None:
    assert report.target("a", 5.0, least=6)["met"] is False
    assert report.target("a", 6.0, least=6)["met"] is True
    assert report.target("a", 0.5, most=1)["met"] is True
    assert report.target("a", 1.5, most=1)["met"] is False
