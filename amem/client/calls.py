"""What the SDK asks of a server, shared by the blocking and the asyncio client.

Every public method of the clients is one builder here: it returns a `Call`, a client carries it out. User names
travel in the query string, never in the path, so that "a/b", ".." or "?" need no care.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode

from amem.client.answers import AmemError, Answer, Json, Page, as_object, error_from, whole_answer

T = TypeVar("T")
Texts = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]


@dataclass(frozen=True)
class Call(Generic[T]):
    """One HTTP request and how to read its answer.

    timeout: seconds without a byte, None for the client's own. tried_again: whether a lost connection or a busy
    server leads to another try.
    """

    method: str
    path: str
    parse: Callable[[Any], T]
    query: tuple[tuple[str, str], ...] = ()
    body: Json | None = None
    idempotency_key: str | None = None
    timeout: float | None = None
    tried_again: bool = True

    def target(self, prefix: str) -> str:
        """Path and query as they stand in the request line. Raises AmemError(400) on text that is not Unicode."""
        try:
            return prefix + self.path + ("?" + urlencode(self.query) if self.query else "")
        except UnicodeEncodeError as error:
            raise AmemError(400, f"not valid Unicode text: {error.object!r}", "invalid_text") from error

    def payload(self) -> bytes | None:
        """The JSON body. Raises AmemError(400) on what JSON cannot say (NaN, a set, a lone surrogate…)."""
        if self.body is None:
            return None
        try:
            return json.dumps(self.body, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise AmemError(400, f"this cannot be sent as JSON: {error}", "invalid_json") from error

    def headers(self, api_key: str | None) -> dict[str, str]:
        headers = {"Accept": "application/json"}
        if self.body is not None:
            headers["Content-Type"] = "application/json"
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        if self.idempotency_key is not None:
            headers["Idempotency-Key"] = self.idempotency_key
        return headers


def health() -> Call[Json]:
    """State of the server: {"status": "ok", …}. Raises AmemError(503) while the engine is down."""
    return Call("GET", "/health", as_object, tried_again=False)


def models() -> Call[list[Json]]:
    """The names that `ask` accepts as `model`."""
    return Call("GET", "/v1/models", _items("data"))


def remember(
    user: str,
    texts: Texts | None = None,
    *,
    messages: Sequence[Mapping[str, Any]] | None = None,
    keys: Sequence[str | None] | None = None,
    conversation: str | None = None,
    idempotency_key: str | None = None,
) -> Call[list[Json]]:
    """Store texts, or the messages of a dialogue, durably when this returns. One {"id", "outcome"} each, in order.

    A text may be {"text", "key", "metadata"}. The same `key` again supersedes the older memory; an exact repeat is
    counted, not stored twice. `conversation` names the dialogue that texts belong to, so that each is read in the
    light of those before it. The same `idempotency_key` again changes nothing and gets the first answer.
    """
    one = isinstance(texts, str | Mapping)
    body: Json = {
        "user": user,
        "texts": [texts] if one else None if texts is None else list(texts),
        "messages": None if messages is None else [dict(message) for message in messages],
        "keys": None if keys is None else list(keys),
        "conversation": conversation,
    }
    return _write("POST", "/v1/memories", _items("memories"), body=_given(body), key=idempotency_key)


def list_memories(user: str, *, limit: int = 100, after: str | None = None) -> Call[Page]:
    """Live memories of a user, oldest first. The result is a list with `next`, which goes into `after`."""
    return Call("GET", "/v1/memories", _page("memories"), (("user", user), *_part(limit, after)))


def get(user: str, memory_id: str) -> Call[Json]:
    """One memory. Raises AmemError(404) when the user has none of that id."""
    return Call("GET", "/v1/memories", as_object, _these(user, memory_id))


def update(
    user: str, memory_id: str, text: str | None = None, *, metadata: Json | None = None, version: int | None = None
) -> Call[Json]:
    """Change a memory's text or metadata; KV computed from the old text is gone when this returns.

    With `version`, only if nobody changed it since: AmemError(409) otherwise.
    """
    body = _given({"text": text, "metadata": metadata, "version": version})
    return _write("PATCH", "/v1/memories", as_object, _these(user, memory_id), body)


def forget(user: str, memory_id: str | Sequence[str]) -> Call[Json]:
    """Erase a memory, or several, all or none: text, index, every KV computed from it or behind it. The receipt."""
    return _write("DELETE", "/v1/memories", as_object, _these(user, memory_id))


def forget_all(user: str) -> Call[Json]:
    """Erase everything of a user. Returns the receipt."""
    return _write("DELETE", "/v1/memories", as_object, (("user", user),))


def recall(
    user: str, query: str, *, k: int | None = None, budget_tokens: int | None = None, explain: bool = False
) -> Call[list[Json]]:
    """The memories that a question would get, best first, with their scores; nothing is generated."""
    body = {"user": user, "query": query, "k": k, "budget_tokens": budget_tokens, "explain": explain or None}
    return Call("POST", "/v1/recall", _items("memories"), body=_given(body))


def start_session(user: str, *, budget_tokens: int | None = None, session: str | None = None) -> Call[str]:
    """Open a session, the working set that one conversation keeps in KV. Returns its id, `session` if given."""
    body = _given({"user": user, "budget_tokens": budget_tokens, "session": session})
    return _write("POST", "/v1/sessions", lambda answer: str(as_object(answer)["id"]), body=body)


def session(user: str, session_id: str) -> Call[Json]:
    """What a session holds: memories in order, tokens, epoch."""
    return Call("GET", _session_path(session_id), as_object, (("user", user),))


def end_session(user: str, session_id: str) -> Call[Json]:
    """Drop a session. Its memories stay."""
    return _write("DELETE", _session_path(session_id), as_object, (("user", user),))


def ask_full(
    user: str | None,
    question: str | None = None,
    *,
    messages: Sequence[Mapping[str, Any]] | None = None,
    session: str | None = None,
    fidelity: str | None = None,
    recompute_ratio: float | None = None,
    max_tokens: int | None = None,
    remember: bool = False,
    model: str = "amem",
    timeout: float | None = None,
    **openai: Any,
) -> Call[Answer]:
    """Ask with memory and get an `Answer`: text, what was reused, what was computed, how long it took.

    `question` is one user turn, put behind `messages` if both are given. `fidelity` is exact, high, balanced or
    fast; `recompute_ratio` (0 to 1) overrides it. `remember=True` also stores the question. Further arguments are
    OpenAI's: temperature, top_p, stop, seed… Without `user` memory is off.
    """
    turns = [dict(message) for message in messages or ()]
    if question is not None:
        turns.append({"role": "user", "content": question})
    body = _given({"model": model, "user": user, "session": session, "max_tokens": max_tokens})
    chosen = _given({"fidelity": fidelity, "recompute_ratio": recompute_ratio, "remember": remember or None})
    body |= {"messages": turns, **({"amem": chosen} if chosen else {}), **openai}
    key = secrets.token_hex(16) if remember else None
    return Call("POST", "/v1/chat/completions", whole_answer, body=body, idempotency_key=key, timeout=timeout)


def as_stream(call: Call[Answer]) -> Call[Answer]:
    """The same question, answered piece by piece over server-sent events."""
    body = (call.body or {}) | {"stream": True, "stream_options": {"include_usage": True}}
    return replace(call, body=body)


def users(*, limit: int = 1000, after: str | None = None) -> Call[Page]:
    """Who has memories, and how many, by name. The result is a list with `next`, which goes into `after`."""
    return Call("GET", "/v1/users", _page("users"), _part(limit, after))


def stats() -> Call[Json]:
    """Counters of memory, KV store and engine."""
    return Call("GET", "/v1/stats", as_object)


def result(call: Call[T], status: int, body: bytes) -> T:
    """What a finished HTTP exchange means. Raises AmemError on an error status or an answer of another shape."""
    if status >= 400:
        raise error_from(status, body)
    try:
        return call.parse(json.loads(body or b"{}"))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise AmemError(status, f"not an answer of an amem server: {error!r}", "bad_answer") from error


def _write(
    method: str,
    path: str,
    parse: Callable[[Any], T],
    query: tuple[tuple[str, str], ...] = (),
    body: Json | None = None,
    key: str | None = None,
) -> Call[T]:
    return Call(method, path, parse, query, body, key or secrets.token_hex(16))


def _these(user: str, memory_id: str | Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The query that names these memories. Without one it would mean all of the user's, so that is refused here."""
    ids = [memory_id] if isinstance(memory_id, str) else list(memory_id or ())
    if not ids or not all(isinstance(item, str) and item for item in ids):
        raise AmemError(400, f"not the id of a memory: {memory_id!r}", "invalid_id")
    return (("user", user), *(("id", item) for item in ids))


def _given(fields: Json) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def _session_path(session_id: str) -> str:
    try:
        return "/v1/sessions/" + quote(session_id, safe="")
    except UnicodeEncodeError as error:
        raise AmemError(400, f"not valid Unicode text: {session_id!r}", "invalid_text") from error


def _part(limit: int, after: str | None) -> tuple[tuple[str, str], ...]:
    return (("limit", str(limit)), *((("after", after),) if after is not None else ()))


def _page(name: str) -> Callable[[Any], Page]:
    return lambda answer: Page.of(answer, name)


def _items(name: str) -> Callable[[Any], list[Json]]:
    return lambda answer: [as_object(item) for item in as_object(answer)[name]]
