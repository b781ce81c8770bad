"""Leases: the KV of one chunk, held still while it is read."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from amem.engine.batch import ChunkKV
from amem.engine.store.config import Tier
from amem.engine.store.disk import DiskTier, RecordRef
from amem.engine.store.format import BadRecord, Head
from amem.engine.store.index import Entry
from amem.engine.store.shelf import Shelf

_LOG = logging.getLogger("amem.store")
PROMOTE_FROM_USES = 2
# Shortage of descriptors or memory says nothing about the file.
_INNOCENT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})


@dataclass(frozen=True, slots=True)
class Lease:
    """The KV of a chunk and the tier that it came from. Read-only views, valid inside the `with` block alone."""

    kv: ChunkKV
    tier: Tier


@contextmanager
def open_lease(shelf: Shelf, head: Head) -> Iterator[Lease | None]:
    with shelf.changed:
        entry = shelf.live(head.key)
        if entry is None:
            shelf.counters["misses"] += 1
        else:
            shelf.pin(head.key)
            shelf.index.link(entry, head.memories)
            shelf.touch(entry)
    if entry is None:
        yield None
        return
    try:
        if entry.ram is not None:
            yield _counted(shelf, Lease(entry.ram.kv, Tier.CPU))
        else:
            with _disk_lease(shelf, entry, head) as lease:
                yield _counted(shelf, lease)
    finally:
        with shelf.changed:
            shelf.unpin(head.key)


def _counted(shelf: Shelf, lease: Lease | None) -> Lease | None:
    with shelf.changed:
        shelf.counters["misses" if lease is None else f"hits_{lease.tier.value}"] += 1
    return lease


@contextmanager
def _disk_lease(shelf: Shelf, entry: Entry, head: Head) -> Iterator[Lease | None]:
    disk = shelf.disk
    ref = entry.disk
    if disk is None or ref is None:
        yield None
        return
    slot = disk.journal.enter(ref.segment.journal_name)
    try:
        kv = _read(shelf, disk, entry, head, ref)
        yield None if kv is None else Lease(kv, Tier.DISK)
    finally:
        disk.journal.leave(slot)


def _read(shelf: Shelf, disk: DiskTier, entry: Entry, head: Head, ref: RecordRef) -> ChunkKV | None:
    """The mapped KV. A file that is not what it was is removed, unless a copy has taken its place meanwhile."""
    while True:
        try:
            kv = disk.read(ref, head)
        except (OSError, BadRecord) as error:
            with shelf.changed:
                now = entry.disk
                if now is ref or now is None:
                    _give_up(shelf, disk, ref, error, gone=now is None)
                    return None
                ref = now
        else:
            _use(shelf, entry, head)
            return kv


def _give_up(shelf: Shelf, disk: DiskTier, ref: RecordRef, error: Exception, gone: bool) -> None:
    if gone:
        return
    if isinstance(error, OSError) and error.errno in _INNOCENT:
        shelf.counters["read_errors"] += 1
        return
    shelf.counters["corrupt"] += 1
    _LOG.warning("a KV file is damaged and was dropped; its chunks will be computed again: %s", error)
    try:
        disk.remove(ref.segment)
    except OSError:
        # It stays, and is checked again by every read: never served.
        shelf.counters["read_errors"] += 1
        return
    shelf.detach(ref.segment)


def _use(shelf: Shelf, entry: Entry, head: Head) -> None:
    """Ask for a copy in RAM when there is room for it, or when the chunk is used again and again."""
    with shelf.changed:
        entry.disk_uses += 1
        room = shelf.ram_used + shelf.layout.payload_bytes(entry.tokens) <= shelf.config.ram_bytes
        if room or entry.disk_uses >= PROMOTE_FROM_USES:
            shelf.wanted[entry.key] = head
            shelf.changed.notify_all()
