"""The disk tier: immutable, fully allocated files that hold the chunks of one tenant, and are read through mappings.

A file is written under `partial/`, synced, and renamed into place; from then on it is only read or unlinked. Every
record in a file is wanted: what is erased is left out of a copy that replaces the file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from amem.engine.batch import ChunkKV
from amem.engine.store import files
from amem.engine.store.config import ChunkLayout
from amem.engine.store.format import PAGE, BadRecord, Head, Place, blank, layer_sums, pack, parse, place
from amem.engine.store.journal import ReadingJournal

SUFFIX = ".kv"


@dataclass(eq=False, slots=True)
class Segment:
    """One file. `records` holds (key, offset, header bytes, tokens) in file order."""

    seq: int
    tenant: bytes
    path: Path
    length: int
    records: tuple[tuple[bytes, int, int, int], ...]

    @property
    def name(self) -> bytes:
        return self.seq.to_bytes(8, "big")

    @property
    def journal_name(self) -> str:
        return f"{self.tenant.hex()}/{self.path.name}"


@dataclass(frozen=True, slots=True)
class RecordRef:
    segment: Segment
    offset: int
    header_bytes: int


@dataclass(frozen=True, slots=True)
class Item:
    """A record ready to be written: whole header, flat payload."""

    head: Head
    header: bytes
    payload: memoryview


class DiskTier:
    """Files of one layout under one claimed directory. Not thread-safe, but for `read`."""

    def __init__(self, root: Path, layout: ChunkLayout, sync: bool) -> None:
        """Raises StoreError when the directory cannot be had, OSError when it cannot be prepared."""
        self.root = root
        self.home = root / layout.fingerprint_digest.hex()[:16]
        self.layout = layout
        self.segments: dict[bytes, Segment] = {}
        self.used = 0
        self.next_seq = 1
        self.checked_bytes = 0
        self.checked_s = 0.0
        self._sync = sync
        self._lock_fd = files.claim(root)
        self._partial = root / "partial"
        try:
            shutil.rmtree(self._partial, ignore_errors=True)
            for directory in (self._partial, self.home):
                directory.mkdir(mode=files.DIR_MODE, exist_ok=True)
            self.journal = ReadingJournal(root / "READING")
        except OSError:
            os.close(self._lock_fd)
            raise
        _quiet_first_read_only_buffer()

    def item(self, head: Head, payload: memoryview) -> Item:
        """Raises StoreError when the memory ids cannot be written."""
        return Item(head, pack(head, self.layout, layer_sums(payload, self.layout.layers)), payload)

    def draft(self, tenant: bytes, items: Sequence[Item]) -> Segment:
        """Write a file that nothing can see yet. Raises OSError, and leaves nothing behind then."""
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        parts: list[bytes | memoryview] = []
        records: list[tuple[bytes, int, int, int]] = []
        at = 0
        for item in items:
            where = place(at, len(item.header), len(item.payload))
            records.append((item.head.key, at, len(item.header), item.head.tokens))
            parts += [item.header, bytes(where.payload - at - len(item.header)), item.payload]
            parts.append(bytes(where.end - where.payload - len(item.payload)))
            at = where.end
        length = -(-at // PAGE) * PAGE
        parts.append(bytes(length - at))
        path = self._partial / f"{seq:016x}{SUFFIX}"
        files.write_whole(path, parts, length, self._sync)
        return Segment(seq, tenant, path, length, tuple(records))

    def commit(self, draft: Segment) -> None:
        """Give a draft its place. Raises OSError, and the draft is gone then."""
        directory = self.home / draft.tenant.hex()
        try:
            if not directory.exists():
                directory.mkdir(mode=files.DIR_MODE)
                self.sync(self.home)
            os.rename(draft.path, directory / draft.path.name)
        except OSError:
            self.discard(draft)
            raise
        draft.path = directory / draft.path.name
        self.add(draft)

    def discard(self, draft: Segment) -> None:
        """Drop a draft. One that cannot be removed now is removed by `clear_partial`, or by the next start."""
        with contextlib.suppress(OSError):
            files.unlink(draft.path)

    def clear_partial(self) -> None:
        """Remove what failed drafts left. Raises OSError. Only for a caller who keeps others from drafting."""
        for path in list(self._partial.iterdir()):
            files.unlink(path)

    def add(self, segment: Segment) -> None:
        self.segments[segment.name] = segment
        self.used += segment.length

    def remove(self, segment: Segment) -> None:
        """Unlink a file; mappings of it stay valid. Raises OSError when it is still there."""
        files.unlink(segment.path)
        if self.segments.pop(segment.name, None) is not None:
            self.used -= segment.length

    def read(self, ref: RecordRef, head: Head) -> ChunkKV:
        """The KV of a record, mapped, every byte of it checked. Raises OSError or BadRecord."""
        where = place(ref.offset, ref.header_bytes, self.layout.payload_bytes(head.tokens))
        view = files.map_range(ref.segment.path, ref.segment.length, where.offset, where.end)
        found = self._check(view, where)
        if (found.key, found.tenant, found.chain, found.tokens, found.context, found.trusted) != (
            head.key,
            head.tenant,
            head.chain,
            head.tokens,
            head.context,
            head.trusted,
        ):
            raise BadRecord("another chunk lies where this one was")
        payload = view[where.payload - where.offset :][: where.payload_bytes]
        data = torch.frombuffer(payload, dtype=self.layout.dtype).view(self.layout.shape(head.tokens))
        prior = torch.frombuffer(bytearray(found.prior), dtype=torch.float32) if found.prior else None
        return ChunkKV(data[:, 0], data[:, 1], prior)

    def load_items(self, segment: Segment, keys: Iterable[bytes]) -> tuple[list[Item], int]:
        """Records of a file by ordinary reads, for a copy, and how many of them were bad. Raises OSError."""
        wanted = set(keys)
        items: list[Item] = []
        bad = 0
        fd, _ = files.open_exact(segment.path, segment.length)
        try:
            for key, offset, header_bytes, tokens in segment.records:
                if key not in wanted:
                    continue
                where = place(offset, header_bytes, self.layout.payload_bytes(tokens))
                view = files.read_range(fd, where.offset, where.end)
                try:
                    head = self._check(view, where)
                except BadRecord:
                    bad += 1
                    continue
                payload = view[where.payload - where.offset :][: where.payload_bytes]
                items.append(Item(head, bytes(view[:header_bytes]), payload))
        finally:
            os.close(fd)
        return items, bad

    def _check(self, view: memoryview, where: Place) -> Head:
        started = time.thread_time()
        parsed = parse(view[: where.header_bytes], self.layout)
        start = where.payload - where.offset
        payload = view[start : start + where.payload_bytes]
        if not (blank(view[where.header_bytes : start]) and blank(view[start + where.payload_bytes :])):
            raise BadRecord("the padding is not empty")
        if layer_sums(payload, self.layout.layers) != parsed.sums:
            raise BadRecord("a layer fails its checksum")
        self.checked_bytes += len(view)
        self.checked_s += time.thread_time() - started
        return parsed.head

    def sync(self, directory: Path) -> None:
        if self._sync:
            files.sync_dir(directory)

    def close(self) -> None:
        self.journal.close()
        os.close(self._lock_fd)


def _quiet_first_read_only_buffer() -> None:
    """torch warns once per process about read-only buffers; ours are read-only on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(bytes(8), dtype=torch.uint8)
