"""One context under construction: people, their facts, and the chunks that state them in each task's way."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from amem.bench import vocabulary as vocab


@dataclass(frozen=True)
class Level:
    """How hard an example is. Pairs are inclusive ranges.

    pieces: of an invented word; 1 takes whole words of `pool`.  wild: share of invented words that begin with a word
    of `pool`, which training gives so that words are many.  spelled: share of words that are letters at random, as
    names are to a tokenizer that does not know them.  sentences: single facts that share a chunk.
    later: share of examples in which a later turn brings its own memories.
    """

    pieces: int = 2
    people: tuple[int, int] = (2, 6)
    attributes: tuple[int, int] = (1, 4)
    wordings: int = 4
    real: float = 0.4
    wild: float = 0.0
    spelled: float = 0.0
    fillers: tuple[int, int] = (0, 3)
    mixed: int = 2
    turns: int = 2
    variants: bool = True
    system: float = 0.1
    sentences: tuple[int, int] = (1, 1)
    later: float = 0.0
    pool: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fact:
    """`subject` is what a question calls the person; `lead` begins the sentence that answers it."""

    subject: str
    attribute: str
    value: str
    lead: str
    person: str = "third"

    @property
    def answer(self) -> str:
        a = vocab.ATTRIBUTES[self.attribute]
        phrase = (a.third if self.person == "third" else a.first)[0]
        return f"{self.lead} {phrase.format(v=self.value)}."


@dataclass(frozen=True)
class Unit:
    chunks: tuple[str, ...]
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str
    value: str
    fact: Fact | None = None


def held_out(word: str) -> bool:
    """True for the fixed tenth of words that never occurs in training."""
    if word.lower() in vocab.QUICKSTART_WORDS:
        return False
    return hashlib.blake2b(word.lower().encode(), digest_size=1).digest()[0] < 26


@lru_cache(maxsize=64)
def _real_words(kind: str, split: str) -> tuple[str, ...]:
    words = vocab.NAMES if kind == "name" else vocab.VALUES[kind]
    return tuple(w for w in words if held_out(w) == (split == "heldout"))


def _invented(rng: random.Random, level: Level) -> str:
    if level.pieces == 1:
        return rng.choice(level.pool)
    if rng.random() < level.spelled:
        parity = rng.randrange(2)
        return "".join(rng.choice(vocab.LETTERS[(parity + i) % 2]) for i in range(rng.randint(3, 8))).capitalize()
    first = rng.choice(level.pool if rng.random() < level.wild else vocab.FIRST_PIECES)
    pieces = level.pieces + (rng.random() < 0.08)
    return first + "".join(rng.choice(vocab.LAST_PIECES) for _ in range(pieces - 1))


class Scene:
    """One context under construction: draws words that are unique in it, builds the units of a task."""

    def __init__(self, rng: random.Random, split: str, level: Level) -> None:
        self.rng = rng
        self.split = split
        self.level = level
        self._used: set[str] = set()
        low, high = level.attributes
        self.attributes = rng.sample(sorted(vocab.ATTRIBUTES), rng.randint(max(low, 1), high))

    def word(self, kind: str) -> str:
        """A word of this kind not used in the context yet: real, or invented where the real ones run out."""
        real = _real_words(kind, self.split)
        for attempt in range(1000):
            if real and attempt < 8 and self.rng.random() < self.level.real:
                word = self.rng.choice(real)
            else:
                word = _invented(self.rng, self.level)
                if self.level.pieces > 1 and held_out(word) != (self.split == "heldout"):
                    continue
            word = word.lower() if kind in vocab.LOWER_CASE and self.level.pieces > 1 else word
            if word.lower() not in self._used:
                self._used.add(word.lower())
                return word
        raise ValueError(f"no unused {kind} word left: ask for fewer people or attributes")

    def pick(self, wordings: tuple[str, ...]) -> str:
        return self.rng.choice(wordings[: self.level.wordings])

    def value(self, attribute: str) -> str:
        return self.word(vocab.ATTRIBUTES[attribute].kind)

    def phrase(self, attribute: str, person: str = "third") -> str:
        """A verb phrase with {v} left open."""
        a = vocab.ATTRIBUTES[attribute]
        return self.pick(a.third if person == "third" else a.first)

    def sentence(self, subject: str, attribute: str) -> str:
        """A statement with {v} left open: third person, first person ("I") or with a possessive."""
        if self.level.wordings > 1 and self.rng.random() < 0.3:
            owner = {"I": "My", "He": "His", "She": "Her"}.get(subject, f"{subject}'s")
            return f"{owner} {self.pick(vocab.ATTRIBUTES[attribute].noun)}."
        return f"{subject} {self.phrase(attribute, 'first' if subject == 'I' else 'third')}."

    def fact(self, subject: str, attribute: str, lead: str = "", person: str = "third") -> Fact:
        return Fact(subject, attribute, self.value(attribute), lead or subject, person)

    def turn(self, fact: Fact) -> Turn:
        question = self.pick(vocab.ATTRIBUTES[fact.attribute].questions).format(n=fact.subject)
        return Turn(question, fact.answer, fact.value, fact)


def _single(scene: Scene, attributes: list[str]) -> list[Unit]:
    name = scene.word("name")
    facts = [scene.fact(name, a) for a in attributes]
    return [Unit((scene.sentence(name, f.attribute).format(v=f.value),), (f,)) for f in facts]


def _compound(scene: Scene, attributes: list[str], name: str = "") -> list[Unit]:
    name = name or scene.word("name")
    units = []
    for i in range(0, len(attributes), 2):
        facts = tuple(scene.fact(name, a) for a in attributes[i : i + 2])
        parts = [scene.phrase(f.attribute).format(v=f.value) for f in facts]
        units.append(Unit((f"{name} {' and '.join(parts)}.",), facts))
    return units


def _two_hop(scene: Scene, attributes: list[str]) -> list[Unit]:
    owner, other = scene.word("name"), scene.word("name")
    relation = scene.pick(vocab.KINSHIP) if scene.level.wordings < 2 else scene.rng.choice(vocab.KINSHIP)
    subject = f"{owner}'s {relation}"
    facts = tuple(scene.fact(subject, a, f"{subject} {other}") for a in attributes)
    if scene.level.variants and scene.rng.random() < 0.3:
        said = [scene.sentence(other, f.attribute).format(v=f.value) for f in facts]
        return [Unit((f"{subject} is {other}.", *said), facts)]
    units = [Unit((f"{subject} {other} {scene.phrase(f.attribute).format(v=f.value)}.",), (f,)) for f in facts]
    spare = [a for a in scene.attributes if a != facts[0].attribute]
    own = [facts[0].attribute, *scene.rng.sample(spare, min(len(spare), scene.rng.randint(0, 1)))]
    return [*units, *_compound(scene, own, owner)]


def _cut(scene: Scene, attributes: list[str]) -> list[Unit]:
    name = scene.word("name")
    units = []
    for a in attributes:
        fact = scene.fact(name, a)
        if scene.level.variants and scene.rng.random() < 0.3:
            chunks: tuple[str, ...] = (name, scene.phrase(a).format(v=fact.value) + ".")
        else:
            chunks = (scene.sentence(name, a).split(" {v}")[0], f"{fact.value}.")
        units.append(Unit(chunks, (fact,)))
    return units


def _speaker(scene: Scene, attributes: list[str]) -> list[Unit]:
    name = scene.word("name")
    facts = tuple(scene.fact(name, a, f"{name}: I", "first") for a in attributes)
    said = [scene.sentence("I", f.attribute).format(v=f.value) for f in facts]
    return [Unit((scene.pick(vocab.SPEAKER_INTRO).format(n=name), *said), facts)]


def _pronoun(scene: Scene, attributes: list[str]) -> list[Unit]:
    name, pronoun = scene.word("name"), scene.rng.choice(("He", "She"))
    facts = tuple(scene.fact(name, a, f"{name}: {pronoun}") for a in attributes)
    said = [scene.sentence(pronoun, f.attribute).format(v=f.value) for f in facts]
    return [Unit((scene.pick(vocab.PRONOUN_INTRO).format(n=name), *said), facts)]


def _alias(scene: Scene, attributes: list[str]) -> list[Unit]:
    name, alias = scene.word("name"), scene.word("name")
    facts = tuple(scene.fact(name, a, f"{name} is {alias}. {alias}") for a in attributes)
    said = [scene.sentence(alias, f.attribute).format(v=f.value) for f in facts]
    return [Unit((scene.pick(vocab.ALIAS_INTRO).format(n=name, a=alias), *said), facts)]


def _update(scene: Scene, attributes: list[str]) -> list[Unit]:
    name = scene.word("name")
    units = []
    for a in attributes:
        old, fact = scene.value(a), scene.fact(name, a)
        said = scene.sentence(name, a).format(v=old)
        change = scene.pick(vocab.CORRECTION).format(old=old, new=fact.value)
        between = (scene.rng.choice(vocab.FILLERS),) if scene.level.variants and scene.rng.random() < 0.3 else ()
        units.append(Unit((said, *between, change), (fact,)))
    return units


BUILDERS: dict[str, Callable[[Scene, list[str]], list[Unit]]] = {
    "fact": _single,
    "compound": _compound,
    "two_hop": _two_hop,
    "cut": _cut,
    "speaker": _speaker,
    "pronoun": _pronoun,
    "alias": _alias,
    "update": _update,
    "unknown": _single,
}
