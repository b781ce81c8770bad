"""The messages between the HTTP process and the engine process: length-prefixed msgpack, never pickle.

A frame is a 4-byte little-endian length and a msgpack array `[tag, fields…]`. Token ids travel as packed int32.
"""

from __future__ import annotations

import dataclasses
import struct
from array import array
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgpack

from amem.engine.config import EngineConfig
from amem.engine.types import (
    ChunkSpec,
    FinishReason,
    ForgetReceipt,
    GenerateRequest,
    ModelInfo,
    Report,
    Tenant,
    TokenLogprob,
)

MAX_FRAME_BYTES = 256 << 20
_LENGTH = struct.Struct("<I")


# To the engine -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Configure:
    """The first message to a new engine process."""

    config: EngineConfig


@dataclass(frozen=True, slots=True)
class Generate:
    request: GenerateRequest


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class WriteChunks:
    """Compute and store the canonical KV of chunks in idle time. Chunks already stored cost nothing."""

    job_id: str
    tenant: Tenant
    chunks: tuple[ChunkSpec, ...]


@dataclass(frozen=True, slots=True)
class ForgetMemories:
    """Erase every chunk owned by, or computed behind, one of `memories`; `memories=None` means the whole tenant."""

    job_id: str
    tenant: Tenant
    memories: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class GetStats:
    job_id: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    pass


# From the engine -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    model: ModelInfo


@dataclass(frozen=True, slots=True)
class Loading:
    """Progress while the engine starts: bytes of weights read so far, of how many."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Tokens:
    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    request_id: str
    reason: FinishReason
    report: Report


@dataclass(frozen=True, slots=True)
class Failed:
    """`code` is one of: prompt_too_long, invalid_request, memory_forgotten, numeric, overloaded, internal.

    `request_id` may be that of a job. An engine that cannot start sends an empty id and the code start_failed.
    """

    request_id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class ChunksWritten:
    """`written` were computed now, `present` were stored already, `failed` could not be stored or found no room.

    A chunk that was asked for several times is written and charged (`prefill_tokens`) once: to the first who asked.
    """

    job_id: str
    written: int
    present: int
    failed: int
    prefill_tokens: float


@dataclass(frozen=True, slots=True)
class Forgotten:
    job_id: str
    receipt: ForgetReceipt


@dataclass(frozen=True, slots=True)
class Stats:
    job_id: str
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent every second; `steps` and `busy` let the other side tell progress from mere life.

    steps: a number that changes while the engine gets on.
    """

    steps: int
    busy: bool


Message = (
    Configure
    | Generate
    | Abort
    | WriteChunks
    | ForgetMemories
    | GetStats
    | Shutdown
    | Ready
    | Loading
    | Tokens
    | Finished
    | Failed
    | ChunksWritten
    | Forgotten
    | Stats
    | Heartbeat
)

_TYPES: dict[str, type] = {kind.__name__: kind for kind in get_args(Message)}


class WireError(ValueError):
    """A frame that is not one of ours."""


def encode(message: Message) -> bytes:
    """One frame, length included. Raises WireError on a number or a text that does not go over the wire."""
    try:
        body: bytes = msgpack.packb([type(message).__name__, *_fields(message)])
    except (OverflowError, TypeError, ValueError) as error:
        raise WireError(f"a {type(message).__name__} cannot be sent: {error}") from error
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"a {type(message).__name__} of {len(body)} bytes is over the {MAX_FRAME_BYTES} limit")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes | memoryview) -> Message:
    """The message of one frame's body (without its length). Raises WireError on anything else."""
    try:
        tag, *values = msgpack.unpackb(body, use_list=True, strict_map_key=False)
        message: Message = _build(_TYPES[tag], values)
    except (KeyError, TypeError, ValueError, msgpack.UnpackException) as error:
        raise WireError(f"not a message of this version: {error}") from error
    return message


class FrameReader:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        self._buffer += data
        messages: list[Message] = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise WireError(f"a frame of {length} bytes is over the {MAX_FRAME_BYTES} limit")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(decode(bytes(self._buffer[_LENGTH.size : end])))
            del self._buffer[:end]
        return messages


_INT_TUPLE = tuple[int, ...]


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _fields(value: Any) -> list[Any]:
    kind: type = type(value)
    hints = _hints(kind)
    return [_pack(getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(value)]


def _pack(value: Any, hint: Any) -> Any:
    hint = _strip_none(hint)
    if value is None:
        return None
    if hint == _INT_TUPLE:
        return array("i", value).tobytes()
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return _fields(value)
    if isinstance(value, tuple):
        return [_pack(item, kind) for item, kind in zip(value, _item_hints(hint, len(value)), strict=True)]
    return value


def _item_hints(hint: Any, length: int) -> list[Any]:
    inner = get_args(hint)
    return [inner[0]] * length if len(inner) == 2 and inner[1] is ... else list(inner)


def _strip_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _build(kind: type, values: list[Any]) -> Any:
    hints = _hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    if len(names) != len(values):
        raise TypeError(f"{kind.__name__} has {len(names)} fields, got {len(values)}")
    return kind(**{name: _unpack(value, hints[name]) for name, value in zip(names, values, strict=True)})


def _unpack(value: Any, hint: Any) -> Any:
    if value is None:
        return None
    hint = _strip_none(hint)
    if hint == _INT_TUPLE:
        return tuple(array("i", value))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if get_origin(hint) is tuple:
        kinds = _item_hints(hint, len(value))
        return tuple(_unpack(item, kind) for item, kind in zip(value, kinds, strict=True))
    return value
