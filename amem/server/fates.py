"""The fate of every field of a chat request: implemented, accepted without effect, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from amem.server.errors import bad_request
from amem.server.strict_json import Json


class Fate(str, Enum):
    """What the server does with a field."""

    IMPLEMENTED = "implemented"
    NO_EFFECT = "accepted without effect"
    REFUSED = "refused"


_DONE, _NOTED, _REFUSED = Fate.IMPLEMENTED, Fate.NO_EFFECT, Fate.REFUSED

OPENAI_FIELDS: dict[str, Fate] = {
    "messages": _DONE,
    "model": _DONE,
    "audio": _REFUSED,
    "frequency_penalty": _REFUSED,
    "function_call": _REFUSED,
    "functions": _REFUSED,
    "logit_bias": _REFUSED,
    "logprobs": _DONE,
    "max_completion_tokens": _DONE,
    "max_tokens": _DONE,
    "metadata": _NOTED,
    "modalities": _REFUSED,
    "moderation": _REFUSED,
    "n": _REFUSED,
    "parallel_tool_calls": _NOTED,
    "prediction": _REFUSED,
    "presence_penalty": _REFUSED,
    "prompt_cache_key": _NOTED,
    "prompt_cache_options": _NOTED,
    "prompt_cache_retention": _NOTED,
    "reasoning_effort": _NOTED,
    "response_format": _REFUSED,
    "safety_identifier": _DONE,
    "seed": _DONE,
    "service_tier": _NOTED,
    "stop": _DONE,
    "store": _REFUSED,
    "stream": _DONE,
    "stream_options": _DONE,
    "temperature": _DONE,
    "tool_choice": _REFUSED,
    "tools": _REFUSED,
    "top_logprobs": _DONE,
    "top_p": _DONE,
    "user": _DONE,
    "verbosity": _NOTED,
    "web_search_options": _REFUSED,
}
OTHER_FIELDS: dict[str, Fate] = dict.fromkeys(
    ("top_k", "min_p", "session", "fidelity", "recompute_ratio", "amem"), Fate.IMPLEMENTED
)
AMEM_FIELDS = ("user", "session", "fidelity", "recompute_ratio", "policy", "remember", "k")

# A refused field may still say what happens anyway, such as n=1.
ASKS_NOTHING: dict[str, Callable[[Any], bool]] = {
    "frequency_penalty": lambda v: type(v) in (int, float) and v == 0,
    "function_call": lambda v: v in ("none", "auto"),
    "functions": lambda v: v == [],
    "logit_bias": lambda v: v == {},
    "modalities": lambda v: v == ["text"],
    "n": lambda v: type(v) is int and v == 1,
    "presence_penalty": lambda v: type(v) in (int, float) and v == 0,
    "response_format": lambda v: v == {"type": "text"},
    "store": lambda v: v is False,
    "tool_choice": lambda v: v in ("none", "auto"),
    "tools": lambda v: v == [],
}


def refuse_unsupported(body: Json) -> None:
    """Raises ApiError 400 for a field that is unknown or asks for something the server does not do."""
    fates = OPENAI_FIELDS | OTHER_FIELDS
    for name, value in body.items():
        if name not in fates:
            raise bad_request(f"Unknown field: {name[:64]}.", name[:64], "unknown_parameter")
        harmless = value is None or (name in ASKS_NOTHING and ASKS_NOTHING[name](value))
        if fates[name] is Fate.REFUSED and not harmless:
            raise bad_request(f"{name} with this value is not supported by amem.", name, "unsupported_parameter")
