"""The blocking client, on the standard library alone."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

from amem.client import calls
from amem.client.answers import Answer, Transcript, error_from
from amem.client.calls import Call
from amem.client.target import CONNECT_SECONDS, Target, signed

P = ParamSpec("P")
T = TypeVar("T")

IDLE_CONNECTIONS = 8


def _blocking(build: Callable[P, Call[T]]) -> Callable[Concatenate[Amem, P], T]:
    def method(self: Amem, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(build(*args, **kwargs))

    return signed(method, build)


class Amem:
    """A blocking client. Threads may share it; connections are kept and reused.

    base_url: of the server, with or without /v1; None for AMEM_URL or http://localhost:8000. api_key: sent as a
    bearer token; None for AMEM_API_KEY. timeout: seconds without a byte after which a call gives up. retries: further
    tries after a lost connection or a 429, 502, 503 or 504; writes carry an idempotency key, so that a second try
    never stores a text twice.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 2,
    ) -> None:
        self._target = Target.parse(base_url, api_key, timeout, retries)
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    health = _blocking(calls.health)
    models = _blocking(calls.models)
    remember = _blocking(calls.remember)
    list = _blocking(calls.list_memories)
    get = _blocking(calls.get)
    update = _blocking(calls.update)
    forget = _blocking(calls.forget)
    forget_all = _blocking(calls.forget_all)
    recall = _blocking(calls.recall)
    start_session = _blocking(calls.start_session)
    session = _blocking(calls.session)
    end_session = _blocking(calls.end_session)
    ask_full = _blocking(calls.ask_full)
    users = _blocking(calls.users)
    stats = _blocking(calls.stats)

    def ask(self, user: str | None, question: str, session: str | None = None, **options: Any) -> str:
        """The answer's text; `options` as for `ask_full`."""
        return self.ask_full(user, question, session=session, **options).text

    def ask_stream(self, user: str | None, question: str, session: str | None = None, **options: Any) -> AnswerStream:
        """The answer piece by piece; `options` as for `ask_full`. Close it to make the server stop."""
        call = calls.as_stream(calls.ask_full(user, question, session=session, **options))
        connection, response = self._open(call)
        return AnswerStream(response, self._target, connection)

    def close(self) -> None:
        """Close the kept connections; the client can still be used and opens new ones."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def __enter__(self) -> Amem:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, call: Call[T]) -> T:
        connection, response = self._open(call)
        return calls.result(call, response.status, self._read(connection, response))

    def _open(self, call: Call[Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send the call, again where that is due, until an answer begins. Raises AmemError on an error status."""
        attempt = 0
        while True:
            try:
                connection, response = self._send(call)
                if response.status < 400:
                    return connection, response
                body = self._read(connection, response)
                failure = error_from(response.status, body, response.getheader("Retry-After"))
            except (OSError, http.client.HTTPException) as error:
                failure = self._target.failure(error)
            pause = self._target.pause(attempt, failure) if call.tried_again else None
            if pause is None:
                raise failure
            time.sleep(pause)
            attempt += 1

    def _read(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> bytes:
        """The whole body; the connection is kept for the next call where it can be."""
        try:
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._target.failure(error) from error
        with self._lock:
            kept = not response.will_close and len(self._idle) < IDLE_CONNECTIONS
            if kept:
                self._idle.append(connection)
        if not kept:
            connection.close()
        return body

    def _send(self, call: Call[Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """One try, on a kept connection if there is one; a kept one that the server closed meanwhile costs no try."""
        method, target = call.method, call.target(self._target.prefix)
        body, headers = call.payload(), call.headers(self._target.api_key)
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            fresh = connection is None
            connection = connection or self._connect()
            try:
                if connection.sock is not None:
                    connection.sock.settimeout(call.timeout or self._target.timeout)
                with contextlib.suppress(ConnectionError):  # an early refusal, such as 413, may be there to read
                    connection.request(method, target, body, headers)
                return connection, connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if fresh or isinstance(error, TimeoutError):
                    raise

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._target.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._target.host, self._target.port, timeout=CONNECT_SECONDS)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection


class AnswerStream:
    """Iterate for the pieces of text; `answer` is the whole `Answer` once the iteration has ended."""

    def __init__(
        self, response: http.client.HTTPResponse, target: Target, connection: http.client.HTTPConnection
    ) -> None:
        self._response, self._target, self._connection = response, target, connection
        self._transcript = Transcript()

    def __iter__(self) -> Iterator[str]:
        try:
            while not self._transcript.done and (line := self._response.readline()):
                if piece := self._transcript.push(line):
                    yield piece
        except (OSError, http.client.HTTPException) as error:
            raise self._target.failure(error) from error
        finally:
            self.close()
        self._transcript.answer()

    @property
    def answer(self) -> Answer:
        return self._transcript.answer()

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
