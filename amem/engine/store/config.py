"""What a store is configured with, the shape of what it keeps, and its one exception."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from pathlib import Path

import torch

DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class Tier(str, Enum):
    """Where the KV of a chunk lies, fastest first. The values are the names used in `PromptTokens`."""

    GPU = "gpu"
    CPU = "cpu"
    DISK = "disk"


class StoreError(Exception):
    """The store refuses an input, cannot start, or could not finish an erasure. Never raised for a lost chunk."""


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Budgets in bytes, times in seconds.

    path: the directory of the disk tier, or None for RAM alone.  disk_bytes: with 0 nothing is written; what an
    earlier run left in the directory is still read, and erased with its memory.
    fsync: data is synced before it is published; off, a power cut may lose chunks but never serves a wrong one.
    free_floor_bytes: never write when less than this would stay free on the file system.
    segment_bytes: how much of one tenant is packed into one file at most (a larger chunk gets a file alone). Erasing
        a chunk rewrites the file that it is packed into.
    linger_s: how long the writer waits for company for a chunk before it writes a file.
    erase_timeout_s: how long `forget` waits for readers of what it erases.
    """

    path: Path | None
    ram_bytes: int
    disk_bytes: int
    fsync: bool = True
    free_floor_bytes: int = 1 << 30
    segment_bytes: int = 2 << 20
    linger_s: float = 0.2
    erase_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.ram_bytes <= 0 or self.disk_bytes < 0 or self.segment_bytes <= 0:
            raise StoreError(
                f"budgets must be positive (disk_bytes may be 0), got ram_bytes={self.ram_bytes}, "
                f"disk_bytes={self.disk_bytes}, segment_bytes={self.segment_bytes}"
            )

    @property
    def batch_bytes(self) -> int:
        """How much RAM the writer may pin at once."""
        return min(self.segment_bytes, max(self.ram_bytes // 4, 1))


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """The shape of a chunk's KV in memory and in files: [layers, 2 (K, V), tokens, kv_heads, head_dim], contiguous.

    fingerprint: a string that differs whenever the model, its settings or the KV format would change the bytes.
    fingerprint_digest: 32 bytes that stand for it in keys, file headers and directory names.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    fingerprint: str
    fingerprint_digest: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_CODES:
            known = ", ".join(str(dtype) for dtype in DTYPE_CODES)
            raise StoreError(f"KV of dtype {self.dtype} cannot be stored; use one of {known}")
        if (
            min(self.layers, self.kv_heads, self.head_dim) < 1
            or max(self.layers, self.kv_heads, self.head_dim) > 65535
        ):
            raise StoreError(
                f"layers, kv_heads and head_dim must lie in 1..65535, "
                f"got {self.layers}, {self.kv_heads}, {self.head_dim}"
            )
        digest = blake2b(self.fingerprint.encode(), digest_size=32, person=b"amem-kv-model").digest()
        object.__setattr__(self, "fingerprint_digest", digest)

    def shape(self, tokens: int) -> tuple[int, int, int, int, int]:
        return (self.layers, 2, tokens, self.kv_heads, self.head_dim)

    def payload_bytes(self, tokens: int) -> int:
        return math.prod(self.shape(tokens)) * self.dtype.itemsize
