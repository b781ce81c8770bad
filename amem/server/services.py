"""What the routes work with, made once when the server starts."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from amem.engine.client import EngineClient, EngineState
from amem.engine.types import EngineError, ModelInfo
from amem.memory.plan import Planner
from amem.memory.service import MemoryService
from amem.server.auth import Gate
from amem.server.background import KvKeeper, Rooms
from amem.server.config import MODEL_ALIAS, ConfigError, ServerConfig
from amem.server.erasures import ErasureJournal
from amem.server.errors import ApiError, bad_request, unavailable
from amem.server.idempotency import Replays
from amem.server.memory_schema import query_text
from amem.server.strict_json import check_text
from amem.server.threads import Threads
from amem.server.turns import TurnPlanner
from amem.text import ChatFormat

_RETRY_S = 2


@dataclass(eq=False)
class Services:
    """Shared by all requests of one server; lives on one event loop."""

    config: ServerConfig
    memory: MemoryService
    engine: EngineClient
    planner: Planner
    turns: TurnPlanner
    kv: KvKeeper
    threads: Threads
    gate: Gate
    max_context: int
    replays: Replays = field(default_factory=Replays)
    active: set[asyncio.Task[object]] = field(default_factory=set)
    counters: dict[str, int] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False

    @classmethod
    def open(cls, config: ServerConfig) -> Services:
        """Opens the data directory and reads the tokenizer; the engine is not started. Blocking."""
        planner, context = Planner(ChatFormat.load(config.model_dir), config.plan), _max_context(config)
        memory_config = dataclasses.replace(config.memory, count_tokens=planner.count)
        memory = MemoryService(config.data_dir, memory_config)
        engine, threads = EngineClient(config.engine), Threads()
        journal = ErasureJournal(config.data_dir / "erasures")
        kv = KvKeeper(Rooms(memory, engine, planner, threads), journal, config.limits.forget_wait_s)
        turns = TurnPlanner(memory, planner, config.answers)
        return cls(config, memory, engine, planner, turns, kv, threads, Gate.of(config), context)

    def memory_tokens(self) -> int:
        """Most memory tokens that one prompt holds."""
        context = self.known_model.max_context if self.known_model else self.max_context
        return int(context * self.config.answers.memory_share)

    async def close(self) -> None:
        await self.kv.close()
        await self.engine.close()
        await self.threads.run(self.memory.close)
        self.threads.close()

    def ready_model(self) -> ModelInfo:
        """The model, when it can answer now. Raises ApiError 503 with the reason otherwise."""
        if self.draining:
            raise unavailable("The server is shutting down.")
        if self.engine.state is not EngineState.READY:
            reason = self.engine.reason or self.engine.state.value
            raise unavailable(f"The engine is not ready: {reason}. Memories can be read and written meanwhile.")
        return self.engine.model

    @property
    def known_model(self) -> ModelInfo | None:
        """The model, also while its engine is being restarted; None before it was ready for the first time."""
        try:
            return self.engine.model
        except EngineError:
            return None

    def check_model(self, name: str) -> ModelInfo:
        """Raises ApiError 404 for a name that is neither the alias nor the model's own, 503 before it is loaded."""
        model = self.ready_model()
        if name not in (MODEL_ALIAS, model.name):
            message = f"The model {name[:128]!r} does not exist here; use {MODEL_ALIAS!r} or {model.name!r}."
            raise ApiError(404, "model_not_found", message, "model")
        return model

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """A place among the requests in flight. Raises ApiError 429 when there is none."""
        if len(self.active) >= self.config.limits.active:
            message = f"{len(self.active)} requests are in flight already; try again shortly."
            raise ApiError(429, "too_many_requests", message, retry_after_s=_RETRY_S)
        task: asyncio.Task[object] | None = asyncio.current_task()
        if task is None:
            raise RuntimeError("a request runs in a task")
        self.active.add(task)
        try:
            yield
        finally:
            self.active.discard(task)

    def count(self, name: str, amount: int = 1) -> None:
        self.counters[name] = self.counters.get(name, 0) + amount


def _max_context(config: ServerConfig) -> int:
    """The context of the model's own config.json, for as long as the engine has not named its limit."""
    try:
        values = json.loads((config.model_dir / "config.json").read_text(encoding="utf-8"))
        return int(values["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{config.model_dir} is not a model directory"
        raise ConfigError(f"{reason}: its config.json names no max_position_embeddings") from error


SERVICES = web.AppKey("services", Services)


def services_of(request: web.Request) -> Services:
    return request.app[SERVICES]


def user_of(request: web.Request, body_user: str | None = None) -> str | None:
    """The user that a request is for: path, query, x-amem-user and body, all that are given have to agree.

    Raises ApiError 400 when they do not.
    """
    headers = request.headers.getall("x-amem-user", [])
    if len(set(headers)) > 1:
        raise bad_request("x-amem-user is given twice with different users.", "x-amem-user", "conflicting_values")
    given = [request.match_info.get("user"), query_text(request, "user"), *headers[:1], body_user]
    users = [user for user in given if user is not None]
    for user in users:
        check_text(user, "user")
    if len(set(users)) > 1:
        message = "The path, ?user=, x-amem-user and the body name different users; send one of them."
        raise bad_request(message, "user", "conflicting_values")
    return users[0] if users else None


async def session_user(request: web.Request, session: str) -> str:
    """The user of a session: the one that the request names, else its owner. Raises NotFound."""
    user = user_of(request)
    services = services_of(request)
    return user if user is not None else await services.threads.run(services.memory.session_owner, session)


def needed_user(request: web.Request, body_user: str | None = None) -> str:
    user = user_of(request, body_user)
    if user is None:
        raise bad_request("user is required.", "user", "missing_required_parameter")
    return user
