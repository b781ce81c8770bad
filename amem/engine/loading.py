"""What becomes of a chunk of a prompt: loaded from the store, blended, or computed as ordinary rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from amem.engine.batch import ChunkKV, Int64s
from amem.engine.sequence import Fate, Place, Sequence
from amem.engine.tally import Source
from amem.engine.types import ChunkSpec, Tenant


class Lease(Protocol):
    """Stored KV that stays valid while it is held; `tier.value` is gpu, cpu or disk."""

    @property
    def kv(self) -> ChunkKV: ...
    @property
    def tier(self) -> TierName: ...


class TierName(Protocol):
    @property
    def value(self) -> str: ...


class ChunkReader(Protocol):
    """What loading needs of the store."""

    def contains(self, key: bytes) -> object | None: ...
    def lease(self, tenant: Tenant, spec: ChunkSpec) -> AbstractContextManager[Lease | None]: ...


class PageWriter(Protocol):
    """What loading needs of the runner: rotate rows of a chunk to their positions and write them to pages."""

    def load_chunk(self, kv: ChunkKV, positions: Int64s, block_table: Int64s, rows: Int64s | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class Loader:
    """Fills pages from the store. `want` asks for the canonical KV of a chunk that is not stored."""

    store: ChunkReader
    runner: PageWriter
    want: Callable[[Tenant, ChunkSpec], None]

    def resolve(self, sequence: Sequence, place: Place) -> Fate:
        """Decided once while a sequence holds its pages; rows in front of `computed` are in place already."""
        fate = sequence.fates.get(place.index)
        if fate is None:
            fate = sequence.fates[place.index] = self._decide(sequence, place)
        return fate

    def _decide(self, sequence: Sequence, place: Place) -> Fate:
        tenant = sequence.tenant
        if tenant is None:
            return Fate.FRESH
        if place.exact or sequence.mode.enabled:
            begun = time.perf_counter()
            loaded = self._load(tenant, sequence, place)
            sequence.tally.load_s += time.perf_counter() - begun
            if loaded:
                return Fate.EXACT if place.exact else Fate.BLENDED
            sequence.tally.missing += 1
        if self.store.contains(place.key) is None:
            self.want(tenant, place.spec)
        return Fate.FRESH

    def _load(self, tenant: Tenant, sequence: Sequence, place: Place) -> bool:
        start = max(place.start, sequence.computed)
        positions = np.arange(place.start, place.stop)
        with self.store.lease(tenant, place.spec) as lease:
            if lease is None:
                return False
            rows = None if start == place.start else np.arange(start - place.start, len(positions))
            self.runner.load_chunk(lease.kv, positions, sequence.numbers, rows)
            if not place.exact:
                sequence.marks |= {(place.start, place.key)}
                _keep_prior(sequence, place, lease.kv.prior)
            sequence.tally.fill(start, min(place.stop, sequence.length - 1), Source[lease.tier.value.upper()])
        return True


def _keep_prior(sequence: Sequence, place: Place, prior: torch.Tensor | None) -> None:
    """Remember the write-time sensitivity of loaded rows; NaN where none was stored."""
    if sequence.prior is None:
        sequence.prior = np.full(sequence.limit, np.nan, np.float32)
    sequence.prior[place.start : place.stop] = np.nan if prior is None else prior.float().cpu().numpy()
