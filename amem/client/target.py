"""Where a server is, and when a request to it is tried again."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from amem.client.answers import AmemError

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_URL = "http://localhost:8000"
CONNECT_SECONDS = 10.0
LONGEST_PAUSE_SECONDS = 10.0
RETRIED_STATUS = frozenset({429, 502, 503, 504})


@dataclass(frozen=True)
class Target:
    """Where and how to reach a server; `prefix` is the path that every route stands behind."""

    scheme: str
    host: str
    port: int
    prefix: str
    api_key: str | None
    timeout: float
    retries: int

    @classmethod
    def parse(cls, base_url: str | None, api_key: str | None, timeout: float, retries: int) -> Target:
        """Raises AmemError for an address or a key that cannot be used."""
        base_url = base_url or os.environ.get("AMEM_URL") or DEFAULT_URL
        api_key = api_key or os.environ.get("AMEM_API_KEY") or None
        try:
            url = urlsplit(base_url)
            port = url.port or (443 if url.scheme == "https" else 80)
        except ValueError as error:
            raise AmemError(0, f"base_url {base_url!r} is not a URL: {error}") from error
        if url.scheme not in ("http", "https") or not url.hostname:
            raise AmemError(0, f"base_url {base_url!r} is not an http(s) URL; give one like http://localhost:8000")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise AmemError(0, "api_key has characters that an HTTP header cannot carry; use printable ASCII")
        prefix = url.path.rstrip("/").removesuffix("/v1")
        return cls(url.scheme, url.hostname, port, prefix, api_key, timeout, retries)

    @property
    def origin(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    def failure(self, error: BaseException) -> AmemError:
        """What a connection that failed means to the caller: status 0."""
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
            return AmemError(0, f"{self.origin} did not answer in time", "timeout")
        return AmemError(0, f"no answer from {self.origin}: {error or type(error).__name__}", "unreachable")

    def pause(self, attempt: int, failure: AmemError) -> float | None:
        """Seconds to wait before trying again, or None when another try is not due.

        A timeout is never tried again: the server may be at work on it still.
        """
        lost = failure.status == 0 and failure.code == "unreachable"
        if attempt >= self.retries or not (lost or failure.status in RETRIED_STATUS):
            return None
        wanted = 0.2 * 2**attempt if failure.retry_after is None else failure.retry_after
        return min(wanted, LONGEST_PAUSE_SECONDS) * (1 + random.random() / 4)


def signed(method: F, build: Callable[..., Any]) -> F:
    """Name, docstring and signature of the builder, with `self` in front."""
    functools.update_wrapper(method, build)
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    parameters += inspect.signature(build).parameters.values()
    vars(method)["__signature__"] = inspect.Signature(parameters)
    del vars(method)["__wrapped__"]
    return method
