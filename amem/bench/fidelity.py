"""How near blended answers stay to full prefill: agreement, KL of the next token and accuracy, per policy and ratio.

The same prompts, on the same engine: once prefilled in full, once with the stored KV of every memory at each ratio.
Memories are shuffled by conversation, so that hardly any stands where it was computed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from amem.bench.harness import EXACT, Answer, Harness, divergence, right, tenant, wilson
from amem.bench.report import Chart, Result, quantile
from amem.bench.scene import Level
from amem.bench.workload import Note, Question, of_example
from amem.bench.world import CROSS_CHUNK_TASKS, TASKS, examples
from amem.engine.types import BlendOptions, Fidelity, Tenant
from amem.memory.plan import PlacedBatch, PlacedMemory

REUSE = "reuse"


@dataclass(frozen=True, slots=True)
class FidelityOptions:
    """n: questions of each task.  context: stored KV is computed behind this many preceding chunks (the plan's
    window when None)."""

    n: int = 50
    seed: int = 0
    tasks: tuple[str, ...] = TASKS
    policies: tuple[str, ...] = ("gradual", "prior", "prior_gradual", "random")
    ratios: tuple[float, ...] = (0.05, 0.10, 0.15, 0.30, 1.0)
    recall_share: float = 1.0


@dataclass(frozen=True, slots=True)
class Case:
    question: Question
    batch: PlacedBatch
    owner: Tenant


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of the table."""

    policy: str
    ratio: float

    @property
    def blend(self) -> BlendOptions:
        return BlendOptions(Fidelity.BALANCED, self.ratio, self.policy)


def settings(options: FidelityOptions) -> list[Setting]:
    blended = [Setting(policy, ratio) for policy in options.policies for ratio in options.ratios]
    return [Setting(REUSE, 0.0), *blended]


def cases(options: FidelityOptions) -> list[Case]:
    """Held-out questions, the first asking of each example, its memories in a shuffled order of conversations."""
    level = Level(turns=1, system=0.0)
    found = []
    for task in options.tasks:
        for number, example in enumerate(examples(task, "heldout", options.seed, options.n, level)):
            workload = of_example(example)
            rng = random.Random(f"order/{task}/{options.seed}/{number}")
            notes = _shuffled(workload.notes, rng)
            placed = tuple(PlacedMemory(note, workload.predecessors(note)) for note in notes)
            owner = tenant(f"fidelity/{task}/{options.seed}/{number}")
            found.append(Case(workload.questions[0], PlacedBatch(placed), owner))
    return found


def _shuffled(notes: Sequence[Note], rng: random.Random) -> list[Note]:
    groups: dict[str, list[Note]] = {}
    for note in notes:
        groups.setdefault(f"c{note.conversation}" if note.conversation >= 0 else note.id, []).append(note)
    order = list(groups.values())
    rng.shuffle(order)
    return list(chain.from_iterable(order))


def run(harness: Harness, options: FidelityOptions, tick: Callable[[], None]) -> Result:
    """`tick` is called once a question and setting, the full prefill included."""
    lines = settings(options)
    every = cases(options)
    full: list[Answer] = []
    blended: dict[Setting, list[Answer]] = {line: [] for line in lines}
    for case in every:
        plain = harness.segments(case.question.text, case.batch, chunks=False)
        full.append(harness.ask(plain, tenant(f"full/{case.owner.id.hex()}"), EXACT))
        tick()
        harness.write(case.owner, harness.specs(case.batch))
        segments = harness.segments(case.question.text, case.batch)
        for line in lines:
            blended[line].append(harness.ask(segments, case.owner, line.blend))
            tick()
    return _result(every, full, blended, options)


def _result(
    every: list[Case], full: list[Answer], blended: dict[Setting, list[Answer]], options: FidelityOptions
) -> Result:
    n = len(every)
    rows: list[tuple[object, ...]] = [
        ("full prefill", "", "", "", "", "", sum(right(a, c.question) for a, c in zip(full, every, strict=True)) / n)
    ]
    data: dict[str, object] = {"tasks": {}, "lines": []}
    lines: list[dict[str, object]] = []
    for line, answers in blended.items():
        agree = [a.text == f.text for a, f in zip(answers, full, strict=True)]
        gaps = [divergence(f.logits, a.logits) for a, f in zip(answers, full, strict=True)]
        charged = sum(answer.report.effective_ratio for answer in answers) / n
        accuracy = sum(right(a, c.question) for a, c in zip(answers, every, strict=True)) / n
        low, high = wilson(sum(agree), n)
        mean_gap = sum(gaps) / n
        rows.append(
            (
                line.policy,
                line.ratio,
                charged,
                f"{sum(agree) / n:.3f} [{low:.3f}, {high:.3f}]",
                mean_gap,
                quantile(gaps, 0.95),
                accuracy,
            )
        )
        lines.append(
            {
                "policy": line.policy,
                "ratio": line.ratio,
                "charged_ratio": charged,
                "agreement": sum(agree) / n,
                "interval": [low, high],
                "kl_mean": mean_gap,
                "kl_p95": quantile(gaps, 0.95),
                "accuracy": accuracy,
                "per_task": {task: _share(agree, every, task) for task in options.tasks},
                "policies_run": sorted({answer.report.policy for answer in answers}),
            }
        )
    data["lines"] = lines
    data["tasks"] = {
        task: {
            "full_prefill_accuracy": _share(
                [right(a, c.question) for a, c in zip(full, every, strict=True)], every, task
            ),
            "cross_chunk": task in CROSS_CHUNK_TASKS,
        }
        for task in options.tasks
    }
    columns = ("policy", "ratio", "charged", "agreement [95 %]", "KL mean", "KL p95", "accuracy")
    charts = (_chart(lines, "agreement"), _chart(lines, "kl_mean"))
    return Result("fidelity", options.seed, n, columns, rows, data, [], charts)


def _share(flags: Sequence[bool], every: Sequence[Case], task: str) -> float:
    chosen = [flag for flag, case in zip(flags, every, strict=True) if case.question.task == task]
    return sum(chosen) / len(chosen) if chosen else float("nan")


def _chart(lines: list[dict[str, object]], measure: str) -> Chart:
    series: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        point = (float(str(line["charged_ratio"])), float(str(line[measure])))
        series.setdefault(str(line["policy"]), []).append(point)
    title = {"agreement": "Agreement with full prefill", "kl_mean": "KL to full prefill, next token"}[measure]
    return Chart(title, "charged share of the memory's prefill", measure, series, log_y=measure == "kl_mean")
