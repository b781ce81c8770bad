"""Memories and questions of the size a bench asks for, drawn from the synthetic world."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from amem.bench.scene import Level
from amem.bench.world import CROSS_CHUNK_TASKS, Example, examples
from amem.memory.plan import PlacedBatch, PlacedMemory, Planner

SINGLE_TASKS = ("fact", "compound", "two_hop")


@dataclass(frozen=True, slots=True)
class Note:
    """A memory as the planner sees it, with its place: `conversation` is -1 for a single fact."""

    id: str
    text: str
    conversation: int = -1


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    answer: str
    task: str


@dataclass(frozen=True, slots=True)
class Workload:
    notes: tuple[Note, ...]
    questions: tuple[Question, ...]

    def placed(self, notes: Sequence[Note]) -> PlacedBatch:
        """`notes` in the order given, each with every note before it in its conversation as predecessors."""
        return PlacedBatch(tuple(PlacedMemory(note, self.predecessors(note)) for note in notes))

    def predecessors(self, note: Note) -> tuple[Note, ...]:
        if note.conversation < 0:
            return ()
        before = self.notes[: self.notes.index(note)]
        return tuple(earlier for earlier in before if earlier.conversation == note.conversation)


def of_example(example: Example) -> Workload:
    """The memories of one example as they are, its turns as questions."""
    notes = tuple(
        Note(f"m{i}", text, conversation)
        for i, (text, conversation) in enumerate(zip(example.chunks, example.conversations, strict=True))
    )
    return Workload(notes, tuple(Question(q, a, example.task) for q, a in example.turns))


def large(planner: Planner, tokens: int, questions: int, seed: int, per_note: int = 64) -> Workload:
    """At least `tokens` tokens of memory: half of it notes of about `per_note` tokens that hold several facts, half
    conversations. No word names two people. Raises ValueError when there are fewer questions than asked for."""
    source = _Source(planner, seed)
    notes: list[Note] = []
    asked: list[Question] = []
    while sum(planner.count(note.text) for note in notes) < tokens:
        if len(notes) % 2 == 0:
            text, found = source.packed(per_note)
            notes.append(Note(f"m{len(notes)}", text))
        else:
            chunks, found = source.conversation()
            number = len(notes)
            notes += [Note(f"m{number + i}", chunk, number) for i, chunk in enumerate(chunks)]
            if len(chunks) % 2 == 0:
                text, more = source.packed(per_note)
                notes.append(Note(f"m{len(notes)}", text))
                found = [*found, *more]
        asked += found
    random.Random(f"questions/{seed}").shuffle(asked)
    if len(asked) < questions:
        raise ValueError(f"{tokens} tokens of memory hold {len(asked)} questions, {questions} were asked for")
    return Workload(tuple(notes), tuple(asked[:questions]))


class _Source:
    """Examples of two people each, none of which shares a capitalised word with an earlier one."""

    def __init__(self, planner: Planner, seed: int) -> None:
        self._planner = planner
        self._rng = random.Random(f"large/{seed}")
        self._seen: set[str] = set()
        self._drawn = 0

    def packed(self, tokens: int) -> tuple[str, list[Question]]:
        sentences: list[str] = []
        questions: list[Question] = []
        while self._planner.count(" ".join(sentences)) < tokens:
            example = self._fresh(SINGLE_TASKS)
            sentences += example.chunks
            questions += [Question(q, a, example.task) for q, a in example.turns]
        return " ".join(sentences), questions

    def conversation(self) -> tuple[tuple[str, ...], list[Question]]:
        example = self._fresh(CROSS_CHUNK_TASKS)
        return example.chunks, [Question(q, a, example.task) for q, a in example.turns]

    def _fresh(self, tasks: Sequence[str]) -> Example:
        level = Level(people=(2, 2), real=0.0, fillers=(0, 0), mixed=0, turns=1, system=0.0)
        while True:
            self._drawn += 1
            (example,) = examples(self._rng.choice(tasks), "heldout", self._rng.getrandbits(48), 1, level)
            words = {word.strip(".,:?!'s") for chunk in example.chunks for word in chunk.split()}
            names = {word for word in words if word[:1].isupper() and len(word) > 2} - _COMMON
            if not names & self._seen or self._drawn % 200 == 0:
                self._seen |= names
                return example


_COMMON = frozenset(
    ("Notes", "From", "Today", "Correction", "Change", "Everyone", "The", "His", "Her", "She", "Monday", "Friday")
)
