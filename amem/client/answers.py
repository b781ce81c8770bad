"""What the SDK makes of a server's answers: typed errors, answers, and streams put together."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


class AmemError(Exception):
    """A request that failed.

    status: the HTTP status, or 0 when no answer came (refused, reset, timed out, not HTTP).
    detail: what went wrong, for people. code: a stable name for it, or None. retry_after: seconds that the server
    asked to wait, or None.
    """

    def __init__(self, status: int, detail: str, code: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(f"{detail} (status {status})" if status else detail)
        self.status = status
        self.detail = detail
        self.code = code
        self.retry_after = retry_after


class Page(list[Json]):
    """A part of a longer list. next: where the following part begins, None at the end."""

    def __init__(self, items: Iterable[Json], next: str | None = None) -> None:
        super().__init__(items)
        self.next = next

    @classmethod
    def of(cls, answer: Any, name: str) -> Page:
        """From the field `name` of the answer of a list route."""
        return cls((as_object(item) for item in as_object(answer)[name]), answer.get("next"))


@dataclass(frozen=True)
class Answer:
    """An answer and what was measured while it was made.

    report: the server's `amem` object: tokens by source, charged prefill, time to first token, memories used.
    usage: the OpenAI usage object. session: the session it belongs to, or None without memory.
    """

    text: str
    finish_reason: str | None
    session: str | None
    report: Json = field(default_factory=dict)
    usage: Json = field(default_factory=dict)
    raw: Json = field(default_factory=dict, repr=False)


class Transcript:
    """Puts a streamed answer together, line by line of its server-sent events."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._last: Json = {}
        self._finish_reason: str | None = None
        self.done = False

    def push(self, line: bytes) -> str:
        """The text that this line adds, often none. Raises AmemError on an error event or a line of another kind."""
        if not line.startswith(b"data:"):
            return ""
        data = line[5:].strip()
        if data == b"[DONE]":
            self.done = True
            return ""
        try:
            event = as_object(json.loads(data))
            if "error" in event:
                raise error_from(int(event["error"].get("status") or 500), data)
            self._last |= {name: value for name, value in event.items() if value is not None}
            choice = (event.get("choices") or [{}])[0]
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            piece = str((choice.get("delta") or {}).get("content") or "")
        except (ValueError, TypeError, AttributeError) as error:
            raise AmemError(0, f"a broken event in the stream: {error!r}", "bad_answer") from error
        self._pieces.append(piece)
        return piece

    def answer(self) -> Answer:
        """The whole answer. Raises AmemError(0) if the stream ended before the server said that it was done."""
        if not self.done:
            raise AmemError(0, "the answer broke off: the connection closed in the middle of it", "broken_stream")
        report = self._last.get("amem") or {}
        text, usage = "".join(self._pieces), self._last.get("usage") or {}
        return Answer(text, self._finish_reason, report.get("session"), report, usage, self._last)


def error_from(status: int, body: bytes, retry_after: str | None = None) -> AmemError:
    """The typed error of an HTTP answer; reads OpenAI's {"error": {"message", "code"}} and survives anything else."""
    wait = float(retry_after) if retry_after and retry_after.isdecimal() else None
    try:
        error = json.loads(body)["error"]
        return AmemError(status, str(error["message"]), error.get("code") or error.get("type"), wait)
    except (ValueError, KeyError, TypeError, AttributeError):
        text = body[:2000].decode("utf-8", "replace").strip()
        return AmemError(status, text or "the server gave no reason", retry_after=wait)


def as_object(answer: Any) -> Json:
    """The same, if it is a JSON object. Raises TypeError otherwise."""
    if not isinstance(answer, dict):
        raise TypeError(f"expected an object, got {type(answer).__name__}")
    return answer


def whole_answer(answer: Any) -> Answer:
    """The `Answer` of a chat completion that was not streamed."""
    choice = as_object(answer)["choices"][0]
    report = answer.get("amem") or {}
    return Answer(
        text=choice["message"]["content"] or "",
        finish_reason=choice.get("finish_reason"),
        session=report.get("session"),
        report=report,
        usage=answer.get("usage") or {},
        raw=answer,
    )
