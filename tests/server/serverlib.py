"""Real servers and a plain HTTP client for the tests of the HTTP room."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

from amem.engine.config import EngineConfig
from amem.engine.launch import EngineLaunch
from amem.engine.types import SamplingParams
from amem.server.app import Server
from amem.server.config import Limits, ServerConfig

T = TypeVar("T")

IDLE_S = 30.0
BUSY = ("requests_running", "requests_waiting", "writes_waiting", "store_pending")
MODEL = Path(__file__).resolve().parents[2] / "amem" / "models" / "demo"
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One keep-alive connection per thread, given up before the server would close it for idleness."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        self.url = url
        self._address = urlsplit(url).netloc
        self._headers = dict(headers or {})
        self._local = threading.local()

    def request(
        self,
        method: str,
        path: str,
        content: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Answer:
        target = path + ("?" + urlencode(params, doseq=True) if params else "")
        if time.monotonic() - getattr(self._local, "used", 0.0) > IDLE_S:
            self.close()
        connection = self._connection()
        try:
            connection.request(method, target, content, self._headers | dict(headers or {}))
            found = connection.getresponse()
            body = found.read()
        except (OSError, http.client.HTTPException):
            self.close()
            raise
        self._local.used = time.monotonic()
        if found.will_close:
            self.close()
        return Answer(found.status, found.headers, body)

    def get(self, path: str, **options: Any) -> Answer:
        return self.request("GET", path, **options)

    def delete(self, path: str, **options: Any) -> Answer:
        return self.request("DELETE", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        return self._with_json("POST", path, body, options)

    def patch(self, path: str, body: Any = None, **options: Any) -> Answer:
        return self._with_json("PATCH", path, body, options)

    def close(self) -> None:
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    def _with_json(self, method: str, path: str, body: Any, options: dict[str, Any]) -> Answer:
        headers = JSON | options.pop("headers", {})
        return self.request(method, path, json.dumps(body).encode(), headers, **options)

    def _connection(self) -> http.client.HTTPConnection:
        if getattr(self._local, "connection", None) is None:
            self._local.connection = http.client.HTTPConnection(self._address, timeout=60)
        connection: http.client.HTTPConnection = self._local.connection
        return connection


class ServerThread(Client):
    """A server on an event loop of its own thread, and a client for it."""

    def __init__(self, config: ServerConfig, engine: bool = True) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.server = self.run(Server.listen(config))
        if engine:
            self.run(self.server.start_engine())
        super().__init__(
            self.server.url, {} if config.api_key is None else {"Authorization": f"Bearer {config.api_key}"}
        )

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    def stop(self) -> None:
        """Ends the server; a second time it does nothing."""
        if self._thread.is_alive():
            self.close()
            self.run(self.server.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def remember(self, user: str, *texts: Any, **fields: Any) -> list[str]:
        """Ids, in the order of the texts."""
        answer = self.post("/v1/memories", {"user": user, "texts": list(texts)} | fields)
        assert answer.status == 200, answer.text
        return [memory["id"] for memory in answer.json()["memories"]]

    def texts(self, user: str) -> list[str]:
        return [memory["text"] for memory in self.get("/v1/memories", params={"user": user}).json()["memories"]]

    def ask(self, user: str | None, question: str | list[dict[str, str]], **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        body = {"model": "amem", "messages": messages, "max_tokens": 4} | fields
        answer = self.post("/v1/chat/completions", body if user is None else body | {"user": user})
        assert answer.status == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def settled(self) -> dict[str, float]:
        """The engine's figures once no work is left anywhere."""
        stats: dict[str, Any] = {}
        for _ in range(600):
            stats = self.get("/v1/stats").json()
            engine: dict[str, float] = stats["engine"]
            busy = sum(engine[kind] for kind in BUSY)
            if not busy and not stats["server"]["kv_jobs_waiting"] + stats["server"]["active_requests"]:
                return engine
            threading.Event().wait(0.05)
        raise AssertionError(f"the server does not come to rest: {stats}")


def config_in(data_dir: Path, **fields: Any) -> ServerConfig:
    engine = EngineConfig(
        model=str(MODEL),
        kv_bytes=64 << 20,
        kv_dir=str(data_dir / "kv"),
        ram_bytes=32 << 20,
        disk_bytes=64 << 20,
        max_step_tokens=512,
    )
    defaults: dict[str, Any] = {"port": 0, "limits": Limits(shutdown_s=5.0)}
    return ServerConfig(MODEL, data_dir, EngineLaunch(engine, backoff_s=0.1), **defaults | fields)


def endless_sampling(**wanted: Any) -> SamplingParams:
    """What a request asks for, but no token ends its answer."""
    return SamplingParams(**wanted | {"stop_token_ids": (), "ignore_eos": True})


def error_of(answer: Answer) -> dict[str, Any]:
    """The error of an answer, in the one shape that every failure has."""
    body = answer.json()
    assert set(body) == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["code"]
    return error
