"""Builds the application and runs it: start, serve, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import time

from aiohttp import web
from aiohttp.typedefs import Handler

from amem.engine.types import ModelInfo
from amem.server import chat, memory_api, sessions_api, status
from amem.server.config import ConfigError, OnProgress, OnReady, ReadyInfo, ServerConfig
from amem.server.failures import REQUEST_ID, Discreet, failures
from amem.server.services import SERVICES, Services

_MAX_ADDRESS_BYTES = 32 << 10


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
    response.headers["X-Request-Id"] = REQUEST_ID.get()
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")


class Server:
    """One listening server. Memory routes work from `listen` on, questions are answered from `start_engine` on."""

    def __init__(self, services: Services, runner: web.AppRunner, url: str) -> None:
        self.services = services
        self.url = url
        self._runner = runner
        self._began = time.monotonic()

    @classmethod
    async def listen(cls, config: ServerConfig) -> Server:
        """Opens the data directory and the socket. Raises ConfigError, DataDirError or TextError."""
        services = await asyncio.to_thread(Services.open, config)
        runner = _runner(services)
        try:
            await runner.setup()
            return cls(services, runner, await _bind(runner, config))
        except BaseException:
            await runner.cleanup()
            await services.close()
            raise

    async def start_engine(self, on_progress: OnProgress | None = None) -> ReadyInfo:
        """Returns when questions can be answered. Raises EngineError."""
        model = await self.services.engine.start(on_progress)
        self.services.kv.start()
        return await self._ready_info(model)

    async def close(self) -> None:
        """Lets running requests end, for as long as the limits allow, then stops."""
        self.services.draining = True
        try:
            await self._runner.cleanup()
        finally:
            await self.services.close()

    def signalled(self) -> asyncio.Event:
        """Set by the first SIGTERM or SIGINT; a second one ends the requests that still run."""
        stop = asyncio.Event()

        def received() -> None:
            if stop.is_set():
                for task in self.services.active:
                    task.cancel()
            self.services.draining = True
            stop.set()

        for signum in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signum, received)
        return stop

    async def _ready_info(self, model: ModelInfo) -> ReadyInfo:
        tokens = model.pages * model.page_size
        memory = await self.services.threads.run(self.services.memory.stats)
        return ReadyInfo(
            url=self.url,
            model=model.name,
            dtype=model.dtype,
            device=model.device,
            max_context=model.max_context,
            kv_tokens=tokens,
            kv_bytes=tokens * model.kv_bytes_per_token,
            data_dir=self.services.config.data_dir,
            users=memory["users"],
            auth=self.services.config.api_key is not None,
            seconds=time.monotonic() - self._began,
        )


def serve(config: ServerConfig, on_ready: OnReady | None = None, on_progress: OnProgress | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then lets running answers end. A second signal ends them.

    on_ready is called once, when questions can be answered; on_progress with bytes of weights read and their total.
    Raises ConfigError (bad address, port in use), DataDirError, TextError or EngineError when it cannot start.
    """
    asyncio.run(run(config, on_ready, on_progress))


async def run(config: ServerConfig, on_ready: OnReady | None = None, on_progress: OnProgress | None = None) -> None:
    """`serve` as a coroutine of the main thread."""
    server = await Server.listen(config)
    starting: asyncio.Task[ReadyInfo] | None = None
    try:
        stopping = asyncio.ensure_future(server.signalled().wait())
        starting = asyncio.ensure_future(server.start_engine(on_progress))
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            info = starting.result()
            if on_ready is not None:
                on_ready(info)
            await stopping
    finally:
        if starting is not None and not starting.done():
            starting.cancel()
        await server.close()


def _runner(services: Services) -> web.AppRunner:
    """A client that leaves cancels its handler; a body is never decompressed; idle connections end."""
    limits = services.config.limits
    log = logging.getLogger("amem.server.http")
    log.addFilter(Discreet())
    return web.AppRunner(
        build(services),
        access_log=None,
        logger=log,
        max_line_size=_MAX_ADDRESS_BYTES,
        handler_cancellation=True,
        auto_decompress=False,
        keepalive_timeout=limits.idle_connection_s,
        shutdown_timeout=limits.shutdown_s,
    )


async def _bind(runner: web.AppRunner, config: ServerConfig) -> str:
    site = web.TCPSite(runner, config.host, config.port)
    try:
        await site.start()
    except OSError as error:
        reason = f"cannot listen on {config.host}:{config.port}: {error.strerror}"
        raise ConfigError(f"{reason}; choose another --port or stop what uses it") from error
    host, port = runner.addresses[0][:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
