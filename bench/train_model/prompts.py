"""Examples as token ids: the prompt format that the server builds, from separately encoded parts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from amem.bench import vocabulary as vocab
from amem.bench.world import UNKNOWN, Example
from amem.text import PREAMBLE

BEGIN, END, SYSTEM, USER, ASSISTANT, PAD = range(6)


@dataclass(frozen=True)
class Prompt:
    """ids; chunks: (start, end) of each memory chunk; answers: (start, end) of each answer with its <|end|>."""

    ids: list[int]
    chunks: tuple[tuple[int, int], ...]
    answers: tuple[tuple[int, int], ...]
    prefix: int


class Encoder:
    """Encodes text with special tokens never recognised in it; remembers what it has encoded."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._encode = lru_cache(maxsize=200_000)(self._ids)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def pool(self) -> tuple[str, ...]:
        """Single-token words that no template of the world uses: many, so that copying pays and knowing does not."""
        used = {word for line in _wordings() for word in re.findall("[A-Za-z]+", line)}
        found = (token[1:] for token in self._tokenizer.get_vocab() if re.fullmatch("\u0120[A-Za-z]{2,}", token))
        return tuple(sorted(word for word in found if word not in used))

    def prompt(self, example: Example) -> Prompt:
        """The whole conversation over the example's memory, every turn answered."""
        ids, spans, answers = [BEGIN], [], []
        front = self._recalled(example, 0)
        prefix = 1
        if front:
            ids += [SYSTEM, *self._encode(" " + PREAMBLE)]
            prefix = len(ids)
            self._append(ids, spans, front)
            ids += [*self._encode(example.system), END]
        elif example.system:
            ids += [SYSTEM, *self._encode(" " + example.system), END]
        for number, (question, answer) in enumerate(example.turns):
            ids.append(USER)
            later = self._recalled(example, number) if number else []
            if later:
                ids += self._encode(" " + PREAMBLE)
                self._append(ids, spans, later)
            ids += [*self._encode(question if later else " " + question), END, ASSISTANT]
            start = len(ids)
            ids += [*self._encode(" " + answer), END]
            answers.append((start, len(ids)))
        return Prompt(ids, tuple(spans), tuple(answers), prefix)

    @staticmethod
    def _recalled(example: Example, turn: int) -> list[str]:
        return [text for text, place in zip(example.chunks, example.places, strict=True) if place == turn]

    def _append(self, ids: list[int], spans: list[tuple[int, int]], chunks: list[str]) -> None:
        for text in chunks:
            start = len(ids)
            ids += self._encode(f"- {text}\n")
            spans.append((start, len(ids)))


def _wordings() -> tuple[str, ...]:
    lines = (*vocab.SPEAKER_INTRO, *vocab.PRONOUN_INTRO, *vocab.ALIAS_INTRO, *vocab.CORRECTION, *vocab.KINSHIP)
    facts = (line for a in vocab.ATTRIBUTES.values() for line in (*a.third, *a.first, *a.noun, *a.questions))
    return (*lines, *facts, *vocab.SYSTEM_TEXTS, PREAMBLE, UNKNOWN, "My His Her He She")
