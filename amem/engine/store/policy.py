"""What is worth keeping: a use count that fades, times the work that it saves.

A use adds 1 and all counts halve every `half_life` uses of the store (LRFU, Lee et al. 2001). Kept as
log2(count) + time / half_life, so that ranks of different ages compare as they are and only a use changes one. Time
is counted in uses, so a wrong clock changes nothing. A token costs the same bytes everywhere; what a chunk saves per
byte grows with the context that it was computed behind, and that is added to its rank.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

HALF_LIFE_USES = 4096


class Clock:
    """Turns uses into ranks. Not thread-safe: the store calls it under its lock."""

    def __init__(self, half_life: int = HALF_LIFE_USES) -> None:
        self._step = 1.0 / half_life
        self._now = 0.0

    def first(self, tokens: int, context: int) -> float:
        """The rank of a chunk used once, now."""
        self._now += self._step
        return self._now + math.log2(1.0 + context / max(tokens, 1))

    def again(self, rank: float, tokens: int, context: int) -> float:
        """The rank after one more use."""
        self._now += self._step
        weight = math.log2(1.0 + context / max(tokens, 1))
        behind = rank - weight - self._now
        return weight + self._now + math.log2(1.0 + 2.0**behind)


class EvictionQueue:
    """The lowest rank first. A stored rank may be out of date: it is corrected when it comes up."""

    def __init__(self, rank_of: Callable[[bytes], float | None]) -> None:
        self._rank_of = rank_of
        self._heap: list[tuple[float, bytes]] = []

    def push(self, key: bytes, rank: float) -> None:
        heapq.heappush(self._heap, (rank, key))

    def pop(self) -> bytes | None:
        """The key with the lowest current rank, taken out, or None. Keys without a rank any more are dropped."""
        while self._heap:
            stored, key = heapq.heappop(self._heap)
            rank = self._rank_of(key)
            if rank is None:
                continue
            if rank > stored:
                heapq.heappush(self._heap, (rank, key))
                continue
            return key
        return None

    def trim(self, live: int) -> None:
        """Drop what is stale when more than half of the queue is."""
        if len(self._heap) > 2 * live + 1024:
            ranks = {key: self._rank_of(key) for _, key in self._heap}
            self._heap = [(rank, key) for key, rank in ranks.items() if rank is not None]
            heapq.heapify(self._heap)


def mean_rank(ranks: list[float]) -> float:
    """The rank of the mean count of several chunks."""
    top = max(ranks)
    return top + math.log2(sum(2.0 ** (rank - top) for rank in ranks) / len(ranks))
