"""Erasure: after `forget` returns, the bytes are in no file, no buffer and no queue, and stay away."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from kvlib import ALICE, BOB, LAYOUT, kv_files, make_kv, open_store, put, residue, spec, tier_of

from amem.engine.store import StoreError


def test_a_canary_is_nowhere_afterwards_and_its_neighbours_stay(tmp_path: Path) -> None:
    store = open_store(tmp_path, linger_s=0.5)
    chunks = [spec(number, 30) for number in range(8)]
    put(store, ALICE, *chunks)
    put(store, BOB, chunks[3])
    store.flush()
    assert all(len(residue(tmp_path, ALICE, chunk)) == 1 for chunk in chunks), "the search itself works"
    receipt = store.forget(ALICE, ("m3", "m5", "unknown"))
    size = LAYOUT.payload_bytes(30)
    assert (receipt.chunks, receipt.disk_bytes) == (2, 2 * size)
    assert receipt.ram_bytes == 2 * (size + 30 * 4)
    for store_again in (store, None):
        if store_again is None:
            store.close()
            store = open_store(tmp_path)
        for number, chunk in enumerate(chunks):
            erased = number in (3, 5)
            assert (tier_of(store, ALICE, chunk) is None) == erased
            assert residue(tmp_path, ALICE, chunk) == [] if erased else residue(tmp_path, ALICE, chunk)
        assert tier_of(store, BOB, chunks[3]) is not None, "another tenant's chunk of the same text"
    assert store.forget(ALICE, ("m3",)).chunks == 0
    store.close()


def test_what_was_computed_behind_a_memory_goes_with_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    behind = [spec(2, behind=("m1",)), spec(3, behind=("m2", "m1")), spec(4, behind=("m3",))]
    put(store, ALICE, spec(1), *behind)
    store.close()
    store = open_store(tmp_path)
    assert store.forget(ALICE, ("m1",)).chunks == 3
    assert [tier_of(store, ALICE, chunk) for chunk in (spec(1), *behind)] == [None, None, None, "disk"]
    assert not any(residue(tmp_path, ALICE, chunk) for chunk in (spec(1), *behind[:2]))
    store.close()


def test_ram_is_overwritten(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store, ALICE, spec(1), spec(2))
    with store.lease(ALICE, spec(1)) as first, store.lease(ALICE, spec(2)) as second:
        assert first is not None
        assert second is not None
        kept = (first.kv, second.kv)
    store.forget(ALICE, ("m1",))
    assert kept[0].prior is not None
    assert not any(tensor.any() for tensor in (kept[0].k, kept[0].v, kept[0].prior))
    assert kept[1].k.any()
    store.close()


def test_a_block_made_in_inference_mode_can_be_overwritten_by_any_thread(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with torch.inference_mode():
        put(store, ALICE, spec(1))
    assert store.forget(ALICE, ("m1",)).chunks == 1
    store.close()


def test_refused_and_repeated_puts_leave_no_copy_behind() -> None:
    store = open_store(None)
    kv = make_kv(ALICE, spec(1))
    kv.k[0, 0, 0, 0] = float("nan")
    with pytest.raises(StoreError):
        store.put(ALICE, spec(1), kv)
    for _ in range(5):
        put(store, ALICE, spec(1))
    assert store.stats()["ram_bytes"] == LAYOUT.payload_bytes(12) + 48
    store.close()


def test_a_disk_that_refuses_makes_it_fail_and_again_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path, linger_s=0.3)
    put(store, ALICE, spec(1), spec(2))
    store.flush()

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(StoreError, match="could not be erased"):
            store.forget(ALICE, ("m1",))
    assert tier_of(store, ALICE, spec(1)) is None
    assert tier_of(store, ALICE, spec(2)) is not None
    assert store.forget(ALICE, ("m1",)).chunks == 1
    assert residue(tmp_path, ALICE, spec(1)) == []
    assert tier_of(store, ALICE, spec(2)) is not None
    store.close()
    store = open_store(tmp_path)
    assert tier_of(store, ALICE, spec(2)) == "disk"
    assert len(kv_files(tmp_path)) == 1
    store.close()


def test_a_copy_that_could_not_be_taken_back_is_erased_with_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path, linger_s=0.3)
    put(store, ALICE, spec(1), spec(2))
    store.flush()

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(StoreError):
            store.forget(ALICE, ("m1",))
    assert len(residue(tmp_path, ALICE, spec(2))) == 2, "the copy lacks what is erased and holds the rest"
    store.forget(ALICE, ("m2",))
    assert residue(tmp_path, ALICE, spec(2)) == []
    store.close()


@pytest.mark.parametrize("memories", [("m1",), None])
def test_it_does_not_return_before_the_names_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memories: tuple[str, ...] | None
) -> None:
    store = open_store(tmp_path, fsync=False)
    put(store, ALICE, spec(1))
    store.flush()

    def refuse(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(StoreError, match="could not be erased"):
            store.forget(ALICE, memories)
    assert tier_of(store, ALICE, spec(1)) is None
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    store.forget(ALICE, memories)
    assert synced, "an earlier failure does not count as done"
    assert kv_files(tmp_path) == []
    store.close()


def test_without_room_for_a_copy_the_neighbours_go_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path, linger_s=0.3)
    put(store, ALICE, spec(1), spec(2))
    store.close()
    store = open_store(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert store.forget(ALICE, ("m1",)).chunks == 1
    assert kv_files(tmp_path) == []
    assert tier_of(store, ALICE, spec(2)) is None
    assert store.stats()["chunks"] == 0
    store.close()


def test_a_whole_tenant_leaves_no_directory(tmp_path: Path) -> None:
    other = dataclasses.replace(LAYOUT, fingerprint="model-b")
    for layout in (other, LAYOUT):
        store = open_store(tmp_path, layout)
        for number in range(5):
            put(store, ALICE, spec(number), layout=layout)
            put(store, BOB, spec(number), layout=layout)
        store.flush()
        if layout is other:
            store.close()
    receipt = store.forget(ALICE, None)
    assert receipt.chunks == 5
    assert not [path for path in tmp_path.rglob("*") if ALICE.id.hex() in str(path) and path.is_file()]
    assert not (tmp_path / LAYOUT.fingerprint_digest.hex()[:16] / ALICE.id.hex()).exists()
    assert tier_of(store, BOB, spec(1)) == "cpu"
    put(store, ALICE, spec(1))
    store.close()
    store = open_store(tmp_path)
    assert tier_of(store, ALICE, spec(1)) == "disk", "the tenant may come back"
    store.close()


def test_files_of_another_model_lose_the_memory_too(tmp_path: Path) -> None:
    other = dataclasses.replace(LAYOUT, fingerprint="model-b", layers=5)
    store = open_store(tmp_path, other)
    for number in (1, 2):
        put(store, ALICE, spec(number, behind=("m9",) if number == 2 else ()), layout=other)
        store.flush()
    put(store, BOB, spec(1), layout=other)
    store.close()
    store = open_store(tmp_path)
    assert store.stats()["disk_other_bytes"] > 0
    assert store.forget(ALICE, ("m9",)).disk_bytes > 0
    assert residue(tmp_path, ALICE, spec(2), other) == []
    assert residue(tmp_path, ALICE, spec(1), other)
    store.forget(ALICE, ("m1",))
    assert residue(tmp_path, ALICE, spec(1), other) == []
    assert residue(tmp_path, BOB, spec(1), other)
    store.close()


def test_a_file_of_another_model_that_cannot_be_read_is_taken_to_hold_it(tmp_path: Path) -> None:
    other = dataclasses.replace(LAYOUT, fingerprint="model-b")
    store = open_store(tmp_path, other)
    put(store, ALICE, spec(1), layout=other)
    store.close()
    (path,) = kv_files(tmp_path)
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    store = open_store(tmp_path)
    store.forget(ALICE, ("m7",))
    assert not path.exists()
    store.close()


def test_a_second_owner_takes_the_chunk_along(tmp_path: Path) -> None:
    """Two memories with the same text share one chunk; forgetting either of them erases it."""
    store = open_store(tmp_path)
    put(store, ALICE, spec(1))
    twin = dataclasses.replace(spec(1), memory="twin")
    assert tier_of(store, ALICE, twin) == "cpu"
    assert store.forget(ALICE, ("twin",)).chunks == 1
    assert tier_of(store, ALICE, spec(1)) is None
    assert residue(tmp_path, ALICE, spec(1)) == []
    store.close()


def test_a_record_that_an_older_file_still_holds_does_not_come_back(tmp_path: Path) -> None:
    """A crash may leave the file that was being replaced: the start keeps the newer one alone."""
    store = open_store(tmp_path, linger_s=0.3)
    put(store, ALICE, spec(1), spec(2))
    store.flush()
    (old,) = kv_files(tmp_path)
    saved = old.read_bytes()
    store.forget(ALICE, ("m1",))
    store.close()
    old.write_bytes(saved)
    store = open_store(tmp_path)
    assert tier_of(store, ALICE, spec(1)) is None
    assert tier_of(store, ALICE, spec(2)) == "disk"
    assert residue(tmp_path, ALICE, spec(1)) == []
    store.close()
