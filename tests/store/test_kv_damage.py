"""Damaged, swapped, foreign and strange files: each is a miss and a count, never wrong bytes, never an exception."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kvlib import ALICE, BOB, LAYOUT, kv_files, open_store, put, spec, tier_of

from amem.engine.store import ChunkStore
from amem.engine.store.format import PAGE, Place, header_length, parse, place

CHUNKS = [spec(number, tokens) for number, tokens in ((1, 12), (2, 3), (3, 400), (4, 12))]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A directory with one file that holds all of CHUNKS."""
    root = tmp_path / "kv"
    store = open_store(root, linger_s=0.5)
    put(store, ALICE, *CHUNKS)
    store.close()
    assert len(kv_files(root)) == 1
    return root


def places(path: Path) -> list[Place]:
    """Where the records of a file lie, read from the file."""
    data = path.read_bytes()
    found: list[Place] = []
    at = 0
    while at + PAGE <= len(data) or any(data[at:]):
        size = header_length(data[at : at + PAGE])
        head = parse(data[at : at + size], LAYOUT).head
        found.append(place(at, size, LAYOUT.payload_bytes(head.tokens)))
        at = found[-1].end
    return found


def served(store: ChunkStore) -> list[str | None]:
    """The tier of each chunk; a wrong byte fails inside `tier_of`."""
    return [tier_of(store, ALICE, chunk) for chunk in CHUNKS]


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << random.Random(offset).randrange(8))]))


def sampled_offsets(path: Path) -> list[int]:
    """Every byte of one header, and some of each layer, padding and the tail of the file."""
    rng = random.Random(7)
    found = places(path)
    offsets = list(range(found[0].header_bytes))
    for where in found:
        offsets += rng.sample(range(where.offset, where.offset + where.header_bytes), 20)
        step = where.payload_bytes // LAYOUT.layers
        for layer in range(LAYOUT.layers):
            base = where.payload + layer * step
            offsets += [base, base + step - 1, *(base + rng.randrange(step) for _ in range(12))]
        offsets += [where.payload - 1, where.end - 1]
    tail = range(found[-1].end, path.stat().st_size)
    return offsets + rng.sample(tail, min(5, len(tail)))


def test_a_flipped_bit_anywhere_is_never_served(written: Path) -> None:
    (path,) = kv_files(written)
    pristine = path.read_bytes()
    offsets = sampled_offsets(path)
    assert len(offsets) > 500
    for offset in offsets:
        path.write_bytes(pristine)
        flip(path, offset)
        store = open_store(written)
        assert None in served(store), f"nothing noticed at byte {offset}"
        assert store.stats()["corrupt"] >= 1
        assert kv_files(written) == [], "a bad file is removed"
        store.close()


def test_a_flip_under_a_running_store_is_never_served(written: Path) -> None:
    (path,) = kv_files(written)
    pristine = path.read_bytes()
    for where in places(path):
        for offset in (where.offset + 40, where.payload, where.payload + where.payload_bytes - 1):
            path.write_bytes(pristine)
            store = open_store(written, ram_bytes=1)
            assert served(store) == ["disk"] * 4
            flip(path, offset)
            assert None in served(store)
            assert store.stats()["corrupt"] == 1
            assert served(store) == [None] * 4, "the file is gone"
            store.close()


def test_any_other_length_is_never_served(written: Path) -> None:
    (path,) = kv_files(written)
    pristine = path.read_bytes()
    ends = [where.end for where in places(path)]
    lengths = {
        0,
        1,
        100,
        PAGE - 1,
        PAGE,
        PAGE + 1,
        *ends,
        *(end - 1 for end in ends),
        *(end // PAGE * PAGE for end in ends),
    }
    lengths |= set(random.Random(3).sample(range(len(pristine)), 30))
    for length in sorted(lengths - {len(pristine)}):
        path.write_bytes(pristine[:length])
        store = open_store(written)
        served(store)
        assert store.stats()["corrupt"] == 1, length
        store.close()
    for extra in (b"\0", b"x", bytes(PAGE), b"x" * PAGE, pristine):
        path.write_bytes(pristine + extra)
        store = open_store(written)
        assert served(store) == [None] * 4
        assert store.stats()["corrupt"] == 1
        store.close()


@pytest.mark.parametrize("length", [0, 1, PAGE, 3 * PAGE])
def test_cut_short_between_two_reads(written: Path, length: int) -> None:
    (path,) = kv_files(written)
    store = open_store(written, ram_bytes=1)
    assert served(store) == ["disk"] * 4
    os.truncate(path, length)
    assert served(store) == [None] * 4
    assert store.stats()["corrupt"] == 1
    store.close()


@pytest.mark.parametrize("size", [512, 4096])
def test_zeroed_and_foreign_sectors(written: Path, size: int) -> None:
    (path,) = kv_files(written)
    pristine = path.read_bytes()
    rng = random.Random(size)
    for at in rng.sample(range(0, len(pristine) - size, size), 20):
        for filler in (bytes(size), pristine[-at - size : len(pristine) - at], rng.randbytes(size)):
            damaged = pristine[:at] + filler + pristine[at + size :]
            if len(filler) != size or damaged == pristine:
                continue
            path.write_bytes(damaged)
            store = open_store(written)
            assert None in served(store), at
            assert store.stats()["corrupt"] >= 1
            store.close()


def two_files(root: Path) -> tuple[Path, Path]:
    """One chunk of Alice and one of Bob, alike in size, each in a file of its own."""
    store = open_store(root)
    put(store, ALICE, spec(1))
    store.flush()
    put(store, BOB, spec(1))
    store.close()
    alice = root.glob(f"*/{ALICE.id.hex()}/*.kv")
    bob = root.glob(f"*/{BOB.id.hex()}/*.kv")
    return next(alice), next(bob)


def test_a_file_of_another_tenant_is_never_served(tmp_path: Path) -> None:
    alice, bob = two_files(tmp_path)
    shutil.copy(alice, bob)
    shutil.copy(alice, bob.with_name("00000000000000ff.kv"))
    store = open_store(tmp_path)
    assert tier_of(store, BOB, spec(1)) is None
    assert tier_of(store, ALICE, spec(1)) == "disk"
    assert store.stats()["corrupt"] == 2
    store.close()


def test_a_file_moved_to_another_tenant_is_served_to_neither(tmp_path: Path) -> None:
    alice, bob = two_files(tmp_path)
    alice.rename(bob)
    store = open_store(tmp_path)
    assert [tier_of(store, tenant, spec(1)) for tenant in (ALICE, BOB)] == [None, None]
    assert store.stats()["corrupt"] == 1
    store.close()


def test_files_swapped_under_a_running_store(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for number in (1, 2):
        put(store, ALICE, spec(number))
        store.flush()
    store.close()
    first, second = kv_files(tmp_path)
    store = open_store(tmp_path, ram_bytes=1)
    a, b = first.read_bytes(), second.read_bytes()
    assert len(a) == len(b)
    first.write_bytes(b)
    second.write_bytes(a)
    assert [tier_of(store, ALICE, spec(number)) for number in (1, 2)] == [None, None]
    assert store.stats()["corrupt"] == 2
    store.close()


def test_a_file_of_another_model_in_our_directory(tmp_path: Path) -> None:
    other = dataclasses.replace(LAYOUT, fingerprint="model-b")
    for layout in (LAYOUT, other):
        store = open_store(tmp_path, layout)
        put(store, ALICE, spec(1), layout=layout)
        store.close()
    ours = tmp_path / LAYOUT.fingerprint_digest.hex()[:16] / ALICE.id.hex()
    theirs = tmp_path / other.fingerprint_digest.hex()[:16] / ALICE.id.hex()
    shutil.copy(next(theirs.iterdir()), next(ours.iterdir()))
    store = open_store(tmp_path)
    assert tier_of(store, ALICE, spec(1)) is None
    assert store.stats()["corrupt"] == 1
    store.close()


def link(path: Path, target: Path) -> None:
    shutil.copy(path, target)
    path.unlink()
    path.symlink_to(target)


def pipe(path: Path, target: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path, target: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("replace", [link, pipe, directory])
@pytest.mark.parametrize("running", [False, True])
def test_what_is_no_regular_file_is_refused_at_once(
    written: Path, tmp_path: Path, replace: Callable[[Path, Path], None], running: bool
) -> None:
    (path,) = kv_files(written)
    store = open_store(written, ram_bytes=1)
    if not running:
        store.close()
    replace(path, tmp_path / "elsewhere")
    started = time.monotonic()
    if not running:
        store = open_store(written)
    assert served(store) == [None] * 4
    assert time.monotonic() - started < 2
    assert store.stats()["corrupt"] >= 1
    store.close()
    if replace is link:
        assert (tmp_path / "elsewhere").stat().st_size > 0, "what a link points at is not ours to touch"


def test_a_file_deleted_under_a_running_store(written: Path) -> None:
    store = open_store(written, ram_bytes=1)
    kv_files(written)[0].unlink()
    assert served(store) == [None] * 4
    put(store, ALICE, CHUNKS[0])
    store.close()
    assert store.stats()["disk_bytes"] == 0


def test_a_deleted_file_stays_readable_inside_a_lease(written: Path) -> None:
    store = open_store(written, ram_bytes=1)
    with store.lease(ALICE, CHUNKS[2]) as lease:
        assert lease is not None
        before = lease.kv.k.clone()
        kv_files(written)[0].unlink()
        assert (lease.kv.k == before).all()
    store.close()


def test_running_out_of_descriptors_costs_no_file(written: Path) -> None:
    import resource

    store = open_store(written, ram_bytes=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        assert served(store) == [None] * 4
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert served(store) == ["disk"] * 4
    assert store.stats()["corrupt"] == 0
    assert store.stats()["read_errors"] == 4
    store.close()


READER = """
import os, signal, sys
from pathlib import Path
from kvlib import ALICE, open_store, spec
root, how = Path(sys.argv[1]), sys.argv[2]
store = open_store(root)
with store.lease(ALICE, spec(3, 400)) as lease:
    if how == "truncate":
        os.truncate(next(root.glob("*/*/*.kv")), 4096)
        print(float(lease.kv.k.float().sum()))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def die_reading(root: Path, how: str) -> int:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.run([sys.executable, "-c", READER, str(root), how], env=environment, timeout=120).returncode


def test_a_file_cut_short_while_mapped_costs_one_process_not_two(written: Path) -> None:
    assert die_reading(written, "truncate") == -signal.SIGBUS
    store = open_store(written)
    assert served(store) == [None] * 4
    assert kv_files(written) == []
    store.close()


def test_what_was_being_read_at_a_crash_is_checked_before_it_is_mapped_again(written: Path) -> None:
    assert die_reading(written, "kill") == -signal.SIGKILL
    (path,) = kv_files(written)
    flip(path, places(path)[2].payload + 5)
    store = open_store(written)
    assert kv_files(written) == [], "found by the start itself, with ordinary reads"
    assert served(store) == [None] * 4
    store.close()


def test_a_sound_file_that_was_being_read_at_a_crash_is_kept(written: Path) -> None:
    assert die_reading(written, "kill") == -signal.SIGKILL
    store = open_store(written)
    assert served(store) == ["disk"] * 4
    assert store.stats()["corrupt"] == 0
    store.close()
    assert not any((written / "READING").read_bytes()), "nobody is reading"
