"""What goes in comes out bit for bit, from every tier and after a restart; what must not go in is refused."""

from __future__ import annotations

import dataclasses
import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from kvlib import ALICE, BOB, LAYOUT, kv_files, make_kv, open_store, put, raw, same, spec, tier_of

from amem.engine.batch import ChunkKV
from amem.engine.store import ChunkLayout, StoreConfig, StoreError, Tier
from amem.engine.types import ChunkSpec, Tenant

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 12, 513])
def test_bytes_survive_ram_disk_and_reopening(tmp_path: Path, dtype: torch.dtype, tokens: int) -> None:
    layout = dataclasses.replace(LAYOUT, dtype=dtype)
    chunk = spec(1, tokens)
    store = open_store(tmp_path, layout)
    put(store, ALICE, chunk, layout=layout)
    assert tier_of(store, ALICE, chunk, layout) == "cpu"
    store.close()
    store = open_store(tmp_path, layout)
    assert store.contains(store.key(ALICE, chunk)) is Tier.DISK
    assert tier_of(store, ALICE, chunk, layout) == "disk"
    store.flush()
    assert tier_of(store, ALICE, chunk, layout) == "cpu", "a warm chunk is copied up"
    assert store.stats()["promoted"] == 1
    store.close()


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    layout = dataclasses.replace(LAYOUT, dtype=torch.float32)
    chunk = spec(1, 4)
    kv = make_kv(ALICE, chunk, layout)
    kv.k[0, 0, 0, :4] = torch.tensor([-0.0, 1e-45, 3.4e38, -3.4e38])
    store = open_store(tmp_path, layout)
    store.put(ALICE, chunk, kv)
    store.close()
    store = open_store(tmp_path, layout)
    with store.lease(ALICE, chunk) as lease:
        assert lease is not None
        assert raw(lease.kv.k) == raw(kv.k)
    store.close()


def test_prior_is_optional_and_views_may_be_strided(tmp_path: Path) -> None:
    chunk = spec(1, 5)
    whole = make_kv(ALICE, spec(1, 20), prior=False)
    kv = ChunkKV(whole.k[:, ::4], whole.v[:, 3::4])
    store = open_store(tmp_path)
    store.put(ALICE, chunk, kv)
    store.close()
    store = open_store(tmp_path)
    with store.lease(ALICE, chunk) as lease:
        assert lease is not None
        assert lease.kv.prior is None
        assert same(lease.kv, ChunkKV(kv.k.contiguous(), kv.v.contiguous()))
    store.close()


def test_many_chunks_share_few_files_and_a_large_one_stands_alone(tmp_path: Path) -> None:
    store = open_store(tmp_path, segment_bytes=64 << 10, linger_s=0.2)
    small = [spec(number) for number in range(60)]
    large = spec(99, 1000)
    put(store, ALICE, *small, large)
    put(store, BOB, *small[:5])
    store.flush()
    files = kv_files(tmp_path)
    assert 4 <= len(files) < 15
    store.close()
    store = open_store(tmp_path)
    assert {tier_of(store, ALICE, chunk) for chunk in [*small, large]} == {"disk"}
    assert {tier_of(store, BOB, chunk) for chunk in small[:5]} == {"disk"}
    assert store.stats()["corrupt"] == 0
    store.close()


def test_chunks_put_one_by_one_are_packed_together(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    chunks = [spec(number) for number in range(40)]
    for chunk in chunks:
        put(store, ALICE, chunk)
        store.flush()
    assert len(kv_files(tmp_path)) <= 14
    store.close()
    store = open_store(tmp_path)
    assert [tier_of(store, ALICE, chunk) for chunk in chunks] == ["disk"] * 40
    store.close()


def test_header_longer_than_a_page(tmp_path: Path) -> None:
    chunk = spec(1, behind=tuple(f"memory-{number:04d}-é" for number in range(900)))
    store = open_store(tmp_path)
    put(store, ALICE, spec(2), chunk, spec(3))
    store.close()
    store = open_store(tmp_path)
    assert [tier_of(store, ALICE, each) for each in (spec(2), chunk, spec(3))] == ["disk"] * 3
    assert store.forget(ALICE, ("memory-0899-é",)).chunks == 1
    assert [tier_of(store, ALICE, each) is None for each in (spec(2), chunk, spec(3))] == [False, True, False]
    store.close()


def test_ram_alone_works_without_a_directory() -> None:
    store = open_store(None)
    put(store, ALICE, spec(1))
    store.flush()
    assert tier_of(store, ALICE, spec(1)) == "cpu"
    assert store.forget(ALICE, None).chunks == 1
    assert tier_of(store, ALICE, spec(1)) is None
    store.close()
    store.close()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["k", "v", "prior"])
def test_kv_that_is_not_finite_is_refused(tmp_path: Path, poison: float, part: str) -> None:
    store = open_store(tmp_path)
    kv = make_kv(ALICE, spec(1))
    tensor: torch.Tensor = getattr(kv, part)
    tensor[-1, ...] = poison
    with pytest.raises(StoreError, match="NaN or infinity"):
        store.put(ALICE, spec(1), kv)
    assert tier_of(store, ALICE, spec(1)) is None
    assert store.stats()["refused_not_finite"] == 1
    store.close()
    assert kv_files(tmp_path) == []


def test_kv_of_another_shape_or_dtype_is_refused() -> None:
    store = open_store(None)
    kv = make_kv(ALICE, spec(1))
    for wrong in (
        ChunkKV(kv.k.float(), kv.v.float()),
        ChunkKV(kv.k[:, :-1], kv.v[:, :-1]),
        ChunkKV(kv.k, kv.v[:-1]),
        ChunkKV(kv.k, kv.v, torch.zeros(3)),
        ChunkKV(kv.k, kv.v, torch.zeros(12, dtype=torch.float64)),
    ):
        with pytest.raises(StoreError):
            store.put(ALICE, spec(1), wrong)
    with pytest.raises(StoreError):
        store.put(ALICE, spec(1, 0), kv)
    assert store.stats()["ram_bytes"] == 0
    store.close()


@pytest.mark.parametrize(
    "chunk",
    [
        ChunkSpec((1, 2**31), (), 0, "m"),
        ChunkSpec((1, 2), (2**40,), 0, "m"),
        ChunkSpec((1, 2), (5,), 2, "m"),
        ChunkSpec((1, 2), (5,), -1, "m"),
    ],
)
def test_specs_that_make_no_sense_are_refused(chunk: ChunkSpec) -> None:
    store = open_store(None)
    with pytest.raises(StoreError):
        store.key(ALICE, chunk)
    store.close()


def test_memory_ids_that_cannot_be_written_are_refused() -> None:
    store = open_store(None)
    for memory in ("\ud800", "x" * 70000):
        chunk = ChunkSpec((1,), (), 0, memory)
        with pytest.raises(StoreError, match="memory id"):
            store.put(ALICE, chunk, make_kv(ALICE, chunk))
    store.close()


def test_the_key_changes_with_everything_that_changes_the_kv() -> None:
    base = ChunkSpec((1, 2, 3), (7, 8), 1, "m")
    store = open_store(None)
    changed = [
        dataclasses.replace(base, token_ids=(1, 2, 4)),
        dataclasses.replace(base, token_ids=(1, 2)),
        dataclasses.replace(base, context=(7, 9)),
        dataclasses.replace(base, context=(7,)),
        dataclasses.replace(base, context=(7, 8, 1), token_ids=(2, 3)),
        dataclasses.replace(base, trusted=2),
    ]
    keys = {store.key(ALICE, each) for each in [base, *changed]}
    keys.add(store.key(Tenant(ALICE.id, BOB.secret), base))
    keys.add(store.key(Tenant(BOB.id, ALICE.secret), base))
    for field in ("layers", "kv_heads", "head_dim"):
        other = dataclasses.replace(LAYOUT, fingerprint=f"model-a {field}+1", **{field: getattr(LAYOUT, field) + 1})
        keys.add(open_store(None, other).key(ALICE, base))
    assert len(keys) == 12
    assert {len(key) for key in keys} == {32}
    assert store.key(ALICE, dataclasses.replace(base, memory="n", behind=("o",))) == store.key(ALICE, base)
    store.close()


def test_other_context_tenant_fingerprint_and_dtype_miss(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store, ALICE, spec(1))
    assert tier_of(store, ALICE, spec(1, context=4)) is None
    assert tier_of(store, BOB, spec(1)) is None
    store.close()
    for layout in (
        dataclasses.replace(LAYOUT, fingerprint="model-b"),
        dataclasses.replace(LAYOUT, dtype=torch.float16),
        dataclasses.replace(LAYOUT, layers=2),
        dataclasses.replace(LAYOUT, head_dim=32),
    ):
        store = open_store(tmp_path, layout)
        assert tier_of(store, ALICE, spec(1), layout) is None, layout
        store.close()


def test_the_same_chunk_put_by_many_threads_is_kept_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    chunks = [spec(number) for number in range(10)]
    gate = threading.Barrier(6)

    def work() -> None:
        gate.wait()
        for chunk in chunks:
            store.put(ALICE, chunk, make_kv(ALICE, chunk))
            tier_of(store, ALICE, chunk)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.flush()
    stats = store.stats()
    assert stats["puts"] == stats["chunks"] == stats["chunks_written"] == 10
    assert stats["ram_bytes"] == sum(make_kv(ALICE, c).k.nbytes * 2 + 48 for c in chunks)
    assert stats["leases"] == 0
    store.close()


def test_directories_and_files_are_private(tmp_path: Path) -> None:
    store = open_store(tmp_path / "kv")
    put(store, ALICE, spec(1))
    store.close()
    for path in [tmp_path / "kv", *(tmp_path / "kv").rglob("*")]:
        mode = stat.S_IMODE(os.stat(path).st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_a_closed_store_refuses_and_misses(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store, ALICE, spec(1))
    store.close()
    assert tier_of(store, ALICE, spec(1)) is None
    for call in (lambda: put(store, ALICE, spec(2)), lambda: store.forget(ALICE, None)):
        with pytest.raises(StoreError, match="closed"):
            call()


def test_senseless_configurations_are_refused(tmp_path: Path) -> None:
    for wrong in ({"ram_bytes": 0}, {"disk_bytes": -1}, {"segment_bytes": 0}):
        with pytest.raises(StoreError):
            StoreConfig(**({"path": tmp_path, "ram_bytes": 1, "disk_bytes": 1} | wrong))
    with pytest.raises(StoreError, match="dtype"):
        ChunkLayout(1, 1, 1, torch.int8, "x")
    with pytest.raises(StoreError):
        ChunkLayout(0, 1, 1, torch.float32, "x")
