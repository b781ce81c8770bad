"""From two rankings to the memories of an answer: rank fusion, budget, company, and where every score came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from amem.memory import rows
from amem.memory.database import Transaction
from amem.memory.types import Memory, Recalled, RecallOptions

Ranking = Sequence[tuple[int, float]]

_RRF_K = 60.0
_COMPANY = 0.5  # share of a hit's score that its neighbour gets; squared for the one behind it
MIN_DEPTH = 50
CONTEXT_WEIGHT = 0.75
_CONTEXT_DEPTH = 32
_QUERY_CHARACTERS = 1 << 14


@dataclass(frozen=True, slots=True)
class Hit:
    seq: int
    score: float
    parts: dict[str, float]


def shortened(query: str) -> str:
    """Both ends of a text too long for a question: it stands at one of them, and every word costs a look-up."""
    half = _QUERY_CHARACTERS // 2
    return query if len(query) <= 2 * half else f"{query[:half]} {query[-half:]}"


def fuse(lexical: Ranking, vectors: Ranking) -> list[Hit]:
    """Reciprocal rank fusion (Cormack et al., 2009): the sum of 1 / (60 + rank).

    Equal sums are common (first here and second there, against second here and first there): then the shares of the
    best score on either side decide, and then the newest is first.
    """
    parts: dict[int, dict[str, float]] = {}
    shares: dict[int, float] = {}
    for name, measure, ranking in (("lexical", "bm25", lexical), ("vector", "cosine", vectors)):
        rank, before = 0, math.inf
        for place, (seq, value) in enumerate(ranking, 1):
            rank, before = (rank if value == before else place), value
            found = {f"{name}_rank": float(rank), f"{name}_{measure}": value, f"{name}_rrf": 1.0 / (_RRF_K + rank)}
            parts.setdefault(seq, {}).update(found)
            shares[seq] = shares.get(seq, 0.0) + value / (ranking[0][1] or 1.0)
    hits = [Hit(seq, p.get("lexical_rrf", 0.0) + p.get("vector_rrf", 0.0), p) for seq, p in parts.items()]
    return sorted(hits, key=lambda hit: (-round(hit.score, 9), -round(shares[hit.seq], 6), -hit.seq))


def in_context(
    transaction: Transaction, near: Ranking, cosines: Callable[[Sequence[int]], Mapping[int, float]]
) -> list[tuple[int, float]]:
    """A vector ranking in which a memory is read together with the one before it in its conversation.

    The score is its own cosine plus a share of the cosine of the one before, which is what encoding both together
    would give, without a vector that has to follow when the one before is forgotten.
    """
    heads = dict(near[:_CONTEXT_DEPTH])
    behind = rows.followers(transaction, list(heads))
    scores = dict(near)
    scores.update(cosines([seq for seq in behind.values() if seq not in scores]))
    for head, follower in behind.items():
        if follower in scores:
            scores[follower] += CONTEXT_WEIGHT * heads[head]
    return sorted(scores.items(), key=lambda item: (-item[1], -item[0]))


def choose(
    transaction: Transaction, hits: Sequence[Hit], options: RecallOptions, count: Callable[[str], int]
) -> list[Recalled]:
    """The best `k` that fit into the budget, then their neighbours where there is room. Best first."""
    chosen: list[Recalled] = []
    left = options.budget_tokens
    texts: set[str] = set()
    for hit, memory in _live(transaction, hits, 2 * options.k):
        if memory.text in texts or options.conversation not in (None, memory.conversation):
            continue
        if len(chosen) == options.k:
            break
        tokens = count(memory.text)
        if left is not None:
            if tokens > left:
                continue
            left -= tokens
        texts.add(memory.text)
        chosen.append(Recalled(memory, hit.score, hit.parts, tokens))
    if left is not None and options.neighbours:
        chosen += _company(transaction, tuple(chosen), options.neighbours, left, count)
    return sorted(chosen, key=lambda recalled: -recalled.score)


def _live(transaction: Transaction, hits: Sequence[Hit], step: int) -> Iterator[tuple[Hit, Memory]]:
    """The hits with their memories, read a few at a time: most are never asked for."""
    for start in range(0, len(hits), step):
        part = hits[start : start + step]
        found = rows.by_seq(transaction, [hit.seq for hit in part])
        yield from ((hit, found[hit.seq]) for hit in part if hit.seq in found)


def _company(
    transaction: Transaction, hits: Sequence[Recalled], reach: int, left: int, count: Callable[[str], int]
) -> Iterable[Recalled]:
    known = {hit.memory.id for hit in hits}
    for rank, hit in enumerate(hits, 1):
        for distance, memory in _neighbours(transaction, hit.memory, reach):
            tokens = count(memory.text)
            if memory.id not in known and tokens <= left:
                known.add(memory.id)
                left -= tokens
                yield Recalled(memory, hit.score * _COMPANY**distance, {"neighbour_of_rank": float(rank)}, tokens)


def _neighbours(transaction: Transaction, memory: Memory, reach: int) -> list[tuple[int, Memory]]:
    earlier = enumerate(reversed(rows.before(transaction, memory, reach)), 1)
    later = enumerate(rows.after(transaction, memory, reach), 1)
    return sorted([*earlier, *later], key=lambda found: found[0])
