"""The JSON of a chat completion and of its chunks, with amem's report of what was really done."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from amem.engine.types import ModelInfo, Report
from amem.server.schema import ChatRequest
from amem.server.strict_json import Json
from amem.server.turns import Turn


def _new_id() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class Completion:
    """What stays the same over all chunks of one answer."""

    chat: ChatRequest
    user: str | None
    turn: Turn
    model: ModelInfo
    remembered: tuple[str, ...] = ()
    id: str = field(default_factory=_new_id)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, logprobs: Sequence[Json], reason: str, report: Report) -> Json:
        """The answer in one piece."""
        choice: Json = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(logprobs),
            "finish_reason": reason,
        }
        return self._head("chat.completion") | {
            "choices": [choice],
            "usage": usage(report),
            "amem": self.report(report),
        }

    def chunk(self, delta: Json, logprobs: Sequence[Json] = ()) -> Json:
        """One piece of a streamed answer."""
        return self._chunk(delta, logprobs)

    def last_chunks(self, reason: str, report: Report) -> list[Json]:
        """What ends a stream. The very last one has the `amem` report, and the usage where that was asked for."""
        finish, amem = self._chunk({}, (), reason), {"amem": self.report(report)}
        if not self.chat.include_usage:
            return [finish | amem]
        return [finish, self._head("chat.completion.chunk") | {"choices": [], "usage": usage(report)} | amem]

    def _chunk(self, delta: Json, logprobs: Sequence[Json], reason: str | None = None) -> Json:
        choice: Json = {
            "index": 0,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": reason,
        }
        body = self._head("chat.completion.chunk") | {"choices": [choice]}
        return body | {"usage": None} if self.chat.include_usage else body

    def report(self, report: Report) -> Json:
        """The `amem` object: counted by the engine from the rows that it ran."""
        return {
            "user": self.user,
            "session": self.turn.session,
            "model": self.model.name,
            "memories": [{"id": used.id, "score": used.score} for used in self.turn.memories],
            "dropped": self.turn.dropped,
            "remembered": list(self.remembered),
            "tokens": dataclasses.asdict(report.prompt),
            "charged": report.charged,
            "recompute_ratio": report.recompute_ratio,
            "effective_ratio": report.effective_ratio,
            "policy": report.policy,
            "fallback": report.fallback,
            "queue_ms": _ms(report.queue_s),
            "load_ms": _ms(report.load_s),
            "ttft_ms": _ms(report.ttft_s),
            "total_ms": _ms(report.total_s),
        }

    def _head(self, kind: str) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.chat.model,
            "system_fingerprint": f"fp_{self.model.fingerprint[:16]}",
        }

    def _logprobs(self, logprobs: Sequence[Json]) -> Json | None:
        if self.chat.sampling.logprobs is None:
            return None
        return {"content": list(logprobs), "refusal": None}


def usage(report: Report) -> Json:
    """OpenAI's usage object; `cached_tokens` are the prompt tokens whose KV was not computed for this request."""
    prompt, completion = report.prompt.total, report.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": report.prompt.reused},
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
