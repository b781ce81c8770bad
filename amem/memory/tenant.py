"""One user's memory: a database, and the vector index that follows it."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from amem.memory import lexical, recall, rows, sessions, writes
from amem.memory.config import MemoryConfig
from amem.memory.control import TenantRecord
from amem.memory.database import Transaction, Value
from amem.memory.embed import Vectors
from amem.memory.schema import open_tenant
from amem.memory.types import (
    Added,
    Forgotten,
    Memory,
    Page,
    Recalled,
    RecallOptions,
    Session,
)
from amem.memory.vectors import VectorIndex
from amem.memory.writes import Changes, Prepared, Rules

_STORED = np.dtype("<f2")
_REPAIR_STEP = 1_000


class TenantMemory:
    """Thread-safe. Arguments are checked already; what it raises is in `amem.memory.errors`."""

    def __init__(self, record: TenantRecord, path: Path, config: MemoryConfig) -> None:
        self._user = record.user
        self._secret = record.secret
        self._config = config
        self._embedder = config.embedder
        self._rules = Rules(f"{self._embedder.name}/{self._embedder.dim}", config.count_tokens)
        self._limits = sessions.SessionLimits(config.evict_to, config.max_sessions)
        self._vectors: VectorIndex | None = None
        self.database = open_tenant(path, record.key, record.new, config.max_group)

    @property
    def broken(self) -> bool:
        return self.database.broken

    def add(self, items: Sequence[Prepared], request: str | None) -> list[Added]:
        now = self._config.clock()
        digest = self._request_digest(items)

        def operation(transaction: Transaction) -> list[Added]:
            if request is not None:
                oldest = now - self._config.idempotency_seconds
                answer = writes.recorded_answer(transaction, request, digest, oldest)
                if answer is not None:
                    return answer
            changes = Changes()
            added = writes.add(transaction, items, now, self._rules, changes)
            if request is not None:
                writes.record_answer(transaction, request, digest, added, now)
            self._follow(transaction, changes, items)
            return added

        return self.database.write(operation)

    def get(self, id: str) -> Memory:
        return self.database.read(lambda t: rows.by_id(t, id))

    def get_many(self, ids: Sequence[str]) -> dict[str, Memory]:
        return self.database.read(lambda t: rows.by_ids(t, ids))

    def page(self, after: int, limit: int, conversation: str | None, superseded: bool) -> Page:
        where = "WHERE m.seq > ?"
        values: list[Value] = [after]
        if not superseded:
            where += " AND m.superseded_by IS NULL"
        if conversation is not None:
            where += " AND c.name = ?"
            values.append(conversation)
        found = self.database.read(lambda t: rows.select(t, f"{where} ORDER BY m.seq LIMIT ?", (*values, limit + 1)))
        more = len(found) > limit
        return Page(tuple(found[:limit]), str(found[limit - 1].seq) if more else None)

    def update(self, id: str, version: int | None, item: Prepared | None, metadata: str | None) -> Memory:
        now = self._config.clock()

        def operation(transaction: Transaction) -> Memory:
            memory = writes.update(transaction, id, version, item, metadata, now, self._rules)
            if item is not None:
                self._follow(transaction, Changes(stored={memory.seq: 0}), [item])
            return memory

        updated = self.database.write(operation)
        if item is not None:
            self.database.empty_wal()
        return updated

    def forget(self, ids: Sequence[str]) -> Forgotten:
        begun = self._config.clock()
        changes = Changes()

        def operation(transaction: Transaction) -> list[str]:
            nonlocal changes
            changes = Changes()
            gone = writes.forget(transaction, ids, changes)
            self._follow(transaction, changes, ())
            return gone

        gone = self.database.write(operation)
        self.database.empty_wal()
        return Forgotten(
            tuple(gone), changes.rows, len(changes.removed), changes.sessions, self._config.clock() - begun
        )

    def neighbours(self, ids: Sequence[str], count: int, later: bool) -> tuple[Memory, ...]:
        """Live memories within `count` places of one of `ids`, in canonical order, without `ids` themselves."""

        def operation(transaction: Transaction) -> tuple[Memory, ...]:
            found: dict[str, Memory] = {}
            for memory in rows.by_ids(transaction, ids).values():
                beside = rows.after if later else rows.before
                found.update((each.id, each) for each in beside(transaction, memory, count))
            return tuple(sorted((m for m in found.values() if m.id not in ids), key=lambda m: m.place))

        return self.database.read(operation)

    def recall(self, query: str, options: RecallOptions) -> list[Recalled]:
        index, query = self._index(), recall.shortened(query)
        vector = self._embedder.encode([query])[0]
        depth = max(recall.MIN_DEPTH, 4 * options.k)
        wide = depth if options.conversation is None else len(index)
        near = index.search(vector, wide, self._embedder.min_similarity)

        def operation(transaction: Transaction) -> list[Recalled]:
            matches = lexical.search(transaction, query, depth, options.conversation)
            ranked = recall.in_context(transaction, near, lambda seqs: index.scores(vector, seqs))
            hits = recall.fuse(matches, ranked)
            return recall.choose(transaction, hits, options, self._config.count_tokens)

        return self.database.read(operation)

    def start_session(self, id: str, budget: int) -> tuple[Session, list[str]]:
        now = self._config.clock()
        return self.database.write(lambda t: sessions.start(t, self._user, id, budget, now, self._limits))

    def session(self, id: str) -> Session:
        return self.database.read(lambda t: sessions.load(t, self._user, id))

    def end_session(self, id: str) -> bool:
        return self.database.write(lambda t: sessions.end(t, id))

    def admit(self, id: str, recalled: Sequence[Recalled], anchor: str | None) -> Session:
        now = self._config.clock()

        def operation(transaction: Transaction) -> Session:
            current = sessions.unchanged(transaction, recalled)
            sessions.admit(transaction, id, current, anchor, now, self._limits)
            return sessions.load(transaction, self._user, id)

        return self.database.write(operation)

    def counts(self) -> tuple[int, int, int, int]:
        """Live memories, superseded ones, sessions, bytes of the database."""
        sql = (
            "SELECT (SELECT count(*) FROM memories WHERE superseded_by IS NULL), "
            "(SELECT count(*) FROM memories WHERE superseded_by IS NOT NULL), (SELECT count(*) FROM sessions), "
            "(SELECT page_count * page_size FROM pragma_page_count, pragma_page_size)"
        )
        [(live, superseded, open_sessions, size)] = self.database.read(lambda t: t.execute(sql))
        return live, superseded, open_sessions, size

    def all_ids(self) -> list[str]:
        return [row[0] for row in self.database.read(lambda t: t.execute("SELECT id FROM memories ORDER BY seq"))]

    def close(self) -> None:
        self.database.close()
        if self._vectors is not None:
            self._vectors.close()

    def _index(self) -> VectorIndex:
        if self._vectors is None:
            while self._encode_missing():
                pass
            self.database.read(self._load_vectors)
        if self._vectors is None:
            raise RuntimeError("the vector index was not loaded")
        return self._vectors

    def _load_vectors(self, transaction: Transaction) -> None:
        """Runs under the lock of the database: no commit can come between the rows and the index."""
        if self._vectors is not None:
            return
        index = VectorIndex(self._embedder.dim, self._config.exact_rows)
        found = transaction.execute("SELECT seq, data FROM vectors WHERE embedder = ?", (self._rules.embedder,))
        matrix = np.frombuffer(b"".join(row[1] for row in found), _STORED).astype(np.float32)
        index.put([row[0] for row in found], matrix.reshape(len(found), self._embedder.dim))
        self._vectors = index

    def _encode_missing(self) -> bool:
        """Encodes memories whose vector is missing, damaged or of another embedder. Whether there may be more."""
        sql = (
            "SELECT m.seq, m.text, m.version FROM memories m LEFT JOIN vectors v ON v.seq = m.seq "
            "WHERE m.superseded_by IS NULL AND (v.embedder IS NOT ? OR length(v.data) <> ?) LIMIT ?"
        )
        size = self._embedder.dim * _STORED.itemsize
        values = (self._rules.embedder, size, _REPAIR_STEP)
        missing = self.database.read(lambda t: t.execute(sql, values))
        if not missing:
            return False
        vectors = stored_vectors(self._embedder.encode([text for _, text, _ in missing]))
        store = (
            "INSERT OR REPLACE INTO vectors SELECT seq, ?, ? FROM memories "
            "WHERE seq = ? AND version = ? AND superseded_by IS NULL"
        )

        def operation(transaction: Transaction) -> None:
            for (seq, _, version), vector in zip(missing, vectors, strict=True):
                transaction.run(store, (self._rules.embedder, vector, seq, version))

        self.database.write(operation)
        return True

    def _follow(self, transaction: Transaction, changes: Changes, items: Sequence[Prepared]) -> None:
        """Lets the vector index follow the rows once they are durable. It is loaded from them if it is not there."""

        def hook() -> None:
            if self._vectors is None:
                return
            self._vectors.remove(changes.removed)
            data = b"".join(items[index].vector for index in changes.stored.values())
            matrix: Vectors = np.frombuffer(data, _STORED).astype(np.float32).reshape(-1, self._embedder.dim)
            self._vectors.put(list(changes.stored), matrix)

        transaction.after_commit(hook)

    def _request_digest(self, items: Sequence[Prepared]) -> bytes:
        fields = [(item.text, item.key, item.metadata, item.conversation) for item in items]
        return hashlib.blake2b(json.dumps(fields).encode(), key=self._secret, digest_size=32).digest()


def stored_vectors(vectors: Vectors) -> list[bytes]:
    """Vectors as they are stored: half precision, little-endian."""
    return [row.tobytes() for row in vectors.astype(_STORED)]


def new_session_id() -> str:
    return f"sess-{secrets.token_hex(16)}"
