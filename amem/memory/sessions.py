"""Sessions: which memories a conversation carries, in which order, and what happens when one of them changes.

A session only grows at its end. Taking something out moves what stands behind it, so it happens for two reasons only:
a memory is gone or changed, or the budget is full at the beginning of a turn. Either begins a new epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from amem.memory.database import Transaction
from amem.memory.errors import NotFound
from amem.memory.types import Batch, Recalled, Session

_HALF_LIFE_TURNS = 8.0
_AGED = 0.6  # weight of the newest recall in the aged mean of a resident's scores


@dataclass(frozen=True, slots=True)
class SessionLimits:
    evict_to: float
    max_sessions: int


@dataclass(frozen=True, slots=True)
class _Resident:
    batch: int
    anchor: str | None
    memory: str
    tokens: int
    score: float
    hits: int
    turn: int

    def value(self, turn: int) -> float:
        """Relevance x recency x reuse. Size is in it already: the prefill saved and the room taken grow together."""
        return self.score * math.pow(2.0, (self.turn - turn) / _HALF_LIFE_TURNS) * (1.0 + math.log(self.hits))

    def recalled(self, score: float, turn: int) -> _Resident:
        aged = _AGED * score + (1.0 - _AGED) * self.score
        return replace(self, score=aged, hits=self.hits + 1, turn=turn)


def start(
    transaction: Transaction, user: str, id: str, budget: int, now: float, limits: SessionLimits
) -> tuple[Session, list[str]]:
    """Starts a session, or returns the one of this id. Also: the ids of those that made room."""
    transaction.run(
        "INSERT INTO sessions(id, epoch, budget, turn, created, used) VALUES (?, 0, ?, 0, ?, ?) "
        "ON CONFLICT(id) DO NOTHING",
        (id, budget, now, now),
    )
    old = transaction.execute(
        "SELECT id FROM sessions ORDER BY used DESC, id LIMIT -1 OFFSET ?", (limits.max_sessions,)
    )
    ended = [row[0] for row in old if row[0] != id]
    for each in ended:
        end(transaction, each)
    return load(transaction, user, id), ended


def load(transaction: Transaction, user: str, id: str) -> Session:
    """Raises NotFound."""
    rows = transaction.execute("SELECT epoch, budget, created FROM sessions WHERE id = ?", (id,))
    if not rows:
        raise NotFound(f"there is no session {id!r}; start one first", "session")
    epoch, budget, created = rows[0]
    batches: dict[int, tuple[str | None, list[str]]] = {}
    tokens = 0
    for resident in _residents(transaction, id):
        batches.setdefault(resident.batch, (resident.anchor, []))[1].append(resident.memory)
        tokens += resident.tokens
    placed = tuple(Batch(anchor, tuple(ids)) for anchor, ids in batches.values())
    return Session(id, user, epoch, placed, budget, tokens, created)


def end(transaction: Transaction, id: str) -> bool:
    return transaction.run("DELETE FROM sessions WHERE id = ?", (id,)) > 0


def admit(
    transaction: Transaction,
    id: str,
    recalled: Sequence[Recalled],
    anchor: str | None,
    now: float,
    limits: SessionLimits,
) -> None:
    """One turn: resident memories are refreshed, new ones appended as one batch in canonical order.

    Where they do not fit, residents of least value make room, down to `evict_to` of the budget, so that the next
    turns find room too; those recalled now go last. A memory larger than the whole budget is left out.
    """
    rows = transaction.execute("SELECT budget, turn FROM sessions WHERE id = ?", (id,))
    if not rows:
        raise NotFound(f"there is no session {id!r}; start one first", "session")
    budget, turn = rows[0][0], rows[0][1] + 1
    best = {item.memory.id: item for item in sorted(recalled, key=lambda item: item.score)}
    old = [
        resident.recalled(best[resident.memory].score, turn) if resident.memory in best else resident
        for resident in _residents(transaction, id)
    ]
    known = {resident.memory for resident in old}
    new = _fitting([item for item in best.values() if item.memory.id not in known], budget)
    needed = sum(item.tokens for item in new)
    kept = _evicted(old, turn, budget - needed, int(budget * limits.evict_to) - needed)
    batch = max((resident.batch for resident in old), default=0) + 1
    new.sort(key=lambda item: item.memory.place)
    fresh = [_Resident(batch, anchor, item.memory.id, item.tokens, item.score, 1, turn) for item in new]
    if len(kept) < len(old):
        _store(transaction, id, kept + fresh)
    else:
        _extend(transaction, id, old, fresh, turn)
    transaction.run(
        "UPDATE sessions SET turn = ?, used = ?, epoch = epoch + ? WHERE id = ?",
        (turn, now, len(kept) < len(old), id),
    )


def unchanged(transaction: Transaction, recalled: Sequence[Recalled]) -> list[Recalled]:
    """Without those that were forgotten, superseded or changed after they were recalled."""
    sql = "SELECT 1 FROM memories WHERE id = ? AND version = ? AND superseded_by IS NULL"
    return [item for item in recalled if transaction.execute(sql, (item.memory.id, item.memory.version))]


def remove(transaction: Transaction, memory: str) -> int:
    """Takes a forgotten memory out of every session; each begins a new epoch. Returns how many sessions had it."""
    sessions = holding(transaction, memory)
    for session in sessions:
        _store(transaction, session, [r for r in _residents(transaction, session) if r.memory != memory])
    _new_epochs(transaction, sessions)
    return len(sessions)


def replace_with(transaction: Transaction, memory: str, successor: str, count: Callable[[], int]) -> int:
    """Where `memory` is resident, `successor` (its new text, or what superseded it) comes in at the end instead."""
    sessions = holding(transaction, memory)
    tokens = count() if sessions else 0
    for session in sessions:
        residents = _residents(transaction, session)
        [gone] = [resident for resident in residents if resident.memory == memory]
        rest = [resident for resident in residents if resident.memory not in (memory, successor)]
        last = rest[-1] if rest else gone
        rest.append(replace(gone, batch=last.batch, anchor=last.anchor, memory=successor, tokens=tokens))
        _store(transaction, session, rest)
    _new_epochs(transaction, sessions)
    return len(sessions)


def _fitting(items: list[Recalled], budget: int) -> list[Recalled]:
    """The best-scored items that fit into the budget together."""
    chosen, room = [], budget
    for item in sorted(items, key=lambda item: -item.score):
        if item.tokens <= room:
            chosen.append(item)
            room -= item.tokens
    return chosen


def _evicted(old: list[_Resident], turn: int, room: int, target: int) -> list[_Resident]:
    """`old` without the least valuable ones: unchanged if it fits into `room`, else cut to `target` (at least 0)."""
    total = sum(resident.tokens for resident in old)
    if total <= room:
        return old
    gone = set()
    for resident in sorted(old, key=lambda r: (r.turn == turn, r.value(turn), r.memory)):
        enough = room if resident.turn == turn else max(0, target)
        if total <= enough:
            break
        gone.add(resident.memory)
        total -= resident.tokens
    return [resident for resident in old if resident.memory not in gone]


def _residents(transaction: Transaction, session: str) -> list[_Resident]:
    sql = "SELECT batch, anchor, memory, tokens, score, hits, turn FROM residents WHERE session = ? ORDER BY place"
    return [_Resident(*row) for row in transaction.execute(sql, (session,))]


def _store(transaction: Transaction, session: str, residents: Sequence[_Resident]) -> None:
    transaction.run("DELETE FROM residents WHERE session = ?", (session,))
    _insert(transaction, session, residents, 0)


def _extend(
    transaction: Transaction, session: str, old: Sequence[_Resident], new: Sequence[_Resident], turn: int
) -> None:
    """What `_store` would do for `old` and `new`, where only those recalled in this turn are changed."""
    for r in old:
        if r.turn == turn:
            sql = "UPDATE residents SET score = ?, hits = ?, turn = ? WHERE session = ? AND memory = ?"
            transaction.run(sql, (r.score, r.hits, r.turn, session, r.memory))
    _insert(transaction, session, new, len(old))


def _insert(transaction: Transaction, session: str, residents: Sequence[_Resident], place: int) -> None:
    for offset, r in enumerate(residents):
        transaction.run(
            "INSERT INTO residents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (session, place + offset, r.batch, r.anchor, r.memory, r.tokens, r.score, r.hits, r.turn),
        )


def holding(transaction: Transaction, memory: str) -> list[str]:
    return [row[0] for row in transaction.execute("SELECT session FROM residents WHERE memory = ?", (memory,))]


def _new_epochs(transaction: Transaction, sessions: Sequence[str]) -> None:
    for session in sessions:
        transaction.run("UPDATE sessions SET epoch = epoch + 1 WHERE id = ?", (session,))
