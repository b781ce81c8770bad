"""Training batches: examples of the curriculum's mixture, sorted into buckets of one length each."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amem.bench.world import UNKNOWN, Level, example
from bench.train_model.curriculum import LADDER, Curriculum
from bench.train_model.prompts import ASSISTANT, BEGIN, END, PAD, USER, Encoder

BUCKETS = (64, 96, 128, 160, 224, 320, 448, 640, 896, 1280)
BACKGROUND = 0.03


@dataclass(frozen=True)
class Batch:
    """ids int64 [B, T]; positions whose next token is scored, as flat indices into [B * T]; their weights."""

    ids: Tensor
    picks: Tensor
    targets: Tensor
    weights: Tensor
    tokens: int


@dataclass
class Mix:
    """Shares of rows of random tokens; the rest are examples of the world. May change while training."""

    copies: float = 0.02
    records: float = 0.02


@dataclass(frozen=True)
class Row:
    ids: list[int]
    weights: list[float]


def copy_row(rng: random.Random, vocabulary: int) -> Row:
    """Random tokens, then the same again: teaches to look up and copy."""
    n = rng.randint(8, 40)
    half = [rng.randrange(6, vocabulary) for _ in range(n)]
    return Row([BEGIN, *half, *half], [0.0] * (n + 2) + [0.7] * (n - 1))


def record_row(rng: random.Random, vocabulary: int) -> Row:
    """A table in random tokens, then look-ups by two keys: binding in its densest form.

    Either every record is (name, attribute, value), or a name stands once as a header over its (attribute, value)
    pairs. Each name has the same attributes, so that only both keys together tell the value.
    """
    names, attributes = rng.randint(2, 5), rng.randint(1, 4)
    words = rng.sample(range(6, vocabulary), names + attributes + names * attributes + 4)
    people, kinds, values, marks = (
        words[:names],
        words[names : names + attributes],
        words[names + attributes : -4],
        words[-4:],
    )
    header, link, stop = rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.5
    ids: list[int] = [BEGIN]
    cells = {(n, k): values[i * attributes + j] for i, n in enumerate(people) for j, k in enumerate(kinds)}
    if header:
        for name in people:
            ids += [marks[0], name, marks[1]]
            for kind in rng.sample(kinds, attributes):
                ids += [kind, *marks[2 : 2 + link], cells[name, kind], *marks[3 : 3 + stop]]
    else:
        for name, kind in rng.sample(sorted(cells), len(cells)):
            ids += [name, kind, *marks[2 : 2 + link], cells[name, kind], *marks[3 : 3 + stop]]
    weights = [0.0] * len(ids)
    wrapped = rng.random() < 0.5
    for name, kind in rng.sample(sorted(cells), min(len(cells), 10)):
        ask = [USER, name, kind, END, ASSISTANT] if wrapped else [USER, name, kind]
        ids += [*ask, cells[name, kind]]
        weights += [0.0] * len(ask) + [1.0]
    return Row(ids, weights)


def example_row(rng: random.Random, encoder: Encoder, task: str, level: Level) -> Row:
    """One example: weight 1 on answers, a random eighth of the other tokens at a low weight."""
    made = example(task, "train", rng, level)
    if rng.random() < level.system / 4:
        question = made.turns[0][0]
        made = replace(made, chunks=(), conversations=(), turns=((question, UNKNOWN),))
    prompt = encoder.prompt(made)
    weights = [BACKGROUND * 8 if rng.random() < 0.125 else 0.0 for _ in prompt.ids]
    for start, end in prompt.answers:
        weights[start : end - 1] = [1.0] * (end - 1 - start)
        weights[end - 1] = 0.2
    return Row(prompt.ids, weights)


def collate(rows: list[Row], length: int) -> Batch:
    """Pad rows to the bucket's length and list the scored positions."""
    ids = torch.full((len(rows), length), PAD)
    picks, targets, weights = [], [], []
    for b, row in enumerate(rows):
        ids[b, : len(row.ids)] = torch.tensor(row.ids)
        for t in range(1, len(row.ids)):
            if row.weights[t] > 0:
                picks.append(b * length + t - 1)
                targets.append(row.ids[t])
                weights.append(row.weights[t])
    tokens = sum(len(r.ids) for r in rows)
    return Batch(ids, torch.tensor(picks), torch.tensor(targets), torch.tensor(weights), tokens)


def batches(
    curriculum: Curriculum, encoder: Encoder, vocabulary: int, seed: str, tokens: int, mix: Mix
) -> Iterator[Batch]:
    """Endless batches of about `tokens` tokens, one bucket each; reads the curriculum as it climbs."""
    rng = random.Random(seed)
    waiting: dict[int, list[Row]] = {b: [] for b in BUCKETS}
    while True:
        weights = curriculum.weights()
        kind = rng.random()
        if kind < mix.copies:
            row = copy_row(rng, vocabulary)
        elif kind < mix.copies + mix.records:
            row = record_row(rng, vocabulary)
        else:
            task = rng.choices(list(weights), list(weights.values()))[0]
            top = curriculum.levels[task]
            level = top if rng.random() < 0.8 else rng.randint(0, top)
            row = example_row(rng, encoder, task, LADDER[level])
        bucket = next((b for b in BUCKETS if b >= len(row.ids)), None)
        if bucket is None:
            continue
        waiting[bucket].append(row)
        if len(waiting[bucket]) * bucket >= tokens:
            yield collate(waiting[bucket], bucket)
            waiting[bucket] = []
