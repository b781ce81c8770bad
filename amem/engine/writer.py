"""Background computation of chunk KV: each chunk behind its own context, once, however many ask for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from amem.engine.batch import ChunkKV
from amem.engine.intake import Intake
from amem.engine.messages import ChunksWritten, WriteChunks
from amem.engine.sequence import Sequence
from amem.engine.store.config import StoreError
from amem.engine.types import ChunkSpec, EngineError, Tenant

_log = logging.getLogger(__name__)


class ChunkShelf(Protocol):
    """What the writer needs of the store."""

    def key(self, tenant: Tenant, spec: ChunkSpec) -> bytes: ...
    def contains(self, key: bytes) -> object | None: ...
    def put(self, tenant: Tenant, spec: ChunkSpec, kv: ChunkKV) -> None: ...


@dataclass(slots=True)
class _Job:
    """One WriteChunks message: what is settled, and how many chunks are not."""

    id: str
    open: int = 0
    written: int = 0
    present: int = 0
    failed: int = 0
    charged: float = 0.0

    def result(self) -> ChunksWritten:
        return ChunksWritten(self.id, self.written, self.present, self.failed, self.charged)


@dataclass(slots=True)
class _Pending:
    """A chunk in flight, and the jobs that wait for it."""

    tenant: Tenant
    spec: ChunkSpec
    jobs: list[_Job]


@dataclass(slots=True)
class WriterCounters:
    written: int = 0
    failed: int = 0
    charged: float = 0.0


@dataclass(slots=True)
class Writer:
    """`submit` hands a background sequence to the scheduler; `finish` returns the jobs that it settles."""

    store: ChunkShelf
    intake: Intake
    submit: Callable[[Sequence], None]
    prior: Callable[[ChunkSpec], tuple[torch.Tensor, float] | None]
    clock: Callable[[], float]
    counters: WriterCounters = field(default_factory=WriterCounters)
    _pending: dict[str, _Pending] = field(default_factory=dict)

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    def write(self, message: WriteChunks) -> list[ChunksWritten]:
        """Start what is missing. Answers at once when nothing has to be computed."""
        job = _Job(message.job_id)
        for spec in message.chunks:
            try:
                self._start_or_count(message.tenant, spec, job)
            except (EngineError, StoreError) as error:
                _log.warning("a chunk of %d tokens is not written: %s", len(spec.token_ids), error)
                job.failed += 1
        return [] if job.open else [job.result()]

    def want(self, tenant: Tenant, spec: ChunkSpec) -> None:
        """A request missed this chunk: compute its KV for the next one.

        A chunk that does not fit behind its own context although its prompt does stays ordinary rows.
        """
        key = self.store.key(tenant, spec)
        if key.hex() in self._pending or self.store.contains(key) is not None:
            return
        try:
            self._start(key, tenant, spec, [])
        except EngineError as error:
            _log.warning("the KV of a chunk of %d tokens cannot be computed: %s", len(spec.token_ids), error)

    def finish(self, sequence: Sequence) -> list[ChunksWritten]:
        """The rows of a background sequence have run: store what they captured."""
        pending = self._pending[sequence.id]
        charged = sequence.tally.charged
        stored = False
        try:
            kv, more = self._chunk_kv(pending.spec, sequence.captured)
            charged += more
            self.store.put(pending.tenant, pending.spec, kv)
            stored = self.store.contains(bytes.fromhex(sequence.id)) is not None
        except (StoreError, RuntimeError, ValueError, OSError) as error:
            _log.warning("a chunk's KV could not be stored: %s", error)
        return self._settle(sequence.id, stored, charged)

    def drop(self, sequence: Sequence) -> list[ChunksWritten]:
        """A background sequence was ended: its memory was forgotten, or its numbers were not finite."""
        return self._settle(sequence.id, False, sequence.tally.charged)

    def _start_or_count(self, tenant: Tenant, spec: ChunkSpec, job: _Job) -> None:
        key = self.store.key(tenant, spec)
        if self.store.contains(key) is not None:
            job.present += 1
            return
        self._start(key, tenant, spec, [job])
        job.open += 1

    def _start(self, key: bytes, tenant: Tenant, spec: ChunkSpec, jobs: list[_Job]) -> None:
        found = self._pending.get(key.hex())
        if found is not None:
            found.jobs += jobs
            return
        sequence = self.intake.chunk(key.hex(), tenant, spec, self.clock())
        self._pending[key.hex()] = _Pending(tenant, spec, jobs)
        self.submit(sequence)

    def _chunk_kv(self, spec: ChunkSpec, pieces: list[ChunkKV]) -> tuple[ChunkKV, float]:
        k = torch.cat([piece.k for piece in pieces], dim=1)
        v = torch.cat([piece.v for piece in pieces], dim=1)
        found = self.prior(spec)
        return (ChunkKV(k, v), 0.0) if found is None else (ChunkKV(k, v, found[0]), found[1])

    def _settle(self, name: str, stored: bool, charged: float) -> list[ChunksWritten]:
        pending = self._pending.pop(name)
        self.counters.written += stored
        self.counters.failed += not stored
        self.counters.charged += charged
        done = []
        for at, job in enumerate(pending.jobs):
            job.open -= 1
            job.written += stored and at == 0
            job.present += stored and at > 0
            job.failed += not stored
            job.charged += 0.0 if at else charged
            if not job.open:
                done.append(job.result())
        return done
