"""Which chunks there are, whose they are and where they lie. Small: one entry a chunk, shared keys."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from amem.engine.store.disk import RecordRef
from amem.engine.store.format import Head
from amem.engine.store.ram import RamBlock


@dataclass(eq=False, slots=True)
class Entry:
    """A stored chunk. `erasing` hides it from everything but the erasure that has begun."""

    key: bytes
    tenant: bytes
    tokens: int
    context: int
    memories: tuple[str, ...]
    rank: float
    ram: RamBlock | None = None
    disk: RecordRef | None = None
    erasing: bool = False
    disk_uses: int = 0


class Index:
    """Keys to entries, and for each tenant memory ids to keys. Not thread-safe."""

    def __init__(self) -> None:
        self._entries: dict[bytes, Entry] = {}
        self._owned: dict[bytes, dict[str, tuple[bytes, ...]]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, key: bytes) -> Entry | None:
        return self._entries.get(key)

    def add(self, head: Head, rank: float) -> Entry:
        entry = Entry(head.key, head.tenant, head.tokens, head.context, (), rank)
        self._entries[entry.key] = entry
        self.link(entry, head.memories)
        return entry

    def link(self, entry: Entry, memories: Iterable[str]) -> None:
        """Note more memories whose erasure takes the chunk along."""
        fresh = tuple(sys.intern(memory) for memory in dict.fromkeys(memories) if memory not in entry.memories)
        if not fresh:
            return
        entry.memories += fresh
        owned = self._owned.setdefault(entry.tenant, {})
        for memory in fresh:
            owned[memory] = (*owned.get(memory, ()), entry.key)

    def remove(self, entry: Entry) -> None:
        """Drop an entry. One that was dropped already is left alone."""
        if self._entries.get(entry.key) is not entry:
            return
        del self._entries[entry.key]
        owned = self._owned[entry.tenant]
        for memory in entry.memories:
            rest = tuple(key for key in owned[memory] if key != entry.key)
            if rest:
                owned[memory] = rest
            else:
                del owned[memory]
        if not owned:
            del self._owned[entry.tenant]

    def owned(self, tenant: bytes, memories: Iterable[str] | None) -> list[Entry]:
        """Distinct chunks owned by, or computed behind, one of the memories; all of the tenant's with None."""
        owned = self._owned.get(tenant, {})
        chosen = owned if memories is None else memories
        keys = dict.fromkeys(key for memory in chosen for key in owned.get(memory, ()))
        return [self._entries[key] for key in keys]
