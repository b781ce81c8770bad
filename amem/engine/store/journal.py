"""Which files are being read through a mapping right now, kept where a crash cannot lose it.

A mapping whose file was cut short, or lies on a bad sector, kills the process with SIGBUS. The next start finds the
file's name here and checks the whole file with ordinary reads, which fail with an error code, before it is mapped
again; so a bad file costs one restart, not a crash loop. Survives a crash of the process, not a power cut, after
which nothing was being read.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from amem.engine.store.files import FILE_MODE

SLOT_BYTES = 128
RESERVED_SLOTS = 64
_EMPTY = bytes(SLOT_BYTES)


class ReadingJournal:
    """One slot of 128 bytes per reader at a time, in one small file."""

    def __init__(self, path: Path) -> None:
        """Read what the last process left, then start empty."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
        left = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        slots = (left[at : at + SLOT_BYTES].rstrip(b"\0") for at in range(0, len(left), SLOT_BYTES))
        self.suspects = frozenset(slot.decode("ascii", "replace") for slot in slots if slot)
        with contextlib.suppress(OSError):
            os.posix_fallocate(self._fd, 0, RESERVED_SLOTS * SLOT_BYTES)
        self._lock = threading.Lock()
        self._free: list[int] = []
        self._slots = 0

    def enter(self, name: str) -> int:
        """Note that the file is being read; returns the slot to leave."""
        with self._lock:
            if self._free:
                slot = self._free.pop()
            else:
                slot = self._slots
                self._slots += 1
        self._write(slot, name.encode("ascii").ljust(SLOT_BYTES, b"\0"))
        return slot

    def leave(self, slot: int) -> None:
        self._write(slot, _EMPTY)
        with self._lock:
            self._free.append(slot)

    def forget_suspects(self) -> None:
        """Called once the suspects have been checked, before the first reader."""
        for at in range(0, os.fstat(self._fd).st_size, SLOT_BYTES):
            self._write(at // SLOT_BYTES, _EMPTY)

    def _write(self, slot: int, content: bytes) -> None:
        # A journal that cannot be written must not stop a read: it only makes a second crash possible.
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, content, slot * SLOT_BYTES)

    def close(self) -> None:
        os.close(self._fd)
