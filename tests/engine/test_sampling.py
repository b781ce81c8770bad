"""Draws follow the distribution that was asked for, and depend on nothing but seed and position."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amem.engine.sampling import Draw, sample, uniform
from amem.engine.types import SamplingParams

DRAWS = 20_000


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, **fields})


def counts(logits: torch.Tensor, chosen: SamplingParams, draws: int = DRAWS) -> torch.Tensor:
    rows = logits.expand(draws, -1)
    tokens = [found.token for found in sample(rows, [Draw(chosen, 7, position) for position in range(draws)])]
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1])


def expected(logits: torch.Tensor, chosen: SamplingParams) -> list[float]:
    """The target distribution, by hand in float64: temperature, then top_k, top_p, min_p, then renormalised."""
    heat = [value / chosen.temperature for value in logits.double().tolist()]
    order = sorted(range(len(heat)), key=lambda token: -heat[token])
    kept = order[: chosen.top_k or len(order)]
    total = sum(math.exp(heat[token]) for token in kept)
    mass = {token: math.exp(heat[token]) / total for token in kept}
    nucleus, before = [], 0.0
    for token in kept:
        if before < chosen.top_p:
            nucleus.append(token)
        before += mass[token]
    final = [token for token in nucleus if mass[token] >= chosen.min_p * mass[kept[0]]]
    total = sum(mass[token] for token in final)
    return [mass[token] / total if token in final else 0.0 for token in range(len(heat))]


@pytest.mark.parametrize(
    "chosen",
    [
        params(),
        params(temperature=0.5),
        params(temperature=2.0),
        params(top_k=3),
        params(top_p=0.6),
        params(min_p=0.2),
        params(temperature=1.5, top_k=12, top_p=0.8, min_p=0.05),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(chosen: SamplingParams) -> None:
    logits = torch.randn(17, generator=torch.Generator().manual_seed(1)) * 1.5
    target = expected(logits, chosen)
    found = counts(logits, chosen)
    statistic = 0.0
    for share, count in zip(target, found.tolist(), strict=True):
        assert share > 0 or count == 0, "a token outside the filters was drawn"
        statistic += (count - share * DRAWS) ** 2 / (share * DRAWS) if share else 0.0
    freedom = sum(share > 0 for share in target) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5  # five sigma of chi squared; the seed is fixed


@settings(max_examples=60, deadline=None)
@given(
    seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8),
    position=st.integers(0, 4000),
    data=st.data(),
)
def test_a_draw_is_the_same_in_any_batch(seeds: list[int], position: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(len(seeds))
    logits = torch.randn(len(seeds), 50, generator=generator)
    draws = [Draw(params(top_p=data.draw(st.floats(0.1, 1.0))), seed, position) for seed in seeds]
    together = [found.token for found in sample(logits, draws)]
    alone = [sample(logits[row : row + 1], [draw])[0].token for row, draw in enumerate(draws)]
    assert together == alone


def test_greedy_and_drawn_rows_share_a_batch() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(3))
    draws = [Draw(params(temperature=0.0 if row % 2 else 1.0), row, 5) for row in range(4)]
    found = [item.token for item in sample(logits, draws)]
    assert [found[1], found[3]] == logits.argmax(-1)[1::2].tolist()


def test_a_tiny_temperature_or_nucleus_is_greedy() -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(4)).expand(50, -1)
    best = int(logits[0].argmax())
    for chosen in (params(temperature=1e-9), params(top_p=1e-9), params(top_k=1), params(min_p=1.0)):
        assert {found.token for found in sample(logits, [Draw(chosen, seed, 0) for seed in range(50)])} == {best}


def test_seeds_and_positions_all_count() -> None:
    values = {uniform(seed, position) for seed in range(40) for position in range(40)}
    assert len(values) == 1600
    assert 0 <= min(values) < 0.01
    assert 0.99 < max(values) < 1
    assert uniform(5, 6) != uniform(6, 5)


def test_logprobs_are_those_of_the_model() -> None:
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(5))
    wanted = SamplingParams(temperature=0.7, top_k=2, logprobs=3)
    plain, asked = sample(logits, [Draw(SamplingParams(), 0, 0), Draw(wanted, 1, 0)])
    assert plain.logprob is None
    assert asked.logprob is not None
    reference = logits[1].double().log_softmax(-1)
    assert asked.logprob.logprob == pytest.approx(float(reference[asked.token]), abs=1e-5)
    assert [token for token, _ in asked.logprob.top] == reference.topk(3).indices.tolist()
    assert [value for _, value in asked.logprob.top] == pytest.approx(reference.topk(3).values.tolist(), abs=1e-5)


def test_no_top_logprobs_still_gives_the_chosen_one() -> None:
    found = sample(torch.zeros(1, 4), [Draw(SamplingParams(logprobs=0), 0, 0)])[0]
    assert found.logprob is not None
    assert found.logprob.top == ()
    assert found.logprob.logprob == pytest.approx(-math.log(4))
