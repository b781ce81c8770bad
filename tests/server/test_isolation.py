"""Many users at once, each with words of their own: no answer, list, score or report ever holds another's."""

from __future__ import annotations

import random
import threading
from typing import Any

from serverlib import Client, ServerThread

USERS, ROUNDS = 5, 12
FAMILY = [{"role": "user", "content": "What is the secret word of the canary?"}]


def live(url: str, user: str, others: list[str], seed: int, failures: list[str]) -> None:
    client, chance = Client(url), random.Random(seed)
    word = f"zorb{user}"
    kept: list[str] = []

    def checked(answer: Any) -> Any:
        if answer.status not in (200, 409) or any(f"zorb{other}" in answer.text for other in others):
            failures.append(f"{user}: {answer.status} {answer.text}")
        return answer.json()

    for n in range(ROUNDS):
        texts = [f"The secret word of canary {n} is {word}.", "The canary is yellow."]
        kept += checked(client.post("/v1/memories", {"user": user, "texts": texts, "conversation": "c"}))["added"]
        asked = client.post(
            "/v1/chat/completions",
            {"model": "amem", "user": user, "messages": FAMILY, "max_tokens": 6, "stream": chance.random() < 0.5},
        )
        if "memories" in asked.text and asked.headers["Content-Type"].startswith("application/json"):
            used = {memory["id"] for memory in checked(asked)["amem"]["memories"]}
            if not used <= set(kept):
                failures.append(f"{user} was given {used - set(kept)}")
        elif any(f"zorb{other}" in asked.text for other in others):
            failures.append(asked.text)
        checked(client.post("/v1/recall", {"user": user, "query": chance.choice([*others, "zorb canary"])}))
        checked(client.get("/v1/memories", params={"user": user}))
        if chance.random() < 0.4:
            checked(client.delete("/v1/memories", params={"user": user, "id": kept.pop(chance.randrange(len(kept)))}))
    client.close()


def test_no_canary_sings_in_another_cage(server: ServerThread) -> None:
    users = [f"cage{n}" for n in range(USERS)]
    failures: list[str] = []
    threads = [
        threading.Thread(target=live, args=(server.url, user, [u for u in users if u != user], n, failures))
        for n, user in enumerate(users)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    server.settled()
    for user in users:
        assert server.texts(user)
        assert server.delete("/v1/memories", params={"user": user}).status == 200
    assert not [one for one in server.get("/v1/users").json()["users"] if one["user"].startswith("cage")]


def test_the_same_text_of_another_user_is_computed_anew(server: ServerThread) -> None:
    """What one user has in the store or in the cache is never a hit for another, so that timing tells nothing."""
    text = "The lighthouse keeper of Skagen writes letters to a whale."
    written = server.settled()["chunks_written"]
    for number, user in enumerate(("keeper-1", "keeper-2"), 1):
        server.remember(user, text)
        assert server.settled()["chunks_written"] == written + number
    question = "Who writes letters to a whale? " * 12
    first, again = (server.ask("keeper-1", question, amem={"k": 0}) for _ in range(2))
    prompt = first["usage"]["prompt_tokens"]
    assert again["amem"]["tokens"]["prefix"] > prompt - 16
    head = len(server.server.services.planner.chat.trusted_prefix)
    for user in ("keeper-2", "keeper-3", None):  # one with memories, one unknown, nobody
        other = server.ask(user, question, amem={"k": 0})
        assert other["usage"]["prompt_tokens"] == prompt
        assert other["amem"]["tokens"]["prefix"] <= head
