"""Erasure against readers, writers and other erasures that run at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kvlib import ALICE, kv_files, make_kv, open_store, put, residue, spec, tier_of

from amem.engine.store import StoreError
from amem.engine.store.disk import DiskTier


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


def test_puts_reads_and_erasures_from_many_threads(tmp_path: Path) -> None:
    """Whatever the order: no wrong byte, no exception, and what was erased last is gone."""
    store = open_store(tmp_path, linger_s=0.0, ram_bytes=20 * 4700, segment_bytes=16 << 10)
    stop = time.monotonic() + 3
    errors: list[BaseException] = []

    def guard(step: Callable[[int], object]) -> None:
        number = 0
        try:
            while time.monotonic() < stop:
                number = (number + 7) % 40
                step(number)
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
