"""An oracle for the store: the KV of a chunk follows from tenant, context and ids, so that any wrong byte shows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from amem.engine.batch import ChunkKV
from amem.engine.store import ChunkLayout, ChunkStore, StoreConfig
from amem.engine.types import ChunkSpec, Tenant

LAYOUT = ChunkLayout(layers=3, kv_heads=2, head_dim=16, dtype=torch.bfloat16, fingerprint="model-a")
ALICE = Tenant(b"alice".ljust(16, b"."), b"secret of alice".ljust(32, b"."))
BOB = Tenant(b"bob".ljust(16, b"."), b"secret of bob".ljust(32, b"."))


def config(path: Path | None, **changes: Any) -> StoreConfig:
    values: dict[str, Any] = {
        "path": path,
        "ram_bytes": 64 << 20,
        "disk_bytes": 256 << 20,
        "free_floor_bytes": 0,
        "linger_s": 0.01,
        "erase_timeout_s": 5.0,
    }
    return StoreConfig(**(values | changes))


def open_store(path: Path | None, layout: ChunkLayout = LAYOUT, **changes: Any) -> ChunkStore:
    return ChunkStore(config(path, **changes), layout)


def spec(number: int, tokens: int = 12, behind: tuple[str, ...] = (), context: int = 3) -> ChunkSpec:
    ids = tuple(range(number * 1000, number * 1000 + tokens))
    return ChunkSpec(ids, tuple(range(context)), min(context, 2), f"m{number}", behind)


def make_kv(tenant: Tenant, chunk: ChunkSpec, layout: ChunkLayout = LAYOUT, prior: bool = True) -> ChunkKV:
    text = repr((tenant.id, chunk.context, chunk.token_ids, layout.fingerprint))
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    tokens = len(chunk.token_ids)
    data = torch.randn(layout.shape(tokens), generator=generator).to(layout.dtype)
    scores = torch.rand(tokens, generator=generator) if prior else None
    return ChunkKV(data[:, 0], data[:, 1], scores)


def same(found: ChunkKV, wanted: ChunkKV) -> bool:
    """Bit for bit."""
    if (found.prior is None) != (wanted.prior is None):
        return False
    pairs = [(found.k, wanted.k), (found.v, wanted.v)]
    if found.prior is not None and wanted.prior is not None:
        pairs.append((found.prior, wanted.prior))
    return all(a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b) for a, b in pairs)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def put(store: ChunkStore, tenant: Tenant, *chunks: ChunkSpec, layout: ChunkLayout = LAYOUT) -> None:
    for chunk in chunks:
        store.put(tenant, chunk, make_kv(tenant, chunk, layout))


def tier_of(store: ChunkStore, tenant: Tenant, chunk: ChunkSpec, layout: ChunkLayout = LAYOUT) -> str | None:
    """The tier that served the chunk, or None for a miss. Fails when what is served is not the chunk."""
    with store.lease(tenant, chunk) as lease:
        if lease is None:
            return None
        wanted = make_kv(tenant, chunk, layout, prior=lease.kv.prior is not None)
        assert same(lease.kv, wanted), "wrong bytes were served"
        return lease.tier.value


def kv_files(root: Path) -> list[Path]:
    return sorted(root.glob("*/*/*.kv"))


def residue(root: Path, tenant: Tenant, chunk: ChunkSpec, layout: ChunkLayout = LAYOUT) -> list[str]:
    """Files under `root` that hold any 64-byte run of the chunk's KV (each layer's K and V are looked for)."""
    kv = make_kv(tenant, chunk, layout)
    needles = [raw(part[layer])[:64] for part in (kv.k, kv.v) for layer in range(layout.layers)]
    while True:  # the writer may publish a file between the listing and the reading: then look again
        files = [path for path in root.rglob("*") if path.is_file()]
        try:
            return [str(path) for path in files if any(needle in path.read_bytes() for needle in needles)]
        except FileNotFoundError:
            continue
