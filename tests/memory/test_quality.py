"""Whether recall finds the evidence: a seeded set of conversations with labels, and the quickstart's questions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from amem.memory import lexical, recall
from amem.memory.service import MemoryService
from amem.memory.tenant import TenantMemory
from amem.memory.types import NewMemory, RecallOptions

NAMES = (
    "Alma Bruno Carla Dmitri Esther Farid Greta Hugo Ines Jonas Kira Lamar Mina Nils Olga Pavel Rosa Stefan".split()
)
CITIES = "Lisbon Denver Oslo Kyoto Quito Dakar Riga Perth Turin Lima Cork Basel Osaka Ghent Malmo Tunis Sofia".split()
FIRMS = "Boeing Nokia Philips Siemens Bosch Lego Ikea Volvo Shell Roche Nestle Danone Airbus Ericsson".split()
PETS = "parrot tortoise greyhound hamster ferret pony iguana rabbit".split()
PET_NAMES = "Biscuit Comet Dusty Echo Fudge Ginger Pepper Ziggy".split()
FOODS = "lasagne ramen tacos goulash paella dumplings falafel risotto".split()
HOBBIES = "climbing pottery chess sailing knitting beekeeping juggling fencing".split()
FILLER = [
    "How was your weekend, {n}?",
    "Pretty quiet, thanks for asking.",
    "{n} and {m} watched a film about {f} last night.",
    "We should meet {n} for coffee soon.",
    "{n} says that work keeps everybody busy these days.",
    "A cousin of {n} visited {c} once and loved it.",
    "Did {n} read the news about {w} today?",
    "{n} has to buy some {f} for dinner.",
    "{n} told me a funny story about a {p} and a neighbour.",
    "I wonder who lives next to {n} and {m}.",
    "{n} asked what name would suit a {p}.",
    "The summer party of {w} was lovely, says {n}.",
]


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    evidence: int


@dataclass(frozen=True)
class Conversations:
    """`turns` are (conversation, text); a question's evidence is an index into them."""

    turns: list[tuple[str, str]]
    questions: list[Question]


def facts(rng: random.Random, name: str) -> Iterator[tuple[str, list[str], str]]:
    """(kind, turns of which the last is the evidence, question)"""
    city, other, firm = rng.choice(CITIES), rng.choice(CITIES), rng.choice(FIRMS)
    pet, pet_name, food, hobby = rng.choice(PETS), rng.choice(PET_NAMES), rng.choice(FOODS), rng.choice(HOBBIES)
    sister = rng.choice(NAMES)
    yield "direct", [f"{name} lives in {city} and works at {firm}."], f"What company does {name} work for?"
    yield "direct", [f"{name}'s sister {sister} is living in {other}."], f"Where does {name}'s sister live?"
    yield "direct", [f"{name} keeps a {pet} called {pet_name}."], f"What is the name of the {pet} that {name} keeps?"
    yield "inflected", [f"On Sundays {name} enjoys {hobby} with friends."], f"Who did {name} enjoy {hobby[:-3]} with?"
    yield "inflected", [f"{name} baked {food} for the whole office."], f"What was {name} baking for the offices?"
    typo = name[:2] + name[3:]
    yield "misspelt", [f"{name} moved away from {other} because of the noise."], f"why did {typo} mooved from {other}"
    yield (
        "answer",
        [f"Where will you spend the summer, {name}?", f"In {city}, as always."],
        f"Where will {name} spend the summer?",
    )
    yield (
        "answer",
        [f"{name}, which instrument did you learn?", "The cello, for nine years."],
        f"Which instrument did {name} learn?",
    )


def conversations(seed: int) -> Conversations:
    """One conversation with each of 18 people: 8 facts about each among 40 turns that name people and things too."""
    rng = random.Random(seed)
    turns: list[tuple[str, str]] = []
    questions: list[Question] = []
    for name in NAMES:
        blocks = [("", [rng.choice(FILLER)], "") for _ in range(40)] + list(facts(rng, name))
        rng.shuffle(blocks)
        for kind, texts, question in blocks:
            words = {"n": rng.choice(NAMES), "m": rng.choice(NAMES), "f": rng.choice(FOODS)}
            words |= {"c": rng.choice(CITIES), "p": rng.choice(PETS), "w": rng.choice(FIRMS)}
            turns += [(f"talk with {name}", text.format(**words)) for text in texts]
            if question:
                questions.append(Question(kind, question, len(turns) - 1))
    return Conversations(turns, questions)


def store(service: MemoryService, data: Conversations) -> list[str]:
    items = [NewMemory(text, conversation=talk, metadata={"turn": i}) for i, (talk, text) in enumerate(data.turns)]
    return [added.id for added in service.add("u", items)]


def hits(data: Conversations, search: Callable[[str], list[int]]) -> dict[str, float]:
    """Share of questions of each kind, and of all, whose evidence is among the first ten."""
    found: dict[str, list[bool]] = {}
    for question in data.questions:
        hit = question.evidence + 1 in search(question.text)[:10]
        found.setdefault(question.kind, []).append(hit)
        found.setdefault("all", []).append(hit)
    return {kind: sum(values) / len(values) for kind, values in found.items()}


def measure(service: MemoryService, data: Conversations) -> dict[str, dict[str, float]]:
    """Evidence recall@10 of each part and of the fusion. Row numbers are turn numbers plus one."""
    store(service, data)
    record = service._control.find("u")
    assert record is not None
    with service._pool.lease(record) as memory:
        parts = {
            "lexical": lambda q: [s for s, _ in memory.database.read(lambda t: lexical.search(t, q, 50))],
            "vectors": lambda q: near(memory, q),
        }
        measured = {name: hits(data, search) for name, search in parts.items()}
    options = RecallOptions(k=10)
    measured["fusion"] = hits(data, lambda q: [r.memory.seq for r in service.recall("u", q, options)])
    return measured


def near(memory: TenantMemory, question: str) -> list[int]:
    index, embedder = memory._index(), memory._embedder
    query = embedder.encode([question])[0]
    found = index.search(query, 50, embedder.min_similarity)
    ranked = memory.database.read(lambda t: recall.in_context(t, found, lambda seqs: index.scores(query, seqs)))
    return [seq for seq, _ in ranked]


@pytest.mark.parametrize("seed", [11, 12])
def test_fusion_finds_what_either_part_finds(service: MemoryService, seed: int) -> None:
    data = conversations(seed)
    assert len(data.turns) > 700
    measured = measure(service, data)
    best = max(measured["lexical"]["all"], measured["vectors"]["all"])
    assert measured["fusion"]["all"] >= best - 0.01, measured
    assert measured["fusion"]["all"] >= 0.97, measured
    assert measured["fusion"]["direct"] == 1.0, measured
    assert measured["vectors"]["misspelt"] >= 0.8, measured


def test_a_search_that_finds_nothing_would_fail(service: MemoryService) -> None:
    """Control: the score is not given away."""
    data = conversations(11)
    rng = random.Random(0)
    assert hits(data, lambda q: [rng.randint(1, len(data.turns)) for _ in range(10)])["all"] < 0.1


def test_the_questions_of_the_quickstart(service: MemoryService) -> None:
    works, sister = "Alice lives in Seattle and works at Boeing.", "Alice's sister Maria lives in Denver."
    service.add("alice", [NewMemory(works), NewMemory(sister)])
    assert service.recall("alice", "Where does Alice's sister live?")[0].memory.text == sister
    assert service.recall("alice", "What company does Alice work for?")[0].memory.text == works
    others = [
        f"{name} lives in {city} and works at {firm}." for name, city, firm in zip(NAMES, CITIES, FIRMS, strict=False)
    ]
    service.add("alice", [NewMemory(text) for text in others])
    assert service.recall("alice", "Where does Alice's sister live?")[0].memory.text == sister
    assert service.recall("alice", "What company does Alice work for?")[0].memory.text == works


def test_what_has_nothing_to_do_with_the_question_stays_out(service: MemoryService) -> None:
    store(service, conversations(11))
    assert service.recall("u", "quantum chromodynamics") == []
    assert service.recall("u", "?!") == []
    assert service.recall("u", "🙂") == []
