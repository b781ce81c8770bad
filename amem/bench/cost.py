"""What a question costs in prefill: re-prefilling, exact prefix caching, amem. Every side really runs.

Two regimes: one stable session, whose memories stay, and a recalled set that changes its members and its order with
every question. `charged` is counted by the engine from the rows that ran.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from amem.bench.harness import EXACT, Answer, Harness, right, tenant
from amem.bench.report import Chart, Result, target
from amem.bench.workload import Note, Workload, large
from amem.engine.types import BlendOptions

SIDES = ("re-prefill", "exact prefix cache", "amem")
REGIMES = ("stable session", "changing set")
CHANGING_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class CostOptions:
    """memory_tokens: tokens of the memory in each prompt, at least."""

    memory_tokens: int = 2048
    questions: int = 30
    seed: int = 0
    blend: BlendOptions = field(default_factory=BlendOptions)


@dataclass(frozen=True, slots=True)
class Side:
    """One side of one regime: per-question answers, and what writing cost before the first question."""

    answers: tuple[Answer, ...]
    write_tokens: float = 0.0
    write_seconds: float = 0.0

    @property
    def charged(self) -> list[float]:
        return [answer.report.charged for answer in self.answers]

    @property
    def ttft(self) -> list[float]:
        return [answer.report.ttft_s for answer in self.answers]


Sides = dict[str, dict[str, Side]]
"""By regime, then by side."""


def run(harness: Harness, options: CostOptions, tick: Callable[[], None]) -> Result:
    """`tick` is called once a question and side."""
    share = CHANGING_SHARE * 0.98
    workload = large(harness.planner, int(options.memory_tokens / share), options.questions, options.seed)
    sides: Sides = {}
    for regime in REGIMES:
        sets = _sets(workload, regime, options)
        sides[regime] = {side: _run_side(harness, workload, sets, regime, side, options, tick) for side in SIDES}
    return _result(harness, workload, sides, options)


def _sets(workload: Workload, regime: str, options: CostOptions) -> list[tuple[Note, ...]]:
    """The notes recalled for each question. A conversation is recalled whole and in order."""
    if regime == "stable session":
        return [workload.notes] * options.questions
    groups: dict[str, list[Note]] = {}
    for note in workload.notes:
        groups.setdefault(str(note.conversation) if note.conversation >= 0 else note.id, []).append(note)
    rng = random.Random(f"sets/{options.seed}")
    total = sum(len(note.text) for note in workload.notes)
    sets = []
    for _ in range(options.questions):
        order = list(groups.values())
        rng.shuffle(order)
        chosen: list[Note] = []
        for group in order:
            if sum(len(note.text) for note in chosen) >= CHANGING_SHARE * total:
                break
            chosen += group
        sets.append(tuple(chosen))
    return sets


def _run_side(
    harness: Harness,
    workload: Workload,
    sets: Sequence[tuple[Note, ...]],
    regime: str,
    side: str,
    options: CostOptions,
    tick: Callable[[], None],
) -> Side:
    owner = tenant(f"cost/{regime}/{side}/{options.seed}")
    written = None
    if side == "amem":
        written = harness.write(owner, harness.specs(workload.placed(workload.notes)))
    answers = []
    for number, (notes, question) in enumerate(zip(sets, workload.questions, strict=True)):
        segments = harness.segments(question.text, workload.placed(notes), chunks=side == "amem")
        if side == "re-prefill":
            owner = tenant(f"cost/{regime}/{side}/{options.seed}/{number}")
        answers.append(harness.ask(segments, owner, options.blend if side == "amem" else EXACT))
        tick()
    return Side(tuple(answers), *((written[0].prefill_tokens, written[1]) if written else (0.0, 0.0)))


def _result(harness: Harness, workload: Workload, sides: Sides, options: CostOptions) -> Result:
    return Result(
        name="cost",
        seed=options.seed,
        n=options.questions,
        columns=("regime", "side", "tokens", "× less", "with write", "TTFT ms", "agree", "right"),
        rows=[_row(workload, sides, regime, name) for regime in REGIMES for name in SIDES],
        data=_data(harness, workload, sides),
        targets=_targets({regime: {name: sum(s.charged) for name, s in sides[regime].items()} for regime in REGIMES}),
        charts=tuple(_chart(regime, sides[regime]) for regime in REGIMES),
    )


def _row(workload: Workload, sides: Sides, regime: str, name: str) -> tuple[object, ...]:
    side, baseline = sides[regime][name], sides[regime]["re-prefill"]
    n = len(side.answers)
    agree = sum(a.text == b.text for a, b in zip(side.answers, baseline.answers, strict=True))
    return (
        regime,
        name,
        round(sum(side.charged) / n, 1),
        sum(baseline.charged) / sum(side.charged),
        sum(baseline.charged) / (sum(side.charged) + side.write_tokens),
        sum(side.ttft) / n * 1000,
        f"{agree}/{n}",
        f"{sum(map(right, side.answers, workload.questions))}/{n}",
    )


def _targets(charged: dict[str, dict[str, float]]) -> list[dict[str, object]]:
    stable, changing = (charged[regime] for regime in REGIMES)
    return [
        target(
            "changing set: less prefill than re-prefilling",
            changing["re-prefill"] / changing["amem"],
            least=6,
        ),
        target(
            "changing set: less prefill than exact prefix caching",
            changing["exact prefix cache"] / changing["amem"],
            least=4,
        ),
        target(
            "stable session, write excluded: less prefill than re-prefilling",
            stable["re-prefill"] / stable["amem"],
            least=54,
        ),
        target(
            "stable session, write excluded: prefill over that of exact prefix caching",
            stable["amem"] / stable["exact prefix cache"],
            most=1,
        ),
    ]


def _data(harness: Harness, workload: Workload, sides: Sides) -> dict[str, object]:
    return {
        "memory_tokens": sum(harness.planner.count(note.text) for note in workload.notes),
        "prompt_tokens": {
            regime: [a.report.prompt.total for a in sides[regime]["amem"].answers] for regime in REGIMES
        },
        "notes": len(workload.notes),
        "write": {regime: _write(sides[regime]) for regime in REGIMES},
        "break_even_question": {regime: _break_even(sides[regime]) for regime in REGIMES},
        "limit_of_the_curve": {regime: _limit(sides[regime]) for regime in REGIMES},
        "per_question": {
            regime: {name: _per_question(side) for name, side in sides[regime].items()} for regime in REGIMES
        },
        "questions": [(question.text, question.answer, question.task) for question in workload.questions],
    }


def _per_question(side: Side) -> dict[str, object]:
    return {
        "charged": side.charged,
        "ttft_s": side.ttft,
        "answers": [answer.text for answer in side.answers],
        "effective_ratio": [answer.report.effective_ratio for answer in side.answers],
    }


def _write(sides: dict[str, Side]) -> dict[str, float]:
    return {"tokens": sides["amem"].write_tokens, "seconds": sides["amem"].write_seconds}


def _cumulative(side: Side) -> list[float]:
    return list(accumulate(side.charged, initial=side.write_tokens))[1:]


def _break_even(sides: dict[str, Side]) -> int | None:
    """The first question by which amem, its write included, has prefilled less than re-prefilling."""
    pairs = zip(_cumulative(sides["amem"]), _cumulative(sides["re-prefill"]), strict=True)
    return next((number for number, (ours, theirs) in enumerate(pairs, 1) if ours < theirs), None)


def _limit(sides: dict[str, Side]) -> float:
    """What the ratio with the write included tends to: prefill a question of both, once the write is paid off."""
    ours, theirs = sides["amem"].charged, sides["re-prefill"].charged
    tail = max(1, len(ours) // 2)
    return sum(theirs[-tail:]) / sum(ours[-tail:])


def _chart(regime: str, sides: dict[str, Side]) -> Chart:
    series = {name: list(enumerate(_cumulative(side), 1)) for name, side in sides.items()}
    series["amem, write excluded"] = list(enumerate(accumulate(sides["amem"].charged), 1))
    points = {name: [(float(x), y) for x, y in line] for name, line in series.items()}
    return Chart(f"Cumulative prefill, {regime}", "question", "prefilled tokens (charged)", points, log_y=True)
