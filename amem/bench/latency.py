"""Time to the first token against memory length: full prefill, blended from RAM, from disk, and a warm session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from amem.bench.harness import EXACT, Harness, tenant
from amem.bench.report import Chart, Result, quantile
from amem.bench.workload import Workload, large
from amem.engine.config import EngineConfig
from amem.engine.types import BlendOptions, Report, Tenant

KINDS = ("full prefill", "from RAM", "from disk", "warm session")


@dataclass(frozen=True, slots=True)
class LatencyOptions:
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 3072)
    repeats: int = 5
    seed: int = 0
    blend: BlendOptions = field(default_factory=BlendOptions)


def run(config: EngineConfig, options: LatencyOptions, tick: Callable[[], None]) -> Result:
    """`config` needs a kv_dir: the disk figures come from an engine that is started anew over it. `tick` is called
    once a length and repeat of each of the two engines."""
    sources: dict[str, dict[int, list[Report]]] = {kind: {length: [] for length in options.lengths} for kind in KINDS}
    harness = Harness(config)
    try:
        workloads = {n: large(harness.planner, n, 2 * options.repeats, options.seed) for n in options.lengths}
        for length, workload in workloads.items():
            _in_memory(harness, workload, length, options, sources, tick)
    finally:
        harness.close()
    for repeat in range(options.repeats):
        reopened = Harness(config)
        try:
            for length, workload in workloads.items():
                segments = reopened.segments(workload.questions[repeat].text, workload.placed(workload.notes))
                answer = reopened.ask(segments, _owner(length, repeat), options.blend)
                sources["from disk"][length].append(answer.report)
                tick()
        finally:
            reopened.close()
    return _result(sources, options)


def _owner(length: int, repeat: int) -> Tenant:
    """A tenant a repeat: no question finds the pages of another one."""
    return tenant(f"latency/{length}/{repeat}")


def _in_memory(
    harness: Harness,
    workload: Workload,
    length: int,
    options: LatencyOptions,
    sources: dict[str, dict[int, list[Report]]],
    tick: Callable[[], None],
) -> None:
    batch = workload.placed(workload.notes)
    for repeat in range(options.repeats):
        owner = _owner(length, repeat)
        harness.write(owner, harness.specs(batch))
        first, second = workload.questions[2 * repeat : 2 * repeat + 2]
        plain = harness.segments(first.text, batch, chunks=False)
        cold = harness.ask(plain, tenant(f"latency/cold/{length}/{repeat}"), EXACT)
        blended = harness.ask(harness.segments(first.text, batch), owner, options.blend)
        warm = harness.ask(harness.segments(second.text, batch), owner, options.blend)
        for kind, answer in (("full prefill", cold), ("from RAM", blended), ("warm session", warm)):
            sources[kind][length].append(answer.report)
        tick()


def _result(sources: dict[str, dict[int, list[Report]]], options: LatencyOptions) -> Result:
    rows = []
    for length in options.lengths:
        full = median(report.ttft_s for report in sources["full prefill"][length])
        for kind in KINDS:
            reports = sources[kind][length]
            times = [report.ttft_s for report in reports]
            rows.append(
                (
                    f"{length} tokens, {kind}",
                    median(times) * 1000,
                    quantile(times, 0.95) * 1000,
                    median(times) / full,
                    median(report.charged for report in reports)
                    / median(report.charged for report in sources["full prefill"][length]),
                    median(report.load_s for report in reports) * 1000,
                )
            )
    data = {
        kind: {
            str(length): [
                {
                    "ttft_s": r.ttft_s,
                    "load_s": r.load_s,
                    "charged": r.charged,
                    "prompt": r.prompt.total,
                    "disk": r.prompt.disk,
                }
                for r in reports
            ]
            for length, reports in by_length.items()
        }
        for kind, by_length in sources.items()
    }
    series = {
        kind: [(float(length), median(r.ttft_s for r in reports) * 1000) for length, reports in by_length.items()]
        for kind, by_length in sources.items()
    }
    return Result(
        name="latency",
        seed=options.seed,
        n=options.repeats,
        columns=("memory", "TTFT p50 ms", "p95 ms", "of full prefill", "charged of full", "load ms"),
        rows=rows,
        data=data,
        charts=(Chart("Time to first token", "memory tokens", "ms", series),),
    )
