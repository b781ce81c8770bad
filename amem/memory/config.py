"""Settings of the memory layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from amem.memory.embed import Embedder, HashEmbedder


def estimate_tokens(text: str) -> int:
    """A stand-in for the model's tokenizer: one token for three bytes, above what English text needs."""
    return len(text.encode()) // 3 + 1


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """`count_tokens` should be the planner's own count, so that budgets mean the model's tokens.

    max_open: tenant databases kept open at the same time; each is one file handle, two while it is written.
    max_group: writes that share one commit at most.
    exact_rows: below this number of vectors search is exact; above, HNSW where hnswlib is installed.
    evict_to: share of a session's budget that is left filled after an eviction, so that not every turn evicts.
    idempotency_seconds: how long a repeated request is answered with the first answer.
    """

    embedder: Embedder = field(default_factory=HashEmbedder)
    count_tokens: Callable[[str], int] = estimate_tokens
    clock: Callable[[], float] = time.time
    max_open: int = 64
    max_group: int = 64
    max_items: int = 10_000
    max_text_bytes: int = 1 << 20
    max_metadata_bytes: int = 16 << 10
    max_recall: int = 1_000
    max_sessions: int = 1_000
    exact_rows: int = 2_000
    evict_to: float = 0.75
    idempotency_seconds: float = 86_400.0
