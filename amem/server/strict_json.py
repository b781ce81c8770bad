"""Reads a request body as JSON and nothing looser: no NaN, no duplicate keys, no lone surrogates, no NUL."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from typing import Any, NoReturn

from aiohttp import web

from amem.server.config import Limits
from amem.server.errors import ApiError, bad_request

MAX_DEPTH = 64
_MAX_DIGITS = 32

Json = dict[str, Any]


async def read_object(request: web.Request, limits: Limits) -> Json:
    """The body as a JSON object. Raises ApiError 400, 408, 413 or 415; the size is checked while reading."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ApiError(415, "unsupported_content_encoding", "Send the body without a Content-Encoding.")
    raw = await _read_limited(request, limits)
    if not raw.strip():
        raise bad_request("The body is empty. Send a JSON object.", code="invalid_json")
    # Browsers may post other types across origins without asking first, so that a web page could write memories.
    if request.content_type != "application/json":
        raise ApiError(
            415, "unsupported_media_type", "Send the body with the header 'Content-Type: application/json'."
        )
    value = parse(raw)
    if not isinstance(value, dict):
        raise bad_request(f"The body must be a JSON object, not {kind_of(value)}.", code="invalid_json")
    return value


def refuse_body(request: web.Request) -> None:
    """Raises ApiError 400 for a DELETE with a body: whoever names memories in one must not lose all the others."""
    if request.body_exists:
        raise bad_request(
            "DELETE takes no body. Name what is to go by the path, ?user= and ?id=.", code="invalid_value"
        )


async def _read_limited(request: web.Request, limits: Limits) -> bytes:
    too_large = ApiError(413, "body_too_large", f"The body is larger than {limits.max_body_bytes} bytes.")
    if (request.content_length or 0) > limits.max_body_bytes:
        raise too_large

    async def read() -> bytes:
        received = bytearray()
        async for piece in request.content.iter_any():
            received += piece
            if len(received) > limits.max_body_bytes:
                raise too_large
        return bytes(received)

    try:
        return await asyncio.wait_for(read(), limits.body_timeout_s)
    except asyncio.TimeoutError as error:
        message = f"The body did not arrive within {limits.body_timeout_s:g} s."
        raise ApiError(408, "body_timeout", message) from error


def parse(raw: bytes) -> Any:
    """Parses strict JSON. Raises ApiError 400 naming what is wrong."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_request(f"The body is not UTF-8 (byte {error.start}).", code="invalid_json") from error
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_bounded_int,
            object_pairs_hook=_unique_keys,
        )
    except json.JSONDecodeError as error:
        message = f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        raise bad_request(message, code="invalid_json") from error
    except RecursionError as error:
        raise _too_deep() from error
    _check_tree(value)
    return value


def kind_of(value: object) -> str:
    """The JSON name of a value's type, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names: dict[type, str] = {int: "an integer", float: "a number", str: "a string", list: "an array"}
    return names.get(type(value), "an object")


def _refuse_constant(name: str) -> NoReturn:
    raise bad_request(f"The body holds {name}, which is not JSON.", code="invalid_json")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise bad_request(f"The number {text[:_MAX_DIGITS]} is out of range.", code="invalid_json")
    return value


def _bounded_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise bad_request(f"A number of {len(text)} digits is out of range.", code="invalid_json")
    return int(text)


def _unique_keys(pairs: list[tuple[str, Any]]) -> Json:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise bad_request(f"The key {twice[:64]!r} appears twice in one object.", code="invalid_json")
    return result


def _check_tree(root: Any) -> None:
    stack: list[tuple[Any, int]] = [(root, 1)]
    while stack:
        value, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise _too_deep()
        if isinstance(value, str):
            check_text(value)
        elif isinstance(value, list):
            stack.extend((item, depth + 1) for item in value)
        elif isinstance(value, dict):
            stack.extend((item, depth + 1) for pair in value.items() for item in pair)


def check_text(value: str, param: str | None = None) -> None:
    """Raises ApiError 400 for text that no file, tokenizer or database could take."""
    if "\x00" in value:
        raise bad_request("A string holds the NUL character.", param, code="invalid_text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        message = f"A string holds a lone surrogate (character {error.start}), which is not text."
        raise bad_request(message, param, code="invalid_text") from error


def _too_deep() -> ApiError:
    return bad_request(f"The body is nested deeper than {MAX_DEPTH} levels.", code="invalid_json")
