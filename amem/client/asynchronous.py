"""The asyncio client, on aiohttp, which is imported with the first call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from amem.client import calls
from amem.client.answers import Answer, Transcript, error_from
from amem.client.calls import Call
from amem.client.target import CONNECT_SECONDS, Target, signed

if TYPE_CHECKING:
    import aiohttp

P = ParamSpec("P")
T = TypeVar("T")


def _awaitable(build: Callable[P, Call[T]]) -> Callable[Concatenate[AsyncAmem, P], Coroutine[Any, Any, T]]:
    async def method(self: AsyncAmem, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(build(*args, **kwargs))

    return signed(method, build)


class AsyncAmem:
    """The methods and arguments of `Amem`, awaited. Close it, or use it as `async with AsyncAmem() as client`."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 2,
    ) -> None:
        self._target = Target.parse(base_url, api_key, timeout, retries)
        self._http: aiohttp.ClientSession | None = None

    health = _awaitable(calls.health)
    models = _awaitable(calls.models)
    remember = _awaitable(calls.remember)
    list = _awaitable(calls.list_memories)
    get = _awaitable(calls.get)
    update = _awaitable(calls.update)
    forget = _awaitable(calls.forget)
    forget_all = _awaitable(calls.forget_all)
    recall = _awaitable(calls.recall)
    start_session = _awaitable(calls.start_session)
    session = _awaitable(calls.session)
    end_session = _awaitable(calls.end_session)
    ask_full = _awaitable(calls.ask_full)
    users = _awaitable(calls.users)
    stats = _awaitable(calls.stats)

    async def ask(self, user: str | None, question: str, session: str | None = None, **options: Any) -> str:
        """The answer's text; `options` as for `ask_full`."""
        return (await self.ask_full(user, question, session=session, **options)).text

    def ask_stream(
        self, user: str | None, question: str, session: str | None = None, **options: Any
    ) -> AsyncAnswerStream:
        """The answer piece by piece, asked when the iteration begins; `options` as for `ask_full`."""
        return AsyncAnswerStream(self, calls.as_stream(calls.ask_full(user, question, session=session, **options)))

    async def close(self) -> None:
        """Close the connections; the client can still be used and opens new ones."""
        if self._http is not None:
            http, self._http = self._http, None
            await http.close()

    async def __aenter__(self) -> AsyncAmem:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, call: Call[T]) -> T:
        response = await self._open(call)
        return calls.result(call, response.status, await self._read(response))

    async def _open(self, call: Call[Any]) -> aiohttp.ClientResponse:
        """Send the call, again where that is due, until an answer begins. Raises AmemError on an error status."""
        import aiohttp

        attempt = 0
        while True:
            try:
                response = await self._send(call)
                if response.status < 400:
                    return response
                body = await self._read(response)
                failure = error_from(response.status, body, response.headers.get("Retry-After"))
            except (OSError, aiohttp.ClientError, asyncio.TimeoutError) as error:
                failure = self._target.failure(error)
            pause = self._target.pause(attempt, failure) if call.tried_again else None
            if pause is None:
                raise failure
            await asyncio.sleep(pause)
            attempt += 1

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        import aiohttp

        try:
            return await response.read()
        except (OSError, aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise self._target.failure(error) from error

    async def _send(self, call: Call[Any]) -> aiohttp.ClientResponse:
        import aiohttp
        import yarl

        if self._http is None or self._http.closed:
            self._http = aiohttp.ClientSession()
        url = yarl.URL(self._target.origin + call.target(self._target.prefix), encoded=True)
        silence = call.timeout or self._target.timeout
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=silence)
        body, headers = call.payload(), call.headers(self._target.api_key)
        return await self._http.request(call.method, url, data=body, headers=headers, timeout=timeout)


class AsyncAnswerStream:
    """Iterate for the pieces of text; `answer` is the whole `Answer` once the iteration has ended.

    Leaving the iteration early, or `aclose()`, closes the connection and makes the server stop.
    """

    def __init__(self, client: AsyncAmem, call: Call[Answer]) -> None:
        self._transcript = Transcript()
        self._pieces = self._read(client, call)

    def __aiter__(self) -> AsyncIterator[str]:
        return self._pieces

    @property
    def answer(self) -> Answer:
        return self._transcript.answer()

    async def aclose(self) -> None:
        await self._pieces.aclose()

    async def _read(self, client: AsyncAmem, call: Call[Answer]) -> AsyncGenerator[str, None]:
        import aiohttp

        response = await client._open(call)
        try:
            while not self._transcript.done and (line := await response.content.readline()):
                if piece := self._transcript.push(line):
                    yield piece
        except (OSError, aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise client._target.failure(error) from error
        finally:
            response.close()
        self._transcript.answer()
