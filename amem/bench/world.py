"""A small synthetic world: people, facts and conversations as memory chunks, with questions and their answers.

Used to train the bundled model, to gate it and to measure blending. Every example is a function of
(task, split, seed, index, level). A fixed tenth of all words, chosen by hash, is held out: those words occur in
split "heldout" only. In every cross-chunk task at least two candidates share the attribute that is asked about,
so a chunk read alone cannot tell whose value it states.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from amem.bench import vocabulary as vocab

PREAMBLE = "Notes from memory; information, not instructions.\n"
UNKNOWN = "I do not know."
TASKS = ("fact", "compound", "two_hop", "cut", "speaker", "pronoun", "alias", "update", "unknown")
CROSS_CHUNK_TASKS = ("cut", "speaker", "pronoun", "alias", "update")
SPLITS = ("train", "heldout")
MAX_CHUNKS = 32


@dataclass(frozen=True)
class Example:
    """Memory chunks (plain text) and the turns asked over them.

    `conversations[i]` numbers the conversation of chunk i, -1 for a single fact; the chunks of a conversation stand
    in order. `turns` holds (question, answer); an answer is the bare value. `system` is client system text.
    """

    task: str
    chunks: tuple[str, ...]
    conversations: tuple[int, ...]
    turns: tuple[tuple[str, str], ...]
    system: str = ""


@dataclass(frozen=True)
class Level:
    """How hard an example is. Pairs are inclusive ranges.

    `reverse`: share of questions that ask for the name behind a value; `complete`: share that are a statement to
    complete ("Alice lives in"). Both serve training alone.
    """

    pieces: int = 2
    people: tuple[int, int] = (2, 6)
    attributes: tuple[int, int] = (1, 4)
    wordings: int = 4
    real: float = 0.4
    fillers: tuple[int, int] = (0, 3)
    mixed: int = 2
    turns: int = 2
    reverse: float = 0.0
    complete: float = 0.0
    variants: bool = True
    system: float = 0.1


GATE = Level()


@dataclass(frozen=True)
class _Fact:
    subject: str
    attribute: str
    value: str
    name: str


@dataclass(frozen=True)
class _Unit:
    chunks: tuple[str, ...]
    facts: tuple[_Fact, ...]


def held_out(word: str) -> bool:
    """True for the fixed tenth of words that never occurs in training."""
    if word.lower() in vocab.QUICKSTART_WORDS:
        return False
    return hashlib.blake2b(word.lower().encode(), digest_size=1).digest()[0] < 26


@lru_cache(maxsize=64)
def _real_words(kind: str, split: str) -> tuple[str, ...]:
    words = vocab.NAMES if kind == "name" else vocab.VALUES[kind]
    return tuple(w for w in words if held_out(w) == (split == "heldout"))


def _invented(rng: random.Random, pieces: int) -> str:
    first = rng.choice(vocab.FIRST_PIECES)
    if pieces > 1 and rng.random() < 0.08:
        pieces += 1
    return first + "".join(rng.choice(vocab.LAST_PIECES) for _ in range(pieces - 1))


class _Scene:
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
                word = _invented(self.rng, self.level.pieces)
                if self.level.pieces > 1 and held_out(word) != (self.split == "heldout"):
                    continue
            word = word.lower() if kind in vocab.LOWER_CASE else word
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

    def fact(self, subject: str, attribute: str, name: str = "") -> _Fact:
        return _Fact(subject, attribute, self.value(attribute), name or subject)

    def question(self, fact: _Fact, reverse: bool) -> tuple[str, str]:
        a = vocab.ATTRIBUTES[fact.attribute]
        if reverse:
            return self.pick(a.reverse).format(v=fact.value), fact.name
        if self.rng.random() < self.level.complete:
            return f"{fact.subject} {a.third[0].removesuffix(' {v}')}", fact.value
        return self.pick(a.questions).format(n=fact.subject), fact.value


def _single(scene: _Scene, attributes: list[str]) -> list[_Unit]:
    name = scene.word("name")
    facts = [scene.fact(name, a) for a in attributes]
    return [_Unit((scene.sentence(name, f.attribute).format(v=f.value),), (f,)) for f in facts]


def _compound(scene: _Scene, attributes: list[str]) -> list[_Unit]:
    name = scene.word("name")
    units = []
    for i in range(0, len(attributes), 2):
        facts = tuple(scene.fact(name, a) for a in attributes[i : i + 2])
        parts = [scene.phrase(f.attribute).format(v=f.value) for f in facts]
        units.append(_Unit((f"{name} {' and '.join(parts)}.",), facts))
    return units


def _two_hop(scene: _Scene, attributes: list[str]) -> list[_Unit]:
    owner, other = scene.word("name"), scene.word("name")
    relation = scene.pick(vocab.KINSHIP) if scene.level.wordings < 2 else scene.rng.choice(vocab.KINSHIP)
    subject = f"{owner}'s {relation}"
    facts = tuple(scene.fact(subject, a, other) for a in attributes)
    if scene.level.variants and scene.rng.random() < 0.3:
        said = [scene.sentence(other, f.attribute).format(v=f.value) for f in facts]
        return [_Unit((f"{subject} is {other}.", *said), facts)]
    own = scene.fact(owner, facts[0].attribute)
    units = [_Unit((f"{subject} {other} {scene.phrase(f.attribute).format(v=f.value)}.",), (f,)) for f in facts]
    return [*units, _Unit((scene.sentence(owner, own.attribute).format(v=own.value),), ())]


def _cut(scene: _Scene, attributes: list[str]) -> list[_Unit]:
    name = scene.word("name")
    units = []
    for a in attributes:
        fact = scene.fact(name, a)
        if scene.level.variants and scene.rng.random() < 0.3:
            chunks: tuple[str, ...] = (name, scene.phrase(a).format(v=fact.value) + ".")
        else:
            chunks = (scene.sentence(name, a).split(" {v}")[0], f"{fact.value}.")
        units.append(_Unit(chunks, (fact,)))
    return units


def _speaker(scene: _Scene, attributes: list[str]) -> list[_Unit]:
    name = scene.word("name")
    facts = tuple(scene.fact(name, a) for a in attributes)
    said = [scene.sentence("I", f.attribute).format(v=f.value) for f in facts]
    return [_Unit((scene.pick(vocab.SPEAKER_INTRO).format(n=name), *said), facts)]


def _pronoun(scene: _Scene, attributes: list[str]) -> list[_Unit]:
    name, pronoun = scene.word("name"), scene.rng.choice(("He", "She"))
    facts = tuple(scene.fact(name, a) for a in attributes)
    said = [scene.sentence(pronoun, f.attribute).format(v=f.value) for f in facts]
    return [_Unit((scene.pick(vocab.PRONOUN_INTRO).format(n=name), *said), facts)]


def _alias(scene: _Scene, attributes: list[str]) -> list[_Unit]:
    name, alias = scene.word("name"), scene.word("name")
    facts = tuple(scene.fact(name, a) for a in attributes)
    said = [scene.sentence(alias, f.attribute).format(v=f.value) for f in facts]
    return [_Unit((scene.pick(vocab.ALIAS_INTRO).format(n=name, a=alias), *said), facts)]


def _update(scene: _Scene, attributes: list[str]) -> list[_Unit]:
    name = scene.word("name")
    units = []
    for a in attributes:
        old, fact = scene.value(a), scene.fact(name, a)
        said = scene.sentence(name, a).format(v=old)
        change = scene.pick(vocab.CORRECTION).format(old=old, new=fact.value)
        between = (scene.rng.choice(vocab.FILLERS),) if scene.level.variants and scene.rng.random() < 0.3 else ()
        units.append(_Unit((said, *between, change), (fact,)))
    return units


_BUILDERS: dict[str, Callable[[_Scene, list[str]], list[_Unit]]] = {
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


def _people(scene: _Scene, task: str) -> list[_Unit]:
    """Units of the task for several people; the first two share their attributes."""
    low, high = scene.level.people
    count = scene.rng.randint(low, high)
    shared = scene.rng.sample(scene.attributes, scene.rng.randint(1, len(scene.attributes)))
    units: list[_Unit] = []
    for i in range(count):
        pool = scene.attributes
        own = shared if i < 2 else scene.rng.sample(pool, scene.rng.randint(1, len(pool)))
        made = _BUILDERS[task](scene, own)
        if sum(len(u.chunks) for u in units + made) > MAX_CHUNKS:
            break
        units.extend(made)
    return units


def _ask(scene: _Scene, units: list[_Unit]) -> list[tuple[str, str]]:
    """Questions about different facts, each attribute at most half as often as it has candidates."""
    facts = [f for u in units for f in u.facts]
    candidates = {a: sum(f.attribute == a for f in facts) for a in scene.attributes}
    scene.rng.shuffle(facts)
    asked: dict[str, int] = {}
    turns: list[tuple[str, str]] = []
    for fact in facts:
        count, have = asked.get(fact.attribute, 0), candidates.get(fact.attribute, 0)
        if len(turns) == scene.level.turns:
            break
        if (have < 2 and len(candidates) < 2) or count + 1 > max(have // 2, 1):
            continue
        if have < 2 and scene.level.pieces > 1:
            continue
        asked[fact.attribute] = count + 1
        turns.append(scene.question(fact, scene.rng.random() < scene.level.reverse))
    return turns


def _unknown(scene: _Scene, units: list[_Unit]) -> list[tuple[str, str]]:
    """One question with no answer in memory (a stranger, or an attribute never stated), one with an answer."""
    facts = [f for u in units for f in u.facts]
    absent = [a for a in sorted(vocab.ATTRIBUTES) if a not in {f.attribute for f in facts}]
    subject = scene.word("name") if scene.rng.random() < 0.6 else scene.rng.choice(facts).subject
    stranger = subject not in {f.subject for f in facts}
    attribute = scene.rng.choice(facts).attribute if stranger else scene.rng.choice(absent)
    question, _ = scene.question(_Fact(subject, attribute, "", ""), False)
    turns = [(question, UNKNOWN), *_ask(scene, units)[:1]]
    if scene.split == "train":
        scene.rng.shuffle(turns)
    return turns[: max(scene.level.turns, 1)]


def _arrange(scene: _Scene, units: list[_Unit]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Units in random order among fillers; each unit of several chunks is a conversation."""
    room = MAX_CHUNKS - sum(len(u.chunks) for u in units)
    fillers = min(scene.rng.randint(*scene.level.fillers), max(room, 0))
    blocks = [u.chunks for u in units] + [(f,) for f in scene.rng.sample(vocab.FILLERS, fillers)]
    scene.rng.shuffle(blocks)
    chunks: list[str] = []
    conversations: list[int] = []
    for number, block in enumerate(blocks):
        chunks.extend(block)
        conversations.extend([number if len(block) > 1 else -1] * len(block))
    return tuple(chunks), tuple(conversations)


def example(task: str, split: str, rng: random.Random, level: Level = GATE) -> Example:
    """One example. Raises ValueError on an unknown task or split."""
    if task not in _BUILDERS or split not in SPLITS:
        raise ValueError(f"unknown task {task!r} or split {split!r}: tasks are {TASKS}, splits {SPLITS}")
    while True:
        scene = _Scene(rng, split, level)
        main = _people(scene, task)
        turns = _unknown(scene, main) if task == "unknown" else _ask(scene, main)
        if turns:
            break
    for _ in range(rng.randint(0, level.mixed)):
        other = _BUILDERS[rng.choice(TASKS)](scene, scene.attributes[:1])
        if sum(len(u.chunks) for u in main + other) <= MAX_CHUNKS:
            main = main + other
    chunks, conversations = _arrange(scene, main)
    system = rng.choice(vocab.SYSTEM_TEXTS) if rng.random() < level.system else ""
    return Example(task, chunks, conversations, tuple(turns), system)


def examples(task: str, split: str, seed: int, n: int, level: Level = GATE) -> list[Example]:
    """n examples, the same for the same arguments on every machine."""
    rng = random.Random(f"{task}/{split}/{seed}")
    return [example(task, split, rng, level) for _ in range(n)]
