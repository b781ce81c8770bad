"""Server-sent events: one answer as it is made, with comments while nothing comes, so that no proxy gives up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from aiohttp import web

from amem.server.config import Limits
from amem.server.errors import ApiError
from amem.server.strict_json import Json

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
COMMENT = b": keep-alive\n\n"


class EventStream:
    """Writes events to one client. A client that takes nothing for `write_stall_s` counts as gone."""

    def __init__(self, request: web.Request, limits: Limits) -> None:
        self._request = request
        self._stall = limits.write_stall_s
        self._response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache, no-store"}
        )
        self._response.headers["X-Accel-Buffering"] = "no"

    async def open(self) -> None:
        if not self._response.prepared:
            await self._response.prepare(self._request)

    @property
    def opened(self) -> bool:
        return self._response.prepared

    async def event(self, body: Json) -> None:
        await self.open()
        await self._write(f"data: {_ENCODER.encode(body)}\n\n".encode())

    async def comment(self) -> None:
        await self.open()
        await self._write(COMMENT)

    async def error(self, error: ApiError) -> None:
        """An error after the first byte: the status is out, so it goes as an event and ends the stream."""
        body = error.body().json()
        body["error"]["status"] = error.status
        await self.event(body)

    async def end(self) -> web.StreamResponse:
        await self._write(DONE)
        await self._response.write_eof()
        return self._response

    async def close(self) -> web.StreamResponse:
        """Ends without `[DONE]`, which only whole answers get."""
        await self._response.write_eof()
        return self._response

    async def _write(self, data: bytes) -> None:
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        watchdog = asyncio.get_running_loop().call_later(self._stall, transport.abort)
        try:
            await self._response.write(data)
        finally:
            watchdog.cancel()


async def with_pauses(source: AsyncGenerator[T, None], pause_s: float) -> AsyncIterator[T | None]:
    """The items of `source`, and None whenever none came for `pause_s`. Closes the source, however it is left."""
    waiting: asyncio.Future[T] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(source))
            done, _ = await asyncio.wait((waiting,), timeout=pause_s)
            if not done:
                yield None
                continue
            finished, waiting = waiting, None
            try:
                item = finished.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await source.aclose()
