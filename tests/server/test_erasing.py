"""Forget and update reach the KV before they return, whatever else is going on, and whatever is down."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from serverlib import Client, ServerThread

QUESTION = [{"role": "user", "content": "Where does Alice live?"}]


def test_forgetting_takes_the_kv_along_and_what_was_computed_behind_it(server: ServerThread, user: str) -> None:
    texts = [f"Alice says in part {n} that she lives in town {n}." for n in range(4)]
    ids = server.remember(user, *texts, conversation="c")
    before = server.settled()
    server.ask(user, "Where does Alice live?")
    receipt = server.delete(f"/v1/memories/{user}/{ids[1]}").json()["kv"]
    assert receipt["pending"] is False
    assert receipt["chunks"] == 3  # its own and those of the two memories computed behind it
    assert receipt["disk_bytes"] > 0
    assert receipt["pages"] > 0
    after = server.settled()
    assert after["store_chunks"] == before["store_chunks"] - 1  # the two were computed again, behind what is left
    report = server.ask(user, "Where does Alice live?")["amem"]
    assert ids[1] not in [memory["id"] for memory in report["memories"]]
    assert ids[1] not in server.get(f"/v1/sessions/auto?user={user}").text


@pytest.mark.parametrize("whole_user", [False, True])
def test_kv_goes_first_so_that_a_crash_leaves_none_without_its_text(
    server: ServerThread, user: str, whole_user: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    [id] = server.remember(user, "Alice keeps bees on her roof.")
    before = server.settled()["store_chunks"]
    services = server.server.services
    name = "forget_user" if whole_user else "forget"
    forget, left = getattr(services.memory, name), []

    def watched(*arguments: Any) -> Any:
        left.append((server.run(services.engine.stats())["store_chunks"], services.memory.get(user, id).text))
        return forget(*arguments)

    monkeypatch.setattr(services.memory, name, watched)
    address = f"/v1/memories/{user}" if whole_user else f"/v1/memories/{user}/{id}"
    assert server.delete(address).json()["forgotten"] == [id]
    assert left == [(before - 1, "Alice keeps bees on her roof.")]


def test_a_question_waits_for_an_erasure_that_has_begun(
    server: ServerThread, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [id, other] = server.remember(user, "Alice lives in Seattle.", "Alice works at Boeing.")
    server.settled()
    memory = server.server.services.memory
    forget, answers = memory.forget, []
    body = {"model": "amem", "user": user, "messages": QUESTION, "max_tokens": 1}
    asker = threading.Thread(
        target=lambda: answers.append(Client(server.url).post("/v1/chat/completions", body).json())
    )

    def slow(*arguments: Any) -> Any:
        asker.start()
        asker.join(2.0)
        assert asker.is_alive()
        return forget(*arguments)

    monkeypatch.setattr(memory, "forget", slow)
    assert server.delete(f"/v1/memories/{user}/{id}").status == 200
    asker.join(60)
    assert [used["id"] for used in answers[0]["amem"]["memories"]] == [other]


def test_an_update_erases_the_old_kv_and_computes_the_new(server: ServerThread, user: str) -> None:
    [id] = server.remember(user, "Alice works at Boeing in a large hall.")
    server.settled()
    changed = server.patch(f"/v1/memories/{user}/{id}", {"text": "Alice works at SpaceX in a small hall."}).json()
    assert changed["kv"]["chunks"] == 1
    server.settled()
    report = server.ask(user, "Where does Alice work?", fidelity="exact")["amem"]
    tokens = report["tokens"]
    assert [memory["id"] for memory in report["memories"]] == [changed["id"]]
    assert tokens["cpu"] + tokens["disk"] + tokens["prefix"] > 0
    only_metadata = server.patch(f"/v1/memories/{user}/{id}", {"metadata": {"a": 1}}).json()
    assert only_metadata["kv"]["chunks"] == 0


def test_superseding_erases_the_kv_of_the_older_one(server: ServerThread, user: str) -> None:
    server.remember(user, {"text": "Alice lives in Oslo.", "key": "home"})
    server.settled()
    newer = {"text": "Alice lives in Rome.", "key": "home"}
    answer = server.post("/v1/memories", {"user": user, "texts": [newer]}).json()
    assert answer["memories"][0]["outcome"] == "superseded"
    assert answer["kv"]["chunks"] == 1
    report = server.ask(user, "Where does Alice live?")["amem"]
    assert [memory["id"] for memory in report["memories"]] == answer["added"]


def test_a_memory_superseded_before_its_kv_was_computed_gets_none(server: ServerThread, user: str) -> None:
    before = server.settled()["store_chunks"]
    for town in ("Oslo", "Rome", "Bath", "Cork", "Lyon"):
        server.remember(user, {"text": f"Alice lives in {town}.", "key": "home"})
    assert server.settled()["store_chunks"] == before + 1
    [memory] = server.get(f"/v1/memories/{user}").json()["memories"]
    gone = server.delete(f"/v1/memories/{user}/{memory['id']}").json()
    assert len(gone["forgotten"]) == 5  # the earlier versions too
    assert server.settled()["store_chunks"] == before


@pytest.mark.usefixtures("talkative")
def test_an_answer_that_reads_a_forgotten_memory_ends(server: ServerThread, user: str) -> None:
    [id] = server.remember(user, "Alice lives in Seattle.")
    found: list[Any] = []
    body = {"model": "amem", "user": user, "messages": QUESTION, "max_tokens": 3000, "temperature": 2.0, "seed": 3}

    def ask(stream: bool) -> None:
        client = Client(server.server.url)
        found.append((stream, client.post("/v1/chat/completions", body | {"stream": stream})))

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    while server.get("/v1/stats").json()["engine"]["requests_running"] < 2:
        time.sleep(0.02)
    time.sleep(0.3)
    receipt = server.delete(f"/v1/memories/{user}/{id}").json()
    assert receipt["kv"]["aborted"] == 2
    for thread in threads:
        thread.join(20)
    for stream, answer in found:
        if stream:
            last = answer.text.strip().split("\n\n")[-1]
            error = json.loads(last.removeprefix("data: "))["error"]
            assert (error["code"], error["status"]) == ("memory_forgotten", 409)
        else:
            assert (answer.status, answer.json()["error"]["code"]) == (409, "memory_forgotten")
    server.settled()


def test_forgotten_memories_never_come_back_under_fire(server: ServerThread, user: str) -> None:
    """Questions, writes and erasures at once: after each erasure nothing of it is in any prompt or in the store."""
    stop = threading.Event()
    failures: list[str] = []

    def ask() -> None:
        client = Client(server.server.url)
        while not stop.is_set():
            body = {"model": "amem", "user": user, "messages": QUESTION, "max_tokens": 2}
            answer = client.post("/v1/chat/completions", body)
            if answer.status not in (200, 409):
                failures.append(answer.text)

    askers = [threading.Thread(target=ask) for _ in range(2)]
    server.remember(user, "Alice exists.")
    for thread in askers:
        thread.start()
    for n in range(8):
        [id] = server.remember(user, f"Alice lives in town {n}.")
        time.sleep(0.05 * (n % 3))
        server.delete(f"/v1/memories/{user}/{id}")
        report = server.ask(user, "Where does Alice live?")["amem"]
        assert id not in [memory["id"] for memory in report["memories"]]
    stop.set()
    for thread in askers:
        thread.join()
    assert failures == []
    server.delete("/v1/memories", params={"user": user})
    again = server.delete("/v1/memories", params={"user": user}).json()
    assert again["forgotten"] == []


def test_an_erasure_while_the_engine_is_down_is_done_when_it_is_back(start: Callable[..., ServerThread]) -> None:
    server = start()
    ids = server.remember("alice", "Alice lives in Seattle.", "Alice works at Boeing.")
    server.remember("bob", "Bob lives in Bath.")
    assert server.settled()["store_chunks"] == 3
    server.stop()
    server = start(engine=False)
    assert server.delete(f"/v1/memories/alice/{ids[0]}").json()["kv"] == {"pending": True}
    assert server.delete("/v1/memories/bob").json()["kv"] == {"pending": True}
    journal = server.server.services.config.data_dir / "erasures"
    assert len(list(journal.glob("*.json"))) == 2
    assert not any(word in path.read_text() for path in journal.glob("*") for word in ("alice", "bob", "Seattle"))
    server.stop()
    server = start()
    for _ in range(100):
        if not list(journal.glob("*.json")):
            break
        time.sleep(0.1)
    assert list(journal.iterdir()) == []
    assert server.settled()["store_chunks"] == 1
    assert server.ask("alice", "Where does Alice work?")["amem"]["tokens"]["disk"] > 0


def test_a_killed_engine_comes_back_and_memories_work_meanwhile(start: Callable[..., ServerThread]) -> None:
    server = start()
    [id] = server.remember("alice", "Alice lives in Seattle.")
    server.settled()
    pid = server.server.services.engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert server.remember("alice", "Alice works at Boeing.")
    assert len(server.texts("alice")) == 2
    gone = server.delete(f"/v1/memories/alice/{id}").json()
    assert gone["forgotten"] == [id]
    for _ in range(300):
        if server.get("/health").status == 200:
            break
        time.sleep(0.1)
    answer = server.ask("alice", "Where does Alice work?")
    assert [memory["id"] for memory in answer["amem"]["memories"]] != [id]
    for _ in range(100):
        if server.settled()["store_chunks"] == 1:
            break
        time.sleep(0.1)
    assert server.settled()["store_chunks"] == 1
