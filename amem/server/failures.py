"""The outermost layer of every request: turns whatever goes wrong into the one error shape, and leaks nothing."""

from __future__ import annotations

import asyncio
import logging
import secrets
import traceback
from contextvars import ContextVar
from urllib.parse import unquote_to_bytes

from aiohttp import web
from aiohttp.typedefs import Handler

from amem.engine.types import EngineError
from amem.memory.errors import Conflict, Damaged, InvalidInput, MemoryFault, NotFound, Unavailable
from amem.server.errors import ApiError, bad_request, unavailable

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
_log = logging.getLogger(__name__)

_ENGINE_STATUS = {
    "prompt_too_long": 400,
    "invalid_request": 400,
    "memory_forgotten": 409,
    "overloaded": 429,
    "numeric": 500,
    "internal": 500,
}
_ENGINE_CODES = {
    "prompt_too_long": "context_length_exceeded",
    "numeric": "numeric_error",
    "internal": "internal_error",
}


def translated(error: Exception) -> ApiError | None:
    """The ApiError that a known failure stands for; None for one that nobody foresaw."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MemoryFault):
        return _memory(error)
    if isinstance(error, EngineError):
        return _engine(error)
    return None


def _memory(error: MemoryFault) -> ApiError:
    if isinstance(error, NotFound):
        code = {"session": "session_not_found", "user": "user_not_found"}.get(error.param or "", "memory_not_found")
        return ApiError(404, code, error.message, error.param)
    if isinstance(error, InvalidInput):
        return ApiError(400, "invalid_value", error.message, error.param)
    if isinstance(error, Conflict):
        return ApiError(409, error.code, error.message, error.param)
    # These may name files: that is for the log, clients are told what it means to them.
    _log.error("request %s: %s", REQUEST_ID.get(), error.message)
    if isinstance(error, Unavailable):
        message = "Memories cannot be stored durably now, nothing was changed. The server's log says why; try again."
        return ApiError(503, "memory_unavailable", message, retry_after_s=5)
    if isinstance(error, Damaged):
        message = "The database of this user fails its checks; restore the file that the server's log names."
        return ApiError(500, "memory_damaged", message)
    return ApiError(500, "memory_error", "The memory layer failed. The server's log says why.")


def _engine(error: EngineError) -> ApiError:
    status = _ENGINE_STATUS.get(error.code)
    if status is None:
        return unavailable(f"{error} Memories can be read and written meanwhile.")
    code = _ENGINE_CODES.get(error.code, error.code)
    return ApiError(status, code, str(error), retry_after_s=2 if status == 429 else None)


def unforeseen(error: Exception) -> ApiError:
    """Logs where it happened, never what was said: messages of exceptions may quote a client's text."""
    request_id = REQUEST_ID.get()
    where = "".join(traceback.format_tb(error.__traceback__)[-6:])
    _log.error("request %s failed with %s\n%s", request_id, type(error).__name__, where)
    message = f"The server failed on this request. Its log has the place under {request_id}."
    return ApiError(500, "internal_error", message)


@web.middleware
async def failures(request: web.Request, handler: Handler) -> web.StreamResponse:
    REQUEST_ID.set(f"req_{secrets.token_hex(8)}")
    try:
        _check_target(request)
        return await handler(request)
    except (asyncio.CancelledError, ConnectionResetError):
        raise
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return response(_routing(request, error), error.headers.get("Allow"))
    except Exception as error:
        return response(translated(error) or unforeseen(error))


def _check_target(request: web.Request) -> None:
    """Raises ApiError 400 for an address that is no text: decoding it anyway would make one user of many names."""
    try:
        unquote_to_bytes(request.rel_url.raw_path + "?" + request.rel_url.raw_query_string).decode()
    except UnicodeError as error:
        raise bad_request("The address is not UTF-8.", code="invalid_text") from error


class Discreet(logging.Filter):
    """What aiohttp logs about a broken connection, without the bytes that a client sent."""

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else "no exception"
        record.msg, record.args = "a connection ended with %s", (kind,)
        record.exc_info = record.exc_text = None
        return True


def response(error: ApiError, allow: str | None = None) -> web.Response:
    headers = error.headers | ({} if allow is None else {"Allow": allow})
    return web.json_response(error.body().json(), status=error.status, headers=headers)


def _routing(request: web.Request, error: web.HTTPException) -> ApiError:
    messages = {
        404: ("not_found", "There is no such route here. docs/api.md lists them all."),
        405: ("method_not_allowed", f"{request.method} is not allowed on this route."),
        413: ("body_too_large", "The body is too large."),
    }
    code, message = messages.get(error.status, ("http_error", error.reason))
    return ApiError(error.status, code, message)
