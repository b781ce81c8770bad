"""The bytes of one chunk in a file: a checked header, padding, then [layers][K, V][tokens][kv_heads][head_dim].

Header: a fixed part, an xxh3-128 per layer slice, the memory ids (owner first), the optional prior, and an xxh3-128
over all of that. Sizes are computed from the layout and the token count, and the file has to agree with them. The
header holds no place, so a record can be moved between files as it is. docs/storage.md has the table of fields.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xxhash import xxh3_128_digest

from amem.engine.store.config import DTYPE_CODES, ChunkLayout, StoreError
from amem.engine.store.keys import FORMAT_VERSION

MAGIC = b"AMEMKV\0\1"
UNROTATED_LAYER_KV = 1
SUM_BYTES = 16
PAGE = 4096
LINE = 64
PAGE_ALIGNED_FROM = 1 << 16
MAX_HEADER_BYTES = 16 << 20
_FIXED = struct.Struct("<8sHHI16s32s32s32sIIIHHHBBQII")
FIXED_BYTES = _FIXED.size


class BadRecord(Exception):
    """Bytes that are not the record that was looked for. Never leaves the store: it becomes a miss."""


@dataclass(frozen=True, slots=True)
class Head:
    """Who a record belongs to and what it is. `prior` is float32 bytes, one per token, or empty."""

    tenant: bytes
    key: bytes
    chain: bytes
    tokens: int
    context: int
    trusted: int
    memories: tuple[str, ...]
    prior: bytes = b""


@dataclass(frozen=True, slots=True)
class Parsed:
    head: Head
    header_bytes: int
    sums: bytes


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record lies in its file, in bytes. `payload` is absolute, `end` is where the next record starts."""

    offset: int
    header_bytes: int
    payload: int
    payload_bytes: int
    end: int


def place(offset: int, header_bytes: int, payload_bytes: int) -> Place:
    """Records start on 64 bytes. A payload of 64 KiB or more starts on a page; a smaller one would waste it."""
    align = PAGE if payload_bytes >= PAGE_ALIGNED_FROM else LINE
    payload = _up(offset + header_bytes, align)
    return Place(offset, header_bytes, payload, payload_bytes, _up(payload + payload_bytes, LINE))


def layer_sums(payload: memoryview, layers: int) -> bytes:
    """xxh3-128 of each layer slice, joined. `payload` is flat bytes whose length is a multiple of `layers`."""
    step = len(payload) // layers
    return b"".join(xxh3_128_digest(payload[at : at + step]) for at in range(0, step * layers, step))


def pack(head: Head, layout: ChunkLayout, sums: bytes) -> bytes:
    """The header. Raises StoreError when the ids of the memories cannot be written."""
    ids = pack_ids(head.memories)
    length = FIXED_BYTES + len(sums) + len(ids) + len(head.prior) + SUM_BYTES
    if length > MAX_HEADER_BYTES:
        raise StoreError(f"a chunk behind {len(head.memories)} memories needs a header of {length} bytes; too many")
    body = b"".join((_FIXED.pack(*_fixed(head, layout, length, len(ids))), sums, ids, head.prior))
    return body + xxh3_128_digest(body)


def header_length(block: bytes | memoryview) -> int:
    """How long the header that starts here says it is, bounded. Raises BadRecord when it is none of ours."""
    if len(block) < FIXED_BYTES or bytes(block[:8]) != MAGIC:
        raise BadRecord("no record starts here")
    length = int(_FIXED.unpack_from(block)[3])
    if not FIXED_BYTES + SUM_BYTES <= length <= MAX_HEADER_BYTES:
        raise BadRecord(f"a header of {length} bytes")
    return length


def parse(header: bytes | memoryview, layout: ChunkLayout) -> Parsed:
    """The header, with every field that the layout decides compared. Raises BadRecord on any difference."""
    fields = checked_fields(header)
    tenant, key, chain = fields[4:7]
    tokens, context, trusted = fields[8:11]
    ids_bytes, prior_bytes = fields[-2:]
    sums_bytes = SUM_BYTES * layout.layers
    if len(header) != FIXED_BYTES + sums_bytes + ids_bytes + prior_bytes + SUM_BYTES:
        raise BadRecord("the parts of the header do not add up")
    sums_end = FIXED_BYTES + sums_bytes
    ids_end = sums_end + ids_bytes
    memories = _parse_ids(bytes(header[sums_end:ids_end]))
    prior = bytes(header[ids_end : ids_end + prior_bytes])
    head = Head(tenant, key, chain, tokens, context, trusted, memories, prior)
    if tokens < 1 or tuple(fields) != _fixed(head, layout, len(header), ids_bytes):
        raise BadRecord("written for another model, dtype, layout or version")
    return Parsed(head, len(header), bytes(header[FIXED_BYTES:sums_end]))


def checked_fields(header: bytes | memoryview) -> tuple[Any, ...]:
    """The fixed fields of a whole header whose checksum holds."""
    if xxh3_128_digest(header[:-SUM_BYTES]) != bytes(header[-SUM_BYTES:]):
        raise BadRecord("the header fails its checksum")
    return _FIXED.unpack_from(header)


def foreign_record(header: bytes | memoryview) -> tuple[tuple[str, ...], int, int]:
    """(memory ids, header bytes, payload bytes) of a record of any model of this format version."""
    fields = checked_fields(header)
    if fields[1] != FORMAT_VERSION:
        raise BadRecord("another format version")
    layers, payload, ids_bytes = int(fields[11]), int(fields[16]), int(fields[17])
    start = FIXED_BYTES + SUM_BYTES * layers
    return _parse_ids(bytes(header[start : start + ids_bytes])), len(header), payload


def blank(padding: memoryview) -> bool:
    return bytes(padding) == bytes(len(padding))


def _fixed(head: Head, layout: ChunkLayout, length: int, ids_bytes: int) -> tuple[Any, ...]:
    return (
        MAGIC,
        FORMAT_VERSION,
        0,
        length,
        head.tenant,
        head.key,
        head.chain,
        layout.fingerprint_digest,
        head.tokens,
        head.context,
        head.trusted,
        layout.layers,
        layout.kv_heads,
        layout.head_dim,
        DTYPE_CODES[layout.dtype],
        UNROTATED_LAYER_KV,
        layout.payload_bytes(head.tokens),
        ids_bytes,
        4 * head.tokens if head.prior else 0,
    )


def pack_ids(memories: Sequence[str]) -> bytes:
    """Raises StoreError when an id cannot be written."""
    try:
        encoded = [memory.encode() for memory in memories]
        return b"".join(struct.pack("<H", len(item)) + item for item in encoded)
    except (UnicodeEncodeError, struct.error) as error:
        raise StoreError(f"a memory id must be UTF-8 text of at most 65,535 bytes: {error}") from error


def _parse_ids(data: bytes) -> tuple[str, ...]:
    ids: list[str] = []
    at = 0
    try:
        while at < len(data):
            (length,) = struct.unpack_from("<H", data, at)
            item = data[at + 2 : at + 2 + length]
            if len(item) != length:
                raise BadRecord("a memory id is cut off")
            ids.append(item.decode())
            at += 2 + length
    except (struct.error, UnicodeDecodeError) as error:
        raise BadRecord(f"the memory ids are damaged: {error}") from error
    return tuple(ids)


def _up(value: int, align: int) -> int:
    return -(-value // align) * align
