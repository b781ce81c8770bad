"""The README's quickstart as printed, through real processes and sockets, and again after a restart."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from amem import Amem
from amem.child import ServerChild

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
PRINTED = "http://localhost:8000"
SISTER, COMPANY = "Where does Alice's sister live?", "What company does Alice work for?"


def blocks(language: str) -> list[str]:
    section = README.partition("## Quickstart")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


SDK, OPENAI = blocks("python")
(SHELL,) = blocks("sh")


def promised(block: str) -> list[str]:
    """The words that, as the comments say, the answers hold which the lines of a block print."""
    return re.findall(r"^(?:print\(|amem ).*  # (\w+)$", block, re.MULTILINE)


def run(server: ServerChild, *command: str) -> list[str]:
    environment = os.environ | {
        "AMEM_URL": server.url,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [line.strip() for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerChild]:
    with ServerChild(tmp_path_factory.mktemp("quickstart") / "data") as server:
        yield server


def memory_tokens(client: Amem, session: str) -> int:
    """How long the memories of a session are, in tokens."""
    return int(client.session("alice", session)["tokens"])


def test_the_readme_promises_something() -> None:
    assert promised(SDK) == ["Denver", "Boeing"]
    assert promised(OPENAI) == ["Denver"]
    assert promised(SHELL) == ["Oslo"]


def test_the_sdk_quickstart(server: ServerChild) -> None:
    said = run(server, sys.executable, "-c", SDK)
    assert all(word in line for word, line in zip(promised(SDK), said[:2], strict=True))
    tokens = ast.literal_eval(said[2])
    assert set(tokens) == {"prefix", "gpu", "cpu", "disk", "recomputed", "fresh"}
    assert tokens["prefix"] > tokens["fresh"] > 0


def test_the_second_answer_prefills_nothing_of_the_memories(server: ServerChild) -> None:
    client = Amem(server.url)
    session = client.start_session("alice")
    first = client.ask_full("alice", SISTER, session=session)
    second = client.ask_full("alice", COMPANY, session=session)
    assert "Denver" in first.text
    assert "Boeing" in second.text
    memories = memory_tokens(client, session)
    tokens = second.report["tokens"]
    assert sum(tokens.values()) == second.usage["prompt_tokens"]
    assert tokens["prefix"] >= memories
    assert second.usage["prompt_tokens_details"]["cached_tokens"] >= memories
    assert second.report["charged"] < memories


def test_the_openai_quickstart(server: ServerChild) -> None:
    said = run(server, sys.executable, "-c", OPENAI.replace(PRINTED, server.url))
    assert len(said) == 1
    assert promised(OPENAI)[0] in said[0]


def test_the_openai_client_streams(server: ServerChild) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=server.url + "/v1", api_key="any")
    question = {"role": "user", "content": COMPANY}
    stream = client.chat.completions.create(model="amem", user="alice", messages=[question], stream=True)
    assert "Boeing" in "".join(event.choices[0].delta.content or "" for event in stream if event.choices)


def test_the_shell_quickstart(server: ServerChild) -> None:
    said = run(server, "bash", "-euc", SHELL)
    assert promised(SHELL)[0] in said[-2]
    assert said[-1].startswith("forgotten")
    assert Amem(server.url).list("bob") == []


def test_after_a_restart_the_memories_come_from_disk(server: ServerChild) -> None:
    Amem(server.url).remember("alice", "Alice's sister Maria lives in Denver.")
    wait_for_kv(Amem(server.url))
    server.stop()
    server.start()
    client = Amem(server.url)
    session = client.start_session("alice")
    answer = client.ask_full("alice", SISTER, session=session)
    tokens = answer.report["tokens"]
    assert "Denver" in answer.text
    assert tokens["disk"] > 0
    assert tokens["prefix"] == tokens["cpu"] == 0
    # loaded rows that were then corrected count as recomputed; none was prefilled
    assert tokens["disk"] + tokens["recomputed"] == memory_tokens(client, session)
    assert answer.report["recompute_ratio"] <= 0.2


def wait_for_kv(client: Amem) -> None:
    wait_until(lambda: not (client.stats()["engine"]["writes_waiting"] or client.stats()["engine"]["store_pending"]))


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
