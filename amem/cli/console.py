"""What the command line prints: plain when piped, JSON on request, errors as what, why and fix."""

from __future__ import annotations

import json
import shlex
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from amem.client import AmemError

FAILED = 1
MISUSED = 2


class Failure(Exception):
    """A command that could not do its work: what happened, why, and the command or the step that fixes it."""

    def __init__(self, what: str, why: str = "", fix: str = "", status: int = FAILED) -> None:
        super().__init__(what)
        self.what, self.why, self.fix, self.status = what, why, fix, status


def explain(error: AmemError, url: str) -> Failure:
    """The failure of a request to the server at `url`, with the way out of it."""
    detail = error.detail
    if error.code == "unreachable":
        return Failure(f"no amem server answers at {url}", detail, "start one with `amem kv-serve`, or give --url")
    if error.code == "timeout":
        return Failure(f"the server at {url} took too long", detail, "look at what it is doing: `amem stats`")
    if error.code == "not_started":
        return Failure("no server could be started", detail, "run `amem kv-serve` to see more")
    if error.status == 0:
        return Failure("the request was not sent or its answer not understood", detail, "check --url and --api-key")
    fixes = {
        401: "set AMEM_API_KEY, or give --api-key",
        403: "call the server as localhost, or set AMEM_API_KEY on both sides",
        404: "see what there is with `amem users` and `amem list`",
        413: "send less at once",
        429: "wait a little and try again",
        503: "memories can be read and written meanwhile; ask again when `amem stats` says that the engine runs",
    }
    return Failure(f"the server refused this (status {error.status})", detail, fixes.get(error.status, ""))


def print_failure(failure: Failure, as_json: bool) -> None:
    """To standard error, in three lines or as one JSON object."""
    parts = {"what": failure.what, "why": failure.why, "fix": failure.fix}
    if as_json:
        print(json.dumps({"error": parts}, ensure_ascii=False), file=sys.stderr)
        return
    labels = {"what": "error", "why": "why", "fix": "fix"}
    for name, text in parts.items():
        if text:
            print(f"{labels[name] + ':':<7}{shown(text)}", file=sys.stderr)


def print_json(value: object) -> None:
    """One line of JSON on standard output."""
    print(json.dumps(value, ensure_ascii=not _speaks_unicode(sys.stdout)))


def print_line(text: str = "") -> None:
    print(shown(text) if sys.stdout.isatty() else text)


def print_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """A table on a terminal; tab-separated lines without a header when piped."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    if not sys.stdout.isatty():
        for line in cells:
            print("\t".join(line))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for line in cells:
        table.add_row(*(Text(shown(cell)) for cell in line))
    Console().print(table)


def print_more(after: str) -> None:
    """To standard error: the list went on, and how to go on with it."""
    print(f"there are more: --after {shown(shlex.quote(after))}", file=sys.stderr)


def shown(text: str) -> str:
    """The text without what would steer a terminal: stored text may hold escape sequences."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return str(value).replace("\t", " ").replace("\n", " ")


def _speaks_unicode(stream: TextIO) -> bool:
    return (stream.encoding or "").lower().replace("-", "").startswith("utf")
