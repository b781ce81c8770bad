"""Routes that tell how the server is: health, models, stats, users."""

from __future__ import annotations

import dataclasses
import time
from contextlib import suppress

from aiohttp import web

from amem import __version__
from amem.engine.client import EngineState
from amem.engine.types import EngineError, ModelInfo
from amem.server.config import MODEL_ALIAS
from amem.server.errors import ApiError
from amem.server.memory_schema import MAX_PAGE, query_integer, query_only, query_text
from amem.server.services import Services, services_of
from amem.server.shapes import users_json
from amem.server.strict_json import Json


def routes() -> list[web.RouteDef]:
    return [
        web.get("/health", health),
        web.get("/v1/models", models),
        web.get("/v1/models/{model}", model),
        web.get("/v1/stats", stats, allow_head=False),
        web.get("/v1/users", users, allow_head=False),
    ]


async def health(request: web.Request) -> web.Response:
    """200 while questions can be answered, 503 with the reason while not. Names no user and no path."""
    services = services_of(request)
    info, ready = services.known_model, services.engine.state is EngineState.READY
    status = "draining" if services.draining else "ok" if ready else "loading" if info is None else "degraded"
    body: Json = {
        "status": status,
        "version": __version__,
        "model": None if info is None else info.name,
        "engine": {"state": services.engine.state.value, "reason": services.engine.reason},
        "memory": {"state": "ready"},
    }
    return web.json_response(body, status=200 if status == "ok" else 503)


async def models(request: web.Request) -> web.Response:
    services = services_of(request)
    info = services.known_model
    names = [MODEL_ALIAS] if info is None or info.name == MODEL_ALIAS else [MODEL_ALIAS, info.name]
    return web.json_response({"object": "list", "data": [_model_json(services, name, info) for name in names]})


async def model(request: web.Request) -> web.Response:
    services, name = services_of(request), request.match_info["model"]
    info = services.known_model
    if name != MODEL_ALIAS and (info is None or name != info.name):
        raise ApiError(404, "model_not_found", f"The model {name[:128]!r} does not exist here.", "model")
    return web.json_response(_model_json(services, name, info))


def _model_json(services: Services, name: str, info: ModelInfo | None) -> Json:
    body: Json = {"id": name, "object": "model", "created": services.created, "owned_by": "amem"}
    if info is not None:
        body |= {"root": info.name, "max_model_len": info.max_context}
    return body


async def stats(request: web.Request) -> web.Response:
    """Counters of the server since it started, of the memories and of the engine (null while it is down)."""
    services = services_of(request)
    engine: Json | None = None
    with suppress(EngineError):
        engine = dict(await services.engine.stats())
    body: Json = {
        "server": services.counters
        | {
            "uptime_s": round(time.monotonic() - services.started, 3),
            "active_requests": len(services.active),
            "kv_jobs_waiting": services.kv.waiting,
        },
        "memory": await services.threads.run(services.memory.stats),
        "engine": engine,
        "model": None if services.known_model is None else dataclasses.asdict(services.known_model),
    }
    return web.json_response(body)


async def users(request: web.Request) -> web.Response:
    """A page of users by name; the last name of one page is `after` of the next."""
    services = services_of(request)
    query_only(request, ("after", "limit"))
    after, limit = query_text(request, "after") or "", query_integer(request, "limit", 1, MAX_PAGE, MAX_PAGE)
    return web.json_response(await services.threads.run(users_json, services.memory, after, limit))
