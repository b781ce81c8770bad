"""`python -m amem.bench cost|fidelity|latency|all`: run, print a table, write JSON and a chart."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from amem.bench import cost, fidelity, latency, report
from amem.bench.harness import Harness
from amem.engine.config import ConfigError, EngineConfig
from amem.engine.types import BlendOptions, Fidelity

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

BUNDLED = Path(__file__).parent.parent / "models" / "demo"

Model = Annotated[Path, typer.Option(help="Directory of a Hugging Face checkpoint.")]
Out = Annotated[Path, typer.Option(help="Where JSON and charts go.")]
Seed = Annotated[int, typer.Option(help="Seed of memories, questions and order.")]
Level = Annotated[Fidelity, typer.Option("--fidelity", help="The fidelity that amem answers with.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]


@app.command("cost")
def run_cost(
    model: Model = BUNDLED,
    out: Out = Path("bench-results"),
    seed: Seed = 0,
    memory_tokens: Annotated[int, typer.Option(min=64, help="Memory tokens in every prompt, at least.")] = 2048,
    questions: Annotated[int, typer.Option(min=1)] = 30,
    level: Level = Fidelity.BALANCED,
    as_json: Json = False,
) -> None:
    """Prefill a question: re-prefilling, exact prefix caching, amem; stable session and changing set."""
    options = cost.CostOptions(memory_tokens, questions, seed, BlendOptions(level))
    total = questions * len(cost.SIDES) * len(cost.REGIMES)

    def measure(config: EngineConfig, tick: Callable[[], None]) -> report.Result:
        harness = Harness(config)
        try:
            return cost.run(harness, options, tick)
        finally:
            harness.close()

    _bench(model, out, as_json, total, measure)


@app.command("fidelity")
def run_fidelity(
    model: Model = BUNDLED,
    out: Out = Path("bench-results"),
    seed: Seed = 0,
    n: Annotated[int, typer.Option("--n", min=1, help="Questions of each task.")] = 50,
    as_json: Json = False,
) -> None:
    """Agreement with full prefill, KL and accuracy at several ratios and for pure reuse."""
    options = fidelity.FidelityOptions(n, seed)
    total = n * len(options.tasks) * (1 + len(fidelity.settings(options)))

    def measure(config: EngineConfig, tick: Callable[[], None]) -> report.Result:
        harness = Harness(config)
        try:
            return fidelity.run(harness, options, tick)
        finally:
            harness.close()

    _bench(model, out, as_json, total, measure)


@app.command("latency")
def run_latency(
    model: Model = BUNDLED,
    out: Out = Path("bench-results"),
    seed: Seed = 0,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    level: Level = Fidelity.BALANCED,
    as_json: Json = False,
) -> None:
    """Time to first token against memory length: cold, from RAM, from disk, warm."""
    options = latency.LatencyOptions(repeats=repeats, seed=seed, blend=BlendOptions(level))
    total = 2 * repeats * len(options.lengths)
    _bench(model, out, as_json, total, lambda config, tick: latency.run(config, options, tick))


@app.command("all")
def run_all(model: Model = BUNDLED, out: Out = Path("bench-results"), seed: Seed = 0) -> None:
    """cost, fidelity and latency with their defaults."""
    run_cost(model, out, seed)
    run_fidelity(model, out, seed)
    run_latency(model, out, seed)


def _bench(
    model: Path,
    out: Path,
    as_json: bool,
    total: int,
    measure: Callable[[EngineConfig, Callable[[], None]], report.Result],
) -> None:
    errors = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="amem-bench-") as scratch:
        try:
            config = EngineConfig(model=str(model), kv_dir=scratch)
            with report.progress(errors) as bar:
                task = bar.add_task("measuring", total=total)
                result = measure(config, lambda: bar.advance(task))
        except ConfigError as error:
            errors.print(f"amem bench: {error}", style="red", highlight=False)
            raise typer.Exit(1) from error
    written = report.write(result, out, {"path": model.name})
    if as_json:
        typer.echo(json.dumps({k: v for k, v in asdict(result).items() if k != "charts"}, default=str))
    else:
        report.show(result, Console())
        errors.print("wrote " + ", ".join(str(path) for path in written), highlight=False)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
