"""Training batches: examples of the curriculum's mixture, sorted into buckets of one length each."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amem.bench.scene import Level
from amem.bench.world import LONG, UNKNOWN, example
from bench.train_model.curriculum import LADDER, Curriculum
from bench.train_model.prompts import BEGIN, PAD, Encoder

BUCKETS = (64, 96, 128, 160, 224, 320, 448, 640, 896, 1280, 1792, 2560)
BACKGROUND = 0.003


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
    """Shares of rows of random tokens and of long contexts; the rest follow the ladder. May change while training."""

    copies: float = 0.02
    long: float = 0.0


@dataclass(frozen=True)
class Row:
    ids: list[int]
    weights: list[float]


def copy_row(rng: random.Random, vocabulary: int) -> Row:
    """Random tokens, then the same again: teaches to look up and copy."""
    n = rng.randint(8, 40)
    half = [rng.randrange(6, vocabulary) for _ in range(n)]
    return Row([BEGIN, *half, *half], [0.0] * (n + 2) + [0.7] * (n - 1))


def example_row(rng: random.Random, encoder: Encoder, task: str, level: Level) -> Row:
    """One example: weight 1 on answers, a random eighth of the other tokens at a low weight."""
    made = example(task, "train", rng, level)
    if rng.random() < level.system / 4:
        question = made.turns[0][0]
        made = replace(made, chunks=(), conversations=(), places=(), turns=((question, UNKNOWN),), values=(UNKNOWN,))
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
    rng, pool = random.Random(seed), encoder.pool()
    waiting: dict[int, list[Row]] = {b: [] for b in BUCKETS}
    while True:
        weights = curriculum.weights()
        kind = rng.random()
        if kind < mix.copies:
            row = copy_row(rng, vocabulary)
        elif kind < mix.copies + mix.long:
            row = example_row(rng, encoder, rng.choice(list(weights)), replace(LONG, later=0.15))
        else:
            task = rng.choices(list(weights), list(weights.values()))[0]
            top = curriculum.levels[task]
            level = top if rng.random() < 0.8 else rng.randint(0, top)
            row = example_row(rng, encoder, task, replace(LADDER[level], pool=pool))
        bucket = next((b for b in BUCKETS if b >= len(row.ids)), None)
        if bucket is None:
            continue
        waiting[bucket].append(row)
        if len(waiting[bucket]) * bucket >= tokens:
            yield collate(waiting[bucket], bucket)
            waiting[bucket] = []
