"""`python -m bench.gpu.kernels`: every kernel against the floor of its bytes or operations, and against torch.

Rows are written as they come, so a run that is cut short keeps what it has measured. Without a GPU every row is there
and empty: a figure is measured or absent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.gpu import cases, measure

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("kernel", "shape", "median", "GB/s or TFLOP/s", "of peak", "torch", "target", "met")


def row(case: cases.Case, peaks: measure.Peaks | None) -> dict[str, Any]:
    """One measurement, all figures None without a GPU."""
    found: dict[str, Any] = {"part": case.part, "kernel": case.name, "shape": case.shape, "target": target(case)}
    found |= dict.fromkeys(("seconds", "low", "high", "rate", "share", "rival_seconds", "error"))
    if peaks is None:
        return found
    torch.manual_seed(0)
    try:
        seconds = measure.timed(case.make())
        found |= {"seconds": seconds.median, "low": seconds.low, "high": seconds.high}
        found["rate"] = (case.flops or case.bytes) / seconds.median
        found["share"] = found["rate"] / (peaks.matmul if case.flops else peaks.copy)
        torch.cuda.empty_cache()
        if case.rival is not None:
            found["rival_seconds"] = measure.timed(case.rival()).median
    except RuntimeError as error:
        found["error"] = str(error).splitlines()[0][:200]
    torch.cuda.empty_cache()
    return found


def target(case: cases.Case) -> str:
    if case.least_share is not None:
        return f">= {case.least_share:.0%} of the copy peak"
    if case.least_tflops is not None:
        return f">= {case.least_tflops:.0f} TFLOP/s"
    return f"<= {case.within[0]} x {case.within[1]} per FLOP" if case.within is not None else ""


def met(case: cases.Case, found: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bool | None:
    """Whether the target is reached; None where there is none, or no figure."""
    if found["rate"] is None:
        return None
    if case.least_share is not None:
        return bool(found["share"] >= case.least_share)
    if case.least_tflops is not None:
        return bool(found["rate"] >= case.least_tflops * 1e12)
    if case.within is None:
        return None
    other = next((other for other in rows if other["kernel"] == case.within[1] and other["rate"]), None)
    return None if other is None else bool(other["rate"] / found["rate"] <= case.within[0])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; a dash stands for what was not measured."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for found in rows:
        flops = found["part"] == "attention" and found["flops"]
        unit = (1e12, "TFLOP/s") if flops else (1e9, "GB/s")
        cells = [
            found["kernel"],
            found["shape"],
            _cell(found["seconds"], lambda value: f"{value * 1e6:.1f} us"),
            _cell(found["rate"], lambda value, unit=unit: f"{value / unit[0]:.0f} {unit[1]}"),
            _cell(found["share"], lambda value: f"{value:.0%}"),
            _cell(found["rival_seconds"], lambda value: f"{value * 1e6:.1f} us"),
            found["target"] or "-",
            _cell(found["met"], lambda value: "yes" if value else "no"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def said(machine: dict[str, str | None]) -> str:
    """What stands over a table."""
    if machine["gpu"] is None:
        return "No GPU was at hand: nothing below is measured."
    return ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)


def _cell(value: Any, shown: Any) -> str:
    return "-" if value is None else str(shown(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("rowwise", "attention"), help="one part only; both by default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    machine = measure.machine()
    peaks = measure.peaks() if machine["gpu"] else None
    if peaks is None:
        print(said(machine))
    for part in ("rowwise", "attention") if chosen.part is None else (chosen.part,):
        listed = [case for case in (*cases.rowwise(8192), *cases.attention()) if case.part == part]
        rows: list[dict[str, Any]] = []
        for case in listed:
            found = row(case, peaks) | {"flops": bool(case.flops)}
            found["met"] = met(case, found, rows)
            rows.append(found)
            print(json.dumps(found), flush=True)
            head = {"machine": machine, "peaks": None if peaks is None else asdict(peaks), "seed": 0}
            (chosen.out / f"kernels-{part}.json").write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
        (chosen.out / f"kernels-{part}.md").write_text(f"{said(machine)}\n\n{table(rows)}\n")
        print(table(rows))


if __name__ == "__main__":
    main()
