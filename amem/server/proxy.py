"""`amem proxy`: an OpenAI-compatible server of somebody else's, with amem's memories put into its chats.

Everything passes through; of `/v1/chat/completions` the messages are changed, and nothing else. Answers are not
touched, byte for byte. When memory fails, the request goes on as it came, and a header says so. The caller's key
goes to the upstream and no other does; amem's own key travels in X-Amem-Key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler
from multidict import CIMultiDict
from yarl import URL

from amem import __version__
from amem.memory.service import MemoryService
from amem.server.auth import Gate
from amem.server.config import ConfigError, Limits, is_loopback
from amem.server.errors import ApiError
from amem.server.failures import failures
from amem.server.proxy_memory import ProxyMemory
from amem.server.proxy_turns import ProxyTurns, Remembering
from amem.server.strict_json import Json
from amem.server.threads import Threads

_log = logging.getLogger(__name__)
_CONNECT_S = 10.0
_BODY_BYTES = 64 << 20
_BY_HOP = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade".split()
)
_NOT_SENT_ON = _BY_HOP | {"host", "content-length", "x-amem-key", "x-amem-user"}


@dataclass(frozen=True, slots=True)
class ProxyConfig:
    """Raises ConfigError for an upstream that is no URL, or an open address without a key.

    upstream: base URL with its /v1. silence_s: seconds without a byte from the upstream after which it is given up.
    """

    upstream: str
    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 8100
    api_key: str | None = None
    remembering: Remembering = field(default_factory=Remembering)
    silence_s: float = 600.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.upstream)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"the upstream {self.upstream!r} is not an http(s) URL; give one that ends in /v1")
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("the key is empty; leave it out on loopback or set AMEM_API_KEY to a secret")
        if self.api_key is None and not is_loopback(self.host):
            raise ConfigError(f"{self.host} can be reached from outside: set AMEM_API_KEY, or bind 127.0.0.1")

    @property
    def root(self) -> str:
        return self.upstream.rstrip("/").removesuffix("/v1")


class Proxy:
    """Handlers of one proxy; lives on one event loop."""

    def __init__(self, config: ProxyConfig, memory: MemoryService, http: aiohttp.ClientSession) -> None:
        self._config = config
        self._memory = memory
        self._http = http
        self._threads = Threads()
        self._turns = ProxyTurns(memory, config.remembering)
        self._key = None if config.api_key is None else hashlib.sha256(config.api_key.strip().encode()).digest()

    def build(self) -> web.Application:
        app = web.Application(middlewares=[failures, self._allowed], client_max_size=_BODY_BYTES)
        app.router.add_get("/health", self.health)
        app.add_routes(ProxyMemory(self._memory, self._threads, Limits()).routes())
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_route("*", "/{anything:.*}", self.forward)
        return app

    async def close(self) -> None:
        await self._threads.run(self._memory.close)
        self._threads.close()

    @web.middleware
    async def _allowed(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._key is None:
            Gate(None).check(request)
        elif request.path != "/health":
            given = request.headers.get("X-Amem-Key", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(hashlib.sha256(given).digest(), self._key):
                raise ApiError(401, "invalid_amem_key", "The header X-Amem-Key is missing or wrong.")
        return await handler(request)

    async def health(self, request: web.Request) -> web.Response:
        """The proxy's own state; the upstream is not asked."""
        return web.json_response({"status": "ok", "version": __version__, "memory": {"state": "ready"}})

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Any other route, as it is."""
        return await self._send(request, await request.read(), {})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body, state = await self._with_memory(request, raw)
        return await self._send(request, body, {"X-Amem-Memory": state})

    async def _with_memory(self, request: web.Request, raw: bytes) -> tuple[bytes, str]:
        """The body to send on, and what the header says about memory."""
        try:
            body = json.loads(raw)
            if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
                return raw, "off"
            user = _user_of(request, body)
            if user is None:
                return raw, "off"
            found = await self._threads.run(self._turns.remember, user, body["messages"])
        except (ValueError, RecursionError):
            return raw, "off"  # not JSON, or not text: the upstream judges it
        except Exception as error:  # whatever is wrong with memory, the chat goes on
            _log.warning("a chat goes on without memory: %s", type(error).__name__)
            return raw, "unavailable"
        if not found.memories:
            return raw, "0"
        return json.dumps(body | {"messages": found.messages}, ensure_ascii=False).encode(), str(found.memories)

    async def _send(self, request: web.Request, body: bytes, extra: dict[str, str]) -> web.StreamResponse:
        try:
            upstream = await self._http.request(
                request.method,
                URL(self._config.root + request.rel_url.raw_path_qs, encoded=True),
                headers=_kept(request.headers, _NOT_SENT_ON),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                data=body or None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            message = f"The upstream {self._config.root} gave no answer: {error or type(error).__name__}"
            raise ApiError(502, "upstream_unreachable", message) from error
        async with upstream:
            response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
            response.headers.extend(_kept(upstream.headers, _BY_HOP))
            response.headers.update(extra)
            await response.prepare(request)
            try:
                async for piece in upstream.content.iter_any():
                    await response.write(piece)
            except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
                if request.transport is not None:  # a clean end would look like a whole answer
                    request.transport.abort()
                raise ConnectionResetError("the upstream broke off") from error
            await response.write_eof()
            return response


def _user_of(request: web.Request, body: Json) -> str | None:
    for user in (request.headers.get("x-amem-user"), body.get("user"), body.get("safety_identifier")):
        if isinstance(user, str):
            return user
    return None


def _kept(headers: Mapping[str, str], dropped: frozenset[str]) -> CIMultiDict[str]:
    """Headers without those of one hop, and those that `Connection` names."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in dropped | named)


async def run(config: ProxyConfig, on_ready: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT. `on_ready` gets the address. Raises ConfigError, DataDirError."""
    memory = await asyncio.to_thread(MemoryService, config.data_dir)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=config.silence_s)
    async with aiohttp.ClientSession(auto_decompress=False, timeout=timeout) as http:
        proxy = Proxy(config, memory, http)
        runner = web.AppRunner(proxy.build(), access_log=None, handler_cancellation=True, auto_decompress=False)
        try:
            await runner.setup()
            stop = asyncio.Event()
            for signum in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(signum, stop.set)
            on_ready(await _listen(runner, config))
            await stop.wait()
        finally:
            await runner.cleanup()
            await proxy.close()


async def _listen(runner: web.AppRunner, config: ProxyConfig) -> str:
    try:
        await web.TCPSite(runner, config.host, config.port).start()
    except OSError as error:
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror}") from error
    host, port = runner.addresses[0][:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
