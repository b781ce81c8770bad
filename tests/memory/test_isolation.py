"""Users never see each other, whatever they are called and however many there are."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amem.memory.config import MemoryConfig
from amem.memory.errors import InvalidInput, NotFound
from amem.memory.service import MemoryService
from amem.memory.types import NewMemory, RecallOptions

MakeService = Callable[..., MemoryService]

STRANGE = [
    "../../escaped", "..", ".", "/etc/passwd", "a/b/c", "C:\\x", "CON", "~", "-rf", "%2e%2e", "🙂🙂",
    "ünï", "u\u0308ni\u0308", " ", "' OR 1=1 --", "x" * 256, "LOCK", "control.db", "t",
    "\u202emirror", "*", "A", "a", "user:bob",
]  # fmt: skip
_FILE = re.compile(r"(LOCK|FORMAT|master\.key|control\.db(-wal)?|t/[0-9a-f]{32}/memory\.db(-wal)?)")


def files(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]


def test_strange_names_are_users_like_any_other(service: MemoryService, tmp_path: Path) -> None:
    for name in STRANGE:
        service.add(name, [NewMemory(f"secret of {name!r}")])
    for name in STRANGE:
        assert [memory.text for memory in service.list(name).memories] == [f"secret of {name!r}"]
    assert [summary.user for summary in service.users()] == sorted(STRANGE, key=lambda name: name.encode())
    assert all(_FILE.fullmatch(name) for name in files(tmp_path / "data"))
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(max_size=300))
def test_any_name_is_a_user_or_refused(service: MemoryService, tmp_path: Path, name: str) -> None:
    try:
        service.add(name, [NewMemory(f"of {name!r}")])
    except InvalidInput:
        return
    assert [memory.text for memory in service.list(name).memories] == [f"of {name!r}"]
    service.forget_user(name)
    assert all(_FILE.fullmatch(file) for file in files(tmp_path / "data"))
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_ids_of_one_user_mean_nothing_to_another(service: MemoryService) -> None:
    [mine] = service.add("a", [NewMemory("private", conversation="c")])
    service.add("b", [NewMemory("other", conversation="c")])
    session = service.start_session("a", 100)
    for refused in (
        lambda: service.get("b", mine.id),
        lambda: service.update("b", mine.id, text="x"),
        lambda: service.forget("b", [mine.id]),
        lambda: service.session("b", session.id),
        lambda: service.end_session("b", session.id),
    ):
        with pytest.raises(NotFound):
            refused()
    assert service.get_many("b", [mine.id]) == {}
    assert service.predecessors("b", mine.id, 5) == ()
    assert service.successors("b", [mine.id], 5) == ()
    foreign = service.recall("a", "private")
    other = service.start_session("b", 100)
    assert service.admit("b", other.id, foreign, None).memory_ids == ()
    assert service.get("a", mine.id).text == "private"


OPERATION = st.tuples(
    st.sampled_from(["add", "key", "update", "forget", "recall", "list", "session", "erase"]),
    st.integers(0, 4),
    st.integers(0, 999),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(OPERATION, min_size=5, max_size=40), seed=st.integers(0, 1 << 30))
def test_no_canary_crosses_over(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, int, int]], seed: int
) -> None:
    """Five users with canaries, two open databases: whatever happens, everyone sees their own, and all of it."""
    rng = random.Random(seed)
    service = MemoryService(tmp_path_factory.mktemp("leak"), MemoryConfig(max_open=2))
    expected: dict[str, dict[str, str]] = {f"user {i}": {} for i in range(5)}
    keys: dict[tuple[str, str], str] = {}
    try:
        for kind, who, number in operations:
            user = f"user {who}"
            mine = expected[user]
            text = f"canary{who} shared words {number} {rng.random()}"
            if kind == "add":
                mine[service.add(user, [NewMemory(text)])[0].id] = text
            elif kind == "key":
                [added] = service.add(user, [NewMemory(text, key=f"k{number % 3}")])
                mine.pop(keys.get((user, f"k{number % 3}"), ""), None)
                mine[added.id] = text
                keys[user, f"k{number % 3}"] = added.id
            elif kind == "update" and mine:
                id = rng.choice(list(mine))
                mine[id] = service.update(user, id, text=text).text
            elif kind == "forget" and mine:
                id = rng.choice(list(mine))
                service.forget(user, [id])
                del mine[id]
            elif kind == "erase" and service.tenant(user) is not None:
                service.forget_user(user)
                mine.clear()
            elif kind == "session" and mine:
                session = service.start_session(user, 10_000)
                found = service.recall(user, "shared words", RecallOptions(k=50))
                assert set(service.admit(user, session.id, found, None).memory_ids) <= set(mine)
            for recalled in service.recall(user, f"canary{(who + 1) % 5} shared words", RecallOptions(k=50)):
                assert mine[recalled.memory.id] == recalled.memory.text
            listed = {memory.id: memory.text for memory in service.list(user, limit=1000).memories}
            assert listed == mine
        for user, mine in expected.items():
            assert {memory.id: memory.text for memory in service.list(user, limit=1000).memories} == mine
    finally:
        service.close()


def test_few_databases_are_open_for_many_users(open_service: MakeService) -> None:
    service = open_service(MemoryConfig(max_open=4))
    for i in range(30):
        service.add(f"user {i}", [NewMemory(f"fact of user {i}")])
        assert service.stats()["open_databases"] <= 4
    for i in range(30):
        assert [r.memory.text for r in service.recall(f"user {i}", "fact")] == [f"fact of user {i}"]
    assert len(service.users()) == 30
    assert [summary.user for summary in service.users(after="user 7", limit=5)] == ["user 8", "user 9"]
    assert service.stats()["open_databases"] <= 4


def test_more_threads_than_open_databases_all_get_through(open_service: MakeService) -> None:
    service = open_service(MemoryConfig(max_open=2))
    failures: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for i in range(15):
                user = f"user {(thread + i) % 6}"
                service.add(user, [NewMemory(f"from {thread} number {i}")])
                assert service.recall(user, f"from {thread} number {i}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    assert sum(summary.memories for summary in service.users()) == 90


def test_an_erasure_waits_for_whoever_still_reads(open_service: MakeService) -> None:
    service = open_service()
    service.add("u", [NewMemory("a fact")])
    record = service._control.find("u")
    assert record is not None
    eraser = threading.Thread(target=service.forget_user, args=("u",))
    with service._pool.lease(record) as memory:
        eraser.start()
        eraser.join(0.5)
        assert eraser.is_alive()
        assert [found.text for found in memory.page(0, 10, None, False).memories] == ["a fact"]
    eraser.join(30)
    assert not eraser.is_alive()
    assert service.tenant("u") is None


def test_erasing_a_user_while_others_write_to_it(open_service: MakeService) -> None:
    """Every add is before an erasure, and gone, or after it, and there: never an error, never half."""
    service = open_service()
    failures: list[BaseException] = []
    done = threading.Event()

    def write() -> None:
        try:
            number = 0
            while not done.is_set():
                service.add("u", [NewMemory(f"{threading.get_ident()} {number}"), NewMemory(f"twin {number}")])
                number += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    erased = 0
    while erased < 10:
        try:
            service.forget_user("u")
            erased += 1
        except NotFound:
            continue
    done.set()
    for thread in threads:
        thread.join(60)
    assert failures == []
    service.add("u", [NewMemory("last")])
    service.forget_user("u")
    assert service.users() == []
