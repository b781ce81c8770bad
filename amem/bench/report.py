"""Results of a bench: machine and versions beside the figures, as JSON, as a table, as a chart."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

PACKAGES = ("atelya", "torch", "transformers", "numpy", "triton")


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over one x axis; `series` maps a label to (x, y) points."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, list[tuple[float, float]]]
    log_y: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """One bench run. `rows` make the table; `data` is everything that was measured."""

    name: str
    seed: int
    n: int
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    data: dict[str, Any]
    targets: list[dict[str, Any]] = field(default_factory=list)
    charts: tuple[Chart, ...] = ()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def write(result: Result, out: Path, model: dict[str, Any]) -> list[Path]:
    """`<out>/<name>.json` and one PNG a chart (when matplotlib is installed). Returns what was written."""
    out.mkdir(parents=True, exist_ok=True)
    body = asdict(result) | {
        "machine": machine(),
        "model": model,
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    body.pop("charts")
    path = out / f"{result.name}.json"
    path.write_text(json.dumps(body, indent=1, default=str) + "\n", "utf-8")
    written = [path]
    for number, chart in enumerate(result.charts):
        suffix = f"-{number + 1}" if len(result.charts) > 1 else ""
        written += _draw(chart, out / f"{result.name}{suffix}.png")
    return written


def show(result: Result, console: Console) -> None:
    """The table, and each target with what was measured."""
    table = Table(title=f"{result.name} (n = {result.n}, seed {result.seed})")
    for column in result.columns:
        table.add_column(column, justify="left" if column in ("regime", "side", "memory", "policy") else "right")
    for row in result.rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)
    for target in result.targets:
        verdict = "met" if target["met"] else "MISSED"
        console.print(f"  {verdict}: {target['name']}: {_cell(target['measured'])} (target {target['target']})")


def target(name: str, measured: float, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    """A target row; exactly one of `least` and `most` is the bound."""
    bound = f"≥ {least:g}" if least is not None else f"≤ {most:g}"
    met = measured >= least if least is not None else measured <= (most if most is not None else float("inf"))
    return {"name": name, "target": bound, "measured": measured, "met": bool(met)}


def progress(console: Console) -> Progress:
    """A bar on standard error, for anything that takes longer than a breath."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile by linear interpolation. Raises ValueError on no values."""
    if not values:
        raise ValueError("a quantile of nothing")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _draw(chart: Chart, path: Path) -> list[Path]:
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for label, points in chart.series.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=label)
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    if chart.log_y:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return [path]
