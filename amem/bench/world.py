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

UNKNOWN = "I do not know."
TASKS = ("fact", "compound", "two_hop", "cut", "speaker", "pronoun", "alias", "update", "unknown")
CROSS_CHUNK_TASKS = ("cut", "speaker", "pronoun", "alias", "update")
SPLITS = ("train", "heldout")
MAX_CHUNKS = 32


@dataclass(frozen=True)
class Example:
    """Memory chunks (plain text) and the turns asked over them.

    `conversations[i]` numbers the conversation of chunk i, -1 for a single fact; the chunks of a conversation stand
    in order. `turns` holds (question, answer); an answer restates the fact in a sentence, as memory does, and
    `values` are the words in it that matter. `places[i]` is the turn in front of which chunk i is recalled, 0 for
    the block in front of everything. `system` is client system text.
    """

    task: str
    chunks: tuple[str, ...]
    conversations: tuple[int, ...]
    turns: tuple[tuple[str, str], ...]
    values: tuple[str, ...]
    places: tuple[int, ...]
    system: str = ""


@dataclass(frozen=True)
class Level:
    """How hard an example is. Pairs are inclusive ranges.

    pieces: of an invented word; 1 takes whole words of `pool`.  wild: share of invented words that begin with a word
    of `pool`, which training gives so that words are many.  sentences: single facts that share a chunk.
    later: share of examples in which a later turn brings its own memories.
    """

    pieces: int = 2
    people: tuple[int, int] = (2, 6)
    attributes: tuple[int, int] = (1, 4)
    wordings: int = 4
    real: float = 0.4
    wild: float = 0.0
    fillers: tuple[int, int] = (0, 3)
    mixed: int = 2
    turns: int = 2
    variants: bool = True
    system: float = 0.1
    sentences: tuple[int, int] = (1, 1)
    later: float = 0.0
    pool: tuple[str, ...] = ()


GATE = Level()
LONG = Level(people=(30, 70), attributes=(4, 6), fillers=(0, 8), mixed=4, turns=8, sentences=(6, 9))


@dataclass(frozen=True)
class _Fact:
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
class _Unit:
    chunks: tuple[str, ...]
    facts: tuple[_Fact, ...]


@dataclass(frozen=True)
class _Turn:
    question: str
    answer: str
    value: str
    fact: _Fact | None = None


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
    first = rng.choice(level.pool if rng.random() < level.wild else vocab.FIRST_PIECES)
    pieces = level.pieces + (rng.random() < 0.08)
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

    def fact(self, subject: str, attribute: str, lead: str = "", person: str = "third") -> _Fact:
        return _Fact(subject, attribute, self.value(attribute), lead or subject, person)

    def turn(self, fact: _Fact) -> _Turn:
        question = self.pick(vocab.ATTRIBUTES[fact.attribute].questions).format(n=fact.subject)
        return _Turn(question, fact.answer, fact.value, fact)


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
    facts = tuple(scene.fact(subject, a, f"{subject} {other}") for a in attributes)
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
    facts = tuple(scene.fact(name, a, f"{name}: I", "first") for a in attributes)
    said = [scene.sentence("I", f.attribute).format(v=f.value) for f in facts]
    return [_Unit((scene.pick(vocab.SPEAKER_INTRO).format(n=name), *said), facts)]


def _pronoun(scene: _Scene, attributes: list[str]) -> list[_Unit]:
    name, pronoun = scene.word("name"), scene.rng.choice(("He", "She"))
    facts = tuple(scene.fact(name, a, f"{name}: {pronoun}") for a in attributes)
    said = [scene.sentence(pronoun, f.attribute).format(v=f.value) for f in facts]
    return [_Unit((scene.pick(vocab.PRONOUN_INTRO).format(n=name), *said), facts)]


def _alias(scene: _Scene, attributes: list[str]) -> list[_Unit]:
    name, alias = scene.word("name"), scene.word("name")
    facts = tuple(scene.fact(name, a, f"{name} is {alias}. {alias}") for a in attributes)
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
        if _size(units + made, scene.level) > MAX_CHUNKS:
            break
        units.extend(made)
    return units


def _size(units: list[_Unit], level: Level) -> int:
    """Chunks that the units take at most, single facts sharing them."""
    single = sum(len(u.chunks) == 1 for u in units)
    return -(-single // level.sentences[0]) + sum(len(u.chunks) for u in units if len(u.chunks) > 1)


def _ask(scene: _Scene, units: list[_Unit]) -> list[_Turn]:
    """Questions about different facts, each attribute at most half as often as it has candidates."""
    facts = [f for u in units for f in u.facts]
    candidates = {a: sum(f.attribute == a for f in facts) for a in scene.attributes}
    scene.rng.shuffle(facts)
    asked: dict[str, int] = {}
    turns: list[_Turn] = []
    for fact in facts:
        count, have = asked.get(fact.attribute, 0), candidates.get(fact.attribute, 0)
        if len(turns) == scene.level.turns:
            break
        if have < 2 or count + 1 > have // 2:
            continue
        asked[fact.attribute] = count + 1
        turns.append(scene.turn(fact))
    return turns


def _unknown(scene: _Scene, units: list[_Unit]) -> list[_Turn]:
    """One question with no answer in memory (a stranger, or an attribute never stated), one with an answer."""
    facts = [f for u in units for f in u.facts]
    absent = [a for a in sorted(vocab.ATTRIBUTES) if a not in {f.attribute for f in facts}]
    subject = scene.word("name") if scene.rng.random() < 0.6 else scene.rng.choice(facts).subject
    stranger = subject not in {f.subject for f in facts}
    attribute = scene.rng.choice(facts).attribute if stranger else scene.rng.choice(absent)
    question = scene.pick(vocab.ATTRIBUTES[attribute].questions).format(n=subject)
    turns = [_Turn(question, UNKNOWN, UNKNOWN), *_ask(scene, units)[:1]]
    if scene.split == "train":
        scene.rng.shuffle(turns)
    return turns[: max(scene.level.turns, 1)]


@dataclass(frozen=True)
class _Block:
    """Chunks that stand together, and the facts in them."""

    chunks: tuple[str, ...]
    facts: tuple[_Fact, ...] = ()


def _blocks(scene: _Scene, units: list[_Unit]) -> list[_Block]:
    """Units in random order among fillers; with `sentences`, single facts share chunks."""
    room = max(MAX_CHUNKS - _size(units, scene.level), 0)
    fillers = min(scene.rng.randint(*scene.level.fillers), room, len(vocab.FILLERS))
    single = [_Block(u.chunks, u.facts) for u in units if len(u.chunks) == 1]
    scene.rng.shuffle(single)
    packed: list[_Block] = []
    while single:
        many = scene.rng.randint(*scene.level.sentences)
        part, single = single[:many], single[many:]
        packed.append(_Block((" ".join(b.chunks[0] for b in part),), tuple(f for b in part for f in b.facts)))
    blocks = packed + [_Block(u.chunks, u.facts) for u in units if len(u.chunks) > 1]
    blocks += [_Block((text,)) for text in scene.rng.sample(vocab.FILLERS, fillers)]
    scene.rng.shuffle(blocks)
    return blocks


def _place(scene: _Scene, blocks: list[_Block], turns: list[_Turn]) -> list[int]:
    """The turn that each block is recalled for. A block moved to a later turn is not needed before it."""
    places = [0] * len(blocks)
    if len(turns) > 1 and scene.rng.random() < scene.level.later:
        at = scene.rng.randint(1, len(turns) - 1)
        needed = {turn.fact for turn in turns[:at]}
        wanted = {turn.fact for turn in turns[at:]}
        for i, block in enumerate(blocks):
            facts = set(block.facts)
            if facts and not facts & needed and (facts & wanted or scene.rng.random() < 0.1):
                places[i] = at
    return places


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
        if _size(main + other, level) <= MAX_CHUNKS:
            main = main + other
    blocks = _blocks(scene, main)
    places = _place(scene, blocks, turns)
    system = rng.choice(vocab.SYSTEM_TEXTS) if rng.random() < level.system else ""
    return Example(
        task=task,
        chunks=tuple(c for b in blocks for c in b.chunks),
        conversations=tuple(n if len(b.chunks) > 1 else -1 for n, b in enumerate(blocks) for _ in b.chunks),
        turns=tuple((turn.question, turn.answer) for turn in turns),
        values=tuple(turn.value for turn in turns),
        places=tuple(place for place, b in zip(places, blocks, strict=True) for _ in b.chunks),
        system=system,
    )


def examples(task: str, split: str, seed: int, n: int, level: Level = GATE) -> list[Example]:
    """n examples, the same for the same arguments on every machine."""
    rng = random.Random(f"{task}/{split}/{seed}")
    return [example(task, split, rng, level) for _ in range(n)]
