"""What the memory routes accept, read from body and query."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from amem.memory.types import NewMemory
from amem.server.config import Limits
from amem.server.errors import bad_request
from amem.server.fields import Fields
from amem.server.strict_json import Json, check_text, kind_of

MAX_PAGE = 1000
MAX_RECALL = 1000
_REMEMBER = ("user", "texts", "keys", "conversation", "messages", "metadata")
_SPEAKERS = ("user", "assistant")


@dataclass(frozen=True, slots=True)
class RememberRequest:
    """Texts to store, in order. `conversation` is None for facts that have no order."""

    user: str | None
    items: tuple[NewMemory, ...]
    conversation: str | None


@dataclass(frozen=True, slots=True)
class UpdateRequest:
    """A new text, new metadata, or both; `version` is the one that the client has seen."""

    user: str | None
    id: str | None
    text: str | None
    metadata: Json | None
    version: int | None


@dataclass(frozen=True, slots=True)
class RecallRequest:
    user: str | None
    query: str
    k: int
    budget_tokens: int | None
    conversation: str | None
    explain: bool


@dataclass(frozen=True, slots=True)
class SessionRequest:
    user: str | None
    session: str | None
    budget_tokens: int | None


def remember_request(body: Json, limits: Limits, key: str | None) -> RememberRequest:
    """`key`: the Idempotency-Key. Raises ApiError 400 naming the field at fault."""
    fields = Fields(body)
    fields.only(_REMEMBER)
    conversation = fields.text("conversation", 256)
    if (fields.get("texts") is None) == (fields.get("messages") is None):
        raise bad_request("Send either texts or messages.", "texts", "missing_required_parameter")
    if fields.get("messages") is not None:
        items = _spoken(fields)
        conversation = conversation or _new_conversation(key)
    else:
        items = _texts(fields)
    if not items:
        raise bad_request("There is no text to remember.", "texts", "empty_value")
    if len(items) > limits.max_texts:
        message = f"{len(items)} texts in one call; at most {limits.max_texts} are allowed. Send them in parts."
        raise bad_request(message, "texts", "value_too_long")
    return RememberRequest(fields.text("user", blank=True), items, conversation)


def update_request(body: Json) -> UpdateRequest:
    fields = Fields(body)
    fields.only(("user", "id", "text", "metadata", "version"))
    metadata = fields.mapping("metadata")
    request = UpdateRequest(
        user=fields.text("user", blank=True),
        id=fields.text("id", 256),
        text=fields.text("text"),
        metadata=None if metadata is None else dict(metadata),
        version=fields.integer("version", 0, 1 << 53),
    )
    if request.text is None and request.metadata is None:
        raise bad_request("Send a new text, new metadata, or both.", "text", "missing_required_parameter")
    return request


def recall_request(body: Json, default_k: int) -> RecallRequest:
    fields = Fields(body)
    fields.only(("user", "query", "k", "budget_tokens", "conversation", "explain"))
    return RecallRequest(
        user=fields.text("user", blank=True),
        query=fields.needed_text("query"),
        k=fields.integer("k", 1, MAX_RECALL) or default_k,
        budget_tokens=fields.integer("budget_tokens", 1, 1 << 31),
        conversation=fields.text("conversation", 256),
        explain=fields.flag("explain"),
    )


def session_request(body: Json) -> SessionRequest:
    fields = Fields(body)
    fields.only(("user", "session", "budget_tokens"))
    return SessionRequest(
        fields.text("user", blank=True), fields.text("session", 256), fields.integer("budget_tokens", 1, 1 << 31)
    )


def query_text(request: web.Request, name: str) -> str | None:
    """A query parameter given once. Raises ApiError 400 when it is repeated or no text."""
    values = request.query.getall(name, [])
    if len(values) > 1:
        raise bad_request(f"{name} is given {len(values)} times.", name, "conflicting_values")
    for value in values:
        check_text(value, name)
    return values[0] if values else None


def query_integer(request: web.Request, name: str, low: int, high: int, default: int) -> int:
    value = query_text(request, name)
    if value is None:
        return default
    if not (value.isascii() and value.isdigit() and len(value) < 19 and low <= int(value) <= high):
        raise bad_request(f"{name} must be a whole number from {low} to {high}.", name, "value_out_of_range")
    return int(value)


def query_only(request: web.Request, known: Iterable[str]) -> None:
    unknown = sorted(set(request.query) - set(known))
    if unknown:
        raise bad_request(f"Unknown query parameter: {unknown[0][:64]}.", unknown[0][:64], "unknown_parameter")


def _new_conversation(key: str | None) -> str:
    """A repeated request has to name the same conversation, or it would be another request."""
    return f"conv-{secrets.token_hex(8) if key is None else hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"


def _texts(fields: Fields) -> tuple[NewMemory, ...]:
    value = fields.get("texts")
    rows = [value] if isinstance(value, str | dict) else fields.array("texts") or []
    common = fields.mapping("metadata")
    keys = _keys(fields, len(rows))
    return tuple(_item(row, f"texts[{i}]", key, common) for i, (row, key) in enumerate(zip(rows, keys, strict=True)))


def _item(row: Any, path: str, key: str | None, metadata: Any) -> NewMemory:
    if isinstance(row, str):
        if not row.strip():
            raise bad_request(f"{path} is empty. Send some text.", path, "empty_value")
        return NewMemory(row, key=key, metadata=metadata)
    if not isinstance(row, dict):
        raise bad_request(f"{path} must be a string or an object, not {kind_of(row)}.", path, "invalid_type")
    fields = Fields(row, path)
    fields.only(("text", "key", "metadata", "created"))
    own = fields.text("key", 256)
    if own is not None and key is not None and own != key:
        raise bad_request(f"{path}.key and keys differ; send one of them.", "keys", "conflicting_values")
    own_metadata = fields.mapping("metadata")
    return NewMemory(
        fields.needed_text("text"),
        key=own or key,
        metadata=metadata if own_metadata is None else own_metadata,
        created=fields.number("created", 0, 1e11),
    )


def _keys(fields: Fields, count: int) -> Sequence[str | None]:
    value = fields.get("keys")
    keys = [value] if isinstance(value, str) else fields.array("keys")
    if keys is None:
        return [None] * count
    if len(keys) != count:
        message = f"keys has {len(keys)} entries and texts has {count}; they must be as many (null for no key)."
        raise bad_request(message, "keys", "invalid_value")
    for index, key in enumerate(keys):
        if key is not None and not isinstance(key, str):
            path = f"keys[{index}]"
            raise bad_request(f"{path} must be a string or null, not {kind_of(key)}.", path, "invalid_type")
    return keys


def _spoken(fields: Fields) -> tuple[NewMemory, ...]:
    if fields.get("keys") is not None:
        raise bad_request("keys belong to texts, not to messages.", "keys")
    common = dict(fields.mapping("metadata") or {})
    items = []
    for index, value in enumerate(fields.array("messages") or []):
        message = Fields.of(value, f"messages[{index}]")
        message.only(("role", "content", "name"))
        role = message.needed("role", message.choice("role", _SPEAKERS))
        name = message.text("name", 256)
        metadata = common | {"role": role} | ({} if name is None else {"name": name})
        items.append(NewMemory(message.needed_text("content"), metadata=metadata))
    return tuple(items)
