"""A client that goes away, at any moment and in any way, leaves no page, no task and no half-done write behind."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from serverlib import ServerThread

from amem.server.config import Limits
from amem.server.stream import EventStream

HEAD = "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"


def open_request(server: ServerThread, body: dict[str, Any], path: str = "/v1/chat/completions") -> socket.socket:
    host, port = server.server.url.removeprefix("http://").split(":")
    raw = socket.create_connection((host, int(port)), timeout=30)
    data = json.dumps(body).encode()
    raw.sendall(HEAD.format(path=path, length=len(data)).encode() + data)
    return raw


def leave(raw: socket.socket, abruptly: bool) -> None:
    if abruptly:  # RST instead of FIN
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def endless(user: str, stream: bool) -> dict[str, Any]:
    """A request that would run for minutes: hot and long."""
    messages = [{"role": "user", "content": "Tell me everything about Alice."}]
    body = {"model": "amem", "user": user, "messages": messages, "max_tokens": 3000, "temperature": 2.0, "seed": 1}
    return body | {"stream": stream, "stop": ["\x01never\x01"]}


def books(server: ServerThread) -> tuple[float, ...]:
    engine = server.settled()
    return engine["pages"] - engine["pages_free"], engine["requests_running"], engine["requests_waiting"]


@pytest.mark.usefixtures("talkative")
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("abruptly", [True, False])
def test_a_client_that_leaves_frees_its_pages(server: ServerThread, user: str, stream: bool, abruptly: bool) -> None:
    server.remember(user, "Alice lives in Seattle.")
    before = books(server)
    completed = server.settled()["completion_tokens"]
    raw = open_request(server, endless(user, stream))
    if stream:
        assert b"200 OK" in raw.recv(4096)
    else:
        time.sleep(0.3)
    leave(raw, abruptly)
    assert books(server) == before
    assert server.settled()["completion_tokens"] - completed < 2000


@pytest.mark.usefixtures("talkative")
def test_clients_that_leave_at_random_moments(server: ServerThread, user: str) -> None:
    server.remember(user, "Alice lives in Seattle.", "Alice works at Boeing.")
    before = books(server)
    tasks = len(server.server.services.active)
    chance = random.Random(7)
    for _ in range(30):
        raw = open_request(server, endless(user, chance.random() < 0.5) | {"max_tokens": 200})
        time.sleep(chance.random() * 0.12)
        leave(raw, chance.random() < 0.5)
    assert books(server) == before
    assert len(server.server.services.active) == tasks == 0
    assert server.ask(user, "Where does Alice live?")["usage"]["completion_tokens"] > 0


def test_a_write_that_has_begun_is_carried_out(server: ServerThread, user: str) -> None:
    for n in range(20):
        texts = [f"Text {n}.", {"text": f"Key {n}.", "key": "k"}]
        raw = open_request(server, {"user": user, "texts": texts}, "/v1/memories")
        leave(raw, abruptly=n % 2 == 0)
    time.sleep(0.3)
    stored = server.texts(user)
    for n in range(20):  # A request may be lost on the way in, but never by half.
        assert (f"Text {n}." in stored) or (f"Key {n}." not in stored)
    server.settled()


def test_a_client_that_stops_reading_is_cut_off() -> None:
    ended: list[type[BaseException]] = []

    async def flood(request: web.Request) -> web.StreamResponse:
        stream = EventStream(request, Limits(write_stall_s=0.3))
        try:
            while True:
                await stream.event({"data": "x" * 65536})
        except BaseException as error:
            ended.append(type(error))
            raise

    async def scenario() -> None:
        app = web.Application()
        app.add_routes([web.get("/", flood)])
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        reader, writer = await asyncio.open_connection(*runner.addresses[0][:2], limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.read(100)
        for _ in range(100):
            if ended:
                break
            await asyncio.sleep(0.1)
        writer.close()
        await runner.cleanup()

    asyncio.run(scenario())
    assert ended
    assert issubclass(ended[0], (ConnectionError, asyncio.CancelledError))


def test_a_body_that_never_ends_is_cut_off(start: Callable[..., ServerThread]) -> None:
    server = start(engine=False, limits=Limits(body_timeout_s=0.5))
    host, port = server.server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        raw.sendall(HEAD.format(path="/v1/recall", length=100).encode() + b"{")
        assert b" 408 " in raw.recv(4096).split(b"\r\n")[0]


@pytest.mark.usefixtures("talkative")
def test_more_requests_than_allowed_are_told_to_wait(start: Callable[..., ServerThread]) -> None:
    server = start(limits=Limits(active=2, shutdown_s=5.0, keep_alive_comment_s=0.002))
    held = [open_request(server, endless("alice", stream=True)) for _ in range(2)]
    for raw in held:
        received = b""
        while b": keep-alive\n\n" not in received or b"data: {" not in received:
            received += raw.recv(4096)
        assert b"200 OK" in received
    body = {"model": "amem", "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 1}
    refused = server.post("/v1/chat/completions", body)
    assert refused.status == 429
    assert refused.json()["error"]["code"] == "too_many_requests"
    assert int(refused.headers["Retry-After"]) > 0
    assert server.remember("alice", "Memories are still taken.")
    for raw in held:
        leave(raw, abruptly=True)
    server.settled()
    assert server.post("/v1/chat/completions", body).status == 200
