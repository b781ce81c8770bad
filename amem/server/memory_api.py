"""Routes of memories: remember, list, get, update, forget, recall. They need no engine to work."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from amem.engine.types import ForgetReceipt
from amem.memory.errors import NotFound
from amem.memory.types import Added, Forgotten, Memory, NewMemory, RecallOptions
from amem.server.errors import bad_request
from amem.server.idempotency import Once, idempotency_key
from amem.server.memory_schema import (
    MAX_PAGE,
    RememberRequest,
    query_integer,
    query_only,
    query_text,
    recall_request,
    remember_request,
    update_request,
)
from amem.server.services import Services, needed_user, services_of
from amem.server.shapes import added_json, memory_json, recalled_json, receipt_json
from amem.server.strict_json import Json, check_text, read_object, refuse_body

_MAX_IDS = 256


def routes() -> list[web.RouteDef]:
    forms = ("/v1/memories", "/v1/memories/{user}")
    one = "/v1/memories/{user}/{id}"
    return [
        web.post("/v1/memories", remember),
        *(web.get(path, read, allow_head=False) for path in (*forms, one)),
        *(web.delete(path, forget) for path in (*forms, one)),
        *(web.patch(path, update) for path in (*forms, one)),
        web.post("/v1/recall", recall),
    ]


async def remember(request: web.Request) -> web.Response:
    services = services_of(request)
    body = await read_object(request, services.config.limits)
    key = idempotency_key(request)
    wanted = remember_request(body, services.config.limits, key)
    user = needed_user(request, wanted.user)

    async def effect() -> Json:
        return await store(services, user, wanted, key)

    return web.json_response(await services.replays.once(Once(user, "add", key), body, effect))


async def store(services: Services, user: str, wanted: RememberRequest, key: str | None) -> Json:
    """Stores texts durably, and has their KV computed afterwards. KV of what they supersede is gone on return."""
    await services.threads.run(check_lengths, services, wanted.items)
    if any(item.key is not None for item in wanted.items):
        async with services.kv.gates.of(user).erasing():
            added = await _add(services, user, wanted, key)
            superseded = tuple(id for one in added for id in one.superseded)
            receipt = await services.kv.erase_inside(user, superseded)
    else:
        added, receipt = await _add(services, user, wanted, key), ForgetReceipt()
    new = [one.id for one in added if one.outcome != "seen"]
    services.kv.compute(user, new)
    services.count("memories_added", len(new))
    return {
        "user": user,
        "conversation": wanted.conversation,
        "added": new,
        "memories": [added_json(one) for one in added],
        "kv": receipt_json(receipt),
    }


async def _add(services: Services, user: str, wanted: RememberRequest, key: str | None) -> Sequence[Added]:
    return await services.threads.run(services.memory.add, user, wanted.items, wanted.conversation, key)


def check_lengths(services: Services, items: Sequence[NewMemory]) -> None:
    """Raises ApiError 400 for a memory that no prompt could ever hold."""
    limit = services.memory_tokens()
    for index, item in enumerate(items):
        tokens = services.planner.count(item.text)
        if tokens > limit:
            message = (
                f"The text has {tokens} tokens and a prompt holds at most {limit} of memory; split it into parts."
            )
            raise bad_request(message, f"texts[{index}]", "memory_too_long")


async def read(request: web.Request) -> web.Response:
    """A page of memories, or one of them when an id is given."""
    services, user = services_of(request), needed_user(request)
    query_only(request, ("user", "id", "limit", "after"))
    id = _one_id(request)
    if id is not None:
        memory = await services.threads.run(services.memory.get, user, id)
        return web.json_response({"user": user} | memory_json(memory))
    limit = query_integer(request, "limit", 1, MAX_PAGE, 100)
    page = await services.threads.run(services.memory.list, user, limit, query_text(request, "after"))
    memories = [memory_json(memory) for memory in page.memories]
    return web.json_response({"user": user, "memories": memories, "next": page.next})


async def update(request: web.Request) -> web.Response:
    services = services_of(request)
    query_only(request, ("user", "id"))
    body = await read_object(request, services.config.limits)
    wanted = update_request(body)
    user, id = needed_user(request, wanted.user), _one_id(request, wanted.id)
    if id is None:
        raise bad_request("id is required.", "id", "missing_required_parameter")
    if wanted.text is not None:
        await services.threads.run(check_lengths, services, [NewMemory(wanted.text)])

    async def change() -> Memory:
        return await services.threads.run(
            services.memory.update, user, id, text=wanted.text, metadata=wanted.metadata, version=wanted.version
        )

    async def effect() -> Json:
        if wanted.text is None:
            return {"user": user} | memory_json(await change()) | {"kv": receipt_json(ForgetReceipt())}
        await services.threads.run(services.memory.get, user, id)
        memory, receipt = await services.kv.erase(user, (id,), change)
        services.kv.compute(user, [memory.id])
        return {"user": user} | memory_json(memory) | {"kv": receipt_json(receipt)}

    once = Once(user, "update", idempotency_key(request))
    return web.json_response(await services.replays.once(once, body | {"id": id}, effect))


async def forget(request: web.Request) -> web.Response:
    """Erases one memory, several, or all of a user. What is named is gone from text, index and KV on return."""
    services, user = services_of(request), needed_user(request)
    query_only(request, ("user", "id"))
    refuse_body(request)
    ids = _ids(request)

    async def change() -> Forgotten:
        if ids is None:
            return await services.threads.run(services.memory.forget_user, user)
        gone = await services.threads.run(services.memory.forget, user, ids)
        await services.kv.erase_inside(user, tuple(id for id in gone.ids if id not in ids))  # earlier versions
        return gone

    async def effect() -> Json:
        for id in ids or ():
            await services.threads.run(services.memory.get, user, id)
        try:
            gone, receipt = await services.kv.erase(user, ids, change)
        except NotFound:
            if ids is not None:
                raise
            gone, receipt = Forgotten((), 0, 0, 0, 0.0), ForgetReceipt()
        services.replays.forget(user, None if ids is None else gone.ids)
        services.count("memories_forgotten", len(gone.ids))
        text = {"rows": gone.rows, "vectors": gone.vectors, "sessions": gone.sessions}
        return {"user": user, "forgotten": list(gone.ids), "text": text, "kv": receipt_json(receipt)}

    once = Once(user, "forget", idempotency_key(request))
    return web.json_response(await services.replays.once(once, {"ids": ids}, effect))


async def recall(request: web.Request) -> web.Response:
    services = services_of(request)
    body = await read_object(request, services.config.limits)
    wanted = recall_request(body, services.config.answers.recall)
    user = needed_user(request, wanted.user)
    options = RecallOptions(wanted.k, wanted.budget_tokens, conversation=wanted.conversation)
    found = await services.threads.run(services.memory.recall, user, wanted.query, options)
    memories = [recalled_json(one, wanted.explain) for one in found]
    return web.json_response({"user": user, "query": wanted.query, "memories": memories})


def _ids(request: web.Request, in_body: str | None = None) -> tuple[str, ...] | None:
    single = [id for id in (request.match_info.get("id"), in_body) if id is not None]
    ids = tuple(dict.fromkeys(request.query.getall("id", []) + single))
    for id in ids:
        check_text(id, "id")
    if len(ids) > _MAX_IDS:
        raise bad_request(f"At most {_MAX_IDS} ids in one call.", "id", "value_too_long")
    return ids or None


def _one_id(request: web.Request, in_body: str | None = None) -> str | None:
    ids = _ids(request, in_body)
    if ids is not None and len(ids) > 1:
        raise bad_request("Name one id.", "id", "conflicting_values")
    return None if ids is None else ids[0]
