"""What `add`, `update`, `get` and `list` promise: duplicates, keys, conversations, versions, repeated requests."""

from __future__ import annotations

import dataclasses
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amem.memory.config import MemoryConfig
from amem.memory.errors import Conflict, InvalidInput, NotFound
from amem.memory.service import MemoryService
from amem.memory.types import NewMemory, Outcome, State


def add(service: MemoryService, *texts: str, conversation: str | None = None) -> list[str]:
    return [one.id for one in service.add("u", [NewMemory(text) for text in texts], conversation)]


def test_a_memory_comes_back_as_it_was_given(service: MemoryService) -> None:
    given = NewMemory("Ünïcode 🙂\n two lines", key="k/1", metadata={"a": [1, None, {"b": "ü"}]}, created=12.5)
    [added] = service.add("u", [given], conversation="talk")
    memory = service.get("u", added.id)
    assert (memory.text, memory.key, memory.metadata, memory.created) == (
        given.text,
        given.key,
        given.metadata,
        given.created,
    )
    assert (memory.conversation, memory.ordinal, memory.seen, memory.version) == ("talk", 1, 1, 1)
    assert memory.state is State.LIVE


def test_the_same_again_is_counted_and_anything_else_is_kept(service: MemoryService) -> None:
    [first] = service.add("u", [NewMemory("same")])
    same, other_place, other_key, other_metadata, other_text = service.add(
        "u",
        [
            NewMemory("same"),
            NewMemory("same", conversation="c"),
            NewMemory("same", key="k"),
            NewMemory("same", metadata={"x": 1}),
            NewMemory("same "),
        ],
    )
    assert (same.id, same.outcome) == (first.id, Outcome.SEEN)
    new = {other_place.id, other_key.id, other_metadata.id, other_text.id}
    assert len(new) == 4
    assert first.id not in new
    assert service.get("u", first.id).seen == 2
    [again] = service.add("u", [NewMemory("same", metadata={"x": 1})])
    assert (again.id, again.outcome) == (other_metadata.id, Outcome.SEEN)


def test_duplicates_inside_one_call_fold_too(service: MemoryService) -> None:
    added = service.add("u", [NewMemory("x"), NewMemory("x"), NewMemory("x")])
    assert [one.outcome for one in added] == [Outcome.ADDED, Outcome.SEEN, Outcome.SEEN]
    assert service.get("u", added[0].id).seen == 3


def test_a_key_supersedes_next_to_items_without_one(service: MemoryService) -> None:
    first = service.add("u", [NewMemory("Alice works at Boeing", key="job"), NewMemory("Alice likes tea")])
    second = service.add("u", [NewMemory("Alice likes chess"), NewMemory("Alice works at SpaceX", key="job")])
    assert second[1].outcome is Outcome.SUPERSEDED
    assert second[1].superseded == (first[0].id,)
    old = service.get("u", first[0].id)
    assert (old.state, old.superseded_by) == (State.SUPERSEDED, second[1].id)
    live = [memory.text for memory in service.list("u").memories]
    assert live == ["Alice likes tea", "Alice likes chess", "Alice works at SpaceX"]
    assert len(service.list("u", include_superseded=True).memories) == 4
    assert "Alice works at Boeing" not in [
        r.memory.text for r in service.recall("u", "Where does Alice work? Boeing?")
    ]


def test_a_key_used_twice_in_one_call_leaves_the_last(service: MemoryService) -> None:
    added = service.add("u", [NewMemory(f"v{i}", key="k") for i in range(4)])
    assert [memory.text for memory in service.list("u").memories] == ["v3"]
    assert [one.superseded for one in added[1:]] == [(one.id,) for one in added[:-1]]
    assert [r.memory.text for r in service.recall("u", "v0 v1 v2 v3")] == ["v3"]


def test_the_same_under_its_key_is_seen_and_not_superseded(service: MemoryService) -> None:
    [first] = service.add("u", [NewMemory("v", key="k")])
    [second] = service.add("u", [NewMemory("v", key="k")])
    assert (second.id, second.outcome) == (first.id, Outcome.SEEN)


def test_conversations_keep_their_order_and_their_neighbours(service: MemoryService) -> None:
    one = add(service, "a1", "a2", conversation="a")
    add(service, "b1", conversation="b")
    one += add(service, "a3", "a4", conversation="a")
    assert [service.get("u", id).ordinal for id in one] == [1, 2, 3, 4]
    assert [m.text for m in service.predecessors("u", one[3], 2)] == ["a2", "a3"]
    assert [m.text for m in service.predecessors("u", one[0], 2)] == []
    assert [m.text for m in service.successors("u", [one[0]], 2)] == ["a2", "a3"]
    assert [m.text for m in service.successors("u", one[:2], 1)] == ["a3"]
    service.forget("u", [one[2]])
    assert [m.text for m in service.predecessors("u", one[3], 2)] == ["a1", "a2"]
    assert [m.text for m in service.successors("u", ["mem-unknown"], 2)] == []


def test_single_facts_have_no_neighbours(service: MemoryService) -> None:
    ids = add(service, "x", "y", "z")
    assert service.predecessors("u", ids[2], 5) == ()
    assert service.successors("u", ids, 5) == ()


def test_update_replaces_text_and_metadata(service: MemoryService) -> None:
    [id] = add(service, "Alice works at Boeing")
    updated = service.update("u", id, text="Alice works at SpaceX", metadata={"by": "hr"})
    assert (updated.text, updated.metadata, updated.version) == ("Alice works at SpaceX", {"by": "hr"}, 2)
    assert service.update("u", id, metadata={}).metadata == {}
    assert [r.memory.text for r in service.recall("u", "SpaceX")] == ["Alice works at SpaceX"]
    assert service.recall("u", "Boeing") == []


def test_update_with_a_stale_version_changes_nothing(service: MemoryService) -> None:
    [id] = add(service, "one")
    service.update("u", id, text="two", version=1)
    with pytest.raises(Conflict, match="version 2"):
        service.update("u", id, text="three", version=1)
    assert service.get("u", id).text == "two"


def test_update_of_superseded_unknown_or_nothing_is_refused(service: MemoryService) -> None:
    [old] = service.add("u", [NewMemory("v1", key="k")])
    service.add("u", [NewMemory("v2", key="k")])
    with pytest.raises(Conflict, match="superseded"):
        service.update("u", old.id, text="v3")
    with pytest.raises(NotFound):
        service.update("u", "mem-unknown", text="x")
    with pytest.raises(InvalidInput, match="nothing to update"):
        service.update("u", old.id)


def test_a_call_is_stored_whole_or_not_at_all(service: MemoryService) -> None:
    with pytest.raises(InvalidInput):
        service.add("u", [NewMemory("good"), NewMemory("  ")])
    assert service.tenant("u") is None


def test_a_repeated_request_gives_the_same_answer_and_stores_nothing(service: MemoryService) -> None:
    items = [NewMemory("x", key="k"), NewMemory("y")]
    first = service.add("u", items, idempotency_key="req-1")
    service.add("u", [NewMemory("z", key="k")])
    assert service.add("u", items, idempotency_key="req-1") == first
    assert service.get("u", first[1].id).seen == 1
    assert service.get("u", first[0].id).state is State.SUPERSEDED
    with pytest.raises(Conflict, match="idempotency"):
        service.add("u", [NewMemory("other")], idempotency_key="req-1")
    assert service.add("v", [NewMemory("other")], idempotency_key="req-1")[0].outcome is Outcome.ADDED


def test_a_repeated_request_does_not_bring_back_what_was_forgotten(service: MemoryService) -> None:
    [added] = service.add("u", [NewMemory("secret")], idempotency_key="req-1")
    service.forget("u", [added.id])
    assert service.add("u", [NewMemory("secret")], idempotency_key="req-1") == [added]
    assert service.list("u").memories == ()


def test_what_a_request_said_is_forgotten_with_what_it_stored(service: MemoryService) -> None:
    """Its digest would tell whoever has the secret whether a guessed text was it."""
    stored = [service.add("u", [NewMemory(f"fact {n}")], idempotency_key=f"key {n}")[0].id for n in range(4)]
    service.forget("u", [stored[0]])
    service.update("u", stored[1], text="another fact")
    service.update("u", stored[2], metadata={"a": 1})
    record = service._control.find("u")
    assert record is not None
    with service._pool.lease(record) as memory:
        rows = memory.database.read(lambda t: t.execute("SELECT digest IS NULL FROM requests ORDER BY key"))
    assert [bool(row[0]) for row in rows] == [True, True, False, False]


def test_requests_are_remembered_across_a_restart_and_for_a_time(tmp_path_factory: pytest.TempPathFactory) -> None:
    now = [1_000.0]
    config = MemoryConfig(clock=lambda: now[0], idempotency_seconds=60.0)
    path = tmp_path_factory.mktemp("requests")
    service = MemoryService(path, config)
    [first] = service.add("u", [NewMemory("x")], idempotency_key="r")
    service.close()
    service = MemoryService(path, config)
    assert service.add("u", [NewMemory("x")], idempotency_key="r") == [first]
    now[0] += 61.0
    [later] = service.add("u", [NewMemory("x")], idempotency_key="r")
    assert (later.id, later.outcome) == (first.id, Outcome.SEEN)
    service.close()


def test_pages_follow_each_other_while_memories_come_and_go(service: MemoryService) -> None:
    ids = add(service, *(f"text {i}" for i in range(25)))
    page = service.list("u", limit=10)
    service.forget("u", [ids[9], ids[12]])
    add(service, "late")
    seen = [memory.text for memory in page.memories]
    while page.next is not None:
        page = service.list("u", limit=10, after=page.next)
        seen += [memory.text for memory in page.memories]
    assert seen == [f"text {i}" for i in range(25) if i != 12] + ["late"]


def test_reading_never_creates_a_user(service: MemoryService) -> None:
    assert service.tenant("ghost") is None
    assert service.list("ghost").memories == ()
    assert service.recall("ghost", "anything") == []
    assert service.get_many("ghost", ["x"]) == {}
    assert service.successors("ghost", ["x"], 2) == ()
    for refused in (
        lambda: service.get("ghost", "x"),
        lambda: service.update("ghost", "x", text="t"),
        lambda: service.forget("ghost", ["x"]),
        lambda: service.forget_user("ghost"),
        lambda: service.session("ghost", "s"),
        lambda: service.end_session("ghost", "s"),
        lambda: service.admit("ghost", "s", [], None),
    ):
        with pytest.raises(NotFound):
            refused()
    assert service.users() == []


def test_adds_from_many_threads_are_all_there_once(service: MemoryService) -> None:
    def work(thread: int) -> None:
        for i in range(20):
            service.add("u", [NewMemory(f"thread {thread} item {i}"), NewMemory("shared")])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memories = service.list("u", limit=1000).memories
    assert len(memories) == 121
    assert len({memory.text for memory in memories}) == 121
    [shared] = [memory for memory in memories if memory.text == "shared"]
    assert shared.seen == 120
    assert {memory.seq for memory in memories} == set(range(1, 122))


def test_first_writes_of_a_new_user_from_many_threads_meet_in_one_tenant(service: MemoryService) -> None:
    barrier = threading.Barrier(8)

    def work(thread: int) -> None:
        barrier.wait()
        service.add("new", [NewMemory(f"from {thread}")])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(service.list("new").memories) == 8
    assert len(service.users()) == 1


BAD_NAMES = ["", "\x00", "a\x00b", "tab\t", "\x7f", "\x85", "\ud800", "x" * 257, "ü" * 129]


@pytest.mark.parametrize("bad", BAD_NAMES)
def test_bad_names_are_refused_everywhere(service: MemoryService, bad: str) -> None:
    for refused in (
        lambda: service.add(bad, [NewMemory("x")]),
        lambda: service.add("u", [NewMemory("x")], conversation=bad),
        lambda: service.add("u", [NewMemory("x", conversation=bad)]),
        lambda: service.add("u", [NewMemory("x", key=bad)]),
        lambda: service.add("u", [NewMemory("x")], idempotency_key=bad),
        lambda: service.tenant(bad, create=True),
        lambda: service.list(bad),
        lambda: service.get("u", bad),
        lambda: service.forget("u", [bad]),
        lambda: service.forget_user(bad),
        lambda: service.recall(bad, "x"),
        lambda: service.start_session("u", 10, bad),
        lambda: service.session("u", bad),
    ):
        with pytest.raises(InvalidInput) as raised:
            refused()
        assert raised.value.param
    assert service.users() == []


@pytest.mark.parametrize("bad", ["", " \n\t", "\x00", "a\x00", "\udfff", "x" * 2_000_000])
def test_bad_texts_are_refused(service: MemoryService, bad: str) -> None:
    [good] = add(service, "good")
    for refused in (
        lambda: service.add("u", [NewMemory(bad)]),
        lambda: service.update("u", good, text=bad),
        lambda: service.recall("u", bad),
    ):
        with pytest.raises(InvalidInput):
            refused()
    assert [memory.text for memory in service.list("u").memories] == ["good"]


@pytest.mark.parametrize(
    "bad", [{"x": float("nan")}, {"x": object()}, {1: "x"}, ["x"], "x", {"x": "\ud800"}, {"x": "y" * 20_000}]
)
def test_bad_metadata_is_refused(service: MemoryService, bad: object) -> None:
    item = dataclasses.replace(NewMemory("x"), metadata=bad)
    with pytest.raises(InvalidInput, match="metadata"):
        service.add("u", [item])


@pytest.mark.parametrize("wrong", [None, 7, b"bytes", ["x"]])
def test_wrong_types_are_refused(service: MemoryService, wrong: object) -> None:
    for refused in (
        lambda: service.add(wrong, [NewMemory("x")]),
        lambda: service.add("u", [NewMemory(wrong)]),
        lambda: service.recall("u", wrong),
        lambda: service.list("u", limit=[wrong]),
    ):
        with pytest.raises(InvalidInput):
            refused()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(min_size=1, max_size=200),
    key=st.none() | st.text(max_size=20),
    metadata=st.dictionaries(
        st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), max_size=4
    ),
)
def test_any_input_is_stored_exactly_or_refused(
    service: MemoryService, text: str, key: str | None, metadata: dict[str, object]
) -> None:
    try:
        [added] = service.add("u", [NewMemory(text, key=key, metadata=metadata)])
    except InvalidInput:
        return
    memory = service.get("u", added.id)
    assert (memory.text, memory.key, memory.metadata) == (text, key, metadata)
