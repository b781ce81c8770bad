"""What the store's threads share, under one lock: the index, the RAM budget, pins, and work for the writer."""

from __future__ import annotations

import math
import threading
from collections import Counter

from amem.engine.store.config import ChunkLayout, StoreConfig, StoreError
from amem.engine.store.disk import DiskTier, RecordRef, Segment
from amem.engine.store.format import Head
from amem.engine.store.index import Entry, Index
from amem.engine.store.policy import Clock, EvictionQueue, mean_rank
from amem.engine.store.ram import RamBlock
from amem.engine.store.recover import ForeignFiles, scan

COUNTERS = (
    "hits_cpu",
    "hits_disk",
    "misses",
    "puts",
    "puts_dropped",
    "refused_not_finite",
    "chunks_written",
    "bytes_written",
    "writes_dropped",
    "write_errors",
    "read_errors",
    "corrupt",
    "evicted_ram",
    "evicted_disk",
    "promoted",
    "forgotten",
)


class Shelf:
    """Every method expects `changed` (the lock) to be held, but for `open_disk`.

    io: held by whoever changes files, taken before `changed` and never inside it.
    pins: key to the ids of the threads that read the chunk; a pinned chunk is neither evicted nor overwritten.
    pending: what to write to disk, oldest first.  wanted: keys to copy from disk to RAM.
    """

    def __init__(self, config: StoreConfig, layout: ChunkLayout) -> None:
        self.config = config
        self.layout = layout
        self.changed = threading.Condition()
        self.io = threading.Lock()
        self.index = Index()
        self.clock = Clock()
        self.counters: Counter[str] = Counter()
        self.pins: dict[bytes, list[int]] = {}
        self.pending: dict[bytes, Head] = {}
        self.wanted: dict[bytes, Head] = {}
        self.closed = False
        self.ram_used = 0
        self.ram_chunks = 0
        self.disk: DiskTier | None = None
        self.foreign: ForeignFiles | None = None
        self._ram_queue = EvictionQueue(self._ram_rank)
        self.segment_queue = EvictionQueue(self._segment_rank)

    def open_disk(self) -> None:
        """Claim the directory and index what it holds, oldest chunks lowest. Raises StoreError.

        Without a disk budget too where there is a directory: what lies in it has to be found by an erasure.
        """
        path = self.config.path
        if path is None or not (self.config.disk_bytes or path.is_dir()):
            return
        try:
            disk = DiskTier(path, self.layout, self.config.fsync)
            try:
                self._fill(disk)
            except OSError:
                disk.close()
                raise
        except OSError as error:
            raise StoreError(f"the KV directory {self.config.path} cannot be read: {error}") from error
        self.disk = disk

    def _fill(self, disk: DiskTier) -> None:
        self.foreign = ForeignFiles(disk.root, disk.home)
        found = scan(disk)
        self.counters["corrupt"] += found.deleted
        for segment, heads in reversed(found.found):
            for head in heads:
                self.index.add(head, self.clock.first(head.tokens, head.context))
            disk.add(segment)
            self.place(segment)
        disk.next_seq = max(disk.next_seq, self.foreign.last_seq + 1)

    def live(self, key: bytes) -> Entry | None:
        entry = self.index.get(key)
        return None if entry is None or entry.erasing or self.closed else entry

    # Pins

    def pin(self, key: bytes) -> None:
        self.pins.setdefault(key, []).append(threading.get_ident())

    def unpin(self, key: bytes) -> None:
        holders = self.pins[key]
        holders.remove(threading.get_ident())
        if not holders:
            del self.pins[key]
        self.changed.notify_all()

    # RAM

    def admit(self, entry: Entry, block: RamBlock, below: float = math.inf) -> bool:
        """Give a chunk its place in RAM; False when only chunks of rank `below` or more could make room."""
        if not self._ram_room(block.nbytes, below):
            return False
        entry.ram = block
        self.ram_used += block.nbytes
        self.ram_chunks += 1
        self._ram_queue.push(entry.key, entry.rank)
        self._ram_queue.trim(self.ram_chunks)
        return True

    def drop_ram(self, entry: Entry) -> int:
        """Overwrite and release the RAM copy; returns its bytes. An entry that lies nowhere any more is gone."""
        block, entry.ram = entry.ram, None
        if block is None:
            return 0
        block.erase()
        self.ram_used -= block.nbytes
        self.ram_chunks -= 1
        if self.pending.pop(entry.key, None) is not None:
            self.counters["writes_dropped"] += 1
        if entry.disk is None:
            self.index.remove(entry)
        return block.nbytes

    def _ram_room(self, need: int, below: float) -> bool:
        budget = self.config.ram_bytes
        aside: list[Entry] = []
        while need <= budget < self.ram_used + need:
            key = self._ram_queue.pop()
            entry = None if key is None else self.index.get(key)
            if entry is None:
                break
            aside.append(entry)
            if entry.rank >= below:
                break
            if entry.key not in self.pins and entry.key not in self.pending:
                self._evict_ram(entry)
        for entry in aside:
            if self.ram_used + need > budget and entry.rank < below and entry.key not in self.pins:
                self._evict_ram(entry)
            if entry.ram is not None:
                self._ram_queue.push(entry.key, entry.rank)
        return self.ram_used + need <= budget

    def _evict_ram(self, entry: Entry) -> None:
        if self.drop_ram(entry):
            self.counters["evicted_ram"] += 1

    def _ram_rank(self, key: bytes) -> float | None:
        entry = self.index.get(key)
        return None if entry is None or entry.ram is None or entry.erasing else entry.rank

    # Disk

    def place(self, segment: Segment) -> None:
        """Point the entries of a file that has just become visible at it."""
        for key, offset, header_bytes, _ in segment.records:
            entry = self.index.get(key)
            if entry is not None:
                entry.disk = RecordRef(segment, offset, header_bytes)
        self.requeue(segment)

    def requeue(self, segment: Segment) -> None:
        """Make a file a candidate for eviction."""
        self.segment_queue.push(segment.name, self._mean_rank(segment))

    def detach(self, segment: Segment) -> int:
        """Forget that a file holds anything; returns how many chunks are gone by that."""
        gone = 0
        for key, *_ in segment.records:
            entry = self.index.get(key)
            if entry is None or entry.disk is None or entry.disk.segment is not segment:
                continue
            entry.disk = None
            if entry.ram is None:
                self.index.remove(entry)
                gone += 1
        return gone

    def _segment_rank(self, name: bytes) -> float | None:
        segment = None if self.disk is None else self.disk.segments.get(name)
        return None if segment is None else self._mean_rank(segment)

    def _mean_rank(self, segment: Segment) -> float:
        entries = (self.index.get(key) for key, *_ in segment.records)
        ranks = [entry.rank for entry in entries if entry is not None]
        return mean_rank(ranks) if ranks else 0.0

    def touch(self, entry: Entry) -> None:
        entry.rank = self.clock.again(entry.rank, entry.tokens, entry.context)
