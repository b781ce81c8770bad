"""Sessions: growing at the end only, budgets, epochs, and who may see them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from amem.memory.config import MemoryConfig
from amem.memory.errors import InvalidInput, NotFound
from amem.memory.service import MemoryService
from amem.memory.types import NewMemory, Recalled, RecallOptions, Session

MakeService = Callable[..., MemoryService]


def words(text: str) -> int:
    return len(text.split())


@pytest.fixture
def service(open_service: MakeService) -> MemoryService:
    return open_service(MemoryConfig(count_tokens=words))


def add(service: MemoryService, *texts: str, conversation: str | None = None) -> list[str]:
    return [one.id for one in service.add("u", [NewMemory(text) for text in texts], conversation)]


def recalled(service: MemoryService, ids: list[str], scores: list[float] | None = None) -> list[Recalled]:
    found = [service.get("u", id) for id in ids]
    return [Recalled(m, 1.0 if scores is None else scores[i], {}, words(m.text)) for i, m in enumerate(found)]


def admit(service: MemoryService, session: Session, ids: list[str], anchor: str | None = None) -> Session:
    return service.admit("u", session.id, recalled(service, ids), anchor)


def test_batches_are_canonical_inside_and_in_order_of_need(service: MemoryService) -> None:
    talk = add(service, "a1", "a2", "a3", conversation="talk")
    lone = add(service, "x", "y")
    session = service.start_session("u", 100)
    session = admit(service, session, [talk[2], lone[1], talk[0]], None)
    assert session.batches[0].memory_ids == (lone[1], talk[0], talk[2])
    session = admit(service, session, [talk[1], talk[0], lone[0]], "turn-2")
    assert [(b.anchor, b.memory_ids) for b in session.batches] == [
        (None, (lone[1], talk[0], talk[2])),
        ("turn-2", (lone[0], talk[1])),
    ]
    assert (session.epoch, session.tokens) == (0, 5)
    again = admit(service, session, [*talk, *lone], "turn-3")
    assert (again.batches, again.epoch) == (session.batches, 0)


def test_a_session_only_grows_at_its_end_until_an_epoch_begins(service: MemoryService) -> None:
    rng = random.Random(7)
    ids = add(service, *(" ".join(["word"] * (i % 7 + 1)) + f" {i}" for i in range(60)))
    session = service.start_session("u", 60)
    for turn in range(80):
        before = session
        now = rng.sample(ids, rng.randint(1, 5))
        session = admit(service, session, now, f"turn-{turn}")
        assert session.tokens <= session.budget_tokens
        assert session.tokens == sum(words(service.get("u", id).text) for id in session.memory_ids)
        assert len(set(session.memory_ids)) == len(session.memory_ids)
        assert set(now) <= set(session.memory_ids)
        if session.epoch == before.epoch:
            assert session.memory_ids[: len(before.memory_ids)] == before.memory_ids
            assert session.batches[: len(before.batches)] == before.batches
        else:
            kept = [id for id in before.memory_ids if id in session.memory_ids]
            assert list(session.memory_ids[: len(kept)]) == kept
    assert session.epoch > 3


def test_an_eviction_leaves_room_for_the_next_turns(service: MemoryService) -> None:
    ids = add(service, *(f"one two three {i}" for i in range(40)))
    session = service.start_session("u", 40)
    epochs = [admit(service, session, [id], id).epoch for id in ids]
    assert max(epochs) == epochs[-1]
    assert epochs[-1] <= 40 * 4 / (40 * 0.25)


def test_a_full_session_never_stops_taking_in_what_a_question_needs(service: MemoryService) -> None:
    filler = [f"filler text number {i} about nothing" for i in range(50)]
    add(service, *filler)
    [fact] = add(service, "the vault code is 4711")
    session = service.start_session("u", 60)
    for i in range(0, 50, 5):
        found = service.recall("u", f"filler number {i}", RecallOptions(k=5))
        session = service.admit("u", session.id, found, f"turn-{i}")
    found = service.recall("u", "What is the vault code?", RecallOptions(k=3))
    session = service.admit("u", session.id, found, "last")
    assert fact in session.memory_ids
    assert session.tokens <= 60


def test_the_least_valuable_go_first_and_what_is_asked_for_now_stays(service: MemoryService) -> None:
    hot, cold, new = add(service, "hot " * 10 + "a", "cold " * 10 + "b", "new " * 10 + "c")
    session = service.start_session("u", 30)
    service.admit("u", session.id, recalled(service, [hot, cold], [0.9, 0.2]), "1")
    service.admit("u", session.id, recalled(service, [hot], [0.9]), "2")
    session = service.admit("u", session.id, recalled(service, [new], [0.3]), "3")
    assert session.memory_ids == (hot, new)
    session = service.admit("u", session.id, recalled(service, [cold, new], [0.1, 0.1]), "4")
    assert session.memory_ids == (new, cold)


def test_old_favourites_age(service: MemoryService) -> None:
    favourite, *others = add(service, *(f"{i} " * 5 for i in range(60)))
    session = service.start_session("u", 50)
    for _ in range(20):
        session = admit(service, session, [favourite], "early")
    for turn, id in enumerate(others):
        session = admit(service, session, [id], f"late-{turn}")
    assert favourite not in session.memory_ids


def test_a_memory_larger_than_the_budget_is_left_out(service: MemoryService) -> None:
    small, huge = add(service, "small", "huge " * 100)
    session = service.start_session("u", 10)
    session = admit(service, session, [huge, small], "1")
    assert session.memory_ids == (small,)


def test_forget_takes_a_resident_out_at_once(service: MemoryService) -> None:
    ids = add(service, "a", "b", "c")
    first, second = service.start_session("u", 100), service.start_session("u", 100)
    admit(service, first, ids, "1")
    admit(service, second, ids[:1], "1")
    receipt = service.forget("u", [ids[1]])
    assert receipt.sessions == 1
    after = service.session("u", first.id)
    assert (after.memory_ids, after.epoch, after.tokens) == ((ids[0], ids[2]), 1, 2)
    assert service.session("u", second.id).epoch == 0


def test_update_moves_a_resident_to_the_end(service: MemoryService) -> None:
    ids = add(service, "a", "b", "c")
    session = admit(service, service.start_session("u", 100), ids[:2], None)
    session = admit(service, session, ids[2:], "later")
    service.update("u", ids[0], metadata={"x": 1})
    assert service.session("u", session.id) == session
    service.update("u", ids[0], text="a a a")
    after = service.session("u", session.id)
    assert [(b.anchor, b.memory_ids) for b in after.batches] == [(None, (ids[1],)), ("later", (ids[2], ids[0]))]
    assert (after.epoch, after.tokens) == (session.epoch + 1, 5)


def test_supersede_puts_the_new_one_in_place_of_the_old(service: MemoryService) -> None:
    [old] = service.add("u", [NewMemory("works at Boeing", key="job")])
    other = add(service, "likes tea")
    session = admit(service, service.start_session("u", 100), [old.id, *other], None)
    [new] = service.add("u", [NewMemory("works at SpaceX now", key="job")])
    after = service.session("u", session.id)
    assert after.memory_ids == (*other, new.id)
    assert (after.epoch, after.tokens) == (1, 6)


def test_what_changed_since_recall_is_passed_over(service: MemoryService) -> None:
    gone, changed, kept = add(service, "gone", "changed", "kept")
    session = service.start_session("u", 100)
    found = recalled(service, [gone, changed, kept])
    service.forget("u", [gone])
    service.update("u", changed, text="changed text")
    assert service.admit("u", session.id, found, "1").memory_ids == (kept,)


def test_a_session_belongs_to_its_user(service: MemoryService) -> None:
    add(service, "x")
    session = service.start_session("u", 10)
    service.start_session("v", 10)
    for refused in (
        lambda: service.session("v", session.id),
        lambda: service.end_session("v", session.id),
        lambda: service.admit("v", session.id, [], None),
    ):
        with pytest.raises(NotFound):
            refused()
    assert service.session_owner(session.id) == "u"
    service.end_session("u", session.id)
    for refused in (
        lambda: service.session("u", session.id),
        lambda: service.end_session("u", session.id),
        lambda: service.session_owner(session.id),
    ):
        with pytest.raises(NotFound):
            refused()


def test_two_users_may_choose_the_same_session_id(service: MemoryService) -> None:
    service.start_session("u", 10, "mine")
    service.start_session("v", 20, "mine")
    assert service.session("u", "mine").budget_tokens == 10
    assert service.session("v", "mine").budget_tokens == 20
    with pytest.raises(NotFound, match="name its user"):
        service.session_owner("mine")
    service.forget_user("u")
    assert service.session_owner("mine") == "v"


def test_starting_an_id_again_returns_the_session_as_it_is(service: MemoryService) -> None:
    ids = add(service, "x")
    session = admit(service, service.start_session("u", 10, "s"), ids, None)
    assert service.start_session("u", 99, "s") == session


def test_sessions_survive_a_restart(open_service: MakeService) -> None:
    service = open_service()
    ids = add(service, "a", "b")
    session = admit(service, service.start_session("u", 100), ids, "t")
    service.close()
    again = open_service()
    assert again.session("u", session.id) == session
    assert again.session_owner(session.id) == "u"


def test_the_oldest_sessions_make_room(open_service: MakeService) -> None:
    now = iter(range(1_000_000))
    service = open_service(MemoryConfig(max_sessions=3, clock=lambda: float(next(now))))
    started = [service.start_session("u", 10) for _ in range(3)]
    service.admit("u", started[0].id, [], None)
    service.start_session("u", 10)
    with pytest.raises(NotFound):
        service.session("u", started[1].id)
    with pytest.raises(NotFound):
        service.session_owner(started[1].id)
    assert service.session("u", started[0].id).id == started[0].id


@pytest.mark.parametrize("budget", [0, -1, 1 << 40, True, 1.5, None])
def test_bad_budgets_are_refused(service: MemoryService, budget: object) -> None:
    with pytest.raises(InvalidInput, match="budget_tokens"):
        service.start_session("u", budget)
    assert service.users() == []
