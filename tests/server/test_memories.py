"""The memory routes: every form of every address, one shape, two users that never see each other."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from serverlib import JSON, ServerThread, error_of

STRANGE = [
    "a/b",
    "..",
    "../../etc/passwd",
    "a b",
    "ünï",
    "🦊",
    "x?y&z=1",
    "a%2Fb",
    "#",
    ".",
    "user;x",
    "'; DROP TABLE",
    "+1",
]
MEMORY = {
    "id",
    "text",
    "conversation",
    "ordinal",
    "key",
    "metadata",
    "created",
    "updated",
    "seen",
    "version",
    "state",
    "superseded_by",
}


def forms(user: str, id: str | None = None) -> list[str]:
    """Every way to write the address of a user's memories, or of one of them."""
    quoted = quote(user, safe="")
    if id is None:
        return [f"/v1/memories/{quoted}", f"/v1/memories?user={quoted}"]
    return [f"/v1/memories/{quoted}/{id}", f"/v1/memories?user={quoted}&id={id}", f"/v1/memories/{quoted}?id={id}"]


@pytest.mark.parametrize("name", STRANGE)
def test_strange_user_names_in_every_form(server: ServerThread, name: str) -> None:
    user = f"{name}~"  # "." and ".." by themselves are another test: clients resolve them in paths
    first, second = server.remember(user, "One.", "Two.")
    for address in forms(user):
        page = server.get(address).json()
        assert (page["user"], [m["id"] for m in page["memories"]]) == (user, [first, second])
    for number, address in enumerate(forms(user, first)):
        assert server.patch(address, {"text": f"One {number}."}).status == 200
        assert server.get(address).json()["text"] == f"One {number}."
    assert server.delete(forms(user, first)[0]).json()["forgotten"] == [first]
    assert server.delete(forms(user, second)[1]).json()["forgotten"] == [second]
    assert server.texts(user) == []


@pytest.mark.parametrize("name", ["..", ".", "a/..", "/"])
def test_names_that_are_paths_stay_users(server: ServerThread, name: str, tmp_path: Path) -> None:
    [id] = server.remember(name, f"This belongs to {name}.")
    assert server.texts(name) == [f"This belongs to {name}."]
    raw = server.get("/v1/memories", params={"user": name, "id": id})
    assert raw.json()["text"] == f"This belongs to {name}."
    data = server.server.services.config.data_dir
    assert not [path for path in data.rglob("*") if name in (path.name,)]
    assert server.delete("/v1/memories", params={"user": name}).json()["forgotten"] == [id]


def test_every_route_gives_a_memory_the_same_shape(server: ServerThread, user: str) -> None:
    [id] = server.remember(user, {"text": "Tea at five.", "key": "tea", "metadata": {"source": "test"}})
    listed = server.get(f"/v1/memories/{user}").json()["memories"][0]
    one = server.get(f"/v1/memories/{user}/{id}").json()
    patched = server.patch(f"/v1/memories/{user}/{id}", {"metadata": {"source": "other"}}).json()
    recalled = server.post("/v1/recall", {"user": user, "query": "tea"}).json()["memories"][0]
    assert set(listed) == MEMORY
    assert set(one) == MEMORY | {"user"}
    assert set(patched) == MEMORY | {"user", "kv"}
    assert set(recalled) == MEMORY | {"score", "tokens"}
    assert one["metadata"] == {"source": "test"}
    assert patched["metadata"] == {"source": "other"}
    assert one["key"] == "tea"


def test_texts_in_every_form_keep_their_order(server: ServerThread, user: str) -> None:
    server.post("/v1/memories", {"user": user, "texts": "Alone."})
    server.remember(user, "Plain.", {"text": "Keyed.", "key": "k"}, keys=[None, "k"])
    spoken = [{"role": "user", "content": "Asked."}, {"role": "assistant", "content": "Said."}]
    answer = server.post("/v1/memories", {"user": user, "messages": spoken}).json()
    assert answer["conversation"]
    memories = server.get("/v1/memories", params={"user": user}).json()["memories"]
    assert [m["text"] for m in memories] == ["Alone.", "Plain.", "Keyed.", "Asked.", "Said."]
    assert [m["ordinal"] for m in memories if m["conversation"] == answer["conversation"]] == sorted(
        m["ordinal"] for m in memories if m["conversation"] == answer["conversation"]
    )
    assert [m["metadata"] for m in memories[-2:]] == [{"role": "user"}, {"role": "assistant"}]


def test_outcomes(server: ServerThread, user: str) -> None:
    def outcomes(*texts: Any) -> list[str]:
        answer = server.post("/v1/memories", {"user": user, "texts": list(texts)}).json()
        return [memory["outcome"] for memory in answer["memories"]]

    assert outcomes("A.", {"text": "Lives in Oslo.", "key": "home"}) == ["added", "added"]
    assert outcomes("A.", {"text": "Lives in Rome.", "key": "home"}) == ["seen", "superseded"]
    assert server.texts(user) == ["A.", "Lives in Rome."]
    recalled = server.post("/v1/recall", {"user": user, "query": "Lives in Oslo?"}).json()["memories"]
    assert [memory["text"] for memory in recalled] == ["Lives in Rome."]


def test_pages(server: ServerThread, user: str) -> None:
    ids = server.remember(user, *(f"Memory {n}." for n in range(25)))
    seen: list[str] = []
    after: str | None = None
    while True:
        page = server.get(
            "/v1/memories", params={"user": user, "limit": 10} | ({"after": after} if after else {})
        ).json()
        seen += [memory["id"] for memory in page["memories"]]
        after = page["next"]
        if after is None:
            break
    assert seen == ids


def test_two_users_never_see_each_other(server: ServerThread, user: str) -> None:
    other = f"{user}-other"
    [mine] = server.remember(user, "The canary sings zorblax.")
    server.remember(other, "Nothing to see.")
    session = server.post("/v1/sessions", {"user": user}).json()["id"]
    for method, address, body in [
        ("GET", f"/v1/memories/{other}/{mine}", None),
        ("PATCH", f"/v1/memories/{other}/{mine}", {"text": "mine now"}),
        ("DELETE", f"/v1/memories/{other}/{mine}", None),
        ("GET", f"/v1/sessions/{session}?user={other}", None),
        ("DELETE", f"/v1/sessions/{session}?user={other}", None),
    ]:
        answer = server.request(method, address, json.dumps(body).encode() if body else None, JSON if body else None)
        assert answer.status == 404, (method, address, answer.text)
        assert "zorblax" not in answer.text
    assert "zorblax" not in server.get(f"/v1/memories/{other}").text
    assert server.post("/v1/recall", {"user": other, "query": "zorblax canary"}).json()["memories"] == []
    report = server.ask(other, "What does the canary sing?")["amem"]
    assert mine not in [memory["id"] for memory in report["memories"]]
    stolen = server.post(
        "/v1/chat/completions",
        {"model": "amem", "user": other, "session": session, "messages": [{"role": "user", "content": "zorblax?"}]},
    )
    assert stolen.status == 404
    assert server.texts(user) == ["The canary sings zorblax."]


def test_the_header_names_the_user_and_must_agree(server: ServerThread, user: str) -> None:
    header = {"x-amem-user": user}
    assert server.post("/v1/memories", {"texts": ["By header."]}, headers=header).status == 200
    assert server.get("/v1/memories", headers=header).json()["memories"][0]["text"] == "By header."
    assert server.get(f"/v1/memories/{user}", headers=header).status == 200
    refused = server.post("/v1/memories", {"user": "another", "texts": ["x"]}, headers=header)
    assert refused.status == 400
    assert error_of(refused)["code"] == "conflicting_values"
    assert server.texts("another") == []


def test_reading_never_creates_a_user(server: ServerThread) -> None:
    ghost = "ghost-user"
    assert server.texts(ghost) == []
    assert server.post("/v1/recall", {"user": ghost, "query": "x"}).json()["memories"] == []
    assert server.get(f"/v1/memories/{ghost}/mem-0").status == 404
    assert server.delete(f"/v1/memories/{ghost}").json()["forgotten"] == []
    report = server.ask(ghost, "Hello?")["amem"]
    assert (report["memories"], report["session"]) == ([], None)
    assert ghost not in server.get("/v1/users").text


def test_a_repeated_write_has_one_effect(server: ServerThread, user: str) -> None:
    key = {"Idempotency-Key": f"{user}-1"}
    body = {"user": user, "texts": ["Once."]}
    first, again = (server.post("/v1/memories", body, headers=key) for _ in range(2))
    assert first.json() == again.json()
    assert server.get("/v1/memories", params={"user": user}).json()["memories"][0]["seen"] == 1
    other = server.post("/v1/memories", body | {"texts": ["Twice."]}, headers=key)
    assert other.status == 400
    assert error_of(other)["code"] == "idempotency_key_reused"
    [id] = [memory["id"] for memory in first.json()["memories"]]
    key = {"Idempotency-Key": f"{user}-2"}
    gone, again = (server.delete(f"/v1/memories/{user}/{id}", headers=key) for _ in range(2))
    assert gone.json() == again.json()
    assert server.delete(f"/v1/memories/{user}/{id}").status == 404
    key = {"Idempotency-Key": f"{user}-3"}
    assert len({server.post("/v1/sessions", {"user": user}, headers=key).json()["id"] for _ in range(2)}) == 1


def test_a_repeated_add_does_not_bring_a_forgotten_user_back(server: ServerThread, user: str) -> None:
    key = {"Idempotency-Key": f"{user}-late"}
    body = {"user": user, "texts": ["Gone for good."]}
    first = server.post("/v1/memories", body, headers=key)
    assert server.delete("/v1/memories", params={"user": user}).status == 200
    assert server.post("/v1/memories", body, headers=key).json() == first.json()
    assert server.texts(user) == []
    assert user not in [found["user"] for found in server.get("/v1/users").json()["users"]]


def test_repeated_messages_are_the_same_request_after_a_restart(start: Callable[..., ServerThread]) -> None:
    body = {"user": "carl", "messages": [{"role": "user", "content": "I live in Rome."}]}
    key = {"Idempotency-Key": "messages-1"}
    server = start(engine=False)
    first = server.post("/v1/memories", body, headers=key)
    other = server.post("/v1/memories", body, headers={"Idempotency-Key": "messages-2"})
    assert first.json()["conversation"] != other.json()["conversation"]
    server.stop()
    server = start(engine=False)
    again = server.post("/v1/memories", body, headers=key)
    assert (again.status, again.json()) == (200, first.json())
    assert server.texts("carl") == ["I live in Rome."] * 2


def test_a_patch_names_its_memory_in_the_body_too_and_names_have_to_agree(server: ServerThread, user: str) -> None:
    first, second = server.remember(user, "First.", "Second.")
    changed = server.patch("/v1/memories", {"user": user, "id": first, "text": "Changed."})
    assert (changed.status, changed.json()["id"]) == (200, first)
    for body in ({"user": "bob"}, {"id": second}):
        refused = server.patch(f"/v1/memories/{user}/{first}", {"text": "Lost."} | body)
        assert (refused.status, error_of(refused)["code"]) == (400, "conflicting_values")
    assert server.texts(user) == ["Changed.", "Second."]


def test_a_delete_that_names_memories_in_a_body_erases_nothing(server: ServerThread, user: str) -> None:
    ids = server.remember(user, "One.", "Two.")
    session = server.post("/v1/sessions", {"user": user}).json()["id"]
    for address in (f"/v1/memories?user={user}", f"/v1/memories/{user}", f"/v1/sessions/{session}"):
        refused = server.request("DELETE", address, json.dumps({"id": ids[0]}).encode(), JSON)
        assert (refused.status, error_of(refused)["code"]) == (400, "invalid_value")
    assert server.texts(user) == ["One.", "Two."]
    assert server.get(f"/v1/sessions/{session}").status == 200


def test_a_stale_version_is_a_conflict(server: ServerThread, user: str) -> None:
    [id] = server.remember(user, "First.")
    address = f"/v1/memories/{user}/{id}"
    seen = server.get(address).json()["version"]
    assert server.patch(address, {"text": "Second.", "version": seen}).status == 200
    late = server.patch(address, {"text": "Third.", "version": seen})
    assert late.status == 409
    assert error_of(late)["code"] == "conflict"
    assert server.texts(user) == ["Second."]


def test_forgetting_several_is_all_or_none(server: ServerThread, user: str) -> None:
    ids = server.remember(user, "One.", "Two.", "Three.")
    assert server.delete("/v1/memories", params={"user": user, "id": [ids[0], "mem-none"]}).status == 404
    assert len(server.texts(user)) == 3
    gone = server.delete("/v1/memories", params={"user": user, "id": ids[:2]})
    assert sorted(gone.json()["forgotten"]) == sorted(ids[:2])
    assert server.texts(user) == ["Three."]


def test_recall_explains_its_scores_and_keeps_to_k(server: ServerThread, user: str) -> None:
    server.remember(user, *(f"Fact {n}: the colour of house {n} is hue{n}." for n in range(12)))
    body = {"user": user, "query": "What is the colour of house 7?", "k": 3, "explain": True}
    found = server.post("/v1/recall", body).json()["memories"]
    assert len(found) == 3
    assert "hue7" in found[0]["text"]
    assert [m["score"] for m in found] == sorted((m["score"] for m in found), reverse=True)
    assert all(memory["explain"] for memory in found)


def test_many_clients_at_once_lose_nothing(server: ServerThread, user: str) -> None:
    def write(worker: int) -> None:
        for n in range(5):
            server.remember(user, f"Worker {worker} says {n}.")

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(server.texts(user)) == sorted(f"Worker {w} says {n}." for w in range(8) for n in range(5))


def test_memories_work_while_the_engine_is_down(start: Callable[..., ServerThread]) -> None:
    server = start(engine=False)
    health = server.get("/health")
    assert health.status == 503
    assert health.json()["engine"]["state"] == "stopped"
    ids = server.remember("alice", "One.", {"text": "Two.", "key": "k"})
    assert server.texts("alice") == ["One.", "Two."]
    assert server.post("/v1/recall", {"user": "alice", "query": "one"}).status == 200
    assert server.post("/v1/sessions", {"user": "alice"}).status == 200
    assert server.patch(f"/v1/memories/alice/{ids[0]}", {"text": "Uno."}).json()["kv"] == {"pending": True}
    assert server.remember("alice", {"text": "Zwei.", "key": "k"})
    gone = server.delete(f"/v1/memories/alice/{ids[0]}")
    assert (gone.status, gone.json()["kv"]) == (200, {"pending": True})
    assert server.texts("alice") == ["Zwei."]
    asked = server.post("/v1/chat/completions", {"model": "amem", "messages": [{"role": "user", "content": "x"}]})
    assert asked.status == 503
    assert error_of(asked)["code"] == "engine_unavailable"
    assert int(asked.headers["Retry-After"]) > 0
    assert server.get("/v1/stats").json()["engine"] is None
    assert server.get("/v1/models").json()["data"][0]["id"] == "amem"


def test_a_damaged_file_is_the_trouble_of_its_user_alone(start: Callable[..., ServerThread]) -> None:
    server = start(engine=False)
    server.remember("alice", *(f"Alice says {n}." for n in range(50)))
    server.remember("bob", "Bob is fine.")
    data = server.server.services.config.data_dir
    tenant = server.server.services.memory.tenant("alice")
    assert tenant is not None
    server.stop()
    files = [path for path in data.rglob("*") if path.is_file() and tenant.id.hex() in str(path)]
    assert files
    for path in files:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2 : len(raw) // 2 + 64] = bytes(64)
        raw[100:164] = bytes(64)
        path.write_bytes(raw)
    server = start(engine=False)
    answer = server.get("/v1/memories/alice")
    assert answer.status == 500
    assert error_of(answer)["code"] == "memory_damaged"
    assert str(data) not in answer.text
    assert server.texts("bob") == ["Bob is fine."]
    users = {one["user"]: one for one in server.get("/v1/users").json()["users"]}
    assert users["alice"]["damaged"]
    assert not users["bob"]["damaged"]
