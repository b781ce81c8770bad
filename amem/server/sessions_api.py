"""Routes of sessions: the working set that one conversation keeps in KV."""

from __future__ import annotations

from aiohttp import web

from amem.server.idempotency import Once, idempotency_key
from amem.server.memory_schema import query_only, session_request
from amem.server.services import needed_user, services_of, session_user
from amem.server.shapes import session_json
from amem.server.strict_json import Json, check_text, read_object, refuse_body


def routes() -> list[web.RouteDef]:
    one = "/v1/sessions/{id}"
    return [
        web.post("/v1/sessions", start),
        web.get(one, read, allow_head=False),
        web.delete(one, end),
    ]


async def start(request: web.Request) -> web.Response:
    services = services_of(request)
    body = await read_object(request, services.config.limits)
    wanted = session_request(body)
    user = needed_user(request, wanted.user)
    budget = min(wanted.budget_tokens or services.memory_tokens(), services.memory_tokens())

    async def effect() -> Json:
        session = await services.threads.run(services.memory.start_session, user, budget, wanted.session)
        return session_json(session)

    once = Once(user, "session", idempotency_key(request))
    return web.json_response(await services.replays.once(once, body, effect))


async def read(request: web.Request) -> web.Response:
    services, id = services_of(request), session_id(request)
    user = await session_user(request, id)
    session = await services.threads.run(services.memory.session, user, id)
    return web.json_response(session_json(session))


async def end(request: web.Request) -> web.Response:
    refuse_body(request)
    services, id = services_of(request), session_id(request)
    user = await session_user(request, id)
    await services.threads.run(services.memory.end_session, user, id)
    return web.json_response({"id": id, "session": id, "user": user, "ended": True})


def session_id(request: web.Request) -> str:
    query_only(request, ("user",))
    id = request.match_info["id"]
    check_text(id, "session")
    return id
