"""What a start finds on disk. Headers are read with ordinary reads; a file that is not as written is deleted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from amem.engine.store import files
from amem.engine.store.disk import SUFFIX, DiskTier, Segment
from amem.engine.store.format import (
    FIXED_BYTES,
    PAGE,
    BadRecord,
    Head,
    blank,
    foreign_record,
    header_length,
    parse,
    place,
)

_TENANT = re.compile(r"[0-9a-f]{32}")
_SEGMENT = re.compile(r"[0-9a-f]{16}" + re.escape(SUFFIX))


@dataclass(slots=True)
class Scan:
    """Good files, newest first, with the heads of their records; and how many files were bad and are gone."""

    found: list[tuple[Segment, list[Head]]] = field(default_factory=list)
    deleted: int = 0


def scan(disk: DiskTier) -> Scan:
    """Every file of this layout. A file that holds a chunk which a newer file holds too is deleted: the newer one
    replaced it, and the older may hold what was being erased."""
    result = Scan()
    seen: set[bytes] = set()
    for path in sorted(_segment_paths(disk.home), key=lambda path: path.name, reverse=True):
        disk.next_seq = max(disk.next_seq, int(path.stem, 16) + 1)
        try:
            segment, heads = _read_file(path, disk)
            keys = {head.key for head in heads}
            if len(keys) != len(heads) or keys & seen:
                raise BadRecord("replaced by a newer file")
            if segment.journal_name in disk.journal.suspects:
                _, bad = disk.load_items(segment, keys)
                if bad:
                    raise BadRecord("being read when the last process died, and damaged")
        except (BadRecord, OSError):
            result.deleted += 1
            remove_strange(path)
            continue
        seen |= keys
        result.found.append((segment, heads))
    disk.journal.forget_suspects()
    return result


def _read_file(path: Path, disk: DiskTier) -> tuple[Segment, list[Head]]:
    tenant = bytes.fromhex(path.parent.name)
    fd, length = files.open_exact(path, None)
    heads: list[Head] = []
    records: list[tuple[bytes, int, int, int]] = []
    at = 0
    try:
        while length - at >= PAGE or not blank(files.read_range(fd, at, length)):
            header = _read_header(fd, at, length)
            parsed = parse(header, disk.layout)
            head = parsed.head
            if head.tenant != tenant:
                raise BadRecord("belongs to another tenant")
            where = place(at, len(header), disk.layout.payload_bytes(head.tokens))
            if where.end > length:
                raise BadRecord("cut off")
            heads.append(head)
            records.append((head.key, at, len(header), head.tokens))
            at = where.end
    finally:
        os.close(fd)
    if not records or length % PAGE:
        raise BadRecord("not a whole file of records")
    return Segment(int(path.stem, 16), tenant, path, length, tuple(records)), heads


def _read_header(fd: int, at: int, length: int) -> memoryview:
    block = files.read_range(fd, at, min(at + PAGE, length))
    if len(block) < FIXED_BYTES:
        raise BadRecord("cut off")
    size = header_length(block)
    if at + size > length:
        raise BadRecord("cut off")
    return block[:size] if size <= len(block) else files.read_range(fd, at, at + size)


def _segment_paths(home: Path) -> Iterator[Path]:
    for tenant in home.iterdir():
        if _TENANT.fullmatch(tenant.name) and tenant.is_dir() and not tenant.is_symlink():
            yield from (path for path in tenant.iterdir() if _SEGMENT.fullmatch(path.name))


def remove_strange(path: Path) -> None:
    """Remove a name that does not hold what it should. What cannot be removed is left and never read."""
    try:
        files.unlink(path)
    except OSError:
        pass


class ForeignFiles:
    """Files that another model, dtype or format left in the same directory.

    They are kept until their room is needed, and erased with the memories that they came from.
    """

    def __init__(self, root: Path, home: Path) -> None:
        homes = [path for path in root.iterdir() if path != home and re.fullmatch(r"[0-9a-f]{16}", path.name)]
        paths = [path for other in homes if other.is_dir() for path in _segment_paths(other)]
        self._sizes = {path: path.lstat().st_size for path in sorted(paths, key=lambda path: path.name)}
        self.used = sum(self._sizes.values())
        self.last_seq = max((int(path.stem, 16) for path in paths), default=0)

    def evict_one(self) -> bool:
        """Remove the oldest file. False when there is none left."""
        if not self._sizes:
            return False
        self._remove(next(iter(self._sizes)))
        return True

    def forget(self, tenant: bytes, memories: frozenset[str] | None) -> int:
        """Remove every file of the tenant that may hold one of the memories; returns the bytes. Raises OSError.

        Names are not synced here.
        """
        mine = [path for path in self._sizes if path.parent.name == tenant.hex()]
        gone = [path for path in mine if memories is None or not memories.isdisjoint(_ids_in(path, memories))]
        return sum(self._remove(path) for path in gone)

    def _remove(self, path: Path) -> int:
        files.unlink(path)
        size = self._sizes.pop(path)
        self.used -= size
        return size


def _ids_in(path: Path, suspected: frozenset[str]) -> frozenset[str]:
    """The memory ids of a file of any layout. A file that cannot be read is taken to hold all that are looked for."""
    ids: set[str] = set()
    at = 0
    try:
        fd, length = files.open_exact(path, None)
        try:
            while length - at >= PAGE or not blank(files.read_range(fd, at, length)):
                memories, header_bytes, payload_bytes = foreign_record(_read_header(fd, at, length))
                ids.update(memories)
                at = place(at, header_bytes, payload_bytes).end
                if at > length:
                    raise BadRecord("cut off")
        finally:
            os.close(fd)
    except (BadRecord, OSError):
        return suspected
    return frozenset(ids)
