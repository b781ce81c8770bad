"""The engine in its own process: answers, aborts, deaths, restarts, a clean end. Real processes and sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from amem.engine.client import EngineClient, EngineState
from amem.engine.config import EngineConfig
from amem.engine.launch import EngineLaunch
from amem.engine.messages import Finished, FrameReader, Generate, Tokens, encode
from amem.engine.pending import Pending
from amem.engine.types import (
    ChunkSpec,
    EngineError,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    Segment,
    Tenant,
)

TENANT = Tenant(b"a" * 16, b"x" * 32)
HEAD = (3, 4, 5)
CHUNK = ChunkSpec((10, 11, 12, 13, 14, 15, 16, 17), HEAD, 3, "m1")
PROMPT = (Segment(HEAD), Segment(CHUNK.token_ids, CHUNK), Segment((20, 21, 22)))

Found = TypeVar("Found")
Run = Callable[[Awaitable[Found]], Found]


def launch(checkpoint: Path, **options: Any) -> EngineLaunch:
    fields = {"num_pages": 64, "page_size": 8, "ram_bytes": 16 << 20, **options}
    return EngineLaunch(EngineConfig(model=str(checkpoint), **fields), backoff_s=0.1, stop_timeout_s=20)


def request(name: str, count: int = 6, segments: tuple[Segment, ...] = PROMPT) -> GenerateRequest:
    return GenerateRequest(name, TENANT, segments, SamplingParams(max_tokens=count, ignore_eos=True))


async def ask(client: EngineClient, name: str, **fields: Any) -> tuple[list[int], Finished]:
    tokens: list[int] = []
    async for message in client.generate(request(name, **fields)):
        if isinstance(message, Finished):
            return tokens, message
        tokens += message.token_ids
    raise AssertionError("no end")


@asynccontextmanager
async def started(how: EngineLaunch) -> AsyncIterator[EngineClient]:
    client = EngineClient(how)
    try:
        await client.start()
        yield client
    finally:
        await client.close()


async def until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true in time"
        await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def run() -> Iterator[Run[Any]]:
    loop = asyncio.new_event_loop()
    yield lambda work: loop.run_until_complete(asyncio.wait_for(work, 270))
    loop.close()


@pytest.fixture(scope="module")
def client(checkpoint: Path, run: Run[Any]) -> Iterator[EngineClient]:
    """One engine process for the tests that do not harm it."""
    seen: list[tuple[int, int]] = []
    client = EngineClient(launch(checkpoint))
    model = run(client.start(lambda done, total: seen.append((done, total))))
    assert model.name == checkpoint.name
    assert client.model is model
    assert seen
    assert all(0 < done <= total for done, total in seen)
    yield client
    run(client.close())


def test_the_http_side_imports_no_torch() -> None:
    code = "import sys, amem.engine.client, amem.engine.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_answers_come_as_they_would_in_process(client: EngineClient, run: Run[Any]) -> None:
    assert client.state is EngineState.READY
    tokens, end = run(ask(client, "a"))
    assert len(tokens) == end.report.completion_tokens == 6
    assert end.reason is FinishReason.LENGTH
    assert end.report.prompt.total == 14

    async def many() -> list[tuple[list[int], Finished]]:
        return await asyncio.gather(*(ask(client, f"b{number}") for number in range(6)))

    assert all(found == tokens for found, _ in run(many()))


def test_jobs_are_answered(client: EngineClient, run: Run[Any]) -> None:
    written = run(client.write_chunks(TENANT, (CHUNK,)))
    assert written.written + written.present == 1
    assert run(client.stats())["requests"] > 0
    assert run(client.forget(TENANT, ("m1",))).chunks == 1
    assert run(client.forget(TENANT, ("m1",))).chunks == 0


def test_closing_the_iterator_aborts(client: EngineClient, run: Run[Any]) -> None:
    async def leave() -> None:
        answer = client.generate(request("leaver", 400))
        assert isinstance(await anext(answer), Tokens)
        await answer.aclose()
        for _ in range(200):
            stats = await client.stats()
            if not stats["requests_running"] and stats["pages_free"] == stats["pages"]:
                return
            await asyncio.sleep(0.02)
        raise AssertionError("the abandoned request still holds pages")

    run(leave())


def test_an_abort_still_brings_the_report(client: EngineClient, run: Run[Any]) -> None:
    async def stop() -> Finished:
        async for message in client.generate(request("stopped", 400)):
            if isinstance(message, Finished):
                return message
            client.abort("stopped")
        raise AssertionError("no end")

    end = run(stop())
    assert end.reason is FinishReason.ABORT
    assert 0 < end.report.completion_tokens < 400


def test_a_bad_request_raises_and_its_id_is_free_again(client: EngineClient, run: Run[Any]) -> None:
    async def bad() -> None:
        async for _ in client.generate(GenerateRequest("x", None, (Segment((99999,)),))):
            raise AssertionError("an answer to a bad request")

    with pytest.raises(EngineError) as error:
        run(bad())
    assert error.value.code == "invalid_request"
    run(ask(client, "x"))


def test_kill_restarts_and_serves(checkpoint: Path, tmp_path: Path, run: Run[Any]) -> None:
    async def story(client: EngineClient) -> None:
        assert (await client.write_chunks(TENANT, (CHUNK,))).written == 1
        before, _ = await ask(client, "before")
        begun = client.generate(request("begun", 450))
        assert isinstance(await anext(begun), Tokens)
        os.kill(client.pid or 0, signal.SIGSTOP)  # so that the next ones cannot be answered by this engine
        reader = asyncio.create_task(ask(client, "reader"))
        other = asyncio.create_task(ask(client, "other", segments=(Segment(HEAD), Segment((30, 31)))))
        forgotten = asyncio.create_task(client.forget(TENANT, ("m1",)))
        stats = asyncio.create_task(client.stats())
        await asyncio.sleep(0.1)
        os.kill(client.pid or 0, signal.SIGKILL)
        with pytest.raises(EngineError) as lost:
            async for _ in begun:
                pass
        assert lost.value.code == "engine_lost"
        with pytest.raises(EngineError) as down:
            await stats
        assert down.value.code == "unavailable"
        assert client.state is EngineState.RESTARTING
        assert "signal 9" in (client.reason or "")
        with pytest.raises(EngineError) as refused:
            await ask(client, "while down")
        assert refused.value.code == "unavailable"
        assert len((await other)[0]) == 6
        with pytest.raises(EngineError) as gone:
            await reader
        assert gone.value.code == "memory_forgotten"
        assert (await forgotten).chunks in (0, 1)  # on disk already, or lost with the process
        assert client.restarts == 1
        tokens, end = await ask(client, "after")
        assert tokens == before
        assert end.report.prompt.disk == end.report.prompt.cpu == 0

    async def whole() -> None:
        async with started(launch(checkpoint, kv_dir=str(tmp_path / "kv"))) as client:
            await story(client)
            await client.close()
            assert client.state is EngineState.STOPPED
            with pytest.raises(EngineError):
                await client.forget(TENANT, None)

    run(whole())


def test_an_engine_that_cannot_start_says_why(tmp_path: Path, run: Run[Any]) -> None:
    async def story() -> None:
        client = EngineClient(launch(tmp_path / "nothing"))
        with pytest.raises(EngineError, match=r"config\.json") as error:
            await client.start()
        assert error.value.code == "start_failed"
        assert client.state is EngineState.FAILED
        await client.close()

    run(story())


def test_a_hung_engine_is_replaced(checkpoint: Path, run: Run[Any]) -> None:
    async def story() -> None:
        async with started(replace(launch(checkpoint), hang_s=6)) as client:
            first = client.pid or 0
            os.kill(first, signal.SIGSTOP)
            await until(lambda: client.restarts == 1)
            assert "no progress" in (client.reason or "")
            await until(lambda: client.state is EngineState.READY)
            assert client.pid != first
            await ask(client, "after")

    run(story())


HANGING = """
import threading
from amem.engine.runner import Runner
real = Runner.forward
def forward(self, batch):
    if any(77 in sequence.token_ids for sequence in batch.sequences):
        threading.Event().wait()
    return real(self, batch)
Runner.forward = forward
"""


def test_an_engine_that_hangs_in_its_first_step_after_a_rest_is_replaced(
    checkpoint: Path, tmp_path: Path, run: Run[Any]
) -> None:
    """It still beats, so only the step that does not end tells."""
    (tmp_path / "sitecustomize.py").write_text(HANGING)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])

    async def story() -> None:
        how = replace(launch(checkpoint), hang_s=5, environment={"PYTHONPATH": path})
        async with started(how) as client:
            await ask(client, "before")
            await asyncio.sleep(2.5)
            asked = asyncio.ensure_future(ask(client, "hangs", segments=(Segment((5, 77)),)))
            await until(lambda: client.restarts == 1, 60)
            assert "no progress" in (client.reason or "")
            asked.cancel()

    run(story())


def test_what_cannot_be_sent_is_refused_and_forgotten(client: EngineClient, run: Run[Any]) -> None:
    bad = replace(request("wide"), sampling=SamplingParams(seed=2**70))

    async def story() -> None:
        for _ in range(2):
            with pytest.raises(EngineError) as caught:
                await client.generate(bad).__anext__()
            assert caught.value.code == "invalid_request"
        with pytest.raises(EngineError):
            await client.write_chunks(TENANT, (replace(CHUNK, token_ids=(2**40,)),))
        await ask(client, "wide")

    run(story())


def test_what_cannot_be_sent_does_not_keep_a_new_engine_from_the_rest() -> None:
    pending = Pending()
    bad = pending.open_stream(replace(request("bad"), sampling=SamplingParams(seed=2**70)))
    good = pending.open_stream(request("good"))
    sent: list[bytes] = []
    pending.resend(lambda message: sent.append(encode(message)))
    assert FrameReader().feed(b"".join(sent)) == [Generate(good.request)]
    assert isinstance(bad.queue.get_nowait(), EngineError)
    assert list(pending.streams) == ["good"]


def test_the_engine_ends_with_its_parent(checkpoint: Path) -> None:
    code = (
        "import asyncio, sys\n"
        "from amem.engine.client import EngineClient\n"
        "from amem.engine.config import EngineConfig\n"
        "from amem.engine.launch import EngineLaunch\n"
        "async def main():\n"
        "    client = EngineClient(EngineLaunch(EngineConfig(sys.argv[1], num_pages=8)))\n"
        "    await client.start()\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(checkpoint)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.kill()
    end = time.monotonic() + 30
    while _alive(child):
        assert time.monotonic() < end, "the engine outlived its parent"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
