"""From memories and messages to segments of token ids: what the engine is asked to run.

A prompt is `[template head + preamble] [memory chunks …] [client's system text] [history] [question]`. Memory stands
in front of everything that the client writes, so that nothing a client changes from call to call moves it; memory
recalled later in a conversation stands in front of the turn that needed it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from amem.engine.types import ChunkSpec, Segment
from amem.text import ChatFormat, Message, Slot

MIN_CHUNK_TOKENS = 8
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")


class MemoryText(Protocol):
    """What the planner needs of a memory."""

    @property
    def id(self) -> str: ...
    @property
    def text(self) -> str: ...


@dataclass(frozen=True, slots=True)
class PlanConfig:
    """`window`: preceding chunks of the conversation that a chunk is computed behind. Chunks split above
    `max_chunk_tokens`."""

    window: int = 2
    max_chunk_tokens: int = 512

    def __post_init__(self) -> None:
        if self.window < 0 or self.max_chunk_tokens < MIN_CHUNK_TOKENS:
            raise ValueError(
                f"window {self.window} must not be negative, max_chunk_tokens {self.max_chunk_tokens} at least "
                f"{MIN_CHUNK_TOKENS}: one character may take that many with its marks"
            )


@dataclass(frozen=True, slots=True)
class PlacedMemory:
    """A recalled memory with the live memories just before it in its conversation, oldest first."""

    memory: MemoryText
    predecessors: tuple[MemoryText, ...] = ()


@dataclass(frozen=True, slots=True)
class PlacedBatch:
    """Memories recalled together. `turn` is the index of the user message they stand next to, None for the front."""

    memories: tuple[PlacedMemory, ...]
    turn: int | None = None


@dataclass(frozen=True, slots=True)
class PromptPlan:
    segments: tuple[Segment, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class _Piece:
    memory: str
    ids: tuple[int, ...]


class Planner:
    """Pure functions of the chat format: the same input gives the same ids, so KV is found again."""

    def __init__(self, chat: ChatFormat, config: PlanConfig | None = None) -> None:
        self.chat = chat
        self.config = config or PlanConfig()

    def count(self, text: str) -> int:
        """Tokens that a memory of this text takes in a prompt."""
        return sum(len(ids) for ids in self._split(text.strip()))

    def chunk_specs(self, memory: MemoryText, predecessors: Sequence[MemoryText] = ()) -> tuple[ChunkSpec, ...]:
        """The chunks of one memory, each behind the trusted prefix and up to `window` preceding chunks."""
        window, trusted = self.config.window, self.chat.trusted_prefix
        before = [piece for earlier in predecessors for piece in self._pieces(earlier)][-window:] if window else []
        specs = []
        for piece in self._pieces(memory):
            context = trusted + tuple(token for earlier in before for token in earlier.ids)
            behind = tuple(dict.fromkeys(p.memory for p in before if p.memory != memory.id))
            specs.append(ChunkSpec(piece.ids, context, len(trusted), memory.id, behind))
            before = [*before, piece][-window:] if window else []
        return tuple(specs)

    def prompt(self, messages: Sequence[Message], batches: Sequence[PlacedBatch] = ()) -> PromptPlan:
        """Segments of a whole prompt. Raises TextError when the template refuses the messages."""
        placed: dict[int | None, list[PlacedMemory]] = {}
        for batch in batches:
            if batch.memories:
                placed.setdefault(batch.turn, []).extend(batch.memories)
        segments: list[Segment] = []
        for part in self.chat.parts(messages, [Slot(turn) for turn in placed]):
            if isinstance(part, Slot):
                for item in placed[part.turn]:
                    specs = self.chunk_specs(item.memory, item.predecessors)
                    segments += [Segment(spec.token_ids, spec) for spec in specs]
            elif part:
                segments.append(Segment(part))
        return PromptPlan(tuple(segments), sum(len(segment.token_ids) for segment in segments))

    def _pieces(self, memory: MemoryText) -> list[_Piece]:
        return [_Piece(memory.id, ids) for ids in self._split(memory.text.strip())]

    def _split(self, text: str) -> list[tuple[int, ...]]:
        whole = self._ids(text)
        if len(whole) <= self.config.max_chunk_tokens:
            return [whole]
        chunks: list[tuple[int, ...]] = []
        packed = ""
        for unit in self._units(text):
            longer = f"{packed} {unit}" if packed else unit
            if packed and len(self._ids(longer)) > self.config.max_chunk_tokens:
                chunks.append(self._ids(packed))
                longer = unit
            packed = longer
        return [*chunks, self._ids(packed)]

    def _units(self, text: str) -> list[str]:
        """Sentences; one that is too long by itself is cut at its middle word, a word at its middle character."""
        units: list[str] = []
        for sentence in filter(None, _SENTENCE_END.split(text)):
            if len(self._ids(sentence)) <= self.config.max_chunk_tokens:
                units.append(sentence)
                continue
            words = sentence.split(" ")
            middle = len(words) // 2
            halves = (
                (" ".join(words[:middle]), " ".join(words[middle:]))
                if middle
                else (sentence[: len(sentence) // 2], sentence[len(sentence) // 2 :])
            )
            units += [unit for half in halves for unit in self._units(half)]
        return units

    def _ids(self, text: str) -> tuple[int, ...]:
        return self.chat.tokenizer.encode(f"- {text}\n")
