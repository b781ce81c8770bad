"""A small synthetic world: people, facts and conversations as memory chunks, with questions and their answers.

Used to train the bundled model, to gate it and to measure blending. Every example is a function of
(task, split, seed, index, level). A fixed tenth of all words, chosen by hash, is held out: those words occur in
split "heldout" only. In every cross-chunk task at least two candidates share the attribute that is asked about,
so a chunk read alone cannot tell whose value it states.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from amem.bench import vocabulary as vocab
from amem.bench.scene import BUILDERS, Fact, Level, Scene, Turn, Unit

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


GATE = Level()
LONG = Level(people=(30, 70), attributes=(4, 6), fillers=(0, 8), mixed=4, turns=8, sentences=(6, 9))


def _people(scene: Scene, task: str) -> list[Unit]:
    """Units of the task for several people; the first two share their attributes."""
    low, high = scene.level.people
    count = scene.rng.randint(low, high)
    shared = scene.rng.sample(scene.attributes, scene.rng.randint(1, len(scene.attributes)))
    units: list[Unit] = []
    for i in range(count):
        pool = scene.attributes
        own = shared if i < 2 else scene.rng.sample(pool, scene.rng.randint(1, len(pool)))
        made = BUILDERS[task](scene, own)
        if _size(units + made, scene.level) > MAX_CHUNKS:
            break
        units.extend(made)
    return units


def _size(units: list[Unit], level: Level) -> int:
    """Chunks that the units take at most, single facts sharing them."""
    single = sum(len(u.chunks) == 1 for u in units)
    return -(-single // level.sentences[0]) + sum(len(u.chunks) for u in units if len(u.chunks) > 1)


def _ask(scene: Scene, units: list[Unit]) -> list[Turn]:
    """Questions about different facts, each attribute at most half as often as it has candidates."""
    facts = [f for u in units for f in u.facts]
    candidates = {a: sum(f.attribute == a for f in facts) for a in scene.attributes}
    scene.rng.shuffle(facts)
    asked: dict[str, int] = {}
    turns: list[Turn] = []
    for fact in facts:
        count, have = asked.get(fact.attribute, 0), candidates.get(fact.attribute, 0)
        if len(turns) == scene.level.turns:
            break
        if have < 2 or count + 1 > have // 2:
            continue
        asked[fact.attribute] = count + 1
        turns.append(scene.turn(fact))
    return turns


def _unknown(scene: Scene, units: list[Unit]) -> list[Turn]:
    """One question with no answer in memory (a stranger, or an attribute never stated), one with an answer."""
    facts = [f for u in units for f in u.facts]
    absent = [a for a in sorted(vocab.ATTRIBUTES) if a not in {f.attribute for f in facts}]
    subject = scene.word("name") if scene.rng.random() < 0.6 else scene.rng.choice(facts).subject
    stranger = subject not in {f.subject for f in facts}
    attribute = scene.rng.choice(facts).attribute if stranger else scene.rng.choice(absent)
    question = scene.pick(vocab.ATTRIBUTES[attribute].questions).format(n=subject)
    turns = [Turn(question, UNKNOWN, UNKNOWN), *_ask(scene, units)[:1]]
    if scene.split == "train":
        scene.rng.shuffle(turns)
    return turns[: max(scene.level.turns, 1)]


@dataclass(frozen=True)
class _Block:
    """Chunks that stand together, and the facts in them."""

    chunks: tuple[str, ...]
    facts: tuple[Fact, ...] = ()


def _blocks(scene: Scene, units: list[Unit]) -> list[_Block]:
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


def _place(scene: Scene, blocks: list[_Block], turns: list[Turn]) -> list[int]:
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
    if task not in BUILDERS or split not in SPLITS:
        raise ValueError(f"unknown task {task!r} or split {split!r}: tasks are {TASKS}, splits {SPLITS}")
    while True:
        scene = Scene(rng, split, level)
        main = _people(scene, task)
        turns = _unknown(scene, main) if task == "unknown" else _ask(scene, main)
        if turns:
            break
    for _ in range(rng.randint(0, level.mixed)):
        other = BUILDERS[rng.choice(TASKS)](scene, scene.attributes[:1])
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
