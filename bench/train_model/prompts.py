"""Examples as token ids: the prompt format that the server builds, from separately encoded parts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from amem.bench.world import PREAMBLE, Example

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

    def prompt(self, example: Example) -> Prompt:
        """The whole conversation over the example's memory, every turn answered."""
        ids = [BEGIN]
        spans, answers, prefix = [], [], 0
        if example.chunks:
            ids += [SYSTEM, *self._encode(" " + PREAMBLE)]
            prefix = len(ids)
            for text in example.chunks:
                start = len(ids)
                ids += self._encode(f"- {text}\n")
                spans.append((start, len(ids)))
            ids += [*self._encode(example.system), END]
        elif example.system:
            ids += [SYSTEM, *self._encode(" " + example.system), END]
        for question, answer in example.turns:
            ids += [USER, *self._encode(" " + question), END, ASSISTANT]
            start = len(ids)
            ids += [*self._encode(" " + answer), END]
            answers.append((start, len(ids)))
        return Prompt(ids, tuple(spans), tuple(answers), prefix)
