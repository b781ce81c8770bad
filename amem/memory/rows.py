"""Rows of a user's database as memories: the reads that everything else is made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

from amem.memory.database import Row, Transaction, Value
from amem.memory.errors import NotFound
from amem.memory.types import Memory, State

_SELECT = """
SELECT m.id, m.seq, m.text, c.name, m.ordinal, m.key, m.metadata, m.created, m.updated, m.seen, m.version,
m.superseded_by FROM memories m LEFT JOIN conversations c ON c.id = m.conversation """
_MAX_VALUES = 500


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def select(transaction: Transaction, where: str, values: Sequence[Value] = ()) -> list[Memory]:
    return [_memory(row) for row in transaction.execute(_SELECT + where, values)]


def by_id(transaction: Transaction, id: str) -> Memory:
    """Raises NotFound."""
    found = select(transaction, "WHERE m.id = ?", (id,))
    if not found:
        raise NotFound(f"there is no memory {id!r}; it may have been forgotten", "id")
    return found[0]


def by_seq(transaction: Transaction, seqs: Iterable[int]) -> dict[int, Memory]:
    """The live ones among `seqs`."""
    found: dict[int, Memory] = {}
    for part in _parts(list(seqs)):
        where = f"WHERE m.seq IN ({_marks(part)}) AND m.superseded_by IS NULL"
        found.update((memory.seq, memory) for memory in select(transaction, where, part))
    return found


def by_ids(transaction: Transaction, ids: Iterable[str]) -> dict[str, Memory]:
    """Those among `ids` that exist, superseded ones included."""
    found: dict[str, Memory] = {}
    for part in _parts(list(ids)):
        found.update((memory.id, memory) for memory in select(transaction, f"WHERE m.id IN ({_marks(part)})", part))
    return found


def before(transaction: Transaction, memory: Memory, count: int) -> tuple[Memory, ...]:
    """The live memories just before one in its conversation, oldest first."""
    found = _beside(transaction, memory, count, "<", "DESC")
    return tuple(reversed(found))


def after(transaction: Transaction, memory: Memory, count: int) -> tuple[Memory, ...]:
    """The live memories just after one in its conversation, oldest first."""
    return tuple(_beside(transaction, memory, count, ">", "ASC"))


def followers(transaction: Transaction, seqs: Sequence[int]) -> dict[int, int]:
    """seq → seq of the live memory right behind it in its conversation, where there is one."""
    found = transaction.execute(
        "SELECT m.seq, (SELECT n.seq FROM memories n WHERE n.conversation = m.conversation AND n.ordinal > m.ordinal "
        "AND n.superseded_by IS NULL AND n.conversation IS NOT NULL ORDER BY n.ordinal LIMIT 1) "
        f"FROM memories m WHERE m.seq IN ({_marks(seqs)}) AND m.superseded_by IS NULL AND m.conversation IS NOT NULL",
        seqs,
    )
    return {seq: follower for seq, follower in found if follower is not None}


def versions_behind(transaction: Transaction, ids: Sequence[str]) -> list[Memory]:
    """`ids` and every earlier memory that they, or those, superseded. Raises NotFound for an unknown id."""
    found = {id: by_id(transaction, id) for id in ids}
    waiting = list(found)
    while waiting:
        for memory in select(transaction, "WHERE m.superseded_by = ?", (waiting.pop(),)):
            if memory.id not in found:
                found[memory.id] = memory
                waiting.append(memory.id)
    return list(found.values())


def _beside(transaction: Transaction, memory: Memory, count: int, side: str, order: str) -> list[Memory]:
    if memory.conversation is None or count < 1:
        return []
    where = (
        f"WHERE m.conversation = (SELECT conversation FROM memories WHERE seq = ?) AND m.ordinal {side} ? "
        f"AND m.superseded_by IS NULL AND m.conversation IS NOT NULL ORDER BY m.ordinal {order} LIMIT ?"
    )
    return select(transaction, where, (memory.seq, memory.ordinal, count))


def _memory(row: Row) -> Memory:
    id, seq, text, conversation, ordinal, key, metadata, created, updated, seen, version, superseded_by = row
    return Memory(
        id=id,
        seq=seq,
        text=text,
        conversation=conversation,
        ordinal=ordinal,
        key=key,
        metadata=None if metadata is None else json.loads(metadata),
        created=created,
        updated=updated,
        seen=seen,
        version=version,
        state=State.LIVE if superseded_by is None else State.SUPERSEDED,
        superseded_by=superseded_by,
    )


def _parts(values: list[Value] | list[int] | list[str]) -> list[list[Value]]:
    return [list(values[start : start + _MAX_VALUES]) for start in range(0, len(values), _MAX_VALUES)]


def _marks(values: Sequence[Value]) -> str:
    return ", ".join("?" * len(values))
