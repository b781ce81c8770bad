"""The synthetic world keeps its promises: determinism, held-out words, ambiguity of cross-chunk tasks."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest

from amem.bench import vocabulary
from amem.bench.scene import held_out
from amem.bench.world import CROSS_CHUNK_TASKS, GATE, LONG, MAX_CHUNKS, TASKS, UNKNOWN, Example, examples

KNOWN = {
    word.lower()
    for line in (
        *vocabulary.FILLERS,
        *vocabulary.SPEAKER_INTRO,
        *vocabulary.PRONOUN_INTRO,
        *vocabulary.ALIAS_INTRO,
        *vocabulary.CORRECTION,
        *vocabulary.KINSHIP,
        "I my he his she her and do not know",
        *(w for a in vocabulary.ATTRIBUTES.values() for w in (*a.third, *a.first, *a.noun, *a.questions)),
    )
    for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", line))
}


def words(example: Example) -> set[str]:
    text = " ".join((*example.chunks, *(part for turn in example.turns for part in turn)))
    return {w for w in re.findall(r"[A-Za-z]+", text.replace("'s ", " ")) if w.lower() not in KNOWN}


@pytest.mark.parametrize("task", TASKS)
def test_the_same_arguments_give_the_same_examples(task: str) -> None:
    assert examples(task, "heldout", 3, 20) == examples(task, "heldout", 3, 20)
    assert examples(task, "heldout", 3, 20) != examples(task, "heldout", 4, 20)


@pytest.mark.parametrize("task", TASKS)
def test_training_never_shows_a_held_out_word(task: str) -> None:
    seen = set().union(*(words(e) for e in examples(task, "train", 0, 300)))
    assert seen
    assert not {w for w in seen if held_out(w)}


@pytest.mark.parametrize("task", TASKS)
def test_held_out_examples_use_only_held_out_words(task: str) -> None:
    seen = set().union(*(words(e) for e in examples(task, "heldout", 0, 300)))
    assert seen
    assert not {w for w in seen if not held_out(w)}


def test_the_words_of_the_quickstart_are_training_words() -> None:
    assert not any(held_out(w) for w in ("Alice", "Maria", "Seattle", "Denver", "Boeing"))


@pytest.mark.parametrize("task", TASKS)
def test_shape_of_an_example(task: str) -> None:
    for e in examples(task, "heldout", 1, 200):
        assert e.task == task
        assert 1 <= len(e.chunks) <= MAX_CHUNKS
        assert len(e.chunks) == len(e.conversations) == len(e.places)
        assert len(e.turns) == len(e.values)
        assert len({question for question, _ in e.turns}) == len(e.turns) >= 1
        numbers = [c for c in e.conversations if c >= 0]
        assert numbers == sorted(numbers), "chunks of a conversation stand together"


@pytest.mark.parametrize("task", [t for t in TASKS if t != "unknown"])
def test_the_answer_is_stated_once_in_memory(task: str) -> None:
    for e in examples(task, "heldout", 2, 200):
        for (_, answer), value in zip(e.turns, e.values, strict=True):
            stated = [c for c in e.chunks if re.search(rf"\b{re.escape(value)}\b", c)]
            assert len(stated) == 1, (value, e)
            assert value in answer


@pytest.mark.parametrize("task", [t for t in CROSS_CHUNK_TASKS if t not in ("update", "alias")])
def test_the_chunk_with_the_answer_does_not_name_its_owner(task: str) -> None:
    for e in examples(task, "heldout", 2, 200):
        for (question, _), value in zip(e.turns, e.values, strict=True):
            chunk = next(c for c in e.chunks if re.search(rf"\b{re.escape(value)}\b", c))
            assert not (words_of(question) & words_of(chunk)), (question, chunk)


def words_of(text: str) -> set[str]:
    return {w for w in re.findall(r"[A-Z][a-z]+", text.replace("'s ", " ")) if w.lower() not in KNOWN}


def test_unknown_questions_have_no_answer_in_memory() -> None:
    refused = [e for e in examples("unknown", "heldout", 0, 100) if e.turns[0][1] == UNKNOWN]
    assert len(refused) == 100


@pytest.mark.parametrize(("task", "split"), [("riddle", "train"), ("fact", "test")])
def test_unknown_tasks_and_splits_are_refused(task: str, split: str) -> None:
    with pytest.raises(ValueError, match="unknown task"):
        examples(task, split, 0, 1)


@pytest.mark.parametrize("task", TASKS)
def test_a_turn_is_never_asked_before_its_memory_is_there(task: str) -> None:
    moved = 0
    for e in examples(task, "train", 0, 200, replace(GATE, turns=4, later=1.0)):
        moved += any(e.places)
        for turn, value in enumerate(e.values):
            places = [p for c, p in zip(e.chunks, e.places, strict=True) if re.search(rf"\b{re.escape(value)}\b", c)]
            assert all(place <= turn for place in places), e
        for first, second in itertools.pairwise(zip(e.conversations, e.places, strict=True)):
            assert first[0] != second[0] or first[0] < 0 or first[1] == second[1], "a conversation moves whole"
    assert moved or task == "unknown"


def test_long_contexts_share_chunks_among_sentences() -> None:
    for e in examples("fact", "heldout", 0, 20, LONG):
        assert len(e.chunks) <= MAX_CHUNKS
        assert max(c.count(".") for c in e.chunks) >= 5
