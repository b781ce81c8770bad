"""Chat completions on the real engine: OpenAI's shape, memory in front, and a report that adds up."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from serverlib import Client, ServerThread, error_of

SISTER = "Where does Alice's sister live?"
FACTS = ("Alice lives in Seattle and works at Boeing.", "Alice's sister Maria lives in Denver.")


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    spoken = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + spoken


def events(server: Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = server.post("/v1/chat/completions", body | {"stream": True})
    assert answer.status == 200, answer.text
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_the_answer_has_openais_shape_and_a_report_that_adds_up(server: ServerThread, user: str) -> None:
    ids = server.remember(user, *FACTS)
    answer = server.ask(user, SISTER)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "amem"
    [choice] = answer["choices"]
    assert choice["finish_reason"] in ("stop", "length")
    assert choice["message"]["role"] == "assistant"
    report, usage = answer["amem"], answer["usage"]
    assert (report["user"], report["session"]) == (user, "auto")
    assert {memory["id"] for memory in report["memories"]} == set(ids)
    tokens = report["tokens"]
    assert sum(tokens.values()) == usage["prompt_tokens"]
    reused = sum(tokens[source] for source in ("prefix", "gpu", "cpu", "disk"))
    assert usage["prompt_tokens_details"]["cached_tokens"] == reused
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < report["charged"] <= usage["prompt_tokens"] * 1.5
    assert report["ttft_ms"] > 0


def test_without_a_user_memory_is_off(server: ServerThread, user: str) -> None:
    server.remember(user, *FACTS)
    report = server.ask(None, SISTER)["amem"]
    assert (report["user"], report["session"], report["memories"]) == (None, None, [])


def test_the_second_question_of_a_session_prefills_no_memory(server: ServerThread, user: str) -> None:
    server.remember(user, *FACTS)
    server.settled()
    session = server.post("/v1/sessions", {"user": user}).json()["id"]
    first = server.ask(user, SISTER, session=session)
    assert first["amem"]["session"] == session
    second = server.ask(user, "What company does Alice work for?", session=session)
    tokens = second["amem"]["tokens"]
    memory = server.get(f"/v1/sessions/{session}?user={user}").json()["tokens"]
    assert tokens["prefix"] + tokens["gpu"] + tokens["cpu"] + tokens["disk"] >= memory
    assert tokens["fresh"] < first["usage"]["prompt_tokens"] - memory


def test_after_a_restart_the_memory_comes_from_disk(start: Callable[..., ServerThread]) -> None:
    server = start()
    server.remember("alice", *FACTS)
    server.settled()
    cold = server.ask("alice", SISTER)
    server.stop()
    again = start().ask("alice", SISTER)
    assert again["choices"][0]["message"] == cold["choices"][0]["message"]
    assert again["amem"]["memories"] == cold["amem"]["memories"]
    assert again["amem"]["tokens"]["disk"] > 0
    assert again["amem"]["tokens"]["cpu"] == 0


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_says_what_the_whole_answer_says(server: ServerThread, user: str, include_usage: bool) -> None:
    server.remember(user, *FACTS)
    body = {"model": "amem", "user": user, "max_tokens": 12, "messages": turns(SISTER)}
    whole = server.post("/v1/chat/completions", body).json()
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = events(server, body | options)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert reasons == [whole["choices"][0]["finish_reason"]]
    assert [("amem" in chunk) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert sum(chunks[-1]["amem"]["tokens"].values()) == whole["usage"]["prompt_tokens"]
    if include_usage:
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
        assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_errors_before_the_first_token_of_a_stream_have_their_status(server: ServerThread) -> None:
    body = {"model": "amem", "stream": True, "messages": turns("word " * 5000)}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status == 400
    assert error_of(answer)["code"] == "context_length_exceeded"


def test_log_probabilities(server: ServerThread) -> None:
    body = {"logprobs": True, "top_logprobs": 3, "max_tokens": 5, "temperature": 1.5, "seed": 3}
    answer = server.ask(None, "Tell me something.", **body)
    content = answer["choices"][0]["logprobs"]["content"]
    stopped = answer["choices"][0]["finish_reason"] == "stop"
    assert len(content) == answer["usage"]["completion_tokens"] - stopped
    for token in content:
        assert token["logprob"] <= 0
        assert len(token["top_logprobs"]) == 3
        best = [other["logprob"] for other in token["top_logprobs"]]
        assert best == sorted(best, reverse=True)
        assert best[0] >= token["logprob"] - 1e-6
    assert server.ask(None, "Tell me something.")["choices"][0]["logprobs"] is None


def test_a_seed_repeats_a_draw_and_another_changes_it(server: ServerThread) -> None:
    def draw(seed: int) -> str:
        answer = server.ask(None, "Tell me a story.", temperature=2.0, seed=seed, max_tokens=24)
        text: str = answer["choices"][0]["message"]["content"]
        return text

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_a_stop_string_ends_the_answer_and_leaves_its_report(server: ServerThread) -> None:
    body: dict[str, Any] = {"temperature": 2.0, "seed": 5, "max_tokens": 60}
    full = server.ask(None, "Tell me a story.", **body)["choices"][0]["message"]["content"]
    assert len(full) > 20, "the draw is too short to be cut"
    stop = full[10:13]
    cut = server.ask(None, "Tell me a story.", **body, stop=[stop])
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["choices"][0]["message"]["content"] == full[: full.index(stop)]
    assert cut["usage"]["completion_tokens"] < 60
    assert cut["usage"]["prompt_tokens"] > 0
    server.settled()


def test_fidelity_and_ratio_reach_the_engine(server: ServerThread, user: str) -> None:
    server.remember(user, *FACTS)
    server.settled()
    exact = server.ask(user, SISTER, fidelity="exact")["amem"]
    assert exact["policy"] == "exact"
    reuse = server.ask(user, "And where is Denver?", amem={"recompute_ratio": 0.0})["amem"]
    assert reuse["recompute_ratio"] == 0
    assert reuse["policy"] != "exact"


def test_remember_stores_the_question_and_not_the_history(server: ServerThread, user: str) -> None:
    server.remember(user, "Alice likes tea.")
    history = turns("Hi.", "Hello.", "I moved to Oslo.")
    answer = server.ask(user, history, amem={"remember": True})
    [id] = answer["amem"]["remembered"]
    assert server.texts(user) == ["Alice likes tea.", "I moved to Oslo."]
    assert server.get(f"/v1/memories/{user}/{id}").json()["text"] == "I moved to Oslo."
    assert id not in [memory["id"] for memory in answer["amem"]["memories"]]
    assert server.ask(f"{user}-new", "I am new.", amem={"remember": True})["amem"]["remembered"]
    assert server.texts(f"{user}-new") == ["I am new."]


def test_chat_alone_never_writes_a_memory(server: ServerThread, user: str) -> None:
    server.remember(user, "Alice likes tea.")
    server.ask(user, "I like coffee.")
    assert server.texts(user) == ["Alice likes tea."]


def test_k_bounds_what_is_looked_up(server: ServerThread, user: str) -> None:
    server.remember(user, *(f"House {n} is red." for n in range(6)))
    assert len(server.ask(user, "Is house 3 red?", amem={"k": 2})["amem"]["memories"]) == 2
    other = f"{user}-2"
    server.remember(other, "House 1 is red.")
    assert server.ask(other, "Is house 1 red?", amem={"k": 0})["amem"]["memories"] == []


def test_both_names_of_the_model_and_the_header_for_the_user(server: ServerThread, user: str) -> None:
    names = [model["id"] for model in server.get("/v1/models").json()["data"]]
    assert names[0] == "amem"
    assert len(names) == 2
    server.remember(user, *FACTS)
    for name in names:
        assert server.get(f"/v1/models/{name}").json()["id"] == name
        body = {"model": name, "messages": turns(SISTER), "max_tokens": 2}
        answer = server.post("/v1/chat/completions", body, headers={"x-amem-user": user}).json()
        assert (answer["model"], answer["amem"]["user"]) == (name, user)
    body = {"model": "amem", "messages": turns(SISTER), "max_tokens": 2, "safety_identifier": user}
    assert server.post("/v1/chat/completions", body).json()["amem"]["user"] == user


def test_a_conversation_keeps_its_prefix_from_turn_to_turn(server: ServerThread, user: str) -> None:
    server.remember(user, *FACTS, "Bob plays chess.", "Carol sails on Sundays.")
    server.settled()
    first = server.ask(user, turns("Where does Alice live?", system="Be brief."))
    said = first["choices"][0]["message"]["content"] or "In Seattle."
    second = server.ask(user, turns("Where does Alice live?", said, "Does Bob play chess?", system="Be brief."))
    third_messages = turns(
        "Where does Alice live?", said, "Does Bob play chess?", "Yes.", "And Carol?", system="Be brief."
    )
    third = server.ask(user, third_messages)
    assert second["amem"]["session"] == third["amem"]["session"] != "auto"
    ids = [[memory["id"] for memory in answer["amem"]["memories"]] for answer in (first, second, third)]
    assert ids[1][: len(ids[0])] == ids[0]
    assert ids[2][: len(ids[1])] == ids[1]
    page = 16
    kept = second["usage"]["prompt_tokens"] - page
    assert third["amem"]["tokens"]["prefix"] >= kept - 8  # "Yes." stands where the model's own answer was


def test_an_edited_opening_is_another_conversation(server: ServerThread, user: str) -> None:
    server.remember(user, *FACTS)
    one = server.ask(user, turns("Where does Alice live?", "Seattle.", "And her sister?"))
    same = server.ask(user, turns("Where does Alice live?", "Seattle.", "And her job?"))
    other = server.ask(user, turns("Where does Alice live now?", "Seattle.", "And her sister?"))
    sessions = [answer["amem"]["session"] for answer in (one, same, other)]
    assert sessions[0] == sessions[1] != sessions[2]


def test_what_another_branch_of_a_conversation_recalled_stays_out(server: ServerThread, user: str) -> None:
    alice, bob, carol = server.remember(user, "Alice lives in Seattle.", "Bob plays chess.", "Carol sails a boat.")
    opening = ("Where does Alice live?", "In Seattle.")

    def used(*asked: str) -> tuple[str, list[str]]:
        report = server.ask(user, turns(*opening, *asked), amem={"k": 1})["amem"]
        return report["session"], [memory["id"] for memory in report["memories"]]

    assert server.ask(user, opening[0], amem={"k": 1})["amem"]["memories"][0]["id"] == alice
    session, first = used("Does Bob play chess?")
    assert bob in first
    other_session, other = used("Does Carol sail a boat?")
    assert (other_session, carol in other, bob in other) == (session, True, False)
    # going on with the first branch brings its own back, at its turn
    _, back = used("Does Bob play chess?", "Yes.", "Where does Alice live?")
    assert (alice in back, bob in back, carol in back) == (True, True, False)


def test_memories_give_way_to_a_long_question(server: ServerThread, user: str) -> None:
    server.remember(user, *(f"Fact {n} of a blue house." for n in range(8)))
    context = server.get("/v1/models/amem").json()["max_model_len"]
    count = server.server.services.planner.chat.count
    hundred = count("blue house " * 101) - count("blue house ")
    full = server.ask(user, "blue house " * (100 * (context - 100) // hundred), max_tokens=60)
    report = full["amem"]
    assert report["dropped"] > 0
    assert context - 160 < full["usage"]["prompt_tokens"] <= context - 60
    assert len(report["memories"]) + report["dropped"] == 8


def client_for(server: ServerThread) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.server.url}/v1", api_key="anything", max_retries=0)


def test_the_stock_openai_client(server: ServerThread, user: str) -> None:
    server.remember(user, *FACTS)
    client = client_for(server)
    messages: Any = turns(SISTER)
    answer = client.chat.completions.create(model="amem", user=user, messages=messages, max_tokens=8)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    extra: Any = answer.model_extra
    assert sum(extra["amem"]["tokens"].values()) == answer.usage.prompt_tokens
    exact = client.chat.completions.create(
        model="amem", user=user, messages=messages, max_tokens=8, extra_body={"amem": {"fidelity": "exact"}}
    )
    assert (exact.model_extra or {})["amem"]["policy"] == "exact"
    stream = client.chat.completions.create(model="amem", user=user, messages=messages, max_tokens=8, stream=True)
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content
    assert (chunks[-1].model_extra or {})["amem"]["user"] == user
    assert "amem" in [model.id for model in client.models.list()]


def test_the_stock_openai_client_reads_our_errors(server: ServerThread) -> None:
    client = client_for(server)
    messages: Any = turns("Hi.")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=messages)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="amem", messages=messages, n=3)
    assert (wrong.value.param, wrong.value.type) == ("n", "invalid_request_error")
