"""`amem proxy`: memories in front of somebody else's server."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amem import __version__
from amem.cli.console import print_json, print_line
from amem.cli.serve import default_data_dir, explained

if TYPE_CHECKING:
    from amem.server.proxy import ProxyConfig


def register(app: typer.Typer) -> None:
    app.command("proxy", rich_help_panel="Serve")(proxy)


def proxy(
    upstream: Annotated[str, typer.Option(envvar="AMEM_UPSTREAM", help="OpenAI-compatible base URL, with its /v1.")],
    host: Annotated[str, typer.Option(help="Address to bind; needs a key unless loopback.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8100,
    api_key: Annotated[str | None, typer.Option(envvar="AMEM_API_KEY", help="Asked for in X-Amem-Key.")] = None,
    data_dir: Annotated[Path | None, typer.Option(envvar="AMEM_DATA_DIR", help="Where memories lie.")] = None,
    memories: Annotated[int, typer.Option(min=0, max=64, help="Recalled for a question, at most.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Their length in all, at most.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line when ready.")] = False,
) -> None:
    """Put memories into chats with another server; answers pass through untouched.

    amem proxy --upstream http://localhost:11434/v1
    """
    where = (data_dir or default_data_dir()).expanduser().absolute()
    with explained():
        from amem.server.proxy import ProxyConfig, run
        from amem.server.proxy_turns import Remembering

        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        remembering = Remembering(memories, tokens)
        config = ProxyConfig(upstream, where, host, port, api_key, remembering)

        def ready(url: str) -> None:
            if as_json:
                print_json({"url": url, "upstream": upstream, "data_dir": str(where), "pid": os.getpid()})
            else:
                print_line(banner(url, config))
            sys.stdout.flush()

        asyncio.run(run(config, ready))


def banner(url: str, config: ProxyConfig) -> str:
    """Where it listens, what it talks to, and what to set."""
    auth = "on, by X-Amem-Key" if config.api_key else "off, this machine only"
    return "\n".join(
        [
            f"amem {__version__} proxy ready",
            f"  OpenAI    {url}/v1 -> {config.upstream}   auth {auth}",
            f"  data      {config.data_dir}",
            f'  try       OPENAI_BASE_URL={url}/v1, and name the user: user="alice"',
            f'            amem remember -u alice "Alice lives in Seattle." --url {url}',
        ]
    )
