"""The background thread: writes chunks to files, packs small files together, copies warm chunks up to RAM.

It may fail as it likes: a chunk that cannot be written stays in RAM or is computed again.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque

from amem.engine.store.disk import DiskTier, Segment
from amem.engine.store.files import free_bytes
from amem.engine.store.format import BadRecord, Head
from amem.engine.store.index import Entry
from amem.engine.store.ram import RamBlock, copy_block
from amem.engine.store.rewrite import swap_files
from amem.engine.store.shelf import Shelf

_LOG = logging.getLogger("amem.store")
PACK_FILES = 8


class Breaker:
    """Stops writing for `pause_s` after `limit` I/O errors within `window_s`."""

    def __init__(self, limit: int = 3, window_s: float = 60.0, pause_s: float = 60.0) -> None:
        self._errors: deque[float] = deque(maxlen=limit)
        self._window_s = window_s
        self._pause_s = pause_s
        self._open_until = -1.0

    def fail(self, now: float) -> None:
        self._errors.append(now)
        if len(self._errors) == self._errors.maxlen and now - self._errors[0] <= self._window_s:
            self._open_until = now + self._pause_s
            self._errors.clear()

    def is_open(self, now: float) -> bool:
        return now < self._open_until


class Writer(threading.Thread):
    """Owns no state but the breaker; everything else is on the shelf."""

    def __init__(self, shelf: Shelf, disk: DiskTier) -> None:
        super().__init__(name="amem-kv-writer", daemon=True)
        self._shelf = shelf
        self._disk = disk
        self.breaker = Breaker()
        self._hurried = 0
        self._busy = False

    def run(self) -> None:
        while self._wait():
            try:
                self._turn()
            except Exception:
                # A thread that dies here would switch the tier off without a word.
                _LOG.exception("the KV writer failed; the chunks at hand are not on disk")
                with self._shelf.changed:
                    self._shelf.counters["write_errors"] += 1
            with self._shelf.changed:
                self._busy = False
                self._shelf.changed.notify_all()

    def drain(self) -> None:
        """Return when nothing is pending and nothing is being written or copied up."""
        shelf = self._shelf
        with shelf.changed:
            self._hurried += 1
            shelf.changed.notify_all()
            shelf.changed.wait_for(lambda: not (shelf.pending or shelf.wanted or self._busy) or not self.is_alive())
            self._hurried -= 1

    def _wait(self) -> bool:
        shelf = self._shelf
        with shelf.changed:
            shelf.changed.wait_for(lambda: shelf.pending or shelf.wanted or shelf.closed)
            if shelf.closed and not shelf.pending:
                return False
            if not shelf.wanted:
                shelf.changed.wait_for(self._enough, timeout=shelf.config.linger_s)
            self._busy = True
            return True

    def _enough(self) -> bool:
        waiting = sum(self._shelf.layout.payload_bytes(head.tokens) for head in self._shelf.pending.values())
        return self._hurried > 0 or self._shelf.closed or waiting >= self._shelf.config.batch_bytes

    def _turn(self) -> None:
        with self._shelf.io:
            batch = self._take()
            if batch:
                try:
                    segment = self._write(batch)
                finally:
                    with self._shelf.changed:
                        for entry, _, _ in batch:
                            self._shelf.unpin(entry.key)
                if segment is not None:
                    self._pack(segment.tenant)
        self._promote()

    # Writing

    def _take(self) -> list[tuple[Entry, Head, RamBlock]]:
        """The oldest pending chunk and what else of its tenant fits into one file, pinned."""
        shelf = self._shelf
        batch: list[tuple[Entry, Head, RamBlock]] = []
        size = 0
        with shelf.changed:
            for key, head in list(shelf.pending.items()):
                entry = shelf.index.get(key)
                if entry is None or entry.ram is None:
                    del shelf.pending[key]
                    continue
                if batch and head.tenant != batch[0][1].tenant:
                    continue
                size += entry.ram.nbytes
                if batch and size > shelf.config.batch_bytes:
                    break
                batch.append((entry, dataclasses.replace(head, memories=entry.memories), entry.ram))
            for entry, _, _ in batch:
                del shelf.pending[entry.key]
                shelf.pin(entry.key)
        return batch

    def _write(self, batch: list[tuple[Entry, Head, RamBlock]]) -> Segment | None:
        shelf = self._shelf
        try:
            items = [self._disk.item(head, block.payload()) for _, head, block in batch]
            need = sum(len(item.header) + len(item.payload) for item in items) + 8192 * len(items)
            if self.breaker.is_open(time.monotonic()) or not self._room(need):
                self._dropped(len(batch))
                return None
            draft = self._disk.draft(batch[0][1].tenant, items)
        except OSError as error:
            self._failed(error, len(batch))
            return None
        with shelf.changed:
            # An erasure that began meanwhile waits for `io`, and finds the file like any other.
            try:
                self._disk.commit(draft)
            except OSError as error:
                self._failed(error, len(batch))
                return None
            shelf.place(draft)
            shelf.counters["chunks_written"] += len(batch)
            shelf.counters["bytes_written"] += draft.length
        self._sync(draft)
        return draft

    def _sync(self, segment: Segment) -> None:
        try:
            self._disk.sync(segment.path.parent)
        except OSError as error:
            self._failed(error, 0)

    def _failed(self, error: Exception, chunks: int) -> None:
        _LOG.warning("KV of %d chunks could not be written: %s", chunks, error)
        self.breaker.fail(time.monotonic())
        with self._shelf.changed:
            self._shelf.counters["write_errors"] += 1
        self._dropped(chunks)

    def _dropped(self, chunks: int) -> None:
        with self._shelf.changed:
            self._shelf.counters["writes_dropped"] += chunks

    # Room

    def _room(self, need: int) -> bool:
        """Keep the budget and the floor of free space, at the cost of the least valuable files. Raises OSError."""
        config = self._shelf.config
        if need > config.disk_bytes:
            return False
        while self._used() + need > config.disk_bytes:
            if not self._evict():
                return False
        start = self._used()
        while free_bytes(self._disk.root) - need < config.free_floor_bytes:
            if start - self._used() >= need or not self._evict():
                return False
        return True

    def _used(self) -> int:
        return self._disk.used + (self._shelf.foreign.used if self._shelf.foreign else 0)

    def _evict(self) -> bool:
        shelf = self._shelf
        if shelf.foreign is not None and shelf.foreign.evict_one():
            return True
        with shelf.changed:
            name = shelf.segment_queue.pop()
            segment = None if name is None else self._disk.segments.get(name)
            if segment is None:
                return False
            try:
                self._disk.remove(segment)
            except OSError:
                shelf.requeue(segment)
                raise
            shelf.counters["evicted_disk"] += len(segment.records)
            shelf.detach(segment)
        return True

    # Packing

    def _pack(self, tenant: bytes) -> None:
        """Join files of a size class once there are PACK_FILES of them, so that single chunks do not cost a file."""
        shelf = self._shelf
        with shelf.changed:
            classes: dict[int, list[Segment]] = {}
            for segment in self._disk.segments.values():
                if segment.tenant == tenant and PACK_FILES * segment.length <= shelf.config.segment_bytes:
                    classes.setdefault(segment.length.bit_length() // 2, []).append(segment)
        for group in classes.values():
            if len(group) >= PACK_FILES:
                self._join(group[:PACK_FILES])

    def _join(self, group: list[Segment]) -> None:
        try:
            swap_files(self._shelf, self._disk, group, frozenset())
            self._disk.sync(group[0].path.parent)
        except OSError as error:
            self._failed(error, 0)

    # Promotion

    def _promote(self) -> None:
        """Copy wanted chunks to RAM, as long as they are worth more than what they displace."""
        shelf = self._shelf
        while True:
            with shelf.changed:
                if not shelf.wanted:
                    return
                key = next(iter(shelf.wanted))
                head = shelf.wanted.pop(key)
                entry = shelf.index.get(key)
                if entry is None or entry.ram is not None or entry.disk is None or entry.erasing:
                    continue
                ref = entry.disk
                shelf.pin(key)
            block: RamBlock | None = None
            try:
                block = copy_block(self._disk.read(ref, head), shelf.layout, head.tokens)
            except (OSError, BadRecord):
                _LOG.debug("a chunk could not be copied up; the next reader finds out why")
            with shelf.changed:
                shelf.unpin(key)
                live = shelf.index.get(key) is entry and not entry.erasing and entry.ram is None
                if block is not None and live and shelf.admit(entry, block, below=entry.rank):
                    shelf.counters["promoted"] += 1
                elif block is not None:
                    block.erase()
