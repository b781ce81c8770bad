"""The memory routes of the proxy: those of the server (docs/api.md) that need no model."""

from __future__ import annotations

from aiohttp import web

from amem.memory.errors import NotFound
from amem.memory.service import MemoryService
from amem.memory.types import Forgotten, RecallOptions
from amem.server.config import Limits
from amem.server.errors import ApiError
from amem.server.idempotency import idempotency_key
from amem.server.memory_schema import (
    MAX_PAGE,
    query_integer,
    query_only,
    query_text,
    recall_request,
    remember_request,
)
from amem.server.services import needed_user
from amem.server.shapes import added_json, memory_json, recalled_json, users_json
from amem.server.strict_json import check_text, read_object, refuse_body
from amem.server.threads import Threads

_RECALLED = 8


class ProxyMemory:
    """Remember, list, forget and recall over a memory service. Users are named by `?user=` or in the body."""

    def __init__(self, memory: MemoryService, threads: Threads, limits: Limits) -> None:
        self._memory, self._threads, self._limits = memory, threads, limits

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/memories", self.remember),
            web.get("/v1/memories", self.read),
            web.delete("/v1/memories", self.forget),
            web.post("/v1/recall", self.recall),
            web.get("/v1/users", self.users),
            web.route("*", "/v1/{room:memories|recall|sessions|users|stats}{rest:(/.*)?}", self.elsewhere),
        ]

    async def remember(self, request: web.Request) -> web.Response:
        key = idempotency_key(request)
        wanted = remember_request(await read_object(request, self._limits), self._limits, key)
        user = needed_user(request, wanted.user)
        added = await self._threads.run(self._memory.add, user, wanted.items, wanted.conversation, key)
        memories = [added_json(one) for one in added]
        new = [one.id for one in added if one.outcome != "seen"]
        return web.json_response({"user": user, "added": new, "memories": memories})

    async def read(self, request: web.Request) -> web.Response:
        query_only(request, ("user", "id", "limit", "after"))
        user, id = needed_user(request, None), query_text(request, "id")
        if id is not None:
            memory = await self._threads.run(self._memory.get, user, id)
            return web.json_response({"user": user} | memory_json(memory))
        limit = query_integer(request, "limit", 1, MAX_PAGE, 100)
        page = await self._threads.run(self._memory.list, user, limit, query_text(request, "after"))
        memories = [memory_json(memory) for memory in page.memories]
        return web.json_response({"user": user, "memories": memories, "next": page.next})

    async def forget(self, request: web.Request) -> web.Response:
        query_only(request, ("user", "id"))
        refuse_body(request)
        user, ids = needed_user(request, None), request.query.getall("id", [])
        for id in ids:
            check_text(id, "id")
        try:
            gone = (await self._erase(user, ids)).ids
        except NotFound:
            if ids:
                raise
            gone = ()
        return web.json_response({"user": user, "forgotten": list(gone)})

    async def recall(self, request: web.Request) -> web.Response:
        wanted = recall_request(await read_object(request, self._limits), _RECALLED)
        options = RecallOptions(k=wanted.k, budget_tokens=wanted.budget_tokens)
        found = await self._threads.run(self._memory.recall, needed_user(request, wanted.user), wanted.query, options)
        return web.json_response({"memories": [recalled_json(item, wanted.explain) for item in found]})

    async def users(self, request: web.Request) -> web.Response:
        query_only(request, ("after", "limit"))
        after, limit = query_text(request, "after") or "", query_integer(request, "limit", 1, MAX_PAGE, MAX_PAGE)
        return web.json_response(await self._threads.run(users_json, self._memory, after, limit))

    async def elsewhere(self, request: web.Request) -> web.Response:
        """What is amem's own and not served here must not reach the upstream: it names users."""
        message = f"The proxy has no {request.method} on this route; name the user by ?user=, or run `amem kv-serve`."
        raise ApiError(404, "not_found", message)

    async def _erase(self, user: str, ids: list[str]) -> Forgotten:
        if not ids:
            return await self._threads.run(self._memory.forget_user, user)
        return await self._threads.run(self._memory.forget, user, ids)
