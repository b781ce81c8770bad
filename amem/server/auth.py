"""Who may call. One optional key; without it the server answers on loopback only, and only to loopback names."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass

from aiohttp import web

from amem.server.config import ServerConfig, is_loopback
from amem.server.errors import ApiError

OPEN_PATHS = frozenset({"/health"})


@dataclass(frozen=True, slots=True)
class Gate:
    """Checks each request. With a key: `Authorization: Bearer KEY`, compared in constant time.

    Without one, any Authorization passes, but the Host header has to be a loopback name: otherwise a web page could
    point its own name at 127.0.0.1 and read memories through the visitor's browser.
    """

    digest: bytes | None

    @classmethod
    def of(cls, config: ServerConfig) -> Gate:
        return cls(None if config.api_key is None else _digest(config.api_key.strip().encode()))

    def check(self, request: web.Request) -> None:
        """Raises ApiError 401 or 403."""
        if self.digest is None:
            _check_host(request)
            return
        if request.path in OPEN_PATHS:
            return
        headers = request.headers.getall("Authorization", [])
        scheme, _, key = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
        given = _digest(key.strip().encode("utf-8", "surrogateescape"))
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self.digest):
            raise ApiError(
                401, "invalid_api_key", "The API key is missing or wrong. Send 'Authorization: Bearer KEY'."
            )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _check_host(request: web.Request) -> None:
    local = request.transport.get_extra_info("sockname") if request.transport else None
    if not (isinstance(local, tuple) and _is_loopback_address(str(local[0]))):
        return
    host = request.headers.get("Host", "")
    name = host[: host.rindex("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
    if not is_loopback(name):
        message = (
            "This server has no API key and answers only to localhost. Call it as localhost or set AMEM_API_KEY."
        )
        raise ApiError(403, "host_not_allowed", message)


def _is_loopback_address(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
