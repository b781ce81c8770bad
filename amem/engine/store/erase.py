"""Erasure: when it returns, the chunks are in no tier, no file and no queue."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from amem.engine.store import files
from amem.engine.store.config import StoreError
from amem.engine.store.disk import DiskTier, Segment
from amem.engine.store.index import Entry
from amem.engine.store.rewrite import swap_files
from amem.engine.store.shelf import Shelf
from amem.engine.types import ForgetReceipt, Tenant


def forget(shelf: Shelf, tenant: Tenant, memories: tuple[str, ...] | None) -> ForgetReceipt:
    """Erase every chunk owned by, or computed behind, one of the memories; the whole tenant with None.

    From the first step on no chunk of them is found again, and what is queued for writing never gets there; a failed
    call leaves them hidden, and calling again goes on where it stopped.
    """
    with shelf.changed:
        victims = shelf.index.owned(tenant.id, memories)
        own = threading.get_ident()
        if any(own in shelf.pins.get(entry.key, ()) for entry in victims):
            raise StoreError("forget was called inside a lease of what it has to erase; leave the lease first")
        for entry in victims:
            entry.erasing = True
            shelf.pending.pop(entry.key, None)
            shelf.wanted.pop(entry.key, None)
    # The lock is had only between two writes: a file that was being written is either in place or gone by then.
    with shelf.io:
        _wait_for_readers(shelf, victims)
        disk_bytes = _erase_disk(shelf, tenant, memories, victims)
        with shelf.changed:
            ram_bytes = sum(shelf.drop_ram(entry) for entry in victims)
            for entry in victims:
                shelf.index.remove(entry)
            shelf.counters["forgotten"] += len(victims)
    return ForgetReceipt(chunks=len(victims), ram_bytes=ram_bytes, disk_bytes=disk_bytes)


def _wait_for_readers(shelf: Shelf, victims: list[Entry]) -> None:
    deadline = time.monotonic() + shelf.config.erase_timeout_s
    with shelf.changed:
        for entry in victims:
            while entry.key in shelf.pins:
                if not shelf.changed.wait(timeout=deadline - time.monotonic()):
                    raise StoreError(
                        f"a chunk that has to be erased is still being read after {shelf.config.erase_timeout_s} s; "
                        "it is no longer served; call forget again to finish"
                    )


def _erase_disk(shelf: Shelf, tenant: Tenant, memories: tuple[str, ...] | None, victims: list[Entry]) -> int:
    disk = shelf.disk
    if disk is None:
        return 0
    try:
        disk.clear_partial()
        erased = sum(_leave_out(shelf, disk, *group) for group in _by_file(shelf, disk, victims))
        if shelf.foreign is not None:
            erased += shelf.foreign.forget(tenant.id, None if memories is None else frozenset(memories))
        if memories is None:
            _remove_directory(disk.home / tenant.id.hex())
        # Even when nothing was left to remove: the sync of an earlier call may have failed.
        for directory in (disk.home, *disk.root.glob(f"*/{tenant.id.hex()}")):
            files.sync_dir(directory)
    except OSError as error:
        raise StoreError(
            f"KV could not be erased from disk: {error}; it is no longer served; call forget again"
        ) from error
    return erased


def _by_file(shelf: Shelf, disk: DiskTier, victims: list[Entry]) -> list[tuple[Segment, frozenset[bytes], int]]:
    """(file, keys to leave out, their payload bytes) of every file that holds a victim."""
    with shelf.changed:
        groups: dict[bytes, list[Entry]] = {}
        for entry in victims:
            if entry.disk is not None:
                groups.setdefault(entry.disk.segment.name, []).append(entry)
        size = shelf.layout.payload_bytes
        return [
            (disk.segments[name], frozenset(entry.key for entry in group), sum(size(entry.tokens) for entry in group))
            for name, group in groups.items()
        ]


def _leave_out(shelf: Shelf, disk: DiskTier, segment: Segment, keys: frozenset[bytes], size: int) -> int:
    try:
        swap_files(shelf, disk, [segment], keys)
    except OSError:
        # There may be no room for the copy. What else the file holds can be computed again; the erased must go.
        with shelf.changed:
            disk.remove(segment)
            shelf.detach(segment)
    return size


def _remove_directory(directory: Path) -> None:
    if directory.exists():
        for path in list(directory.iterdir()):
            path.unlink()
        directory.rmdir()
