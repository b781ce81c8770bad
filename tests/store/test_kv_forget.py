"""Erasure: after `forget` returns, the bytes are in no file, no buffer and no queue, and stay away."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from kvlib import ALICE, BOB, LAYOUT, kv_files, make_kv, open_store, put, residue, spec, tier_of

from amem.engine.store import StoreError
from amem.engine.store.disk import DiskTier


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


def test_what_waits_for_the_disk_never_gets_there(tmp_path: Path) -> None:
    store = open_store(tmp_path, linger_s=60.0)
    put(store, ALICE, spec(1), spec(2))
    assert store.stats()["pending"] == 2
    assert store.forget(ALICE, ("m1",)).chunks == 1
    store.flush()
    store.close()
    assert residue(tmp_path, ALICE, spec(1)) == []
    store = open_store(tmp_path)
    assert [tier_of(store, ALICE, spec(number)) for number in (1, 2)] == [None, "disk"]
    store.close()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_what_is_being_written_is_erased_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """The writer is held in the middle of its file while `forget` runs."""
    entered, go = threading.Event(), threading.Event()
    draft = DiskTier.draft

    def slow(self: DiskTier, tenant: bytes, items: list[object]) -> object:
        made = draft(self, tenant, items) if moment == "after" else None
        entered.set()
        assert go.wait(10)
        return made or draft(self, tenant, items)

    store = open_store(tmp_path, linger_s=0.2)
    monkeypatch.setattr(DiskTier, "draft", slow)
    put(store, ALICE, spec(1), spec(2))
    assert entered.wait(10)
    done: list[int] = []
    eraser = threading.Thread(target=lambda: done.append(store.forget(ALICE, ("m1",)).chunks))
    eraser.start()
    time.sleep(0.1)
    assert not done, "forget must not return while the bytes are being written"
    assert tier_of(store, ALICE, spec(1)) is None, "and they are not served meanwhile"
    monkeypatch.setattr(DiskTier, "draft", draft)
    go.set()
    eraser.join(10)
    assert done == [1]
    assert residue(tmp_path, ALICE, spec(1)) == []
    store.flush()
    store.close()
    store = open_store(tmp_path)
    assert [tier_of(store, ALICE, spec(number)) for number in (1, 2)] == [None, "disk"], "the other one is written"
    store.close()


@pytest.mark.parametrize("on_disk", [False, True])
def test_it_waits_for_readers_and_hides_from_new_ones(tmp_path: Path, on_disk: bool) -> None:
    store = open_store(tmp_path)
    put(store, ALICE, spec(1))
    if on_disk:
        store.close()
        store = open_store(tmp_path, ram_bytes=1)
    done: list[int] = []
    eraser = threading.Thread(target=lambda: done.append(store.forget(ALICE, ("m1",)).chunks))
    with store.lease(ALICE, spec(1)) as lease:
        assert lease is not None
        eraser.start()
        time.sleep(0.1)
        assert not done
        assert (lease.kv.k == make_kv(ALICE, spec(1)).k).all(), "the reader is not disturbed"
        assert store.contains(store.key(ALICE, spec(1))) is None
        with store.lease(ALICE, spec(1)) as late:
            assert late is None
        put(store, ALICE, spec(1))
        assert store.contains(store.key(ALICE, spec(1))) is None
    eraser.join(10)
    assert done == [1]
    assert residue(tmp_path, ALICE, spec(1)) == []
    store.close()


def test_inside_a_lease_of_its_own_thread_it_refuses(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store, ALICE, spec(1), spec(2))
    with store.lease(ALICE, spec(1)):
        assert store.forget(ALICE, ("m2",)).chunks == 1
        with pytest.raises(StoreError, match="inside a lease"):
            store.forget(ALICE, ("m1",))
    assert tier_of(store, ALICE, spec(1)) == "cpu", "a refused call changed nothing"
    assert store.forget(ALICE, ("m1",)).chunks == 1
    store.close()


def test_a_reader_that_never_ends_makes_it_fail_and_again_finishes(tmp_path: Path) -> None:
    store = open_store(tmp_path, erase_timeout_s=0.1)
    put(store, ALICE, spec(1))
    store.flush()
    inside, leave = threading.Event(), threading.Event()

    def read() -> None:
        with store.lease(ALICE, spec(1)):
            inside.set()
            leave.wait(10)

    reader = threading.Thread(target=read)
    reader.start()
    assert inside.wait(10)
    with pytest.raises(StoreError, match="still being read"):
        store.forget(ALICE, ("m1",))
    assert tier_of(store, ALICE, spec(1)) is None
    leave.set()
    reader.join(10)
    assert store.forget(ALICE, ("m1",)).chunks == 1
    assert residue(tmp_path, ALICE, spec(1)) == []
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


def test_a_reader_follows_a_file_that_is_replaced_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path, linger_s=0.3)
    put(store, ALICE, spec(1), spec(2))
    store.close()
    store = open_store(tmp_path)
    read = DiskTier.read

    def late(self: DiskTier, *arguments: object) -> object:
        monkeypatch.undo()
        assert store.forget(ALICE, ("m2",)).chunks == 1
        return read(self, *arguments)

    monkeypatch.setattr(DiskTier, "read", late)
    assert tier_of(store, ALICE, spec(1)) == "disk"
    assert store.stats()["corrupt"] == 0
    assert len(kv_files(tmp_path)) == 1
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


def test_puts_reads_and_erasures_from_many_threads(tmp_path: Path) -> None:
    """Whatever the order: no wrong byte, no exception, and what was erased last is gone."""
    store = open_store(tmp_path, linger_s=0.0, ram_bytes=20 * 4700, segment_bytes=16 << 10)
    stop = time.monotonic() + 3
    errors: list[BaseException] = []

    def guard(step: object) -> None:
        number = 0
        try:
            while time.monotonic() < stop:
                number = (number + 7) % 40
                step(number)  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=guard, args=(step,))
        for step in (
            lambda number: put(store, ALICE, spec(number)),
            lambda number: put(store, ALICE, spec(39 - number)),
            lambda number: tier_of(store, ALICE, spec(number)),
            lambda number: tier_of(store, ALICE, spec((3 * number) % 40)),
            lambda number: (store.forget(ALICE, (f"m{number}",)), time.sleep(0.002)),
        )
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for number in range(0, 40, 2):
        store.forget(ALICE, (f"m{number}",))
        assert residue(tmp_path, ALICE, spec(number)) == []
    store.flush()
    assert store.stats()["corrupt"] == 0
    assert store.stats()["leases"] == 0
    left = {number for number in range(40) if tier_of(store, ALICE, spec(number))}
    assert left <= set(range(1, 40, 2))
    assert store.forget(ALICE, None).chunks == len(left)
    assert store.stats()["ram_bytes"] == store.stats()["disk_bytes"] == store.stats()["chunks"] == 0
    store.close()
