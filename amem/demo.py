"""`amem demo`: remember, ask, ask again, restart, forget, on a server and a data directory of its own.

Every figure is what the server reported for the request or what this process clocked around it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from amem.child import ServerChild
from amem.cli.console import Failure, explain, print_json, print_line
from amem.client import Amem, AmemError, Answer
from amem.residue import Samples

USER = "alice"
FACTS = ("Alice lives in Seattle and works at Boeing.", "Alice's sister Maria lives in Denver.")
SISTER = "Where does Alice's sister live?"
COMPANY = "What company does Alice work for?"
KV_SECONDS = 30.0


@dataclass(frozen=True)
class Step:
    """One thing that the demo did. seconds: wall clock. tokens: prompt tokens by source, for a question."""

    name: str
    seconds: float
    detail: str
    tokens: dict[str, int] = field(default_factory=dict)


def run(as_json: bool) -> None:
    """Run every step, print each as it ends. Raises Failure when a step does not do what it is there to show."""
    steps: list[Step] = []

    def done(step: Step) -> None:
        steps.append(step)
        if not as_json:
            print_line(_line(step))

    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="amem-demo-") as directory:
        server = ServerChild(Path(directory) / "data")
        working = _spinner(as_json)
        try:
            with working("start"):
                server.start()
            _Demo(server, done, working).play(time.perf_counter() - began)
        except AmemError as error:
            raise explain(error, str(server.ready.get("url"))) from error
        finally:
            server.close()
    total = time.perf_counter() - began
    if as_json:
        print_json({"model": server.ready, "steps": [asdict(step) for step in steps], "seconds": total})
        return
    print_line(f"\nall of it in {total:.1f} s.  Next:  amem kv-serve")


class _Demo:
    def __init__(self, server: ServerChild, done: Callable[[Step], None], working: Callable[[str], Working]) -> None:
        self._server, self._done, self._working = server, done, working
        self._client = Amem(server.url)

    def play(self, start_seconds: float) -> None:
        ready = self._server.ready
        self._done(Step("start", start_seconds, f"{ready['model']}, {ready['dtype']} on {ready['device']}"))
        self._remember()
        session = self._client.start_session(USER)
        self._ask("ask, first", SISTER, session)
        self._ask("ask, same session", COMPANY, session)
        self._restart()
        self._ask("ask, after a restart", SISTER, self._client.start_session(USER))
        self._forget()
        self._ask("ask, forgotten", SISTER, self._client.start_session(USER))

    def _remember(self) -> None:
        began = time.perf_counter()
        added = self._client.remember(USER, FACTS)
        self._done(Step("remember", time.perf_counter() - began, f"{len(added)} memories, durable"))

    def _ask(self, name: str, question: str, session: str) -> Answer:
        began = time.perf_counter()
        with self._working(name):
            answer = self._client.ask_full(USER, question, session=session, max_tokens=32)
        seconds = time.perf_counter() - began
        self._done(Step(name, seconds, f"{question}  {answer.text.strip()}", answer.report["tokens"]))
        return answer

    def _restart(self) -> None:
        began = time.perf_counter()
        with self._working("restart"):
            self._await_kv()
            self._server.stop()
            self._server.start()
            self._client.close()
            self._client = Amem(self._server.url)
        self._done(Step("restart", time.perf_counter() - began, "the engine is new, the KV is on disk"))

    def _forget(self) -> None:
        samples = Samples.of(self._server.data_dir / "kv")
        if not samples.blocks:
            raise Failure("there is no KV on disk to forget", "the demo cannot show what it is there to show")
        began = time.perf_counter()
        receipt = self._client.forget_all(USER)
        seconds = time.perf_counter() - began
        left = len(self._client.list(USER)), len(self._client.recall(USER, SISTER))
        found = samples.found_in(self._server.data_dir)
        if any(left) or found:
            raise Failure("something was left after forgetting", f"{left} memories, {found} blocks of KV")
        what = f"{len(FACTS)} memories and {receipt['kv']['chunks']} chunks of KV"
        detail = f"{what}; of {len(samples.blocks)} sampled blocks none is left"
        self._done(Step("forget", seconds, detail))

    def _await_kv(self) -> None:
        """Until the KV of every memory is stored; it is computed after `remember` is acknowledged."""
        until = time.monotonic() + KV_SECONDS
        while not self._kv_on_disk():
            if time.monotonic() > until:
                raise Failure("the KV was not computed in time", f"waited {KV_SECONDS:.0f} s")
            time.sleep(0.05)

    def _kv_on_disk(self) -> bool:
        engine = self._client.stats()["engine"]
        return bool(engine and engine["store_chunks"] >= len(FACTS) and not engine["store_pending"])


Working = AbstractContextManager[object]


def _spinner(as_json: bool) -> Callable[[str], Working]:
    """What shows that something is going on: a spinner on a terminal, nothing otherwise."""
    if as_json or not sys.stdout.isatty():
        return lambda _: nullcontext()
    from rich.console import Console

    return lambda name: Console().status(name)


def _line(step: Step) -> str:
    tokens = "  ".join(f"{name} {count}" for name, count in step.tokens.items() if count)
    return f"{step.name:<22}{step.seconds:>7.2f} s   {step.detail}" + (f"\n{'':34}tokens: {tokens}" if tokens else "")
