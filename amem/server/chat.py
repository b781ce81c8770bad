"""POST /v1/chat/completions: recall, plan, generate, report."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import suppress

from aiohttp import web

from amem.engine.client import EngineClient
from amem.engine.messages import Finished, Tokens
from amem.engine.types import BlendOptions, GenerateRequest, ModelInfo, SamplingParams
from amem.memory.types import NewMemory
from amem.server.answers import Delta, End, answer
from amem.server.completions import Completion
from amem.server.errors import ApiError, bad_request, unavailable
from amem.server.failures import translated, unforeseen
from amem.server.idempotency import idempotency_key
from amem.server.memory_api import store
from amem.server.memory_schema import RememberRequest, query_only
from amem.server.schema import ChatRequest, chat_request
from amem.server.services import Services, services_of, session_user, user_of
from amem.server.stream import EventStream, with_pauses
from amem.server.strict_json import Json, read_object
from amem.server.turns import Turn


def routes() -> list[web.RouteDef]:
    return [web.post("/v1/chat/completions", complete)]


async def complete(request: web.Request) -> web.StreamResponse:
    services = services_of(request)
    query_only(request, ())
    chat = chat_request(await read_object(request, services.config.limits), services.config.limits)
    user = user_of(request, chat.user)
    if user is None and chat.amem.session is not None:
        user = await session_user(request, chat.amem.session)
    if user is None and chat.amem.remember:
        raise bad_request("amem.remember needs a user.", "user", "missing_required_parameter")
    model = services.check_model(chat.model)
    if (chat.sampling.max_tokens or 0) > model.max_context:
        message = f"max_tokens is above the model's context of {model.max_context} tokens."
        raise bad_request(message, "max_tokens", "value_out_of_range")
    async with services.admitted():
        services.count("chat_requests")
        completion, generation = await _begin(services, chat, user, model, idempotency_key(request))
        try:
            if chat.stream:
                return await _streamed(request, services, completion, generation)
            return await _whole(services, completion, generation)
        finally:
            await generation.close()


class Generation:
    """A request that the engine has been sent. Closing it before its end aborts it."""

    def __init__(self, engine: EngineClient, request: GenerateRequest) -> None:
        self.id = request.id
        self._engine = engine
        events = engine.generate(request)
        self._events = events
        self._first: asyncio.Future[Tokens | Finished] = asyncio.ensure_future(anext(events))

    async def events(self) -> AsyncGenerator[Tokens | Finished, None]:
        """Tokens, then one Finished. Raises EngineError."""
        yield await self._first
        async for event in self._events:
            yield event

    async def close(self) -> None:
        self._first.cancel()
        await asyncio.gather(self._first, return_exceptions=True)
        if isinstance(self._events, AsyncGenerator):
            await self._events.aclose()

    def stop(self) -> None:
        """Ends the answer early; the report still comes."""
        self._engine.abort(self.id)


async def _begin(
    services: Services, chat: ChatRequest, user: str | None, model: ModelInfo, key: str | None
) -> tuple[Completion, Generation]:
    """Plans under the user's gate, and passes it only once the engine has the request."""
    if user is None:
        turn = await services.threads.run(services.turns.plan, chat, None, model.max_context)
        return Completion(chat, None, turn, model), _generate(services, chat, turn, model)
    async with services.kv.gates.of(user).planning():
        turn = await services.threads.run(services.turns.plan, chat, user, model.max_context)
        remembered = await _remembered(services, chat, user, key)
        generation = _generate(services, chat, turn, model)
        try:
            await asyncio.sleep(0)  # The request is on its way before an eraser may pass the gate.
        except asyncio.CancelledError:
            await generation.close()
            raise
    return Completion(chat, user, turn, model, remembered), generation


async def _remembered(services: Services, chat: ChatRequest, user: str, key: str | None) -> tuple[str, ...]:
    if not chat.amem.remember or chat.question is None:
        return ()
    stored = await store(services, user, RememberRequest(user, (NewMemory(chat.question),), None), key)
    return tuple(one["id"] for one in stored["memories"])


def _generate(services: Services, chat: ChatRequest, turn: Turn, model: ModelInfo) -> Generation:
    wanted, defaults = chat.sampling, services.config.answers
    room = model.max_context - turn.plan.tokens
    sampling = SamplingParams(
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        min_p=wanted.min_p,
        seed=wanted.seed,
        max_tokens=min(wanted.max_tokens or defaults.max_tokens, room),
        stop_token_ids=model.eos_token_ids,
        logprobs=wanted.logprobs,
    )
    blend = BlendOptions(
        chat.amem.fidelity or defaults.fidelity, chat.amem.recompute_ratio, chat.amem.policy or defaults.policy
    )
    request = GenerateRequest(f"gen-{secrets.token_hex(8)}", turn.tenant, turn.plan.segments, sampling, blend)
    return Generation(services.engine, request)


async def _whole(services: Services, completion: Completion, generation: Generation) -> web.Response:
    text: list[str] = []
    logprobs: list[Json] = []
    async for piece in _pieces(services, completion, generation):
        if isinstance(piece, Delta):
            text.append(piece.text)
            logprobs += piece.logprobs
        else:
            return web.json_response(completion.whole("".join(text), logprobs, piece.reason, piece.report))
    raise ApiError(500, "internal_error", "The engine ended the answer without a report.")


async def _streamed(
    request: web.Request, services: Services, completion: Completion, generation: Generation
) -> web.StreamResponse:
    stream = EventStream(request, services.config.limits)
    pause = services.config.limits.keep_alive_comment_s
    begun = False
    try:
        async for piece in with_pauses(_pieces(services, completion, generation), pause):
            if piece is None:
                await stream.comment()
                continue
            if not begun:
                await stream.event(completion.chunk({"role": "assistant", "content": ""}))
                begun = True
            if isinstance(piece, Delta):
                await stream.event(completion.chunk({"content": piece.text}, piece.logprobs))
            else:
                for chunk in completion.last_chunks(piece.reason, piece.report):
                    await stream.event(chunk)
        return await stream.end()
    except asyncio.CancelledError:
        if services.draining and stream.opened:
            with suppress(ConnectionError):
                await stream.error(unavailable("The server is shutting down."))
        raise
    except ConnectionResetError:
        raise
    except Exception as error:
        if not stream.opened:
            raise
        await stream.error(translated(error) or unforeseen(error))
        return await stream.close()


def _pieces(services: Services, completion: Completion, generation: Generation) -> AsyncGenerator[Delta | End, None]:
    ends = frozenset(completion.model.eos_token_ids)
    stops = completion.chat.sampling.stop
    return answer(generation.events(), services.planner.chat, stops, ends, generation.stop)
