"""Every change of a user's memories, inside one transaction: rows, full-text index, vectors, sessions."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from amem.memory import lexical, rows, sessions
from amem.memory.database import Transaction
from amem.memory.errors import Conflict
from amem.memory.types import Added, Memory, Outcome, State


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked item with what could be computed before the transaction. `vector` is in its stored form."""

    text: str
    key: str | None
    metadata: str | None
    conversation: str | None
    created: float
    vector: bytes


@dataclass(slots=True)
class Changes:
    """What the caches in memory have to follow once the transaction is durable."""

    stored: dict[int, int] = field(default_factory=dict)  # seq → index of the prepared item
    removed: list[int] = field(default_factory=list)
    rows: int = 0
    sessions: int = 0


@dataclass(frozen=True, slots=True)
class Rules:
    embedder: str
    count_tokens: Callable[[str], int]


def add(
    transaction: Transaction, items: Sequence[Prepared], now: float, rules: Rules, changes: Changes
) -> list[Added]:
    return [_add_one(transaction, item, index, now, rules, changes) for index, item in enumerate(items)]


def update(
    transaction: Transaction,
    id: str,
    version: int | None,
    item: Prepared | None,
    metadata: str | None,
    now: float,
    rules: Rules,
) -> Memory:
    """Gives a live memory a new text (of `item`), new metadata, or both. Raises Conflict on another version."""
    old = rows.by_id(transaction, id)
    if old.state is not State.LIVE:
        raise Conflict(f"memory {id} was superseded by {old.superseded_by}; update that one", "id")
    if version is not None and version != old.version:
        raise Conflict(f"memory {id} has version {old.version}, not {version}; read it again", "version")
    if metadata is not None:
        transaction.run("UPDATE memories SET metadata = ? WHERE seq = ?", (metadata, old.seq))
    if item is not None and item.text != old.text:
        with lexical.reindexed(transaction, old.seq):
            sql = "UPDATE memories SET text = ?, digest = ? WHERE seq = ?"
            transaction.run(sql, (item.text, rows.digest(item.text), old.seq))
        _store_vector(transaction, old.seq, item, rules)
        sessions.replace_with(transaction, id, id, lambda: rules.count_tokens(item.text))
        _forget_requests(transaction, [id])
    transaction.run("UPDATE memories SET updated = ?, version = version + 1 WHERE seq = ?", (now, old.seq))
    return rows.by_id(transaction, id)


def forget(transaction: Transaction, ids: Sequence[str], changes: Changes) -> list[str]:
    """Deletes memories and every earlier version behind them. Raises NotFound before anything is changed."""
    gone = rows.versions_behind(transaction, ids)
    held: set[str] = set()
    for memory in gone:
        held.update(sessions.holding(transaction, memory.id))
        [(vectors,)] = transaction.execute("SELECT count(*) FROM vectors WHERE seq = ?", (memory.seq,))
        changes.rows += vectors + sessions.remove(transaction, memory.id)
        with lexical.reindexed(transaction, memory.seq):
            changes.rows += transaction.run("DELETE FROM memories WHERE seq = ?", (memory.seq,))
        changes.removed.append(memory.seq)
    changes.sessions = len(held)
    for conversation in {memory.conversation for memory in gone}:
        changes.rows += transaction.run(
            "DELETE FROM conversations WHERE name = ? AND NOT EXISTS "
            "(SELECT 1 FROM memories m WHERE m.conversation = conversations.id)",
            (conversation,),
        )
    _forget_requests(transaction, [memory.id for memory in gone])
    return [memory.id for memory in gone]


def recorded_answer(transaction: Transaction, key: str, digest: bytes, oldest: float) -> list[Added] | None:
    """The answer that was given to this idempotency key. Raises Conflict when the request was another one."""
    transaction.run("DELETE FROM requests WHERE created < ?", (oldest,))
    for known, answer in transaction.execute("SELECT digest, answer FROM requests WHERE key = ?", (key,)):
        if known is not None and known != digest:
            raise Conflict("this idempotency key was used for a different request; use a new one", "idempotency_key")
        return [Added(id, Outcome(outcome), tuple(old)) for id, outcome, old in json.loads(answer)]
    return None


def record_answer(transaction: Transaction, key: str, digest: bytes, answer: Sequence[Added], now: float) -> None:
    encoded = json.dumps([(added.id, added.outcome.value, added.superseded) for added in answer])
    transaction.run("INSERT INTO requests VALUES (?, ?, ?, ?)", (key, digest, encoded, now))


def _add_one(
    transaction: Transaction, item: Prepared, index: int, now: float, rules: Rules, changes: Changes
) -> Added:
    seen = _duplicate(transaction, item)
    if seen is not None:
        transaction.run("UPDATE memories SET seen = seen + 1 WHERE id = ?", (seen,))
        return Added(seen, Outcome.SEEN)
    id = f"mem-{secrets.token_hex(12)}"
    holders = rows.select(transaction, "WHERE m.key = ? AND m.superseded_by IS NULL", (item.key,)) if item.key else []
    for holder in holders:
        _supersede(transaction, holder, id, item, rules, changes)
    conversation, ordinal = _next_place(transaction, item.conversation)
    [(seq,)] = transaction.execute(
        "INSERT INTO memories(id, text, digest, conversation, ordinal, key, metadata, created, updated) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING seq",
        (id, item.text, rows.digest(item.text), conversation, ordinal, item.key, item.metadata, item.created, now),
    )
    lexical.insert(transaction, seq)
    _store_vector(transaction, seq, item, rules)
    changes.stored[seq] = index
    outcome = Outcome.SUPERSEDED if holders else Outcome.ADDED
    return Added(id, outcome, tuple(holder.id for holder in holders))


def _duplicate(transaction: Transaction, item: Prepared) -> str | None:
    """The live memory of the same conversation that already says all of it: text, and key and metadata if given."""
    for memory, key, metadata in transaction.execute(
        "SELECT m.id, m.key, m.metadata FROM memories m LEFT JOIN conversations c ON c.id = m.conversation "
        "WHERE m.digest = ? AND m.superseded_by IS NULL AND m.text = ? AND c.name IS ? ORDER BY m.seq",
        (rows.digest(item.text), item.text, item.conversation),
    ):
        if item.key in (None, key) and item.metadata in (None, metadata):
            return str(memory)
    return None


def _supersede(
    transaction: Transaction, old: Memory, id: str, item: Prepared, rules: Rules, changes: Changes
) -> None:
    with lexical.reindexed(transaction, old.seq):
        transaction.run("UPDATE memories SET superseded_by = ? WHERE seq = ?", (id, old.seq))
    transaction.run("DELETE FROM vectors WHERE seq = ?", (old.seq,))
    sessions.replace_with(transaction, old.id, id, lambda: rules.count_tokens(item.text))
    changes.stored.pop(old.seq, None)
    changes.removed.append(old.seq)


def _next_place(transaction: Transaction, conversation: str | None) -> tuple[int | None, int]:
    if conversation is None:
        return None, 0
    [(number, ordinal)] = transaction.execute(
        "INSERT INTO conversations(name, next) VALUES (?, 2) ON CONFLICT(name) DO UPDATE SET next = next + 1 "
        "RETURNING id, next - 1",
        (conversation,),
    )
    return number, ordinal


def _store_vector(transaction: Transaction, seq: int, item: Prepared, rules: Rules) -> None:
    transaction.run("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", (seq, rules.embedder, item.vector))


def _forget_requests(transaction: Transaction, ids: Sequence[str]) -> None:
    """A repeated request must not bring back what was forgotten, and its digest must not tell what it was."""
    sql = "UPDATE requests SET digest = NULL WHERE digest IS NOT NULL AND instr(answer, ?) > 0"
    for id in ids:
        transaction.run(sql, (id,))
