"""The small parts by themselves: strict JSON, field fates, gates, replays, conversations, the erasure journal."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import openai
import openai.types.chat.completion_create_params as openai_chat
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given
from hypothesis import strategies as st

from amem.engine.types import Tenant
from amem.memory.types import Batch
from amem.server.conversations import OPEN_SESSION, Openings, thread_of
from amem.server.erasures import ErasureJournal
from amem.server.errors import ApiError
from amem.server.failures import failures
from amem.server.fates import AMEM_FIELDS, ASKS_NOTHING, OPENAI_FIELDS, OTHER_FIELDS, Fate, refuse_unsupported
from amem.server.gates import Gate, Gates
from amem.server.idempotency import Once, Replays
from amem.server.stream import with_pauses
from amem.server.strict_json import MAX_DEPTH, parse
from amem.text import Message

TENANT = Tenant(bytes(16), bytes(range(32)))
API = Path(__file__).resolve().parents[2] / "docs" / "api.md"

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | FLOATS
TEXT = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]))
JSON_VALUES = st.recursive(SCALARS | TEXT, lambda v: st.lists(v) | st.dictionaries(TEXT, v), max_leaves=20)


@given(JSON_VALUES)
def test_all_strict_json_is_read_as_the_standard_library_reads_it(value: Any) -> None:
    for ascii_only in (True, False):
        assert parse(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=64))
def test_any_bytes_are_json_or_a_400(raw: bytes) -> None:
    status = 200
    try:
        parse(raw)
    except ApiError as error:
        status = error.status
    assert status in (200, 400)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused_wherever_it_stands(value: float) -> None:
    for holder in (value, [value], {"a": {"b": [1, value]}}):
        with pytest.raises(ApiError) as refused:
            parse(json.dumps(holder).encode())
        assert refused.value.code == "invalid_json"


def test_depth_is_bounded_exactly() -> None:
    deepest = MAX_DEPTH - 1
    parse(b"[" * deepest + b"1" + b"]" * deepest)
    with pytest.raises(ApiError, match="nested"):
        parse(b"[" * (deepest + 1) + b"1" + b"]" * (deepest + 1))


def test_every_field_of_openai_has_a_fate() -> None:
    documented = set(openai_chat.CompletionCreateParamsBase.__annotations__) | {"stream"}
    unknown = documented - set(OPENAI_FIELDS)
    if openai.__version__ == "3.52.0":
        assert not unknown
    for name in unknown:  # of a newer client: still refused by its name
        with pytest.raises(ApiError, match=name):
            refuse_unsupported({name: 1})
    assert set(ASKS_NOTHING) <= {name for name, fate in OPENAI_FIELDS.items() if fate is Fate.REFUSED}


def test_the_table_in_the_docs_is_the_table_in_the_code() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([a-z ]+?)(?::| \(|;| *\|)", API.read_text(), re.MULTILINE))
    fates = {name: fate.value for name, fate in (OPENAI_FIELDS | OTHER_FIELDS).items()}
    assert {name: rows.get(name) for name in fates} == fates
    for name in AMEM_FIELDS:
        assert f"`{name}`" in API.read_text()


def test_refused_fields_may_ask_for_nothing() -> None:
    for name, fate in OPENAI_FIELDS.items():
        if fate is Fate.REFUSED:
            refuse_unsupported({name: None})
            with pytest.raises(ApiError) as refused:
                refuse_unsupported({name: {"something": True}})
            assert (refused.value.code, refused.value.param) == ("unsupported_parameter", name)
    refuse_unsupported({"n": 1, "tools": [], "tool_choice": "none", "logit_bias": {}, "store": False})
    for body in ({"n": True}, {"n": 1.0}, {"store": 0}):
        with pytest.raises(ApiError):
            refuse_unsupported(body)


def test_a_gate_lets_planners_in_together_and_an_eraser_alone() -> None:
    async def scenario() -> list[str]:
        gate, log, inside = Gate(), [], 0

        async def plan(name: str, seconds: float) -> None:
            nonlocal inside
            async with gate.planning():
                inside += 1
                log.append(f"{name} in {inside}")
                await asyncio.sleep(seconds)
                inside -= 1

        async def erase() -> None:
            async with gate.erasing():
                log.append(f"erase {inside}")
                await asyncio.sleep(0.02)
                assert inside == 0

        first = [asyncio.ensure_future(plan("a", 0.03)), asyncio.ensure_future(plan("b", 0.03))]
        await asyncio.sleep(0.01)
        eraser = asyncio.ensure_future(erase())
        await asyncio.sleep(0)
        late = asyncio.ensure_future(plan("late", 0))
        await asyncio.gather(*first, eraser, late)
        return log

    assert asyncio.run(scenario()) == ["a in 1", "b in 2", "erase 0", "late in 1"]


def test_a_gate_survives_cancellation_everywhere() -> None:
    async def scenario() -> None:
        gate = Gate()

        async def hold(erasing: bool, seconds: float) -> None:
            async with gate.erasing() if erasing else gate.planning():
                await asyncio.sleep(seconds)

        for delay in range(12):
            tasks = [asyncio.ensure_future(hold(n % 2 == 0, 0.01)) for n in range(4)]
            await asyncio.sleep(delay * 0.004)
            for task in tasks[::2]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(hold(True, 0), 1)
        await asyncio.wait_for(hold(False, 0), 1)

    asyncio.run(scenario())


def test_gates_are_one_per_user_and_forgotten_when_unused() -> None:
    gates = Gates()
    held = gates.of("a")
    assert gates.of("a") is held
    assert gates.of("b") is not held
    del held
    assert not gates._gates


def test_replays() -> None:
    async def scenario() -> None:
        replays, runs = Replays(), 0
        once = Once("alice", "update", "k")

        async def effect() -> dict[str, Any]:
            nonlocal runs
            runs += 1
            await asyncio.sleep(0.01)
            if runs == 1:
                raise ApiError(503, "x", "first time fails")
            return {"run": runs}

        with pytest.raises(ApiError):
            await replays.once(once, {"a": 1}, effect)
        both = await asyncio.gather(*(replays.once(once, {"a": 1}, effect) for _ in range(5)))
        assert both == [{"run": 2}] * 5
        with pytest.raises(ApiError, match="another request"):
            await replays.once(once, {"a": 2}, effect)
        assert await replays.once(Once("bob", "update", "k"), {"a": 1}, effect) == {"run": 3}
        assert await replays.once(Once("alice", "update", None), {}, effect) == {"run": 4}
        leaving = asyncio.ensure_future(replays.once(Once("alice", "add", "left"), {}, effect))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.sleep(0.02)
        assert runs == 5  # the effect ran to its end without its client

    asyncio.run(scenario())


def test_replays_forget_texts_and_nothing_else() -> None:
    async def scenario() -> None:
        replays, runs = Replays(), 0

        async def effect() -> dict[str, Any]:
            nonlocal runs
            runs += 1
            return {"run": runs}

        writes: list[tuple[Once, dict[str, Any]]] = [
            (Once("alice", "update", "1"), {"id": "m1", "text": "a"}),
            (Once("alice", "update", "2"), {"id": "m2", "text": "b"}),
            (Once("alice", "add", "1"), {"texts": ["a"]}),
            (Once("alice", "session", "1"), {}),
            (Once("bob", "update", "1"), {"id": "m1", "text": "c"}),
        ]
        for expected, (once, request) in enumerate(writes, 1):
            assert await replays.once(once, request, effect) == {"run": expected}
        replays.forget("alice", ["m1"])
        runs = 100
        again = [await replays.once(once, request, effect) for once, request in writes]
        assert [answer["run"] for answer in again] == [101, 2, 3, 4, 5]
        replays.forget("alice", None)
        again = [await replays.once(once, request, effect) for once, request in writes]
        assert [answer["run"] for answer in again] == [102, 103, 3, 4, 5]

    asyncio.run(scenario())


def conversation(*contents: str) -> list[Message]:
    return [Message(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]


def test_a_conversation_is_known_by_its_opening() -> None:
    first = thread_of(TENANT, conversation("Q1"))
    second = thread_of(TENANT, conversation("Q1", "A1", "Q2"))
    third = thread_of(TENANT, conversation("Q1", "A1", "Q2", "A2", "Q3"))
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first.session, first.anchor) == (OPEN_SESSION, None)
    assert second.session == third.session != OPEN_SESSION
    assert first.opening == second.opening == third.opening
    assert second.anchor in third.anchors
    assert third.anchors[str(second.anchor)] == 2
    assert third.question == 4
    edited = thread_of(TENANT, conversation("Q1", "A1 edited", "Q2"))
    assert edited is not None
    assert edited.session != second.session
    branched = thread_of(TENANT, conversation("Q1", "A1", "Q2 edited", "A", "Q3"))
    assert branched is not None
    assert branched.session == second.session
    assert second.anchor not in branched.anchors


def test_the_same_question_twice_has_two_places() -> None:
    thread = thread_of(TENANT, conversation("Again?", "No.", "Again?", "No.", "Again?"))
    assert thread is not None
    assert list(thread.anchors.values()) == [0, 2, 4]
    assert thread.anchor == list(thread.anchors)[2]


def test_digests_are_secret_to_the_tenant_and_system_texts_do_not_count() -> None:
    other = Tenant(bytes(16), bytes(32))
    messages = conversation("Q1", "A1", "Q2")
    dated = [[Message("system", f"Today is day {day}."), *messages] for day in (1, 2)]
    mine = [thread_of(TENANT, each) for each in (messages, *dated)]
    theirs = thread_of(other, messages)
    assert theirs is not None
    assert len({thread.session for thread in mine if thread}) == 1
    assert mine[0] is not None
    assert mine[0].session != theirs.session
    assert not set(mine[0].anchors) & set(theirs.anchors)
    assert thread_of(TENANT, [Message("system", "x"), Message("assistant", "y")]) is None


def test_openings_are_bounded() -> None:
    openings = Openings()
    for n in range(5000):
        openings.keep("u", str(n), (Batch(None, (str(n),)),))
    assert openings.of("u", "0") is None
    assert openings.of("u", "4999") == (Batch(None, ("4999",)),)
    assert openings.of("v", "4999") is None


def test_the_erasure_journal_keeps_ids_alone(tmp_path: Path) -> None:
    journal = ErasureJournal(tmp_path / "erasures")
    assert journal.pending() == []
    one = journal.add(TENANT, ("mem-1", "mem-2"))
    every = journal.add(TENANT, None)
    again = {erasure.path: erasure for erasure in ErasureJournal(tmp_path / "erasures").pending()}
    assert again[one.path].memories == ("mem-1", "mem-2")
    assert again[every.path].memories is None
    assert {erasure.tenant.id for erasure in again.values()} == {TENANT.id}
    assert TENANT.secret.hex() not in "".join(path.read_text() for path in again)
    assert all(path.stat().st_mode & 0o077 == 0 for path in again)
    (tmp_path / "erasures" / "torn.tmp").write_text("{")  # what a kill in the middle of a write leaves
    journal.done(one)
    journal.done(one)
    assert [erasure.path for erasure in journal.pending()] == [every.path]


def test_an_unforeseen_failure_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(request: web.Request) -> web.Response:
        raise ValueError(f"the {request.query['word']} of alice in /home/alice")

    async def scenario() -> tuple[int, str]:
        app = web.Application(middlewares=[failures])
        app.add_routes([web.get("/", broken)])
        async with TestClient(TestServer(app)) as client:
            answer = await client.get("/?word=zorblax")
            return answer.status, await answer.text()

    status, text = asyncio.run(scenario())
    assert status == 500
    assert json.loads(text)["error"]["code"] == "internal_error"
    request_id = re.search(r"req_[0-9a-f]{16}", text)
    assert request_id
    assert request_id.group() in caplog.text
    assert "ValueError" in caplog.text
    assert "in broken" in caplog.text
    for told in (text, caplog.text):
        assert "zorblax" not in told


def test_pauses_of_a_source_are_told_and_leaving_closes_it() -> None:
    closed: list[str] = []

    async def source(name: str) -> AsyncGenerator[int, None]:
        try:
            for n in range(3):
                await asyncio.sleep(0.03 if n == 1 else 0)
                yield n
            if name == "failing":
                raise ValueError(name)
            await asyncio.sleep(0.03 if name == "whole" else 60)
        finally:
            closed.append(name)

    async def scenario() -> None:
        whole = [item async for item in with_pauses(source("whole"), 0.01)]
        assert [item for item in whole if item is not None] == [0, 1, 2]
        assert whole.index(1) - whole.index(0) > 1
        assert whole[-1] is None
        with pytest.raises(ValueError, match="failing"):
            [item async for item in with_pauses(source("failing"), 1)]

        async def read(name: str) -> None:
            async for _ in with_pauses(source(name), 0.01):
                pass

        reader = asyncio.ensure_future(read("cancelled"))
        await asyncio.sleep(0.1)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        for _ in range(100):
            if "cancelled" in closed:
                break
            await asyncio.sleep(0.01)

    asyncio.run(scenario())
    assert closed == ["whole", "failing", "cancelled"]
