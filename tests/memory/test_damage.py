"""Bad files, wrong keys, second processes: a clear error, for one user only, and never an empty database instead."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest

from amem.memory import database as database_module
from amem.memory.database import Database, Transaction
from amem.memory.errors import Conflict, Damaged, DataDirError, Unavailable
from amem.memory.service import MemoryService
from amem.memory.types import NewMemory

MakeService = Callable[..., MemoryService]
KEY = bytes(range(32))


def build(path: Path) -> Path:
    """Two users with 200 memories each; returns the database file of `u`."""
    service = MemoryService(path)
    for user in ("u", "v"):
        service.add(user, [NewMemory(f"{user} fact {i} about thing {i % 17}") for i in range(200)])
    tenant = service.tenant("u")
    assert tenant is not None
    service.close()
    return path / "t" / tenant.id.hex() / "memory.db"


def truth(user: str) -> list[str]:
    return [f"{user} fact {i} about thing {i % 17}" for i in range(200)]


def read_all(service: MemoryService, user: str) -> list[str]:
    texts = [memory.text for memory in service.list(user, limit=1000).memories]
    for i in range(0, 17, 4):
        found = service.recall(user, f"fact about thing {i}")
        assert {recalled.memory.text for recalled in found} <= set(truth(user))
    return texts


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "half": lambda data: data[: len(data) // 2 // 4096 * 4096],
    "garbage": lambda data: random.Random(1).randbytes(len(data)),
    "plain SQLite": lambda data: b"SQLite format 3\x00" + data[16:],
    "header": lambda data: data[:20] + bytes(16) + data[36:],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_an_error_for_its_user_only(tmp_path: Path, open_service: MakeService, name: str) -> None:
    path = build(tmp_path / "data")
    bad = DAMAGES[name](path.read_bytes())
    path.write_bytes(bad)
    service = open_service()
    for refused in (
        lambda: read_all(service, "u"),
        lambda: service.add("u", [NewMemory("new")]),
    ):
        with pytest.raises(Damaged, match="restore"):
            refused()
    assert read_all(service, "v") == truth("v")
    summaries = {summary.user: summary for summary in service.users()}
    assert summaries["v"].memories == 200
    service.close()
    if name != "half":
        assert path.read_bytes() == bad
    again = open_service()
    assert again.forget_user("u").ids == () or name == "half"
    assert again.add("u", [NewMemory("a new life")])


def test_a_missing_file_is_an_error_and_not_an_empty_memory(tmp_path: Path, open_service: MakeService) -> None:
    path = build(tmp_path / "data")
    path.unlink()
    service = open_service()
    for refused in (lambda: service.list("u"), lambda: service.add("u", [NewMemory("x")])):
        with pytest.raises(Damaged, match="missing"):
            refused()
    assert not path.exists()
    assert [(s.user, s.damaged) for s in service.users()] == [("u", True), ("v", False)]


def test_a_file_of_another_user_is_refused(tmp_path: Path, open_service: MakeService) -> None:
    path = build(tmp_path / "data")
    [other] = [p for p in path.parent.parent.rglob("memory.db") if p != path]
    path.write_bytes(other.read_bytes())
    with pytest.raises(Damaged):
        open_service().list("u")


def test_a_symbolic_link_is_not_followed(tmp_path: Path, open_service: MakeService) -> None:
    path = build(tmp_path / "data")
    path.rename(tmp_path / "elsewhere.db")
    path.symlink_to(tmp_path / "elsewhere.db")
    with pytest.raises((Damaged, Unavailable)):
        open_service().list("u")


def test_no_flipped_bit_is_ever_served(tmp_path: Path) -> None:
    """Each flip: every read is right or an error; never a wrong row."""
    path = build(tmp_path / "data")
    good = path.read_bytes()
    rng = random.Random(5)
    errors = 0
    for _ in range(60):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        service = MemoryService(tmp_path / "data")
        try:
            assert read_all(service, "u") == truth("u")
        except Damaged:
            errors += 1
        finally:
            service.close()
        path.write_bytes(good)
    assert errors > 20


def test_the_data_directory_belongs_to_one_process(tmp_path: Path, service: MemoryService) -> None:
    with pytest.raises(DataDirError, match="in use"):
        MemoryService(tmp_path / "data")
    code = "import sys; from pathlib import Path; from amem.memory.service import MemoryService\n"
    code += "MemoryService(Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "data")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "in use by another amem process" in done.stderr
    service.add("u", [NewMemory("still works")])


def test_a_database_cannot_be_opened_by_a_second_connection(tmp_path: Path) -> None:
    first = Database(tmp_path / "x.db", KEY, create=True)
    first.write(lambda t: t.execute("CREATE TABLE a(x)"))
    code = "import sys; from pathlib import Path; from amem.memory.database import Database\n"
    code += "Database(Path(sys.argv[1]), bytes(range(32)), create=False)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.db")], capture_output=True, text=True, check=False
    )
    assert "locked by another process" in done.stderr
    first.close()


def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    build(tmp_path / "data")
    marker = tmp_path / "data" / "FORMAT"
    assert marker.read_text() == "amem-data 1\n"
    for text, message in (("amem-data 2\n", "newer"), ("something\n", "not an amem"), ("", "not an amem")):
        marker.write_text(text)
        with pytest.raises(DataDirError, match=message):
            MemoryService(tmp_path / "data")
        assert marker.read_text() == text
    marker.unlink()
    with pytest.raises(DataDirError, match="FORMAT is missing"):
        MemoryService(tmp_path / "data")


def test_a_lost_or_wrong_master_key_is_an_error(tmp_path: Path) -> None:
    build(tmp_path / "data")
    key = tmp_path / "data" / "master.key"
    good = key.read_bytes()
    key.write_bytes(bytes(32))
    with pytest.raises(Damaged):
        MemoryService(tmp_path / "data")
    key.write_bytes(good[:31])
    with pytest.raises(DataDirError, match="31 bytes"):
        MemoryService(tmp_path / "data")
    key.unlink()
    with pytest.raises(DataDirError, match="missing"):
        MemoryService(tmp_path / "data")
    assert not key.exists()
    key.write_bytes(good)
    service = MemoryService(tmp_path / "data")
    assert read_all(service, "u") == truth("u")
    service.close()


def test_every_file_is_private(tmp_path: Path, service: MemoryService) -> None:
    service.add("u", [NewMemory("x")])
    root = tmp_path / "data"
    for path in [root, *root.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_the_settings_that_durability_rests_on(tmp_path: Path) -> None:
    database = Database(tmp_path / "x.db", KEY, create=True)
    asked = {
        "locking_mode": "exclusive",
        "journal_mode": "wal",
        "synchronous": 2,
        "secure_delete": 1,
        "mmap_size": 0,
        "foreign_keys": 1,
        "trusted_schema": 0,
        "cell_size_check": 1,
    }
    for name, value in asked.items():
        assert database.read(lambda t, name=name: t.execute(f"PRAGMA {name}")) == [(value,)], name
    database.close()


def test_an_unfit_sqlite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apsw, "mc_version", None)
    with pytest.raises(Unavailable, match="without encryption"):
        Database(tmp_path / "x.db", KEY, create=True)
    monkeypatch.undo()
    monkeypatch.setattr(database_module, "MIN_SQLITE", 9_000_000)
    with pytest.raises(Unavailable, match="apsw-sqlite3mc"):
        Database(tmp_path / "x.db", KEY, create=True)


def test_a_failing_operation_undoes_itself_and_nothing_else(tmp_path: Path) -> None:
    database = Database(tmp_path / "x.db", KEY, create=True)
    database.write(lambda t: t.execute("CREATE TABLE a(x UNIQUE)"))
    hooks: list[str] = []

    def good(transaction: Transaction) -> str:
        transaction.execute("INSERT INTO a VALUES ('good')")
        transaction.after_commit(lambda: hooks.append("good"))
        return "done"

    def bad(transaction: Transaction) -> None:
        transaction.execute("INSERT INTO a VALUES ('half')")
        transaction.after_commit(lambda: hooks.append("bad"))
        raise Conflict("no")

    def clash(transaction: Transaction) -> None:
        transaction.execute("INSERT INTO a VALUES ('good')")

    jobs = [database_module._Job(operation) for operation in (good, bad, clash)]
    with database._lock:
        database._run_group(jobs)
    assert jobs[0].results == ["done"]
    assert isinstance(jobs[1].error, Conflict)
    assert isinstance(jobs[2].error, Conflict)
    assert database.read(lambda t: t.execute("SELECT x FROM a")) == [("good",)]
    assert hooks == ["good"]
    database.close()
    with pytest.raises(Unavailable):
        database.write(good)


def test_writes_that_wait_together_share_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(tmp_path / "x.db", KEY, create=True)
    database.write(lambda t: t.execute("CREATE TABLE a(x)"))
    groups: list[int] = []
    run = Database._run_group

    def counted(self: Database, jobs: list[database_module._Job[object]]) -> None:
        groups.append(len(jobs))
        run(self, jobs)

    monkeypatch.setattr(Database, "_run_group", counted)

    def insert(value: int) -> None:
        database.write(lambda t: t.execute("INSERT INTO a VALUES (?)", (value,)))

    threads = [threading.Thread(target=insert, args=(k,)) for k in range(12)]
    with database._lock:
        for thread in threads:
            thread.start()
        while len(database._queue) < 12:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert groups == [12]
    assert sorted(database.read(lambda t: t.execute("SELECT x FROM a"))) == [(k,) for k in range(12)]
    database.close()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from amem.memory.service import MemoryService
from amem.memory.types import NewMemory
from amem.memory.errors import Unavailable
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
service = MemoryService(Path(sys.argv[1]))
service.add("u", [NewMemory("first")])
acknowledged = 1
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
try:
    for i in range(1000):
        service.add("u", [NewMemory(f"fact {i} " + "x" * 5000)])
        acknowledged += 1
except Unavailable as error:
    print(error.message, file=sys.stderr)
else:
    sys.exit("the limit was never reached")
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
assert len(service.list("u", limit=1000).memories) == acknowledged
service.add("u", [NewMemory("after")])
print(acknowledged + 1)
import os; os._exit(0)
"""


def test_a_write_that_fails_is_not_acknowledged_and_the_next_works(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    service = MemoryService(tmp_path / "data")
    assert len(service.list("u", limit=1000).memories) == int(done.stdout)
    service.close()


def test_a_data_directory_behind_a_link_works(tmp_path: Path, open_service: MakeService) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    service = open_service(path=tmp_path / "link" / "data")
    service.add("u", [NewMemory("x")])
    service.close()
    again = open_service(path=tmp_path / "real" / "data")
    assert [memory.text for memory in again.list("u").memories] == ["x"]


INTERRUPTED = """
import os, sys
from pathlib import Path
from amem.memory import schema
from amem.memory.control import Control
from amem.memory.service import MemoryService
from amem.memory.types import NewMemory
step = sys.argv[2]
create = schema._create
def crash(*arguments):
    os._exit(9)
def half(transaction, tables, application):
    if application == (schema._CONTROL_ID if step == "control" else schema._TENANT_ID):
        transaction.execute(tables.split(";")[0])
        crash()
    create(transaction, tables, application)
if step == "live":
    Control.mark_live = crash
else:
    schema._create = half
MemoryService(Path(sys.argv[1])).add("u", [NewMemory("never acknowledged")])
"""


@pytest.mark.parametrize("step", ["control", "tenant", "live"])
def test_a_crash_in_the_first_seconds_leaves_a_usable_directory(tmp_path: Path, step: str) -> None:
    data = tmp_path / "data"
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, str(data), step], timeout=60, check=False)
    assert done.returncode == 9
    for torn in data.rglob("memory.db"):
        torn.write_bytes(b"torn by a power cut" * 300)
    for text in ("first", "second"):
        service = MemoryService(data)
        service.add("u", [NewMemory(text)])
        service.close()
    service = MemoryService(data)
    assert [memory.text for memory in service.list("u").memories] == ["first", "second"]
    service.close()
