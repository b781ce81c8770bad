"""The one place where what comes from outside is checked, before anything is read or written."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence

from amem.memory.config import MemoryConfig
from amem.memory.errors import InvalidInput
from amem.memory.types import NewMemory, RecallOptions

MAX_NAME_BYTES = 256


def name(value: object, param: str) -> str:
    """User names, conversations, keys, session ids: 1 to 256 bytes of UTF-8 without control characters."""
    if not isinstance(value, str):
        raise InvalidInput(f"{param} must be a string, got {type(value).__name__}", param)
    size = len(_utf8(value, param))
    if not 1 <= size <= MAX_NAME_BYTES:
        raise InvalidInput(f"{param} must have 1 to {MAX_NAME_BYTES} bytes of UTF-8, got {size}", param)
    if any(unicodedata.category(c) == "Cc" for c in value):
        raise InvalidInput(f"{param} contains a control character; remove it", param)
    return value


def names(values: Sequence[object], param: str) -> None:
    for value in values:
        name(value, param)


def text(value: object, param: str, limit: int) -> str:
    """Memory texts and queries: not blank, no NUL (it would end the string inside SQLite), valid UTF-8."""
    if not isinstance(value, str):
        raise InvalidInput(f"{param} must be a string, got {type(value).__name__}", param)
    if not value.strip():
        raise InvalidInput(f"{param} is empty; send some text", param)
    if "\x00" in value:
        raise InvalidInput(f"{param} contains a NUL character; remove it", param)
    size = len(_utf8(value, param))
    if size > limit:
        raise InvalidInput(f"{param} has {size} bytes, the limit is {limit}; split it", param)
    return value


def metadata(value: object, limit: int) -> str | None:
    """Metadata as canonical JSON, or None."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise InvalidInput("metadata must be a JSON object with string names", "metadata")
    try:
        encoded = json.dumps(dict(value), ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"metadata is not plain JSON: {error}", "metadata") from None
    size = len(_utf8(encoded, "metadata"))
    if size > limit:
        raise InvalidInput(f"metadata has {size} bytes as JSON, the limit is {limit}", "metadata")
    return encoded


def new_memory(item: NewMemory, config: MemoryConfig) -> str | None:
    """Checks one item and returns its metadata as JSON."""
    text(item.text, "text", config.max_text_bytes)
    if item.key is not None:
        name(item.key, "key")
    if item.conversation is not None:
        name(item.conversation, "conversation")
    if item.created is not None:
        instant(item.created)
    return metadata(item.metadata, config.max_metadata_bytes)


def instant(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidInput("created must be a finite number of seconds since 1970", "created")


def count(value: object, param: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidInput(f"{param} must be a whole number from {low} to {high}, got {value!r}"[:200], param)
    return value


def recall_options(options: RecallOptions, config: MemoryConfig) -> None:
    count(options.k, "k", 1, config.max_recall)
    count(options.neighbours, "neighbours", 0, 16)
    if options.budget_tokens is not None:
        count(options.budget_tokens, "budget_tokens", 0, 1 << 31)
    if options.conversation is not None:
        name(options.conversation, "conversation")


def _utf8(value: str, param: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"{param} contains half of a surrogate pair (no character); remove it", param) from None
