"""A write that is sent again with the same Idempotency-Key gets the first answer, not a second effect."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from amem.server.errors import bad_request
from amem.server.strict_json import Json

MAX_KEY = 256
_KEPT = 4096


@dataclass(frozen=True, slots=True)
class _Seen:
    digest: bytes
    answer: asyncio.Task[Json]


class Replays:
    """Answers of recent writes by key, in memory: they cover lost connections, not restarts.

    (Adding memories does not rely on this: its keys are durable, in the memory service.)
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[str, _Seen] = OrderedDict()

    async def once(self, key: str | None, request: Json, effect: Callable[[], Awaitable[Json]]) -> Json:
        """Runs `effect` to its end even when the client leaves. A failed effect is forgotten, so it can be retried.

        Raises ApiError 400 when the key was used for another request.
        """
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).digest()
        seen = None if key is None else self._seen.get(key)
        if seen is not None and seen.digest != digest:
            message = "This Idempotency-Key was used for another request; use a new one."
            raise bad_request(message, "Idempotency-Key", "idempotency_key_reused")
        task = asyncio.ensure_future(effect()) if seen is None else seen.answer
        if key is not None and seen is None:
            self._keep(key, _Seen(digest, task))
        return await asyncio.shield(task)

    def _keep(self, key: str, seen: _Seen) -> None:
        self._seen[key] = seen
        while len(self._seen) > _KEPT:
            self._seen.popitem(last=False)

        def drop_if_failed(task: asyncio.Task[Json]) -> None:
            if (task.cancelled() or task.exception() is not None) and self._seen.get(key) is seen:
                del self._seen[key]

        seen.answer.add_done_callback(drop_if_failed)


def idempotency_key(request: web.Request) -> str | None:
    """The header, or None. Raises ApiError 400 when it is too long or empty."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not (0 < len(key) <= MAX_KEY and key.isprintable()):
        message = f"Idempotency-Key must have 1 to {MAX_KEY} printable characters."
        raise bad_request(message, "Idempotency-Key")
    return key
