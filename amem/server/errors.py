"""Every failure leaves the server as one JSON shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """What a client reads. `code` is stable and meant for programs, `message` for people."""

    message: str
    type: str
    param: str | None
    code: str

    def json(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class ApiError(Exception):
    """A request that cannot be answered. `status` is the HTTP status, `param` the field at fault."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def body(self) -> ErrorBody:
        return ErrorBody(self.message, error_type(self.status), self.param, self.code)


def error_type(status: int) -> str:
    """The `type` that OpenAI's clients expect beside a status."""
    if status in _TYPES:
        return _TYPES[status]
    return "server_error" if status >= 500 else "invalid_request_error"


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, code, message, param)


def unavailable(reason: str, retry_after_s: int = 5) -> ApiError:
    """The engine cannot answer now; memories can still be read and written."""
    return ApiError(503, "engine_unavailable", reason, retry_after_s=retry_after_s)
