"""Start and stop as a user does: a real process, signals, a taken port, a data directory in use."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serverlib import Client, ServerThread

PROGRAM = """
import logging, sys
from pathlib import Path
from serverlib import config_in, endless_sampling
from amem.server import chat
from amem.server.app import serve
from amem.server.config import Limits
logging.basicConfig(level=logging.INFO)
chat.SamplingParams = endless_sampling
config = config_in(Path(sys.argv[1]), limits=Limits(shutdown_s=90.0))  # the second signal has to end it
serve(config, on_ready=lambda info: print("READY", info.url, info.model, info.kv_tokens, flush=True))
print("CLOSED", flush=True)
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    made: list[subprocess.Popen[str]] = []

    def make() -> subprocess.Popen[str]:
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(tmp_path / "data")],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
            )
        made.append(process)
        return process

    yield make
    for process in made:
        process.kill()
        process.wait()


def ready(process: subprocess.Popen[str]) -> Client:
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.match(r"READY (http://\S+) \S+ \d+", line)
    assert found, line
    return Client(found.group(1))


def begin_stream(client: Client) -> socket.socket:
    host, port = client.url.removeprefix("http://").split(":")
    body: dict[str, Any] = {"model": "amem", "stream": True, "max_tokens": 4000, "temperature": 2.0, "seed": 1}
    data = json.dumps(body | {"messages": [{"role": "user", "content": "Tell me a canary story."}]}).encode()
    raw = socket.create_connection((host, int(port)), timeout=60)
    raw.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    assert b"200 OK" in raw.recv(1024)
    return raw


def test_sigterm_drains_and_a_second_one_ends(program: Callable[[], subprocess.Popen[str]], tmp_path: Path) -> None:
    process = program()
    client = ready(process)
    ids = client.post("/v1/memories", {"user": "alice", "texts": ["The canary is zorblax."]}).json()["added"]
    assert len(ids) == 1
    stream = begin_stream(client)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None  # the stream is still being answered
    with pytest.raises(ConnectionRefusedError):
        Client(client.url).get("/health")
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    rest = b"".join(iter(lambda: stream.recv(65536), b""))
    assert b"shutting down" in rest
    assert b"[DONE]" not in rest
    assert process.wait(30) == 0
    assert time.monotonic() - begun < 25
    log = (tmp_path / "log").read_text()
    assert "zorblax" not in log
    assert "canary" not in log
    again = ready(program())
    assert again.get("/v1/memories?user=alice").json()["memories"][0]["id"] == ids[0]


def test_sigterm_while_idle_ends_at_once_and_cleanly(program: Callable[[], subprocess.Popen[str]]) -> None:
    process = program()
    client = ready(process)
    assert client.get("/health").status == 200  # an idle keep-alive connection stays open behind this
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert process.stdout is not None
    assert process.stdout.read().strip() == "CLOSED"


def test_a_taken_port_and_a_taken_directory_say_what_to_do(start: Callable[..., ServerThread]) -> None:
    from amem.memory.errors import DataDirError
    from amem.server.config import ConfigError

    server = start(engine=False)
    with pytest.raises(DataDirError):
        start(engine=False)
    port = int(server.url.rsplit(":", 1)[1])
    server.stop()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(ConfigError, match="--port"):
            start(engine=False, port=port)
    assert start(engine=False).get("/health").status == 503
