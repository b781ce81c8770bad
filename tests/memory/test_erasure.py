"""Forgetting: what is gone has to be gone from the decrypted bytes of every file before the call returns."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import apsw
import numpy as np
import pytest

from amem.memory import schema
from amem.memory.config import MemoryConfig
from amem.memory.control import Control
from amem.memory.errors import NotFound
from amem.memory.service import MemoryService
from amem.memory.types import NewMemory, RecallOptions

MakeService = Callable[..., MemoryService]
Decrypt = Callable[[Path], dict[str, bytes]]

CANARY = "zebrafinch4711"
PARTS = (b"zebrafinch4711", b"zebrafinch", b"ebrafinch47", b"finch4711")


def residue(files: dict[str, bytes]) -> dict[str, int]:
    return {name: sum(data.lower().count(part) for part in PARTS) for name, data in files.items()}


def fill(service: MemoryService, user: str, rows: int = 400) -> list[str]:
    rng = random.Random(rows)
    vocabulary = [f"word{i}" for i in range(600)]
    items = [NewMemory(" ".join(rng.choices(vocabulary, k=12)), conversation=f"talk {i % 5}") for i in range(rows)]
    return [added.id for added in service.add(user, items)]


def plant(service: MemoryService, user: str = "u") -> list[str]:
    """The canary as text, context of the next, metadata, key, conversation, old version, long text, and resident."""
    fill(service, user)
    items = [
        NewMemory(f"My secret is {CANARY}.", conversation="talk 1"),
        NewMemory("Nothing here.", metadata={"note": CANARY}),
        NewMemory("Old one", key=CANARY),
        NewMemory(f"first {CANARY}", key="k"),
        NewMemory("second", key="k"),
        NewMemory("In a named talk", conversation=CANARY),
        NewMemory(f"{CANARY} " * 2000),
    ]
    ids = [added.id for added in service.add(user, items)]
    fill(service, user, 60)
    session = service.start_session(user, 100_000)
    service.admit(user, session.id, service.recall(user, CANARY, RecallOptions(k=20)), "turn")
    return [*ids[:3], *ids[4:]]  # the fourth is an earlier version of the fifth


def assert_no_log_keeps_old_pages(tmp_path: Path) -> None:
    """Opening a copy merges its write-ahead log into the file, so what the log alone held is seen by its size."""
    (log,) = (tmp_path / "data" / "t").glob("*/memory.db-wal")
    assert log.stat().st_size == 0


def test_the_canary_can_be_found_in_the_first_place(
    service: MemoryService, tmp_path: Path, decrypted: Decrypt
) -> None:
    plant(service)
    found = residue(decrypted(tmp_path / "data"))
    assert sum(found.values()) > 2000
    assert sum(data.count(b"zebra") for data in (p.read_bytes() for p in (tmp_path / "data").rglob("*.db*"))) == 0


def test_a_plain_full_text_index_would_keep_the_words(tmp_path: Path) -> None:
    """Control: without FTS5's secure-delete the search below does find deleted words."""
    connection = apsw.Connection(str(tmp_path / "plain.db"))
    connection.execute("PRAGMA secure_delete = ON").fetchall()
    connection.execute("CREATE VIRTUAL TABLE f USING fts5(text, content='')").fetchall()
    rng = random.Random(1)
    texts = [" ".join(f"word{rng.randint(0, 600)}" for _ in range(12)) for _ in range(400)]
    texts[50] += f" {CANARY}"
    with connection:
        for i, text in enumerate(texts):
            connection.execute("INSERT INTO f(rowid, text) VALUES (?, ?)", (i, text))
    connection.execute("INSERT INTO f(f, rowid, text) VALUES ('delete', 50, ?)", (texts[50],))
    connection.close()
    assert residue({"plain": (tmp_path / "plain.db").read_bytes()})["plain"] > 0


def test_a_forgotten_memory_is_in_no_file(service: MemoryService, tmp_path: Path, decrypted: Decrypt) -> None:
    ids = plant(service)
    receipt = service.forget("u", ids)
    assert set(ids) < set(receipt.ids)
    assert len(receipt.ids) == len(ids) + 1
    assert receipt.sessions == 1
    files = decrypted(tmp_path / "data")
    assert not any(residue(files).values())
    assert any(b"word17" in data for data in files.values())
    assert service.recall("u", CANARY) == []
    assert_no_log_keeps_old_pages(tmp_path)


def test_an_update_leaves_nothing_of_the_old_text(service: MemoryService, tmp_path: Path, decrypted: Decrypt) -> None:
    fill(service, "u")
    [added] = service.add("u", [NewMemory(f"The word is {CANARY}", conversation="talk 2")])
    fill(service, "u", 30)
    service.update("u", added.id, text="The word is secret")
    assert_no_log_keeps_old_pages(tmp_path)
    assert not any(residue(decrypted(tmp_path / "data")).values())


def test_forgetting_a_version_leaves_the_newer_one(service: MemoryService) -> None:
    ids = [service.add("u", [NewMemory(f"v{i}", key="k")])[0].id for i in range(4)]
    assert service.forget("u", [ids[1]]).ids == (ids[1], ids[0])
    assert [m.text for m in service.list("u", include_superseded=True).memories] == ["v2", "v3"]
    assert service.forget("u", [ids[3]]).ids == (ids[3], ids[2])
    assert service.list("u", include_superseded=True).memories == ()


def test_forgetting_an_unknown_one_forgets_nothing(service: MemoryService) -> None:
    ids = fill(service, "u", 10)
    with pytest.raises(NotFound):
        service.forget("u", [ids[0], "mem-unknown", ids[1]])
    with pytest.raises(NotFound):
        service.forget("other", [ids[0]])
    assert len(service.list("u").memories) == 10


def test_the_vector_is_overwritten_in_memory(open_service: MakeService) -> None:
    config = MemoryConfig()
    service = open_service(config)
    ids = fill(service, "u", 50)
    service.recall("u", "word1")
    record = service._control.find("u")
    assert record is not None
    with service._pool.lease(record) as memory:
        index = memory._vectors
    assert index is not None
    vectors = config.embedder.encode([service.get("u", id).text for id in (ids[20], ids[-1])])
    for vector in vectors:
        assert np.isclose(index._matrix, vector, atol=1e-3).all(axis=1).any()
    service.forget("u", [ids[20], ids[-1]])  # from the middle, and the one that the gap is filled with
    for vector in vectors:
        assert not np.isclose(index._matrix, vector, atol=1e-3).all(axis=1).any()


def test_the_index_equals_one_built_afresh_after_any_changes(service: MemoryService) -> None:
    rng = random.Random(3)
    live = fill(service, "u", 60)
    for step in range(120):
        action = rng.random()
        if action < 0.3 and live:
            service.forget("u", [live.pop(rng.randrange(len(live)))])
        elif action < 0.5 and live:
            service.update("u", rng.choice(live), text=f"changed {step} word{rng.randint(0, 50)}")
        else:
            key = f"k{rng.randint(0, 5)}" if rng.random() < 0.5 else None
            item = NewMemory(f"new {step}", key=key, conversation=f"talk {rng.randint(0, 5)}")
            [added] = service.add("u", [item])
            live = [id for id in live if id not in added.superseded] + [added.id]
    record = service._control.find("u")
    assert record is not None
    with service._pool.lease(record) as memory:
        rows = memory.database.read(lambda t: t.execute("SELECT term, doc, cnt FROM lexical_terms"))
        stored = memory.database.read(lambda t: t.execute("SELECT seq, data FROM vectors ORDER BY seq"))
    fresh = apsw.Connection(":memory:")
    statements = schema.TENANT.split(";\n")
    fresh.execute(next(s for s in statements if "USING fts5(" in s))
    fresh.execute(next(s for s in statements if "fts5vocab" in s))
    memories = service.list("u", limit=1000).memories
    for memory in memories:
        before = service.predecessors("u", memory.id, 1)
        values = (memory.seq, memory.text, before[0].text if before else "")
        fresh.execute("INSERT INTO lexical(rowid, text, context) VALUES (?, ?, ?)", values)
    assert sorted(rows) == sorted(fresh.execute("SELECT term, doc, cnt FROM lexical_terms").fetchall())
    vectors = MemoryConfig().embedder.encode([memory.text for memory in memories])
    assert [row[0] for row in stored] == [memory.seq for memory in memories]
    assert b"".join(row[1] for row in stored) == vectors.astype("<f2").tobytes()


def test_a_forgotten_user_is_in_no_file_and_comes_back_as_another(
    service: MemoryService, tmp_path: Path, decrypted: Decrypt, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, log_sizes = service._control.finish, []

    def watched(tenant_id: bytes) -> None:
        log_sizes.append((tmp_path / "data" / "control.db-wal").stat().st_size)
        finish(tenant_id)

    monkeypatch.setattr(service._control, "finish", watched)
    user = f"user {CANARY}"
    plant(service, user)
    fill(service, "other", 20)
    before = service.tenant(user)
    directories = {path.name for path in (tmp_path / "data" / "t").iterdir()}
    receipt = service.forget_user(user)
    assert receipt.vectors == 466
    assert receipt.sessions == 1
    assert log_sizes == [0]  # the name and the keys are in no older page before the files go
    assert not any(residue(decrypted(tmp_path / "data")).values())
    assert service.tenant(user) is None
    assert service.list(user).memories == ()
    assert len(service.list("other").memories) == 20
    gone = directories - {path.name for path in (tmp_path / "data" / "t").iterdir()}
    assert before is not None
    assert gone == {before.id.hex()}
    after = service.tenant(user, create=True)
    assert after is not None
    assert after.id != before.id
    assert after.secret != before.secret


CRASH = """
import os, sys
from pathlib import Path
from amem.memory.service import MemoryService
from amem.memory.types import NewMemory
from amem.memory import service as module
service = MemoryService(Path(sys.argv[1]))
service.add("u", [NewMemory("gone")])
service.add("v", [NewMemory("stays")])
step = sys.argv[2]
if step == "erase":
    service._control.erase = lambda tenant: os._exit(9)
elif step == "files":
    service._remove_files = lambda tenant: os._exit(9)
else:
    service._control.finish = lambda tenant: os._exit(9)
service.forget_user("u")
"""


@pytest.mark.parametrize("step", ["erase", "files", "finish"])
def test_a_crash_at_any_step_leaves_the_user_whole_or_gone(tmp_path: Path, step: str) -> None:
    data = tmp_path / "data"
    done = subprocess.run([sys.executable, "-c", CRASH, str(data), step], timeout=60, check=False)
    assert done.returncode == 9
    service = MemoryService(data)
    try:
        assert len(service.list("u").memories) == (1 if step == "erase" else 0)
        assert [memory.text for memory in service.list("v").memories] == ["stays"]
        assert len(list((data / "t").iterdir())) == len(service.users())
    finally:
        service.close()


def test_the_key_of_a_forgotten_user_is_gone_so_backups_are_noise(
    open_service: MakeService, tmp_path: Path, decrypted: Decrypt
) -> None:
    service = open_service()
    service.add("u", [NewMemory(f"secret {CANARY}")])
    record = service._control.find("u")
    assert record is not None
    service.forget_user("u")
    files = decrypted(tmp_path / "data")
    assert not any(record.key in data or record.secret in data for data in files.values())
    assert isinstance(service._control, Control)
