"""The command line. What a command needs is imported when it runs, so that the others start at once."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from amem import __version__
from amem.cli import proxy, remote, serve
from amem.cli.console import Failure, print_failure, print_json, print_line

app = typer.Typer(
    help="Agent memory kept in the model's KV cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command of this process. Exits 0 on success, 1 on failure, 2 on misuse."""
    try:
        app()
    except Failure as failure:
        print_failure(failure, "--json" in sys.argv)
        sys.exit(failure.status)


serve.register(app)
proxy.register(app)
remote.register(app)


@app.command(rich_help_panel="Measure")
def demo(as_json: remote.AsJson = False) -> None:
    """Remember, ask, restart, forget: the whole of amem in half a minute, with its measurements."""
    serve.need_engine("amem demo")
    from amem.demo import run

    run(as_json)


@app.command(
    rich_help_panel="Measure",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Measure this machine: `amem bench --help` lists the benches."""
    serve.need_engine("amem bench")
    os.execv(sys.executable, [sys.executable, "-m", "amem.bench", *context.args])


@app.command(rich_help_panel="Operate")
def version(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show the version."""
    found = {"amem": __version__, "python": ".".join(map(str, sys.version_info[:3])), "platform": sys.platform}
    print_json(found) if as_json else print_line(f"amem {__version__}")
