"""Builds the application and runs it: start, serve, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from contextlib import suppress

from aiohttp import web
from aiohttp.typedefs import Handler

from amem.engine.types import ModelInfo
from amem.server import chat, memory_api, sessions_api, status
from amem.server.config import ConfigError, OnProgress, OnReady, ReadyInfo, ServerConfig
from amem.server.failures import failures
from amem.server.services import SERVICES, Services

_log = logging.getLogger(__name__)


def build(services: Services) -> web.Application:
    """The application of a server whose services are open. The caller starts and closes the services."""
    app = web.Application(middlewares=[failures, _allowed], client_max_size=services.config.limits.max_body_bytes)
    app[SERVICES] = services
    for routes in (status.routes(), memory_api.routes(), sessions_api.routes(), chat.routes()):
        app.add_routes(routes)
    app.on_response_prepare.append(_headers)
    return app


@web.middleware
async def _allowed(request: web.Request, handler: Handler) -> web.StreamResponse:
    request.app[SERVICES].gate.check(request)
    return await handler(request)


async def _headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "amem"
    response.headers["X-Request-Id"] = request.get("request_id", "")
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")


def serve(config: ServerConfig, on_ready: OnReady | None = None, on_progress: OnProgress | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then lets running answers end. A second signal ends them.

    on_ready is called once, when questions can be answered; on_progress with bytes of weights read and their total.
    Raises ConfigError (bad address, port in use), DataDirError, TextError or EngineError when it cannot start.
    """
    asyncio.run(run(config, on_ready, on_progress))


async def run(config: ServerConfig, on_ready: OnReady | None = None, on_progress: OnProgress | None = None) -> None:
    """`serve` as a coroutine."""
    began = time.monotonic()
    services = await asyncio.to_thread(Services.open, config)
    runner = runner_of(services)
    try:
        await runner.setup()
        url = await _listen(runner, config)
        stop = _signals(services)
        starting = asyncio.ensure_future(services.engine.start(on_progress))
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            info = starting.result()
            services.kv.start()
            if on_ready is not None:
                on_ready(await _ready_info(services, info, url, time.monotonic() - began))
            await stopping
        else:
            starting.cancel()
    finally:
        services.draining = True
        await runner.cleanup()
        await services.close()


def runner_of(services: Services) -> web.AppRunner:
    """How the application is run: a client that leaves cancels its handler, a slow one is cut off."""
    limits = services.config.limits
    return web.AppRunner(
        build(services),
        access_log=None,
        handler_cancellation=True,
        auto_decompress=False,
        keepalive_timeout=limits.idle_connection_s,
        shutdown_timeout=limits.shutdown_s,
    )


async def _listen(runner: web.AppRunner, config: ServerConfig) -> str:
    site = web.TCPSite(runner, config.host, config.port)
    try:
        await site.start()
    except OSError as error:
        reason = f"cannot listen on {config.host}:{config.port}: {error.strerror}"
        raise ConfigError(f"{reason}; choose another --port or stop what uses it") from error
    host, port = runner.addresses[0][:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _signals(services: Services) -> asyncio.Event:
    stop = asyncio.Event()

    def received() -> None:
        if stop.is_set():
            for task in services.active:
                task.cancel()
        services.draining = True
        stop.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        with suppress(NotImplementedError, ValueError, RuntimeError):  # Only a main thread gets signals.
            asyncio.get_running_loop().add_signal_handler(signum, received)
    return stop


async def _ready_info(services: Services, model: ModelInfo, url: str, seconds: float) -> ReadyInfo:
    tokens = model.pages * model.page_size
    users = await services.threads.run(services.memory.users)
    return ReadyInfo(
        url=url,
        model=model.name,
        dtype=model.dtype,
        device=model.device,
        max_context=model.max_context,
        kv_tokens=tokens,
        kv_bytes=tokens * model.kv_bytes_per_token,
        data_dir=services.config.data_dir,
        users=len(users),
        auth=services.config.api_key is not None,
        seconds=seconds,
    )
