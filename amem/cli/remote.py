"""The commands that talk to a running server through the SDK."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amem.cli.console import MISUSED, Failure, explain, print_json, print_line, print_more, print_table, shown

if TYPE_CHECKING:
    from amem.client import Amem, Answer

Url = Annotated[str, typer.Option("--url", envvar="AMEM_URL", help="Address of the server.")]
Key = Annotated[str | None, typer.Option("--api-key", envvar="AMEM_API_KEY", help="The server's key, if it has one.")]
User = Annotated[str, typer.Option("--user", "-u", help="Whose memories.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

DEFAULT_URL = "http://localhost:8000"


def register(app: typer.Typer) -> None:
    """Add the commands to the application, in the order of its help."""
    for command in (remember, recall, list_memories, forget, ask, users, stats):
        name = command.__name__.removesuffix("_memories")
        app.command(name, rich_help_panel="Operate" if command is stats else "Memory")(command)


@contextmanager
def connected(url: str, api_key: str | None) -> Iterator[Amem]:
    """The SDK; its errors leave as failures that say what to do."""
    from amem.client import Amem, AmemError

    try:
        with Amem(url, api_key) as client:
            yield client
    except AmemError as error:
        raise explain(error, url) from error


def remember(
    user: User,
    texts: Annotated[
        list[str] | None, typer.Argument(help="What to remember; standard input's lines if absent.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="The same key again supersedes the older memory.")] = None,
    conversation: Annotated[str | None, typer.Option(help="The dialogue that the texts belong to, in order.")] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Store memories, durably when this returns.

    amem remember -u alice "Alice lives in Seattle." "Alice works at Boeing."
    """
    found = texts or [line.strip() for line in _piped_input("texts") if line.strip()]
    if key is not None and len(found) != 1:
        raise Failure("--key names one memory", f"{len(found)} texts were given", "store them one by one", MISUSED)
    with connected(url, api_key) as client:
        keys = None if key is None else [key]
        added = client.remember(user, found, keys=keys, conversation=conversation)
    print_json(added) if as_json else print_table(added, ("id", "outcome"))


def recall(
    user: User,
    query: Annotated[str, typer.Argument(help="The question to find memories for.")],
    k: Annotated[int | None, typer.Option("-k", min=1, help="At most so many.")] = None,
    explained: Annotated[bool, typer.Option("--explain", help="Where each score comes from.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Find the memories that a question would get; nothing is generated.

    amem recall -u alice "Where does Alice live?" --explain
    """
    with connected(url, api_key) as client:
        found = client.recall(user, query, k=k, explain=explained)
    columns = ("score", "id", "text", "explain") if explained else ("score", "id", "text")
    print_json(found) if as_json else print_table(found, columns)


def list_memories(
    user: User,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    after: Annotated[str | None, typer.Option(help="Go on from the `next` of an earlier page.")] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show what is remembered, oldest first."""
    with connected(url, api_key) as client:
        found = client.list(user, limit=limit, after=after)
    if as_json:
        print_json({"memories": found, "next": found.next})
        return
    print_table(found, ("id", "text", "key", "seen"))
    if found.next:
        print_more(found.next)


def forget(
    user: User,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of memories.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything of the user.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Erase memories: text, index and KV.

    amem forget -u alice 4f1c…      amem forget -u alice --all --yes
    """
    if bool(ids) == everything:
        raise Failure("name ids, or --all", "one of them is needed, not both", "amem list -u " + user, MISUSED)
    if not yes:
        _confirm(f"Erase everything of {user}?" if everything else f"Erase {len(ids or [])} memories of {user}?")
    with connected(url, api_key) as client:
        receipt = client.forget_all(user) if everything else client.forget(user, ids or [])
    if as_json:
        print_json(receipt)
        return
    print_line("forgotten  " + "  ".join(f"{name} {value}" for name, value in _flat(receipt)))


def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    user: Annotated[str | None, typer.Option("--user", "-u", help="Whose memories; none without it.")] = None,
    session: Annotated[str | None, typer.Option(help="Go on with this session.")] = None,
    fidelity: Annotated[str | None, typer.Option(help="exact, high, balanced or fast.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Ask with memory.

    amem ask -u alice "Where does Alice's sister live?"
    """
    with connected(url, api_key) as client:
        options: dict[str, Any] = {"session": session, "fidelity": fidelity, "max_tokens": max_tokens}
        if as_json:
            print_json(client.ask_full(user, question, **options).raw)
            return
        stream = client.ask_stream(user, question, **options)
        for piece in stream:
            sys.stdout.write(shown(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()
        print_line()
        if sys.stderr.isatty():
            print(measured(stream.answer), file=sys.stderr)


def users(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 1000,
    after: Annotated[str | None, typer.Option(help="Go on behind this name.")] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show who has memories, by name."""
    with connected(url, api_key) as client:
        found = client.users(limit=limit, after=after)
    columns = list(found[0]) if found else []
    print_json(found) if as_json else print_table(found, columns)
    if found.next:
        print_more(found.next)


def stats(url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show what the server has measured so far."""
    with connected(url, api_key) as client:
        found = client.stats()
    rows = [{"name": name, "value": value} for name, value in _flat(found)]
    print_json(found) if as_json else print_table(rows, ("name", "value"))


def measured(answer: Answer) -> str:
    """One line about what an answer cost, from its report."""
    tokens = answer.report.get("tokens") or {}
    spent = "  ".join(f"{name} {count}" for name, count in tokens.items() if count)
    first = answer.report.get("ttft_ms")
    return f"tokens: {spent}" + ("" if first is None else f"   first token after {first:.0f} ms")


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _piped_input(name: str) -> list[str]:
    if sys.stdin.isatty():
        raise Failure(f"no {name} given", "there is no piped input either", 'amem remember -u USER "TEXT"', MISUSED)
    return sys.stdin.read().splitlines()


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise Failure("not erased", "nobody is here to confirm it", "add --yes", MISUSED)
    typer.confirm(question, abort=True)
