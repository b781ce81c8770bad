"""The store as the engine sees it: keys, leases, put, forget. Thread-safe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from amem.engine.batch import ChunkKV
from amem.engine.store import erase
from amem.engine.store.config import ChunkLayout, StoreConfig, StoreError, Tier
from amem.engine.store.format import Head, pack_ids
from amem.engine.store.keys import chain_digest, chunk_key
from amem.engine.store.ram import RamBlock, copy_block
from amem.engine.store.reader import Lease, open_lease
from amem.engine.store.shelf import COUNTERS, Shelf
from amem.engine.store.writer import Writer
from amem.engine.types import ChunkSpec, ForgetReceipt, Tenant


class ChunkStore:
    """The KV of chunks in RAM and in memory-mapped files.

    A chunk that was lost, damaged or written for anything else is a miss, never an exception and never wrong bytes.
    """

    def __init__(self, config: StoreConfig, layout: ChunkLayout) -> None:
        """Index what the directory holds. Raises StoreError when it is taken, unwritable or of another format."""
        started = time.perf_counter()
        self._shelf = Shelf(config, layout)
        self._shelf.open_disk()
        self._scan_s = time.perf_counter() - started
        self._writer: Writer | None = None
        if self._shelf.disk is not None:
            self._writer = Writer(self._shelf, self._shelf.disk)
            self._writer.start()

    def key(self, tenant: Tenant, spec: ChunkSpec) -> bytes:
        """32 bytes that name the chunk. Raises StoreError on an inconsistent spec."""
        return chunk_key(tenant, spec, self._shelf.layout, chain_digest(tenant, spec))

    def contains(self, key: bytes) -> Tier | None:
        """The fastest tier that holds the chunk, as far as is known without reading it."""
        with self._shelf.changed:
            entry = self._shelf.live(key)
            if entry is None:
                return None
            return Tier.DISK if entry.ram is None else Tier.CPU

    @contextmanager
    def lease(self, tenant: Tenant, spec: ChunkSpec) -> Iterator[Lease | None]:
        """The chunk's KV, checked, or None. While it is held the chunk is neither evicted nor erased."""
        with open_lease(self._shelf, self._head(tenant, spec)) as lease:
            yield lease

    def put(self, tenant: Tenant, spec: ChunkSpec, kv: ChunkKV) -> None:
        """Keep a copy: in RAM at once, on disk soon. A chunk that is there already is left as it is.

        kv: [layers, tokens, kv_heads, head_dim], any device. Raises StoreError when it is not finite, not of the
        store's shape and dtype, or does not belong to the spec. A chunk that finds no room is dropped and counted.
        """
        if not spec.token_ids:
            raise StoreError("a chunk without tokens cannot be stored")
        head = self._head(tenant, spec)
        pack_ids(head.memories)
        shelf = self._shelf
        with shelf.changed:
            self._check_open()
            if self._present(head):
                return
        block = copy_block(kv, shelf.layout, head.tokens)
        if not block.finite():
            block.erase()
            with shelf.changed:
                shelf.counters["refused_not_finite"] += 1
            raise StoreError("the KV holds NaN or infinity and was not stored; the forward that made it is at fault")
        with shelf.changed:
            if self._present(head) or not self._admit(replace(head, prior=block.prior_bytes()), block):
                block.erase()

    def forget(self, tenant: Tenant, memories: tuple[str, ...] | None) -> ForgetReceipt:
        """Erase every chunk owned by, or computed behind, one of `memories` (None: all of the tenant's).

        Returns when the bytes are gone from RAM, files and queues. Raises StoreError when that could not be done
        (a lease is still held, the disk refuses); nothing of it is served from then on, and calling again goes on.
        """
        self._check_open()
        return erase.forget(self._shelf, tenant, memories)

    def flush(self) -> None:
        """Return when everything put so far is on disk, or was dropped and counted."""
        if self._writer is not None:
            self._writer.drain()

    def close(self) -> None:
        """Write what is pending and give the directory back. Leases must have ended. May be called twice."""
        shelf = self._shelf
        with shelf.changed:
            if shelf.closed:
                return
            shelf.closed = True
            shelf.changed.notify_all()
        if self._writer is not None:
            self._writer.join()
        if shelf.disk is not None:
            shelf.disk.close()

    def stats(self) -> dict[str, float]:
        """Counters since the start, and what is held now; bytes and seconds."""
        shelf = self._shelf
        writer = None if self._writer is None else self._writer.ident
        with shelf.changed:
            holders = [holder for pinned in shelf.pins.values() for holder in pinned]
            values = dict.fromkeys(COUNTERS, 0.0) | {name: float(count) for name, count in shelf.counters.items()}
            values |= {
                "chunks": float(len(shelf.index)),
                "ram_chunks": float(shelf.ram_chunks),
                "ram_bytes": float(shelf.ram_used),
                "pending": float(len(shelf.pending)),
                "leases": float(sum(holder != writer for holder in holders)),
                "scan_s": self._scan_s,
            }
            if shelf.disk is not None:
                values |= {
                    "disk_bytes": float(shelf.disk.used),
                    "disk_files": float(len(shelf.disk.segments)),
                    "disk_other_bytes": float(shelf.foreign.used if shelf.foreign else 0),
                    "checked_bytes": float(shelf.disk.checked_bytes),
                    "checked_s": shelf.disk.checked_s,
                }
            return values

    def _head(self, tenant: Tenant, spec: ChunkSpec) -> Head:
        chain = chain_digest(tenant, spec)
        key = chunk_key(tenant, spec, self._shelf.layout, chain)
        memories = tuple(dict.fromkeys((spec.memory, *spec.behind)))
        return Head(tenant.id, key, chain, len(spec.token_ids), len(spec.context), spec.trusted, memories)

    def _present(self, head: Head) -> bool:
        """Whether the chunk needs no storing: it is there, or is being erased at this moment."""
        entry = self._shelf.index.get(head.key)
        if entry is not None and not entry.erasing:
            self._shelf.index.link(entry, head.memories)
        return entry is not None

    def _admit(self, head: Head, block: RamBlock) -> bool:
        shelf = self._shelf
        entry = shelf.index.add(head, shelf.clock.first(head.tokens, head.context))
        if not shelf.admit(entry, block):
            shelf.index.remove(entry)
            shelf.counters["puts_dropped"] += 1
            return False
        shelf.counters["puts"] += 1
        if shelf.disk is not None and shelf.config.disk_bytes:
            shelf.pending[head.key] = head
            shelf.changed.notify_all()
        return True

    def _check_open(self) -> None:
        if self._shelf.closed:
            raise StoreError("the store is closed")
