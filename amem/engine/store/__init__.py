"""The KV of chunks: keys, file format, tiers, residency, erasure."""

from __future__ import annotations

from amem.engine.store.config import ChunkLayout, StoreConfig, StoreError, Tier
from amem.engine.store.reader import Lease
from amem.engine.store.store import ChunkStore

__all__ = ["ChunkLayout", "ChunkStore", "Lease", "StoreConfig", "StoreError", "Tier"]
