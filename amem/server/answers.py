"""From the engine's tokens to the answer's text: detokenised, cut at stop strings, with log-probabilities."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from amem.engine.messages import Finished, Tokens
from amem.engine.types import FinishReason, Report, TokenLogprob
from amem.server.strict_json import Json
from amem.text import ChatFormat, StopStrings


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer; `logprobs` in OpenAI's shape, empty when not asked for."""

    text: str
    logprobs: tuple[Json, ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """The last event. `reason` is OpenAI's finish_reason."""

    reason: str
    report: Report


async def answer(
    events: AsyncIterator[Tokens | Finished],
    chat: ChatFormat,
    stops: Sequence[str],
    ends: frozenset[int],
    halt: Callable[[], None],
) -> AsyncGenerator[Delta | End, None]:
    """Deltas, then one End. `ends` are the ids that end a turn; they have no text and no log-probability.

    `halt` is called at a stop string: the engine need not go on, what it still sends is left out.
    """
    text, stop, halted = chat.stream(), StopStrings(stops), False
    async for event in events:
        if isinstance(event, Finished):
            if not halted:
                rest, halted = stop.push(text.finish())
                if tail := rest if halted else rest + stop.finish():
                    yield Delta(tail)
            long = event.reason is FinishReason.LENGTH and not halted
            yield End("length" if long else "stop", event.report)
        elif not halted:
            shown, halted = stop.push(text.push(event.token_ids))
            if halted:
                halt()
            logprobs = _logprobs(chat, event, ends)
            if shown or logprobs:
                yield Delta(shown, logprobs)


def _logprobs(chat: ChatFormat, event: Tokens, ends: frozenset[int]) -> tuple[Json, ...]:
    pairs = zip(event.token_ids, event.logprobs, strict=False)
    return tuple(_logprob(chat, token, found) for token, found in pairs if token not in ends)


def _logprob(chat: ChatFormat, token: int, found: TokenLogprob) -> Json:
    top = [_token(chat, other, logprob) for other, logprob in found.top]
    return _token(chat, token, found.logprob) | {"top_logprobs": top}


def _token(chat: ChatFormat, token: int, logprob: float) -> Json:
    text = chat.tokenizer.decode([token])
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
