"""What the store costs: `python tests/store/measure.py [chunks]`. Prints CPU time of the calling thread (what the
engine's step thread pays) and wall time, for a small model's chunks and for those of a 135 M model."""

from __future__ import annotations

import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amem.engine.batch import ChunkKV
from amem.engine.store import ChunkLayout, ChunkStore, StoreConfig
from amem.engine.types import ChunkSpec, Tenant

TENANT = Tenant(b"t" * 16, b"s" * 32)


def timed(name: str, step: Callable[[Any], object], items: Iterable[Any]) -> None:
    cpu, wall = [], []
    for item in items:
        started, started_cpu = time.perf_counter(), time.thread_time()
        step(item)
        cpu.append(time.thread_time() - started_cpu)
        wall.append(time.perf_counter() - started)
    c50, c99 = np.percentile(cpu, [50, 99]) * 1e6
    w50, w99 = np.percentile(wall, [50, 99]) * 1e6
    print(f"  {name:22} cpu p50 {c50:8.1f} p99 {c99:8.1f} us   wall p50 {w50:8.1f} p99 {w99:8.1f} us   n={len(cpu)}")


def chunk(number: int, tokens: int) -> ChunkSpec:
    ids = tuple(range(number, number + tokens))
    behind = (f"{number - 1:032x}", f"{number - 2:032x}")
    return ChunkSpec(ids, tuple(range(60)), 30, f"{number:032x}", behind)


def lease(store: ChunkStore, spec: ChunkSpec) -> None:
    with store.lease(TENANT, spec) as held:
        if held is None:
            raise SystemExit("a chunk is missing: the figures mean nothing")


def measure(name: str, layout: ChunkLayout, tokens: int, chunks: int) -> None:
    print(f"{name}: {chunks} chunks of {tokens} tokens, {layout.payload_bytes(tokens) / 1000:.0f} kB each")
    shape = (layout.layers, tokens, layout.kv_heads, layout.head_dim)
    kv = ChunkKV(torch.randn(shape).to(layout.dtype), torch.randn(shape).to(layout.dtype))
    specs = [chunk(number, tokens) for number in range(chunks)]
    sample = [specs[at] for at in np.random.default_rng(0).permutation(chunks)[: min(1000, chunks)]]
    with tempfile.TemporaryDirectory() as root:
        config = StoreConfig(Path(root), 8 << 30, 64 << 30, free_floor_bytes=0)
        store = ChunkStore(config, layout)
        timed("put", lambda spec: store.put(TENANT, spec, kv), specs)
        store.close()
        tracemalloc.start()
        store = ChunkStore(config, layout)
        index = tracemalloc.get_traced_memory()[0] / chunks
        tracemalloc.stop()
        store.close()
        cpu = time.thread_time()
        store = ChunkStore(config, layout)
        cpu = time.thread_time() - cpu
        stats = store.stats()
        files = f"{stats['disk_files']:.0f} files, index {index:.0f} B a chunk"
        print(f"  scan {stats['scan_s']:.3f} s wall, {cpu:.3f} s cpu, {files}")
        print(f"  disk {stats['disk_bytes'] / (chunks * layout.payload_bytes(tokens)):.3f} bytes a byte of KV")
        keys = [store.key(TENANT, spec) for spec in sample]
        timed("key", lambda spec: store.key(TENANT, spec), sample)
        timed("contains", store.contains, keys)
        timed("lease from disk", lambda spec: lease(store, spec), sample)
        checked = store.stats()
        gigabytes = checked["checked_bytes"] / checked["checked_s"] / 1e9
        print(f"  checks: {checked['checked_s'] / len(sample) * 1e6:.1f} us a read, {gigabytes:.1f} GB/s")
        store.flush()
        timed("lease from RAM", lambda spec: lease(store, spec), sample)
        timed("forget one memory", lambda spec: store.forget(TENANT, (spec.memory,)), sample[:30])
        started = time.perf_counter()
        receipt = store.forget(TENANT, None)
        print(f"  forget the tenant: {receipt.chunks} chunks in {time.perf_counter() - started:.2f} s")
        store.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    many = int(sys.argv[1]) if len(sys.argv) > 1 else 10000
    measure("small model", ChunkLayout(12, 2, 32, torch.bfloat16, "small"), 12, many)
    measure("135 M model", ChunkLayout(30, 3, 64, torch.bfloat16, "135m"), 64, max(many // 20, 40))
