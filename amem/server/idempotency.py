"""A write that is sent again with the same Idempotency-Key gets the first answer, not a second effect."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from aiohttp import web

from amem.server.errors import bad_request
from amem.server.strict_json import Json

MAX_KEY = 256
_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Once:
    """A kind of write of a user. `key` is the client's; None for one that may be repeated."""

    user: str
    kind: str
    key: str | None


@dataclass(frozen=True, slots=True)
class _Seen:
    """`about`: the memory whose text the answer holds; None where it holds no text."""

    digest: bytes
    about: object
    answer: asyncio.Task[Json]


class Replays:
    """Answers of recent writes by key, in memory: they cover lost connections, not restarts.

    (Adding memories does not rely on this: its keys are durable, in the memory service.)
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[Once, _Seen] = OrderedDict()
        self._secret = secrets.token_bytes(32)  # a digest must not tell what a forgotten text was

    async def once(self, once: Once, request: Json, effect: Callable[[], Awaitable[Json]]) -> Json:
        """Runs `effect` to its end even when the client leaves. A failed effect is forgotten, so it can be retried.

        Raises ApiError 400 when the key was used for another request.
        """
        digest = hashlib.blake2b(json.dumps(request, sort_keys=True).encode(), key=self._secret).digest()
        seen = None if once.key is None else self._seen.get(once)
        if seen is not None and seen.digest != digest:
            message = "This Idempotency-Key was used for another request; use a new one."
            raise bad_request(message, "Idempotency-Key", "idempotency_key_reused")
        if seen is None:
            seen = _Seen(digest, request.get("id"), asyncio.ensure_future(effect()))
            self._keep(once, seen)
        return await asyncio.shield(seen.answer)

    def forget(self, user: str, ids: Sequence[str] | None) -> None:
        """Drops answers that hold the texts of these memories (None: of all of the user).

        Others stay: a write that is repeated after an erasure, even of its user, must not bring anything back.
        """
        for once, seen in list(self._seen.items()):
            if once.user == user and seen.about is not None and (ids is None or seen.about in ids):
                del self._seen[once]

    def _keep(self, once: Once, seen: _Seen) -> None:
        def ended(task: asyncio.Task[Json]) -> None:
            failed = task.cancelled() or task.exception() is not None
            if failed and self._seen.get(once) is seen:
                del self._seen[once]

        seen.answer.add_done_callback(ended)
        if once.key is not None:
            self._seen[once] = seen
            while len(self._seen) > _KEPT:
                self._seen.popitem(last=False)


def idempotency_key(request: web.Request) -> str | None:
    """The header, or None. Raises ApiError 400 when it is too long or empty."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not (0 < len(key) <= MAX_KEY and key.isprintable()):
        message = f"Idempotency-Key must have 1 to {MAX_KEY} printable characters."
        raise bad_request(message, "Idempotency-Key")
    return key
