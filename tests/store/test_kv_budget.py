"""Budgets are kept to the byte, and what is worth most stays."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from pathlib import Path

import pytest
from kvlib import ALICE, BOB, LAYOUT, kv_files, open_store, put, residue, spec, tier_of

from amem.engine.store.policy import Clock, EvictionQueue, mean_rank

CHUNK = LAYOUT.payload_bytes(12) + 12 * 4


def test_ram_stays_within_its_budget_and_the_rest_is_on_disk(tmp_path: Path) -> None:
    store = open_store(tmp_path, ram_bytes=5 * CHUNK)
    for number in range(30):
        put(store, ALICE, spec(number))
        assert store.stats()["ram_bytes"] <= 5 * CHUNK
        store.flush()
    stats = store.stats()
    assert (stats["chunks"], stats["ram_chunks"], stats["evicted_ram"]) == (30, 5, 25)
    assert all(tier_of(store, ALICE, spec(number)) for number in range(30)), "nothing is lost"
    assert store.stats()["ram_bytes"] <= 5 * CHUNK
    store.close()


def test_what_is_used_survives_what_only_passes_by() -> None:
    store = open_store(None, ram_bytes=10 * CHUNK)
    hot = [spec(number) for number in range(4)]
    put(store, ALICE, *hot)
    for number in range(100, 300):
        for chunk in hot:
            tier_of(store, ALICE, chunk)
        put(store, ALICE, spec(number))
    assert [tier_of(store, ALICE, chunk) for chunk in hot] == ["cpu"] * 4
    store.close()


def test_what_is_not_used_any_more_fades() -> None:
    store = open_store(None, ram_bytes=4 * CHUNK)
    put(store, ALICE, spec(1))
    for _ in range(50):
        tier_of(store, ALICE, spec(1))
    for number in range(100, 103):
        put(store, ALICE, spec(number))
    for number in range(40000):
        with store.lease(ALICE, spec(100 + number % 3)):
            pass
    put(store, ALICE, spec(200))
    assert tier_of(store, ALICE, spec(1)) is None
    assert tier_of(store, ALICE, spec(100)) == "cpu"
    store.close()


def test_a_leased_chunk_is_not_evicted() -> None:
    store = open_store(None, ram_bytes=3 * CHUNK)
    put(store, ALICE, spec(1))
    with store.lease(ALICE, spec(1)) as lease:
        assert lease is not None
        before = lease.kv.k.clone()
        for number in range(2, 20):
            put(store, ALICE, spec(number))
            for _ in range(5):
                tier_of(store, ALICE, spec(number))
            assert store.stats()["ram_chunks"] <= 3
        assert store.stats()["evicted_ram"] > 10
        assert (lease.kv.k == before).all()
        assert store.contains(store.key(ALICE, spec(1)))
    store.close()


def test_a_chunk_larger_than_the_budget_is_dropped_and_counted() -> None:
    store = open_store(None, ram_bytes=3 * CHUNK)
    put(store, ALICE, spec(1), spec(2, 500))
    assert tier_of(store, ALICE, spec(2, 500)) is None
    assert tier_of(store, ALICE, spec(1)) == "cpu", "nothing was evicted for it"
    assert store.stats()["puts_dropped"] == 1
    assert store.stats()["ram_bytes"] == CHUNK
    store.close()


def test_a_scan_through_the_disk_does_not_wash_out_ram(tmp_path: Path) -> None:
    store = open_store(tmp_path, ram_bytes=6 * CHUNK)
    for number in range(50):
        put(store, ALICE, spec(number))
        store.flush()
    hot = [number for number in range(50) if store.contains(store.key(ALICE, spec(number))) == "cpu"]
    for _ in range(5):
        assert {tier_of(store, ALICE, spec(number)) for number in hot} == {"cpu"}
    for number in 3 * list(range(50)):
        tier = tier_of(store, ALICE, spec(number))
        assert tier == ("cpu" if number in hot else "disk")
        store.flush()
    store.close()


def test_disk_stays_within_its_budget_and_keeps_what_is_used(tmp_path: Path) -> None:
    budget = 20 * 8192
    store = open_store(tmp_path, ram_bytes=2 * CHUNK, disk_bytes=budget, segment_bytes=4096)
    for number in range(80):
        put(store, ALICE, spec(number))
        store.flush()
        if number:
            tier_of(store, ALICE, spec(0))
            store.flush()
        assert sum(path.stat().st_size for path in kv_files(tmp_path)) == store.stats()["disk_bytes"] <= budget
    assert store.stats()["evicted_disk"] > 50
    assert tier_of(store, ALICE, spec(0)) is not None
    store.close()
    store = open_store(tmp_path)
    assert tier_of(store, ALICE, spec(0)) == "disk"
    assert store.stats()["corrupt"] == 0
    store.close()


def test_files_of_another_model_make_room_first(tmp_path: Path) -> None:
    other = dataclasses.replace(LAYOUT, fingerprint="model-b")
    store = open_store(tmp_path, other)
    for number in range(10):
        put(store, BOB, spec(number, 300), layout=other)
    store.close()
    theirs = store.stats()["disk_bytes"]
    store = open_store(tmp_path, disk_bytes=int(theirs) + 10000)
    assert store.stats()["disk_other_bytes"] == theirs
    put(store, ALICE, *(spec(number) for number in range(8)))
    store.flush()
    assert store.stats()["chunks_written"] == 8
    assert store.stats()["disk_other_bytes"] < theirs
    assert sum(path.stat().st_size for path in kv_files(tmp_path)) <= theirs + 10000
    store.close()


def test_turning_the_disk_off(tmp_path: Path) -> None:
    store = open_store(tmp_path / "kv", disk_bytes=0)
    put(store, ALICE, spec(1))
    store.close()
    assert not (tmp_path / "kv").exists()


def test_turning_the_disk_off_hides_nothing_from_an_erasure(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store, ALICE, spec(1), spec(2))
    store.close()
    store = open_store(tmp_path, disk_bytes=0)
    put(store, ALICE, spec(3))
    store.flush()
    assert [tier_of(store, ALICE, spec(number)) for number in (2, 3)] == ["disk", "cpu"]
    assert store.forget(ALICE, ("m1",)).chunks == 1
    assert not residue(tmp_path, ALICE, spec(1))
    assert not residue(tmp_path, ALICE, spec(3)), "nothing may be written without a budget"
    assert residue(tmp_path, ALICE, spec(2))
    store.close()


def test_a_small_chunk_does_not_cost_a_page_of_air(tmp_path: Path) -> None:
    """What 200 chunks of a dozen tokens cost beyond their bytes."""
    store = open_store(tmp_path, linger_s=0.5)
    put(store, ALICE, *(spec(number) for number in range(200)))
    store.flush()
    payload = 200 * LAYOUT.payload_bytes(12)
    assert store.stats()["disk_bytes"] < 1.15 * payload
    store.close()


def test_the_writer_never_holds_what_is_being_read_or_counted(tmp_path: Path) -> None:
    """Reads go on while a file is written: the lock is not held over input and output."""
    store = open_store(tmp_path, linger_s=0.0)
    put(store, ALICE, spec(0))
    slowest = 0.0
    filler = threading.Thread(target=lambda: put(store, ALICE, *(spec(number, 200) for number in range(1, 60))))
    filler.start()
    while filler.is_alive():
        started = time.perf_counter()
        assert tier_of(store, ALICE, spec(0)) == "cpu"
        slowest = max(slowest, time.perf_counter() - started)
    filler.join()
    store.flush()
    assert slowest < 1.0
    store.close()


def test_ranks_follow_use_age_and_cost() -> None:
    clock = Clock(half_life=10)
    old = clock.first(10, 0)
    used = old
    for _ in range(3):
        used = clock.again(used, 10, 0)
    fresh = clock.first(10, 0)
    assert old < fresh < used
    for _ in range(60):
        fresh = clock.again(fresh, 10, 0)
    assert fresh > used
    assert clock.first(10, 30) > clock.first(10, 0), "what was computed behind more context costs more to rebuild"


def test_a_rank_is_the_log_of_a_fading_count() -> None:
    clock = Clock(half_life=4)
    rank = clock.first(5, 5)
    for _ in range(3):
        rank = clock.again(rank, 5, 5)
    count = sum(2.0 ** (-age / 4) for age in range(4))
    assert rank == pytest.approx(math.log2(count) + 1.0 + 4 / 4)
    assert mean_rank([1.0, 1.0]) == pytest.approx(1.0)
    assert mean_rank([0.0, math.log2(3)]) == pytest.approx(1.0)
    assert mean_rank([-5000.0, 5000.0]) == pytest.approx(4999.0)


def test_the_queue_pops_the_lowest_current_rank() -> None:
    ranks = {b"a": 1.0, b"b": 2.0, b"c": 3.0}
    queue = EvictionQueue(ranks.get)
    for key, rank in ranks.items():
        queue.push(key, rank)
    ranks[b"a"] = 9.0
    del ranks[b"b"]
    assert [queue.pop() for _ in range(3)] == [b"c", b"a", None]
    for number in range(5000):
        queue.push(b"%d" % number, 1.0)
    queue.push(b"a", 1.0)
    queue.trim(1)
    assert [queue.pop(), queue.pop()] == [b"a", None]
