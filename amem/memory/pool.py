"""The databases that are open now: at most `max_open`, the least recently used closed first, never one in use."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from amem.memory.config import MemoryConfig
from amem.memory.control import Control, TenantRecord
from amem.memory.datadir import DataDir, sync_directory
from amem.memory.errors import Unavailable
from amem.memory.schema import remove_files
from amem.memory.tenant import TenantMemory


class Erased(Exception):
    """The tenant of this record was erased after it was looked up: look the user up again."""


@dataclass(slots=True)
class _Handle:
    memory: TenantMemory
    leases: int = 0


class TenantPool:
    """`_busy` tenants are being opened or closed by some thread outside the lock, `_retiring` ones are being erased:
    others wait for them. `_retired` ones are gone for good."""

    def __init__(self, directory: DataDir, control: Control, config: MemoryConfig) -> None:
        self._directory = directory
        self._control = control
        self._config = config
        self._changed = threading.Condition()
        self._open: OrderedDict[bytes, _Handle] = OrderedDict()
        self._busy: set[bytes] = set()
        self._retiring: set[bytes] = set()
        self._retired: set[bytes] = set()
        self._closed = False

    @property
    def open_count(self) -> int:
        return len(self._open)

    @contextlib.contextmanager
    def lease(self, record: TenantRecord) -> Iterator[TenantMemory]:
        """Raises Damaged for a bad file, Erased for a user that is gone, Unavailable after `close`."""
        handle = self._acquire(record)
        try:
            yield handle.memory
        finally:
            with self._changed:
                handle.leases -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def retired(self, tenant_id: bytes) -> Iterator[None]:
        """Waits until nobody uses the tenant and closes it. It stays closed for good unless the block raises."""
        with self._changed:
            while tenant_id in self._busy or tenant_id in self._retiring:
                self._changed.wait()
            if tenant_id in self._retired:
                raise Erased
            self._retiring.add(tenant_id)
            while (handle := self._open.get(tenant_id)) is not None and handle.leases:
                self._changed.wait()
            self._open.pop(tenant_id, None)
        try:
            if handle is not None:
                handle.memory.close()
            yield
            self._retired.add(tenant_id)
        finally:
            with self._changed:
                self._retiring.discard(tenant_id)
                self._changed.notify_all()

    def close(self) -> None:
        """Waits for the calls in progress, then closes every database."""
        with self._changed:
            self._closed = True
            while self._busy or any(handle.leases for handle in self._open.values()):
                self._changed.wait()
            handles, self._open = list(self._open.values()), OrderedDict()
        for handle in handles:
            handle.memory.close()

    def _acquire(self, record: TenantRecord) -> _Handle:
        while True:
            with self._changed:
                if record.id in self._retired:
                    raise Erased
                if self._closed:
                    raise Unavailable("the memory service is shutting down")
                victim = self._next_step(record.id)
                if isinstance(victim, _Handle):
                    return victim
                if victim is None:
                    continue
                old = self._open.pop(victim, None)
                self._busy.add(victim)
            try:
                if old is not None:
                    old.memory.close()
                else:
                    return self._opened(record)
            finally:
                with self._changed:
                    self._busy.discard(victim)
                    self._changed.notify_all()

    def _next_step(self, tenant_id: bytes) -> _Handle | bytes | None:
        """A leased handle; or the tenant to close or open outside the lock; or None after waiting for a change."""
        handle = self._open.get(tenant_id)
        if handle is not None and not handle.memory.broken and tenant_id not in self._retiring:
            handle.leases += 1
            self._open.move_to_end(tenant_id)
            return handle
        if handle is not None and not handle.leases:
            return tenant_id
        if handle is None and tenant_id not in self._busy | self._retiring:
            if len(self._open) + len(self._busy) < self._config.max_open:
                return tenant_id
            for candidate, other in self._open.items():
                if not other.leases:
                    return candidate
        self._changed.wait()
        return None

    def _current(self, record: TenantRecord) -> TenantRecord:
        """The record as it is now: another thread may have brought the tenant to life since it was looked up."""
        current = self._control.find(record.user)
        if current is None or current.id != record.id:
            raise Erased
        return current

    def _opened(self, record: TenantRecord) -> _Handle:
        path = self._directory.tenant_path(record.id)
        if record.new:
            record = self._current(record)
        if record.new:
            # Nothing was acknowledged yet: what lies there is left from a crash in the middle of this.
            path.parent.mkdir(mode=0o700, exist_ok=True)
            remove_files(path)
        memory = TenantMemory(record, path, self._config)
        try:
            if record.new:
                sync_directory(path.parent)
                sync_directory(path.parent.parent)
                self._control.mark_live(record.id)
            with self._changed:
                handle = self._open[record.id] = _Handle(memory, leases=1)
        except BaseException:
            memory.close()
            raise
        return handle
