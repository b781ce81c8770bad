"""Both clients against the real server: every method, and what they have to agree on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from amem import Amem, AmemError, AsyncAmem
from amem.child import ServerChild

ODD_NAMES = ["..", ".", "a/b", "a b", "%2e%2e", "ünï", "😀", "?user=x", "a&b=c", "#"]
FACTS = ["Dora lives in Lima.", "Dora works at Nokia.", "Dora plays the harp."]


async def settle(value: Any) -> Any:
    return await value if isinstance(value, Awaitable) else value


async def tour(client: Any, user: str) -> None:
    """Every method once, on either client."""
    assert (await settle(client.health()))["status"] == "ok"
    assert {item["id"] for item in await settle(client.models())} >= {"amem"}
    added = await settle(client.remember(user, FACTS, keys=["home", None, None]))
    ids = [item["id"] for item in added]
    assert [item["text"] for item in await settle(client.list(user))] == FACTS
    page = await settle(client.list(user, limit=2))
    rest = await settle(client.list(user, limit=2, after=page.next))
    assert ([item["id"] for item in [*page, *rest]], rest.next) == (ids, None)
    memory = await settle(client.get(user, ids[1]))
    changed = await settle(client.update(user, ids[1], "Dora works at Fiat.", version=memory["version"]))
    assert changed["text"] == "Dora works at Fiat."
    with pytest.raises(AmemError) as caught:
        await settle(client.update(user, ids[1], "Dora works at Opel.", version=memory["version"]))
    assert caught.value.status == 409
    found = await settle(client.recall(user, "Where does Dora live?", k=1, explain=True))
    assert [item["text"] for item in found] == [FACTS[0]]
    session = await settle(client.start_session(user))
    answer = await settle(client.ask_full(user, "Where does Dora live?", session=session, max_tokens=4))
    assert answer.session == session
    assert sum(answer.report["tokens"].values()) == answer.usage["prompt_tokens"]
    assert set((await settle(client.session(user, session)))["memories"]) <= set(ids)
    await settle(client.end_session(user, session))
    with pytest.raises(AmemError) as caught:
        await settle(client.session(user, session))
    assert caught.value.status == 404
    assert user in {item["user"] for item in await settle(client.users())}
    assert (await settle(client.stats()))["server"]["memories_added"] >= 3
    assert sorted((await settle(client.forget(user, ids[:2])))["forgotten"]) == sorted(ids[:2])
    assert (await settle(client.forget_all(user)))["forgotten"] == [ids[2]]
    assert await settle(client.list(user)) == []


def test_every_method_of_the_blocking_client(running_server: ServerChild) -> None:
    with Amem(running_server.url) as client:
        asyncio.run(tour(client, "live blocking"))


def test_every_method_of_the_asyncio_client(running_server: ServerChild) -> None:
    async def run() -> None:
        async with AsyncAmem(running_server.url) as client:
            await tour(client, "live asyncio")

    asyncio.run(run())


def test_odd_names_are_names(running_server: ServerChild) -> None:
    client = Amem(running_server.url)
    for name in ODD_NAMES:
        client.remember(name, f"This is for {name!r}.")
    for name in ODD_NAMES:
        (memory,) = client.list(name)
        assert memory["text"] == f"This is for {name!r}."
        session = client.start_session(name, session="../" + name)
        assert client.session(name, session)["user"] == name
        client.end_session(name, session)
        client.forget(name, memory["id"])
        assert client.list(name) == []


def test_a_stream_says_what_the_whole_answer_says(running_server: ServerChild) -> None:
    client = Amem(running_server.url)
    client.remember("live stream", FACTS)
    question = ("live stream", "Where does Dora live?")
    whole = client.ask_full(*question, max_tokens=8)
    stream = client.ask_stream(*question, max_tokens=8)
    assert "".join(stream) == whole.text
    assert stream.answer.finish_reason == whole.finish_reason
    assert sum(stream.answer.report["tokens"].values()) == stream.answer.usage["prompt_tokens"]

    async def pieces() -> str:
        async with AsyncAmem(running_server.url) as other:
            return "".join([piece async for piece in other.ask_stream(*question, max_tokens=8)])

    assert asyncio.run(pieces()) == whole.text


def test_a_write_that_is_sent_twice_counts_once(running_server: ServerChild) -> None:
    client = Amem(running_server.url)
    first = client.remember("live twice", "Only once.", idempotency_key="the same")
    again = client.remember("live twice", "Only once.", idempotency_key="the same")
    assert first == again
    (memory,) = client.list("live twice")
    assert memory["seen"] == 1


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_closing_a_stream_ends_the_request(running_server: ServerChild) -> None:
    client = Amem(running_server.url)
    stream = client.ask_stream(None, "Say something long.", max_tokens=4000, temperature=1.0, seed=1)
    stream.close()
    until(lambda: client.stats()["engine"]["requests_running"] == 0)
    assert client.stats()["server"]["active_requests"] == 0


def test_threads_ask_at_once(running_server: ServerChild) -> None:
    client = Amem(running_server.url)
    client.remember("live threads", FACTS)
    answers: list[str] = []
    asked = [threading.Thread(target=lambda: answers.append(ask(client))) for _ in range(6)]
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join(60)
    assert len(answers) == 6
    assert len(set(answers)) == 1


def ask(client: Amem) -> str:
    return client.ask("live threads", "Where does Dora live?", max_tokens=4, fidelity="exact")
