"""Whatever a client sends wrong gives the right status in OpenAI's shape, and loses nothing."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serverlib import JSON, MODEL, Client, ServerThread, error_of

from amem.engine.config import ModelConfig
from amem.server.fates import OPENAI_FIELDS

SYSTEM = [{"role": "system", "content": "x"}]
HELLO = [{"role": "user", "content": "Hello."}]
CONTEXT = ModelConfig.from_hf(MODEL).max_context
CHAT = "/v1/chat/completions"
POSTS = ("/v1/memories", "/v1/recall", "/v1/sessions", "/v1/chat/completions")


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "amem", "messages": HELLO, "max_tokens": 2} | fields


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"   ", "invalid_json"),
        (b"not json", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b"null", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b'\xef\xbb\xbf{"user": "a"}', "invalid_json"),
        (b'{"user": "\xff"}', "invalid_json"),
        (b'{"user": NaN}', "invalid_json"),
        (b'{"user": Infinity}', "invalid_json"),
        (b'{"user": 1e400}', "invalid_json"),
        (b'{"user": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"user": "a", "user": "b"}', "invalid_json"),
        (b'{"user": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
        (b'{"user": ' + b"[" * 70 + b"]" * 70 + b"}", "invalid_json"),
        (b'{"user": "\\ud800"}', "invalid_text"),
        (b'{"user": "a\\u0000b"}', "invalid_text"),
    ],
)
def test_bodies_that_are_no_strict_json(server: ServerThread, path: str, raw: bytes, code: str) -> None:
    answer = server.request("POST", path, content=raw, headers=JSON)
    assert answer.status == 400, answer.text
    assert error_of(answer)["code"] == code


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_web_page_cannot_post_without_asking(server: ServerThread, path: str, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = server.request("POST", path, content=b'{"user": "mallory", "texts": ["x"]}', headers=headers)
    assert answer.status == 415
    assert server.get("/v1/memories?user=mallory").json()["memories"] == []


def test_compressed_bodies_are_refused_unread(server: ServerThread) -> None:
    for encoding in ("gzip", "deflate", "br", "zstd"):
        answer = server.request("POST", "/v1/recall", content=b"{}", headers=JSON | {"Content-Encoding": encoding})
        assert answer.status == 415
        assert error_of(answer)["code"] == "unsupported_content_encoding"


def test_a_body_above_the_limit_is_refused_by_its_length_and_while_reading(server: ServerThread) -> None:
    limit = server.server.services.config.limits.max_body_bytes
    declared = server.request("POST", "/v1/recall", content=b"x" * (limit + 1), headers=JSON)
    assert declared.status == 413
    assert error_of(declared)["code"] == "body_too_large"
    pieces = (b"x" * 65536 for _ in range(limit // 65536 + 2))
    chunked = server.request("POST", "/v1/recall", content=pieces, headers=JSON)
    assert chunked.status == 413


WRONG: list[tuple[str, dict[str, Any], int, str, str]] = [
    (CHAT, chat(model=None), 400, "missing_required_parameter", "model"),
    (CHAT, chat(model=7), 400, "invalid_type", "model"),
    (CHAT, chat(model="gpt-9"), 404, "model_not_found", "model"),
    (CHAT, chat(messages=None), 400, "missing_required_parameter", "messages"),
    (CHAT, chat(messages=[]), 400, "empty_value", "messages"),
    (CHAT, chat(messages="hi"), 400, "invalid_type", "messages"),
    (CHAT, chat(messages=["hi"]), 400, "invalid_type", "messages[0]"),
    (
        CHAT,
        chat(messages=[{"content": "x"}]),
        400,
        "missing_required_parameter",
        "messages[0].role",
    ),
    (
        CHAT,
        chat(messages=[{"role": "tool", "content": "x"}]),
        400,
        "invalid_value",
        "messages[0].role",
    ),
    (
        CHAT,
        chat(messages=[{"role": "user"}]),
        400,
        "missing_required_parameter",
        "messages[0].content",
    ),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": 5}]),
        400,
        "invalid_type",
        "messages[0].content",
    ),
    (
        CHAT,
        chat(
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}]
        ),
        400,
        "unsupported_content",
        "messages[0].content[0].type",
    ),
    (CHAT, chat(max_tokens=-1), 400, "value_out_of_range", "max_tokens"),
    (CHAT, chat(max_tokens=0), 400, "value_out_of_range", "max_tokens"),
    (CHAT, chat(max_tokens=2**31), 400, "value_out_of_range", "max_tokens"),
    (CHAT, chat(max_tokens=2**63), 400, "value_out_of_range", "max_tokens"),
    (CHAT, chat(max_tokens=CONTEXT + 1), 400, "value_out_of_range", "max_tokens"),
    (CHAT, chat(max_tokens=True), 400, "invalid_type", "max_tokens"),
    (CHAT, chat(max_tokens="9"), 400, "invalid_type", "max_tokens"),
    (CHAT, chat(max_tokens=2.5), 400, "invalid_type", "max_tokens"),
    (CHAT, chat(max_completion_tokens=3), 400, "conflicting_values", "max_tokens"),
    (CHAT, chat(temperature=-0.1), 400, "value_out_of_range", "temperature"),
    (CHAT, chat(temperature=1e308), 400, "value_out_of_range", "temperature"),
    (CHAT, chat(top_p=0), 400, "value_out_of_range", "top_p"),
    (CHAT, chat(top_p=1.1), 400, "value_out_of_range", "top_p"),
    (CHAT, chat(seed=2**63), 400, "value_out_of_range", "seed"),
    (CHAT, chat(n=2), 400, "unsupported_parameter", "n"),
    (CHAT, chat(stop=["a"] * 5), 400, "value_too_long", "stop"),
    (CHAT, chat(stop=[""]), 400, "invalid_value", "stop"),
    (CHAT, chat(stop=[1]), 400, "invalid_type", "stop"),
    (CHAT, chat(top_logprobs=2), 400, "invalid_value", "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "value_out_of_range", "top_logprobs"),
    (CHAT, chat(stream_options={"include_usage": True}), 400, "invalid_value", "stream_options"),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "unsupported_parameter", "tools"),
    (
        CHAT,
        chat(response_format={"type": "json_object"}),
        400,
        "unsupported_parameter",
        "response_format",
    ),
    (CHAT, chat(chat_template="{{ 1 }}"), 400, "unknown_parameter", "chat_template"),
    (CHAT, chat(cache_salt="x"), 400, "unknown_parameter", "cache_salt"),
    (CHAT, chat(fidelity="perfect"), 400, "invalid_value", "fidelity"),
    (CHAT, chat(recompute_ratio=1.5), 400, "value_out_of_range", "recompute_ratio"),
    (CHAT, chat(amem={"fidelity": "fast"}, fidelity="high"), 400, "conflicting_values", "fidelity"),
    (CHAT, chat(amem={"secret": 1}), 400, "unknown_parameter", "amem.secret"),
    (CHAT, chat(amem={"policy": "magic"}), 400, "invalid_request", None),
    (CHAT, chat(amem={"remember": True}), 400, "missing_required_parameter", "user"),
    (CHAT, chat(user="a", safety_identifier="b"), 400, "conflicting_values", "safety_identifier"),
    (CHAT, chat(user="nobody", session="s"), 404, "session_not_found", "session"),
    (CHAT, chat(session="no-such"), 404, "session_not_found", "session"),
    ("/v1/memories", {"texts": ["x"]}, 400, "missing_required_parameter", "user"),
    ("/v1/memories", {"user": "bad"}, 400, "missing_required_parameter", "texts"),
    ("/v1/memories", {"user": "bad", "texts": []}, 400, "empty_value", "texts"),
    ("/v1/memories", {"user": "bad", "texts": 5}, 400, "invalid_type", "texts"),
    ("/v1/memories", {"user": "bad", "texts": ["ok", ""]}, 400, "empty_value", "texts[1]"),
    ("/v1/memories", {"user": "bad", "texts": ["ok", " \n"]}, 400, "empty_value", "texts[1]"),
    ("/v1/memories", {"user": "bad", "texts": ["ok", None]}, 400, "invalid_type", "texts[1]"),
    (
        "/v1/memories",
        {"user": "bad", "texts": ["ok", {"key": "k"}]},
        400,
        "missing_required_parameter",
        "texts[1].text",
    ),
    ("/v1/memories", {"user": "bad", "texts": ["ok"], "keys": ["a", "b"]}, 400, "invalid_value", "keys"),
    ("/v1/memories", {"user": "bad", "texts": ["ok"], "keys": [1]}, 400, "invalid_type", "keys[0]"),
    ("/v1/memories", {"user": "bad", "texts": ["ok"], "metadata": []}, 400, "invalid_type", "metadata"),
    ("/v1/memories", {"user": "bad", "texts": ["x"] * 1025}, 400, "value_too_long", "texts"),
    ("/v1/memories", {"user": "bad", "texts": ["ok", "word " * CONTEXT]}, 400, "memory_too_long", "texts[1]"),
    ("/v1/memories", {"user": "bad", "texts": ["x"], "messages": HELLO}, 400, "missing_required_parameter", "texts"),
    (
        "/v1/memories",
        {"user": "bad", "messages": [{"role": "system", "content": "x"}]},
        400,
        "invalid_value",
        "messages[0].role",
    ),
    ("/v1/recall", {"user": "bad"}, 400, "missing_required_parameter", "query"),
    ("/v1/recall", {"user": "bad", "query": " "}, 400, "empty_value", "query"),
    ("/v1/recall", {"user": "bad", "query": "x", "k": 0}, 400, "value_out_of_range", "k"),
    ("/v1/recall", {"user": "bad", "query": "x", "k": -1}, 400, "value_out_of_range", "k"),
    ("/v1/sessions", {"user": "bad", "budget_tokens": 0}, 400, "value_out_of_range", "budget_tokens"),
    ("/v1/sessions", {}, 400, "missing_required_parameter", "user"),
]


@pytest.mark.parametrize(("path", "body", "status", "code", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_fields_are_named_and_nothing_is_stored(
    server: ServerThread, path: str, body: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    answer = server.post(path, body)
    assert answer.status == status, answer.text
    error = error_of(answer)
    assert (error["code"], error["param"]) == (code, param), error
    assert server.get("/v1/memories?user=bad").json()["memories"] == []


def test_a_prompt_longer_than_the_context(server: ServerThread) -> None:
    answer = server.post(CHAT, chat(messages=[{"role": "user", "content": "word " * CONTEXT}]))
    assert answer.status == 400
    assert error_of(answer)["code"] == "context_length_exceeded"


BAD_USERS = ["", "a\x01b", "a\nb", "\x7f", "a" * 257, "é" * 129, "x" * 10_000]


@pytest.mark.parametrize("name", BAD_USERS, ids=lambda name: repr(name[:8]))
def test_user_names_that_are_refused_everywhere(server: ServerThread, name: str) -> None:
    answers = [
        server.post("/v1/memories", {"user": name, "texts": ["x"]}),
        server.post("/v1/recall", {"user": name, "query": "x"}),
        server.post("/v1/sessions", {"user": name}),
        server.post(CHAT, chat(user=name)),
        server.get("/v1/memories", params={"user": name}),
        server.delete("/v1/memories", params={"user": name}),
    ]
    for answer in answers:
        assert answer.status == 400, answer.text
        assert error_of(answer)["param"] == "user"


def test_lone_surrogates_and_nul_in_urls(server: ServerThread) -> None:
    for quoted in ("%ED%A0%80", "%FF", "a%00b"):
        for path in (f"/v1/memories?user={quoted}", f"/v1/memories/{quoted}", f"/v1/sessions/{quoted}"):
            answer = server.get(path)
            assert answer.status == 400, (path, answer.status)
            error_of(answer)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/nope", 404),
        ("GET", "/v1/memories/a/b/c", 404),
        ("GET", "/v1//memories?user=a", 404),
        ("GET", "/v1/../etc/passwd", 404),
        ("GET", "/v1/%2e%2e/%2e%2e/etc/passwd", 404),
        ("PUT", "/v1/memories", 405),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/chat/completions", 405),
        ("POST", "/health", 405),
        ("GET", "/v1/memories/nobody/mem-1", 404),
        ("DELETE", "/v1/memories/nobody/mem-1", 404),
        ("GET", "/v1/sessions/none", 404),
        ("DELETE", "/v1/sessions/none?user=nobody", 404),
        ("GET", "/v1/models/none", 404),
        ("GET", "/v1/memories", 400),
        ("GET", "/v1/memories?user=a&user=b", 400),
        ("GET", "/v1/memories?user=a&limit=0", 400),
        ("GET", "/v1/memories?user=a&limit=x", 400),
        ("GET", "/v1/memories?user=a&after=x", 400),
        ("GET", "/v1/memories?user=a&colour=red", 400),
        ("GET", "/v1/memories/a?user=b", 400),
    ],
)
def test_wrong_addresses(server: ServerThread, method: str, path: str, status: int) -> None:
    answer = server.request(method, path)
    assert answer.status == status, answer.text
    error_of(answer)
    assert (status == 405) == ("Allow" in answer.headers)


def test_a_raw_request_for_a_path_outside_is_just_not_found(server: ServerThread) -> None:
    host, port = server.server.url.removeprefix("http://").split(":")
    for target in ("/v1/../../etc/passwd", "/..%2f..%2fetc/passwd", "//etc/passwd", "/v1/memories/..;/x"):
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: raw.recv(65536), b""))
        assert b" 404 " in answer.split(b"\r\n")[0], answer


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"POST /v1/recall HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/recall HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["nonsense", "smuggling", "length", "header", "address"],
)
def test_what_is_no_http_is_turned_away(server: ServerThread, raw: bytes, caplog: pytest.LogCaptureFixture) -> None:
    host, port = server.server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(65536)
    assert b" 400 " in answer.split(b"\r\n")[0] or answer == b""
    assert "xxxx" not in caplog.text
    assert server.get("/health").status == 200


def test_every_field_that_openai_documents_is_known_by_name(server: ServerThread) -> None:
    for field in OPENAI_FIELDS:
        answer = server.post("/v1/chat/completions", {"model": "none", "messages": HELLO, field: {"strange": [1]}})
        assert answer.status in (400, 404), field
        assert error_of(answer)["code"] != "unknown_parameter"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    *OPENAI_FIELDS,
    "amem",
    "session",
    "fidelity",
    "texts",
    "keys",
    "query",
    "k",
    "budget_tokens",
    "conversation",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(POSTS), body=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5))
def test_no_body_makes_the_server_fail(server: ServerThread, path: str, body: dict[str, Any]) -> None:
    if "model" in body:
        body["model"] = "none"
    answer = server.post(path, body)
    assert answer.status < 500, (path, body, answer.text)
    if answer.status >= 400:
        error_of(answer)


def test_the_connection_serves_on_after_errors(server: ServerThread) -> None:
    client = Client(server.url)
    for _ in range(3):
        assert client.request("POST", "/v1/recall", b"{", JSON).status == 400
        assert client.get("/health").status == 200
    client.close()
