"""The SDK against a server that misbehaves on cue: what it sends, when it tries again, how failures look."""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from amem import Amem, AmemError, AsyncAmem
from amem.client import blocking, target

RESET, HANG, CLOSE, CUT = "reset", "hang", "close", "cut"
Step = bytes | str


def reply(status: int, body: object = None, headers: str = "", close: bool = False) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    ends = "Connection: close\r\n" if close else ""
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n{headers}{ends}\r\n".encode() + data


@dataclass
class Seen:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Script:
    """A TCP server that answers each request with the next step of its script."""

    steps: list[Step] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.over = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.over.set()
        self.listener.close()

    def _accept(self) -> None:
        for number in range(1000):
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection, number), daemon=True).start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        with connection, connection.makefile("rb") as reader:
            while line := reader.readline():
                method, where, _ = line.decode().split(" ", 2)
                headers = {}
                while (header := reader.readline().decode().strip()) != "":
                    name, _, value = header.partition(":")
                    headers[name.lower()] = value.strip()
                body = reader.read(int(headers.get("content-length", 0)))
                self.seen.append(Seen(method, where, headers, body, number))
                if not self._act(connection, self.steps.pop(0)):
                    return

    def _act(self, connection: socket.socket, step: Step) -> bool:
        if step == RESET:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif step == HANG:
            self.over.wait(30)
        elif step == CUT:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
        elif isinstance(step, bytes):
            connection.sendall(step)
            return b"Connection: close" not in step
        return False


@pytest.fixture
def script() -> Iterator[Script]:
    server = Script()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AMEM_URL", raising=False)
    monkeypatch.delenv("AMEM_API_KEY", raising=False)
    monkeypatch.setattr(target, "LONGEST_PAUSE_SECONDS", 0.01)


Caller = Callable[..., Any]


def call_blocking(url: str, method: str, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    with Amem(url, **(options or {})) as client:
        found = getattr(client, method)(*args, **kwargs)
        return list(found) if method == "ask_stream" else found


def call_async(url: str, method: str, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    async def run() -> Any:
        async with AsyncAmem(url, **(options or {})) as client:
            found = getattr(client, method)(*args, **kwargs)
            return [piece async for piece in found] if method == "ask_stream" else await found

    return asyncio.run(run())


@pytest.fixture(params=[call_blocking, call_async], ids=["blocking", "asyncio"])
def call(request: pytest.FixtureRequest) -> Caller:
    found: Caller = request.param
    return found


ADDED = reply(200, {"memories": [{"id": "m1", "outcome": "added"}]})
CHAT = reply(
    200,
    {
        "choices": [{"message": {"content": "Denver"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7},
        "amem": {"session": "s1", "tokens": {"fresh": 7}},
    },
)


def sse(*events: object, done: bool = True) -> bytes:
    lines = [b": keep-alive\n\n", *(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)]
    body = b"".join(lines) + (b"data: [DONE]\n\n" if done else b"")
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + body


def delta(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": None}]}


@pytest.mark.parametrize("user", ["alice", "a b", "a/b", "..", "x?y&z=1", "ünï", "😀", "100%", "a+b", "#"])
def test_any_user_name_arrives_as_it_is(script: Script, call: Caller, user: str) -> None:
    script.steps = [reply(200, {"memories": []}), reply(200, {})]
    assert call(script.url, "list", user) == []
    call(script.url, "forget", user, "m/1")
    assert script.seen[0].query == {"user": [user], "limit": ["100"]}
    assert (script.seen[1].method, script.seen[1].query) == ("DELETE", {"user": [user], "id": ["m/1"]})


def test_several_are_forgotten_at_once(script: Script, call: Caller) -> None:
    script.steps = [reply(200, {})]
    call(script.url, "forget", "u", ["m1", "m2"])
    assert script.seen[0].query == {"user": ["u"], "id": ["m1", "m2"]}


def test_what_each_method_sends(script: Script, call: Caller) -> None:
    expected = [
        (("remember", "u", "a text"), {"keys": ["k"]}, "POST", "/v1/memories", ADDED),
        (("get", "u", "m1"), {}, "GET", "/v1/memories?user=u&id=m1", reply(200, {"id": "m1"})),
        (("update", "u", "m1", "new"), {}, "PATCH", "/v1/memories?user=u&id=m1", reply(200, {"id": "m1"})),
        (("forget_all", "u"), {}, "DELETE", "/v1/memories?user=u", reply(200, {"ids": []})),
        (("recall", "u", "q"), {"k": 3}, "POST", "/v1/recall", reply(200, {"memories": []})),
        (("start_session", "u"), {}, "POST", "/v1/sessions", reply(200, {"id": "s1"})),
        (("session", "u", "s/1"), {}, "GET", "/v1/sessions/s%2F1?user=u", reply(200, {"id": "s/1"})),
        (("end_session", "u", "s1"), {}, "DELETE", "/v1/sessions/s1?user=u", reply(200, {})),
        (("ask", "u", "q"), {"session": "s1"}, "POST", "/v1/chat/completions", CHAT),
        (("users",), {}, "GET", "/v1/users?limit=1000", reply(200, {"users": []})),
        (("stats",), {}, "GET", "/v1/stats", reply(200, {})),
        (("health",), {}, "GET", "/health", reply(200, {"status": "ok"})),
        (("models",), {}, "GET", "/v1/models", reply(200, {"data": [{"id": "amem"}]})),
    ]
    script.steps = [answer for *_, answer in expected]
    results = {name[0]: call(script.url, *name, **kwargs) for name, kwargs, *_ in expected}
    assert [(seen.method, seen.target) for seen in script.seen] == [(m, t) for _, _, m, t, _ in expected]
    assert script.seen[0].json == {"user": "u", "texts": ["a text"], "keys": ["k"]}
    assert script.seen[4].json == {"user": "u", "query": "q", "k": 3}
    chat = {"model": "amem", "user": "u", "session": "s1", "messages": [{"role": "user", "content": "q"}]}
    assert script.seen[8].json == chat
    assert results["remember"] == [{"id": "m1", "outcome": "added"}]
    assert (results["start_session"], results["ask"], results["models"]) == ("s1", "Denver", [{"id": "amem"}])


def test_ask_full_carries_what_was_measured(script: Script, call: Caller) -> None:
    script.steps = [CHAT]
    history = [{"role": "system", "content": "Be brief."}]
    answer = call(script.url, "ask_full", "u", "q", messages=history, fidelity="high", remember=True, temperature=0.5)
    assert (answer.text, answer.session, answer.report["tokens"]) == ("Denver", "s1", {"fresh": 7})
    assert script.seen[0].json["amem"] == {"fidelity": "high", "remember": True}
    assert script.seen[0].json["messages"] == [*history, {"role": "user", "content": "q"}]
    assert script.seen[0].json["temperature"] == 0.5


@pytest.mark.parametrize("trouble", [RESET, CLOSE, reply(503, {}), reply(429, {}, "Retry-After: 1\r\n")])
def test_a_write_is_tried_again_with_the_same_key(script: Script, call: Caller, trouble: Step) -> None:
    script.steps = [trouble, trouble, ADDED]
    assert call(script.url, "remember", "u", "t") == [{"id": "m1", "outcome": "added"}]
    keys = {seen.headers["idempotency-key"] for seen in script.seen}
    assert len(script.seen) == 3
    assert len(keys) == 1
    assert len(keys.pop()) >= 16


def test_two_writes_have_two_keys(script: Script, call: Caller) -> None:
    script.steps = [ADDED, ADDED, ADDED]
    for key in (None, None, "mine"):
        call(script.url, "remember", "u", "t", idempotency_key=key)
    keys = [seen.headers["idempotency-key"] for seen in script.seen]
    assert len(set(keys)) == 3
    assert keys[2] == "mine"


@pytest.mark.parametrize(("trouble", "status"), [(RESET, 0), (CLOSE, 0), (reply(503, {}), 503)])
def test_trouble_that_lasts_is_reported(script: Script, call: Caller, trouble: Step, status: int) -> None:
    script.steps = [trouble] * 3
    with pytest.raises(AmemError) as caught:
        call(script.url, "remember", "u", "t")
    assert caught.value.status == status
    assert len(script.seen) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 500])
def test_a_refusal_is_not_tried_again(script: Script, call: Caller, status: int) -> None:
    script.steps = [reply(status, {"error": {"message": "no such thing", "code": "not_it", "type": "t"}})]
    with pytest.raises(AmemError) as caught:
        call(script.url, "remember", "u", "t")
    assert (caught.value.status, caught.value.detail, caught.value.code) == (status, "no such thing", "not_it")
    assert len(script.seen) == 1


@pytest.mark.parametrize("body", [b"", b"<html>oops", b"null", b'{"error": 7}', b"[1]", b"\xff\xfe"])
def test_an_error_of_any_shape_is_an_amem_error(script: Script, call: Caller, body: bytes) -> None:
    script.steps = [reply(418, body)]
    with pytest.raises(AmemError) as caught:
        call(script.url, "stats")
    assert caught.value.status == 418
    assert caught.value.detail


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"7", b'{"memories": [1]}', b'{"memories": 3}'])
def test_an_answer_of_another_shape_is_an_amem_error(script: Script, call: Caller, body: bytes) -> None:
    script.steps = [reply(200, body)]
    with pytest.raises(AmemError, match="not an answer of an amem server"):
        call(script.url, "list", "u")


def test_an_answer_cut_in_the_middle_is_an_amem_error(script: Script, call: Caller) -> None:
    script.steps = [CUT] * 3
    with pytest.raises(AmemError) as caught:
        call(script.url, "stats")
    assert caught.value.status == 0


def test_a_timeout_is_status_0_and_not_tried_again(script: Script, call: Caller) -> None:
    script.steps = [HANG, ADDED]
    with pytest.raises(AmemError) as caught:
        call(script.url, "remember", "u", "t", options={"timeout": 0.2})
    assert (caught.value.status, caught.value.code) == (0, "timeout")
    assert len(script.seen) == 1


def test_nobody_there(call: Caller) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(AmemError) as caught:
        call(f"http://127.0.0.1:{port}", "health")
    assert (caught.value.status, caught.value.code) == (0, "unreachable")
    assert str(port) in caught.value.detail


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://h:port", "http://[::1"])
def test_a_bad_address_says_so(url: str) -> None:
    for kind in (Amem, AsyncAmem):
        with pytest.raises(AmemError) as caught:
            kind(url)
        assert caught.value.status == 0


@pytest.mark.parametrize("key", ["naïve", "a\r\nX-Evil: 1", "tab\t"])
def test_a_key_that_no_header_can_carry(key: str) -> None:
    for kind in (Amem, AsyncAmem):
        with pytest.raises(AmemError):
            kind("http://localhost", api_key=key)


def test_address_and_key_from_the_environment(script: Script, call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    script.steps = [reply(200, {}), reply(200, {})]
    monkeypatch.setenv("AMEM_URL", script.url)
    monkeypatch.setenv("AMEM_API_KEY", "from outside")
    call(None, "stats")
    call(None, "stats", options={"api_key": "mine"})
    assert [seen.headers["authorization"] for seen in script.seen] == ["Bearer from outside", "Bearer mine"]


def test_key_and_prefix(script: Script, call: Caller) -> None:
    script.steps = [reply(200, {}), reply(200, {})]
    call(script.url + "/v1/", "stats", options={"api_key": "secret"})
    call(script.url + "/behind/proxy", "stats")
    assert [seen.target for seen in script.seen] == ["/v1/stats", "/behind/proxy/v1/stats"]
    assert script.seen[0].headers["authorization"] == "Bearer secret"
    assert "authorization" not in script.seen[1].headers


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("remember", ("u", "lone \ud800")),
        ("remember", ("u", {"text": "t", "metadata": {"x": float("nan")}})),
        ("remember", ("u", {"text": "t", "metadata": {"x": {1, 2}}})),
        ("list", ("lone \ud800",)),
        ("session", ("u", "lone \ud800")),
        ("forget", ("u", "")),
        ("forget", ("u", [])),
        ("forget", ("u", ["m1", ""])),
        ("forget", ("u", None)),
        ("get", ("u", "")),
        ("update", ("u", "", "new")),
    ],
)
def test_what_cannot_be_sent_is_refused_before_sending(
    script: Script, call: Caller, method: str, args: tuple[Any, ...]
) -> None:
    with pytest.raises(AmemError) as caught:
        call(script.url, method, *args)
    assert caught.value.status == 400
    assert script.seen == []


def test_a_stream_arrives_in_pieces(script: Script, call: Caller) -> None:
    last = {"choices": [{"delta": {}, "finish_reason": "stop"}], "amem": {"session": "s"}, "usage": {"n": 1}}
    script.steps = [sse(delta("Den"), delta("vér"), last)]
    assert call(script.url, "ask_stream", "u", "q") == ["Den", "vér"]
    assert script.seen[0].json["stream"] is True


def test_a_stream_ends_with_the_report(script: Script) -> None:
    last = {"choices": [{"delta": {}, "finish_reason": "length"}], "amem": {"session": "s"}, "usage": {"n": 1}}
    script.steps = [sse(delta("Den"), delta("ver"), last)]
    stream = Amem(script.url).ask_stream("u", "q")
    with pytest.raises(AmemError, match="broke off"):
        _ = stream.answer
    assert "".join(stream) == "Denver"
    answer = stream.answer
    assert (answer.text, answer.finish_reason, answer.session) == ("Denver", "length", "s")
    assert answer.usage == {"n": 1}


@pytest.mark.parametrize(
    ("events", "done", "detail"),
    [
        ([delta("Den"), {"error": {"message": "the engine stopped", "code": "internal"}}], False, "engine stopped"),
        ([delta("Den")], False, "broke off"),
        ([delta("Den"), [1]], True, "broken event"),
    ],
)
def test_a_stream_that_fails_after_its_first_byte_is_not_asked_again(
    script: Script, call: Caller, events: list[object], done: bool, detail: str
) -> None:
    script.steps = [sse(*events, done=done)]
    with pytest.raises(AmemError, match=detail):
        call(script.url, "ask_stream", "u", "q")
    assert len(script.seen) == 1


def test_a_stream_is_asked_again_before_its_first_byte(script: Script, call: Caller) -> None:
    script.steps = [RESET, reply(503, {}), sse(delta("ok"))]
    assert call(script.url, "ask_stream", "u", "q") == ["ok"]


def test_connections_are_kept(script: Script) -> None:
    script.steps = [reply(200, {}), reply(404, {}), reply(200, {}), reply(200, {}, close=True), reply(200, {})]
    client = Amem(script.url)
    for _ in range(5):
        try:
            client.stats()
        except AmemError:
            continue
    assert [seen.connection for seen in script.seen] == [0, 0, 0, 0, 1]


def test_a_kept_connection_that_the_server_closed_costs_no_try(script: Script) -> None:
    script.steps = [reply(200, {}), CLOSE, reply(200, {})]
    client = Amem(script.url, retries=0)
    client.stats()
    assert client.stats() == {}


def test_threads_share_a_client(script: Script) -> None:
    script.steps = [reply(200, {"n": 1})] * 200
    client = Amem(script.url)
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.extend(client.stats() for _ in range(25))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [{"n": 1}] * 200
    assert len({seen.connection for seen in script.seen}) <= 8 + blocking.IDLE_CONNECTIONS


def test_an_early_refusal_of_a_long_body_is_read(script: Script) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def refuse() -> None:
        connection, _ = listener.accept()
        connection.recv(1024)
        connection.sendall(reply(413, {"error": {"message": "too long", "code": "c"}}, close=True))
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 20):
            pass
        connection.close()

    threading.Thread(target=refuse, daemon=True).start()
    with pytest.raises(AmemError) as caught:
        Amem(f"http://127.0.0.1:{listener.getsockname()[1]}").remember("u", "x" * (8 << 20))
    assert caught.value.status == 413
    listener.close()


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> dict[str, Any]:
        return {name: inspect.signature(f) for name, f in vars(kind).items() if name[0] != "_" and callable(f)}

    sync, asynchronous = public(Amem), public(AsyncAmem)
    assert sync.keys() == asynchronous.keys()
    shared = sync.keys() - {"close", "ask_stream"}
    assert {name: sync[name].parameters for name in shared} == {
        name: asynchronous[name].parameters for name in shared
    }
    assert list(inspect.signature(Amem().remember).parameters)[:2] == ["user", "texts"]
    assert all(inspect.getdoc(getattr(Amem, name)) for name in sync)
