"""The door of the memory layer: users by name, everything checked, everything durable when it returns.

Synchronous and thread-safe; call it from worker threads. Reading never creates a user.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from amem.engine.types import Tenant
from amem.memory import validate
from amem.memory.config import MemoryConfig
from amem.memory.control import Control, TenantRecord
from amem.memory.datadir import DataDir, sync_directory
from amem.memory.errors import Damaged, InvalidInput, NotFound
from amem.memory.pool import Erased, TenantPool
from amem.memory.tenant import TenantMemory, new_session_id, stored_vectors
from amem.memory.types import (
    Added,
    Forgotten,
    Memory,
    Metadata,
    NewMemory,
    Page,
    Recalled,
    RecallOptions,
    Session,
    UserSummary,
)
from amem.memory.writes import Prepared

T = TypeVar("T")
Ranked = list[Recalled]

_MAX_IDS = 10_000
_MAX_PAGE = 1_000
_MAX_TOKENS = 1 << 31


class MemoryService:
    def __init__(self, data_dir: Path, config: MemoryConfig | None = None) -> None:
        """Locks the directory and finishes what a crash interrupted. Raises DataDirError, Damaged, Unavailable."""
        self._config = config or MemoryConfig()
        self._directory = DataDir(data_dir)
        try:
            self._control = Control(self._directory)
            self._pool = TenantPool(self._directory, self._control, self._config)
            for tenant_id in self._control.erased():
                self._remove_files(tenant_id)
        except BaseException:
            self._directory.close()
            raise
        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()

    # Users -----------------------------------------------------------------------------------------------------

    def tenant(self, user: str, create: bool = False) -> Tenant | None:
        """Who the user is to the engine. None for a user that is not known, unless `create`."""
        record = self._find(user, create)
        return None if record is None else Tenant(record.id, record.secret)

    def users(self, after: str = "", limit: int = _MAX_PAGE) -> list[UserSummary]:
        """Known users by name; `after` is the last name of the page before."""
        validate.count(limit, "limit", 1, _MAX_PAGE)
        found = []
        for record in self._control.users(after, limit):
            with contextlib.suppress(Erased):
                found.append(self._summary(record))
        return found

    def forget_user(self, user: str) -> Forgotten:
        """Erases a user: name, keys, and the file with every text, index, vector and session. Raises NotFound.

        The keys go first, in one durable step: what a crash leaves behind is noise, removed at the next start.
        """
        begun = self._config.clock()
        record = self._known(user)
        with contextlib.suppress(Erased), self._pool.retired(record.id):
            ids, counts = self._holdings(record)
            self._control.erase(record.id)
            self._remove_files(record.id)
            self._count("users_forgotten")
            rows = sum(counts[:3]) + counts[0]
            return Forgotten(tuple(ids), rows, counts[0], counts[2], self._config.clock() - begun)
        raise NotFound(f"there is no user {user!r}", "user")

    # Memories --------------------------------------------------------------------------------------------------

    def add(
        self,
        user: str,
        items: Sequence[NewMemory],
        conversation: str | None = None,
        idempotency_key: str | None = None,
    ) -> list[Added]:
        """Stores `items` in order; durable when it returns. All or nothing.

        An item that a live memory of the same conversation says already is counted there. `conversation` is for items
        without one of their own. A repeated `idempotency_key` gives the first answer again and stores nothing.
        """
        if not 1 <= len(items) <= self._config.max_items:
            raise InvalidInput(f"send 1 to {self._config.max_items} memories at a time, got {len(items)}", "items")
        if conversation is not None:
            validate.name(conversation, "conversation")
        if idempotency_key is not None:
            validate.name(idempotency_key, "idempotency_key")
        encoded = [validate.new_memory(item, self._config) for item in items]
        validate.name(user, "user")
        vectors = stored_vectors(self._config.embedder.encode([item.text for item in items]))
        now = self._config.clock()
        prepared = [
            Prepared(
                item.text,
                item.key,
                metadata,
                conversation if item.conversation is None else item.conversation,
                now if item.created is None else float(item.created),
                vector,
            )
            for item, metadata, vector in zip(items, encoded, vectors, strict=True)
        ]
        added = self._with(user, lambda memory: memory.add(prepared, idempotency_key), create=True)
        self._count("adds", len(added))
        return added

    def get(self, user: str, id: str) -> Memory:
        """Raises NotFound. A superseded memory is given with its state."""
        validate.name(id, "id")
        return self._with(user, lambda memory: memory.get(id))

    def get_many(self, user: str, ids: Sequence[str]) -> dict[str, Memory]:
        """Those of `ids` that exist."""
        validate.names(ids, "ids")
        return self._with(user, lambda memory: memory.get_many(ids), otherwise={})

    def list(
        self,
        user: str,
        limit: int = 100,
        after: str | None = None,
        conversation: str | None = None,
        include_superseded: bool = False,
    ) -> Page:
        """Memories in the order of arrival. An unknown user has none."""
        validate.count(limit, "limit", 1, _MAX_PAGE)
        start = 0
        if after is not None:
            if not (isinstance(after, str) and after.isascii() and after.isdigit() and len(after) < 19):
                raise InvalidInput("after must be the `next` of an earlier page", "after")
            start = int(after)
        if conversation is not None:
            validate.name(conversation, "conversation")
        return self._with(
            user, lambda memory: memory.page(start, limit, conversation, include_superseded), otherwise=Page((), None)
        )

    def update(
        self,
        user: str,
        id: str,
        text: str | None = None,
        metadata: Metadata | None = None,
        version: int | None = None,
    ) -> Memory:
        """Replaces the text or the metadata ({} clears it). With `version`, only if nobody changed it since.

        The old text is gone from the files when it returns. Raises NotFound, Conflict, InvalidInput.
        """
        validate.name(id, "id")
        if text is None and metadata is None:
            raise InvalidInput("there is nothing to update: give text, metadata or both", "text")
        encoded = validate.metadata(metadata, self._config.max_metadata_bytes)
        item = None
        if text is not None:
            validate.text(text, "text", self._config.max_text_bytes)
            [vector] = stored_vectors(self._config.embedder.encode([text]))
            item = Prepared(text, None, None, None, 0.0, vector)
        updated = self._with(user, lambda memory: memory.update(id, version, item, encoded))
        self._count("updates")
        return updated

    def forget(self, user: str, ids: Sequence[str]) -> Forgotten:
        """Erases memories and the versions that they superseded, from the files too, before it returns.

        All or nothing: raises NotFound if one of them does not exist.
        """
        if not 1 <= len(ids) <= _MAX_IDS:
            raise InvalidInput(f"name 1 to {_MAX_IDS} memories at a time, got {len(ids)}", "ids")
        validate.names(ids, "ids")
        forgotten = self._with(user, lambda memory: memory.forget(tuple(dict.fromkeys(ids))))
        self._count("forgets", len(forgotten.ids))
        return forgotten

    def predecessors(self, user: str, id: str, count: int) -> tuple[Memory, ...]:
        """The live memories just before one in its conversation, at most `count`, oldest first."""
        validate.name(id, "id")
        return self._with(user, lambda memory: memory.neighbours([id], count, later=False), otherwise=())

    def successors(self, user: str, ids: Sequence[str], count: int) -> tuple[Memory, ...]:
        """The live memories that have one of `ids` among their `count` predecessors, in canonical order.

        Ask before `forget`; after it the ids are unknown, and unknown ids are passed over.
        """
        validate.names(ids, "ids")
        return self._with(user, lambda memory: memory.neighbours(ids, count, later=True), otherwise=())

    def recall(self, user: str, query: str, options: RecallOptions | None = None) -> Ranked:
        """What the query calls for, best first. A very long one counts by its ends; an unknown user has nothing."""
        options = options or RecallOptions()
        validate.recall_options(options, self._config)
        validate.text(query, "query", self._config.max_text_bytes)
        self._count("recalls")
        return self._with(user, lambda memory: memory.recall(query, options), otherwise=Ranked())

    # Sessions --------------------------------------------------------------------------------------------------

    def start_session(self, user: str, budget_tokens: int, session_id: str | None = None) -> Session:
        """Starts a session; with the id of one that exists, returns that one. Creates the user."""
        validate.count(budget_tokens, "budget_tokens", 1, _MAX_TOKENS)
        id = new_session_id() if session_id is None else validate.name(session_id, "session")
        session, ended = self._with(user, lambda memory: memory.start_session(id, budget_tokens), create=True)
        self._control.own_session(id, self._known(user).id, ended)
        return session

    def session(self, user: str, id: str) -> Session:
        """Raises NotFound, for the sessions of other users too."""
        validate.name(id, "session")
        return self._with(user, lambda memory: memory.session(id))

    def session_owner(self, id: str) -> str:
        """The user whose session this is. Raises NotFound."""
        return self._control.session_owner(validate.name(id, "session"))

    def end_session(self, user: str, id: str) -> None:
        """Raises NotFound."""
        validate.name(id, "session")
        record = self._known(user)
        ended = self._with(user, lambda memory: memory.end_session(id))
        self._control.disown_session(id, record.id)
        if not ended:
            raise NotFound(f"there is no session {id!r}", "session")

    def admit(self, user: str, session_id: str, memories: Sequence[Recalled], anchor: str | None) -> Session:
        """One turn of a session: appends what was recalled and is not resident yet, as one batch.

        Memories that were forgotten or changed since they were recalled are passed over.
        """
        validate.name(session_id, "session")
        if anchor is not None:
            validate.name(anchor, "anchor")
        return self._with(user, lambda memory: memory.admit(session_id, memories, anchor))

    # The whole -------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """Users, open databases, and what was done since the start."""
        with self._counts_lock:
            done = dict(self._counts)
        names = ("adds", "updates", "forgets", "recalls", "users_forgotten")
        return {
            "users": self._control.count(),
            "open_databases": self._pool.open_count,
            **{name: done.get(name, 0) for name in names},
        }

    def close(self) -> None:
        """Waits for the calls in progress. What was acknowledged is durable with or without it."""
        self._pool.close()
        self._control.close()
        self._directory.close()

    def _find(self, user: str, create: bool) -> TenantRecord | None:
        validate.name(user, "user")
        record = self._control.find(user)
        if record is None and create:
            record = self._control.create(user, self._config.clock())
        return record

    def _known(self, user: str) -> TenantRecord:
        record = self._find(user, create=False)
        if record is None:
            raise NotFound(f"there is no user {user!r}", "user")
        return record

    def _with(
        self, user: str, operation: Callable[[TenantMemory], T], create: bool = False, otherwise: T | None = None
    ) -> T:
        """Runs `operation` on the user's memory. For an unknown user: `create`, or `otherwise`, or NotFound."""
        while True:
            record = self._find(user, create)
            if record is None:
                if otherwise is None:
                    raise NotFound(f"user {user!r} has no memories", "user")
                return otherwise
            with contextlib.suppress(Erased), self._pool.lease(record) as memory:
                return operation(memory)

    def _summary(self, record: TenantRecord) -> UserSummary:
        try:
            with self._pool.lease(record) as memory:
                live, superseded, sessions, size = memory.counts()
        except Damaged:
            return UserSummary(record.user, 0, 0, 0, 0, record.created, damaged=True)
        return UserSummary(record.user, live, superseded, sessions, size, record.created)

    def _holdings(self, record: TenantRecord) -> tuple[Sequence[str], tuple[int, int, int, int]]:
        """Ids and counts of a retired tenant; nothing where the file is not there yet, or cannot be read."""
        if record.new:
            return (), (0, 0, 0, 0)
        try:
            memory = TenantMemory(record, self._directory.tenant_path(record.id), self._config)
            try:
                return memory.all_ids(), memory.counts()
            finally:
                memory.close()
        except Damaged:
            return (), (0, 0, 0, 0)

    def _remove_files(self, tenant_id: bytes) -> None:
        directory = self._directory.tenant_path(tenant_id).parent
        if directory.exists():
            for path in directory.iterdir():
                path.unlink()
            directory.rmdir()
            sync_directory(directory.parent)
        self._control.finish(tenant_id)

    def _count(self, what: str, times: int = 1) -> None:
        with self._counts_lock:
            self._counts[what] += times
