"""`amem proxy` as a process between real clients and an upstream that shows what it received."""

from __future__ import annotations

import gzip
import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from amem import Amem, AmemError
from amem.child import ServerChild

STREAM = (
    b'data: {"choices":[{"index":0,"delta":{"content":"Den"}}]}\n\n',
    b": odd \xff bytes\n\n",
    b"data: [DONE]\n\n",
)
SISTER = "Where does Alice's sister live?"


@dataclass
class Upstream:
    """Keeps what it gets. `status`: of its answers. `cut`: end a stream without its end."""

    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    status: int = 200
    cut: bool = False

    def __post_init__(self) -> None:
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                upstream.seen.append((self.command, self.path, dict(self.headers.items()), body))
                if b'"stream": true' in body or b'"stream":true' in body:
                    self.stream()
                    return
                answer = json.dumps({"choices": [{"message": {"content": "Denver"}}], "odd": "\u00e9"}).encode()
                self.send_response(upstream.status)
                packed = "gzip" in self.headers.get("Accept-Encoding", "")
                data = gzip.compress(answer) if packed else answer
                if packed:
                    self.send_header("Content-Encoding", "gzip")
                self.send_header("X-Upstream", "yes")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def stream(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for piece in STREAM[: 1 if upstream.cut else None]:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    self.wfile.flush()
                if upstream.cut:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                else:
                    self.wfile.write(b"0\r\n\r\n")

            do_GET = do_POST = do_DELETE = do_PATCH = answer

            def log_message(self, format: str, *args: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def messages(self) -> list[Any]:
        found: list[Any] = json.loads(self.seen[-1][3])["messages"]
        return found


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    made = Upstream()
    yield made
    made.server.shutdown()
    made.server.server_close()


Start = Callable[..., str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a proxy on the test's own data directory and gives its address."""
    running: list[subprocess.Popen[str]] = []

    def run(upstream: str, *options: str) -> str:
        stop()
        command = [sys.executable, "-m", "amem", "proxy", "--json", "--port", "0", "--upstream", upstream]
        command += ["--data-dir", str(tmp_path / "data"), *options]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout
        return str(json.loads(running[-1].stdout.readline())["url"])

    def stop() -> None:
        while running:
            process = running.pop()
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            if process.stdout:
                process.stdout.close()

    yield run
    stop()


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict[str, str], bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **named})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, dict(response.headers.items()), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers.items()), error.read()


def ask(url: str, messages: list[Any], **fields: Any) -> tuple[int, dict[str, str], bytes]:
    body = {"model": "m", "user": "alice", "messages": messages} | fields
    return post(f"{url}/v1/chat/completions", json.dumps(body).encode())


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_memories_stand_in_front_of_the_question(upstream: Upstream, start: Start) -> None:
    url = start(upstream.url)
    Amem(url).remember(
        "alice", ["Alice lives in Seattle and works at Boeing.", "Alice's sister Maria lives in Denver."]
    )
    system = {"role": "system", "content": "Be brief."}
    tools = [{"type": "function", "function": {"name": "f"}}]
    status, headers, body = ask(url, [system, user(SISTER)], temperature=0.5, tools=tools, odd={"x": [1]})
    assert (status, json.loads(body)["odd"], headers["X-Upstream"]) == (200, "é", "yes")
    assert headers["X-Amem-Memory"] == "2"
    sent = json.loads(upstream.seen[-1][3])
    assert {name: sent[name] for name in ("model", "user", "temperature", "tools", "odd")} == {
        "model": "m",
        "user": "alice",
        "temperature": 0.5,
        "tools": tools,
        "odd": {"x": [1]},
    }
    assert sent["messages"][0] == system
    content = sent["messages"][1]["content"]
    assert content.endswith("\n\n" + SISTER)
    assert "- Alice's sister Maria lives in Denver.\n" in content


def test_a_history_gets_the_same_bytes_again(upstream: Upstream, start: Start) -> None:
    url = start(upstream.url)
    client = Amem(url)
    client.remember("alice", ["Alice's sister Maria lives in Denver.", "Alice plays the cello."])
    history = [user(SISTER)]
    ask(url, history)
    first = upstream.messages
    client.remember("alice", "Alice's brother Tom lives in Oslo.")
    url = start(upstream.url)
    client = Amem(url)
    history += [{"role": "assistant", "content": "Denver"}, user("And where does her brother live?")]
    ask(url, history)
    second = upstream.messages
    assert second[:1] == first
    assert second[1] == history[1]
    assert "Alice's brother Tom lives in Oslo." in second[2]["content"]
    assert "Denver" not in second[2]["content"]
    # a tool's turn adds nothing: its user message has its memories already
    history += [{"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}]
    history += [{"role": "tool", "tool_call_id": "c", "content": "found"}]
    ask(url, history)
    assert upstream.messages == [*second, *history[3:]]
    # another branch of the conversation is another conversation
    ask(url, [user("Who plays the cello?"), history[1], history[2]])
    assert "Tom" in json.dumps(upstream.messages[2])
    (tom,) = [item["id"] for item in client.list("alice") if "Tom" in item["text"]]
    client.forget("alice", tom)
    ask(url, history)
    assert "Tom" not in json.dumps(upstream.messages)
    assert upstream.messages[:1] == first


def test_parts_of_a_message_are_kept(upstream: Upstream, start: Start) -> None:
    url = start(upstream.url)
    Amem(url).remember("alice", "Alice's sister Maria lives in Denver.")
    parts = [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": SISTER}]
    ask(url, [user(parts)])
    (message,) = upstream.messages
    assert message["content"][1:] == parts
    assert "Maria" in message["content"][0]["text"]


NOT_FOR_MEMORY = [
    b"",
    b"not json",
    b"[]",
    b'{"messages": 7, "user": "alice"}',
    b'{"messages": [7, null, {"role": "user"}], "user": "alice"}',
    b'{"messages":[{"role":"user","content":"Where does Maria live?"}]}',
    b'{"messages":[{"role":"user","content":"Where does Maria live?"}],"user":"nobody"}',
    b'{"messages":[{"role":"user","content":"Where does Maria live?"}],"user":"bad\\u0001name"}',
    b'{"messages":[{"role":"user","content":"lone \\ud800 surrogate"}],"user":"alice"}',
    b'{"messages":[{"role":"assistant","content":"hello"}],"user":"alice",  "odd":1.50}',
]


def test_what_memory_has_no_part_in_goes_on_byte_for_byte(upstream: Upstream, start: Start) -> None:
    url = start(upstream.url)
    Amem(url).remember("alice", "Maria lives in Denver.")
    for body in NOT_FOR_MEMORY:
        status, headers, _ = post(f"{url}/v1/chat/completions", body, Authorization="Bearer theirs", X_Title="t")
        assert status == 200
        assert headers["X-Amem-Memory"] in ("off", "unavailable", "0")
        method, path, sent, received = upstream.seen[-1]
        assert (method, path, received) == ("POST", "/v1/chat/completions", body)
        assert (sent["Authorization"], sent["X-Title"]) == ("Bearer theirs", "t")


def test_streams_and_packed_answers_are_untouched(upstream: Upstream, start: Start) -> None:
    url = start(upstream.url)
    assert ask(url, [user("hi")], stream=True)[2] == b"".join(STREAM)
    _, headers, body = post(f"{url}/v1/embeddings?a=%2F+b", b"{}", Accept_Encoding="gzip")
    assert headers["Content-Encoding"] == "gzip"
    assert json.loads(gzip.decompress(body))["odd"] == "é"
    assert upstream.seen[-1][1] == "/v1/embeddings?a=%2F+b"
    assert "Accept-Encoding" not in upstream.seen[0][2] or upstream.seen[0][2]["Accept-Encoding"] == "identity"


def test_a_stream_that_breaks_does_not_look_whole(upstream: Upstream, start: Start) -> None:
    upstream.cut = True
    url = start(upstream.url)
    with pytest.raises(Exception, match=r"IncompleteRead|reset|closed|aborted"):
        ask(url, [user("hi")], stream=True)


def test_the_upstreams_refusals_are_its_own(upstream: Upstream, start: Start) -> None:
    url = start(upstream.url)
    for count, status in enumerate((400, 401, 404, 429, 500, 503), 1):
        upstream.status = status
        assert ask(url, [user("hi")])[0] == status
        assert len(upstream.seen) == count


def test_no_upstream_is_502(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    status, _, body = ask(start(f"http://127.0.0.1:{port}/v1"), [user("hi")])
    assert status == 502
    assert json.loads(body)["error"]["code"] == "upstream_unreachable"


def test_amems_key_stays_here(upstream: Upstream, start: Start) -> None:
    url = start(upstream.url, "--api-key", "secret")
    body = json.dumps({"messages": [user("hi")], "user": "alice"}).encode()
    assert post(f"{url}/v1/chat/completions", body, Authorization="Bearer secret")[0] == 401
    assert post(f"{url}/v1/chat/completions", body, X_Amem_Key="wrong")[0] == 401
    assert upstream.seen == []
    assert post(f"{url}/v1/chat/completions", body, X_Amem_Key="secret", X_Amem_User="bob")[0] == 200
    sent = {name.lower() for name in upstream.seen[-1][2]}
    assert not sent & {"x-amem-key", "x-amem-user", "authorization"}


def test_routes_of_memory_never_reach_the_upstream(upstream: Upstream, start: Start) -> None:
    url = start(upstream.url)
    client = Amem(url, retries=0)
    (added,) = client.remember("a/b", "One fact.")
    assert [item["id"] for item in client.list("a/b")] == [added["id"]]
    assert client.get("a/b", added["id"])["text"] == "One fact."
    assert client.recall("a/b", "fact")[0]["id"] == added["id"]
    client.remember("other", "One fact.")
    first = client.users(limit=1)
    assert ([item["user"] for item in first], first.next) == (["a/b"], "a/b")
    assert [item["user"] for item in client.users(after=first.next)] == ["other"]
    for refused in (lambda: client.update("a/b", added["id"], "Another."), lambda: client.start_session("a/b")):
        with pytest.raises(AmemError) as caught:
            refused()
        assert caught.value.status == 404
    assert client.forget_all("a/b")["forgotten"] == [added["id"]]
    assert upstream.seen == []


def test_in_front_of_amem_itself_with_the_openai_client(running_server: ServerChild, start: Start) -> None:
    from openai import OpenAI

    url = start(running_server.url + "/v1")
    Amem(url).remember("proxied", "Alice's sister Maria lives in Denver.")
    client = OpenAI(base_url=url + "/v1", api_key="any")
    asked: list[Any] = [{"role": "user", "content": SISTER}]
    bare = client.chat.completions.create(model="amem", messages=asked, max_tokens=4)
    answer = client.chat.completions.create(model="amem", messages=asked, max_tokens=4, user="proxied")
    assert answer.usage.prompt_tokens > bare.usage.prompt_tokens + 10
    stream = client.chat.completions.create(model="amem", messages=asked, max_tokens=4, user="proxied", stream=True)
    said = "".join(event.choices[0].delta.content or "" for event in stream if event.choices)
    assert said == answer.choices[0].message.content
