"""What a chat request says, once it is known to be valid."""

from __future__ import annotations

from dataclasses import dataclass

from amem.engine.types import Fidelity
from amem.server.config import Limits
from amem.server.errors import bad_request
from amem.server.fates import AMEM_FIELDS, refuse_unsupported
from amem.server.fields import Fields, merged
from amem.server.strict_json import Json, kind_of
from amem.text import Message

MAX_RECALL = 64
_MAX_STOPS, _MAX_STOP_CHARACTERS = 4, 256
_MAX_TOP_LOGPROBS = 20
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MESSAGE_FIELDS = frozenset(["role", "content", "name", "refusal", "audio", "tool_calls", "function_call"])
_PART_FIELDS = frozenset(["type", "text", "prompt_cache_breakpoint"])


@dataclass(frozen=True, slots=True)
class AmemOptions:
    """amem's own fields. None means the server's default; `recall` 0 means that nothing is looked up."""

    session: str | None = None
    fidelity: Fidelity | None = None
    recompute_ratio: float | None = None
    policy: str | None = None
    remember: bool = False
    recall: int | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the answer is drawn. Greedy unless a temperature is given; `max_tokens` None means the server's default."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A valid chat request. `user` is what the body says; the header is read beside it."""

    model: str
    messages: tuple[Message, ...]
    user: str | None
    sampling: Sampling
    amem: AmemOptions
    stream: bool = False
    include_usage: bool = False

    @property
    def question(self) -> str | None:
        """The last user message, which memory is looked up for."""
        return next((m.content for m in reversed(self.messages) if m.role == "user" and m.content.strip()), None)


def chat_request(body: Json, limits: Limits) -> ChatRequest:
    """Raises ApiError 400 naming the field at fault."""
    fields = Fields(body)
    refuse_unsupported(body)
    inner = fields.object("amem") or Fields({}, "amem")
    inner.only(AMEM_FIELDS)
    stream = fields.flag("stream")
    return ChatRequest(
        model=fields.needed_text("model", 512),
        messages=_messages(fields, limits),
        user=_user(fields, inner),
        sampling=_sampling(fields),
        amem=_amem(fields, inner),
        stream=stream,
        include_usage=_include_usage(fields, stream),
    )


def _user(fields: Fields, inner: Fields) -> str | None:
    user = merged(fields.text("user", blank=True), inner.text("user", blank=True), "user")
    safety = fields.text("safety_identifier", blank=True)
    if user is not None and safety is not None and user != safety:
        message = "user and safety_identifier name different users; send one of them."
        raise bad_request(message, "safety_identifier", "conflicting_values")
    return safety if user is None else user


def _amem(fields: Fields, inner: Fields) -> AmemOptions:
    levels = [level.value for level in Fidelity]
    fidelity = merged(fields.choice("fidelity", levels), inner.choice("fidelity", levels), "fidelity")
    ratio = merged(fields.number("recompute_ratio", 0, 1), inner.number("recompute_ratio", 0, 1), "recompute_ratio")
    return AmemOptions(
        session=merged(fields.text("session", 256), inner.text("session", 256), "session"),
        fidelity=None if fidelity is None else Fidelity(fidelity),
        recompute_ratio=ratio,
        policy=inner.text("policy", 64),
        remember=inner.flag("remember"),
        recall=inner.integer("k", 0, MAX_RECALL),
    )


def _sampling(fields: Fields) -> Sampling:
    limit = fields.integer("max_completion_tokens", 1, 1 << 31)
    older = fields.integer("max_tokens", 1, 1 << 31)
    if limit is not None and older is not None and limit != older:
        message = "max_tokens and max_completion_tokens differ; send one of them."
        raise bad_request(message, "max_tokens", "conflicting_values")
    top_p = fields.number("top_p", 0, 1)
    if top_p == 0:
        raise bad_request("top_p must be above 0.", "top_p", "value_out_of_range")
    top_k = fields.integer("top_k", -1, 1 << 31)
    return Sampling(
        temperature=fields.number("temperature", 0, 2) or 0.0,
        top_p=1.0 if top_p is None else top_p,
        top_k=max(top_k or 0, 0),
        min_p=fields.number("min_p", 0, 1) or 0.0,
        seed=fields.integer("seed", -(1 << 63), (1 << 63) - 1),
        max_tokens=older if limit is None else limit,
        stop=_stops(fields),
        logprobs=_logprobs(fields),
    )


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    stops = [value] if isinstance(value, str) else fields.array("stop") or []
    if len(stops) > _MAX_STOPS:
        raise bad_request(f"stop takes at most {_MAX_STOPS} strings.", "stop", "value_too_long")
    for stop in stops:
        if not isinstance(stop, str):
            raise bad_request(f"stop must hold strings, not {kind_of(stop)}.", "stop", "invalid_type")
        if not 0 < len(stop) <= _MAX_STOP_CHARACTERS:
            message = f"A stop string has 1 to {_MAX_STOP_CHARACTERS} characters, this one has {len(stop)}."
            raise bad_request(message, "stop")
    return tuple(stops)


def _logprobs(fields: Fields) -> int | None:
    top = fields.integer("top_logprobs", 0, _MAX_TOP_LOGPROBS)
    if fields.flag("logprobs"):
        return top or 0
    if top:
        raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
    return None


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.object("stream_options")
    if options is None:
        return False
    if not stream:
        raise bad_request("stream_options is only allowed when stream is true.", "stream_options")
    options.only(("include_usage", "include_obfuscation"))
    options.flag("include_obfuscation")
    return options.flag("include_usage")


def _messages(fields: Fields, limits: Limits) -> tuple[Message, ...]:
    items = fields.needed("messages", fields.array("messages"))
    if not items:
        raise bad_request("messages is empty. Send at least one message.", "messages", "empty_value")
    if len(items) > limits.max_messages:
        message = f"messages has {len(items)} entries; at most {limits.max_messages} are allowed."
        raise bad_request(message, "messages", "value_too_long")
    return tuple(_message(Fields.of(item, f"messages[{index}]")) for index, item in enumerate(items))


def _message(fields: Fields) -> Message:
    fields.only(_MESSAGE_FIELDS | {"tool_call_id"})
    role = fields.needed_text("role")
    if role not in _ROLES:
        known = ", ".join(_ROLES)
        raise bad_request(f"The role {role[:32]!r} is not supported; use one of {known}.", fields.name("role"))
    for name in ("refusal", "audio", "tool_calls", "function_call", "tool_call_id"):
        if fields.get(name) not in (None, []):
            raise bad_request(
                f"{fields.name(name)} is not supported by amem.", fields.name(name), "unsupported_parameter"
            )
    fields.text("name", 256, blank=True)
    return Message(_ROLES[role], _content(fields))


def _content(fields: Fields) -> str:
    content = fields.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        raise fields.missing("content")
    if not isinstance(content, list):
        message = f"{fields.name('content')} must be a string or an array of parts, not {kind_of(content)}."
        raise bad_request(message, fields.name("content"), "invalid_type")
    return "".join(_part(Fields.of(item, f"{fields.name('content')}[{i}]")) for i, item in enumerate(content))


def _part(fields: Fields) -> str:
    kind = fields.needed_text("type", 64)
    if kind != "text":
        message = f"Content parts of type {kind!r} are not supported; this model reads text."
        raise bad_request(message, fields.name("type"), "unsupported_content")
    fields.only(_PART_FIELDS)
    return fields.needed("text", fields.text("text", blank=True))
