"""Which rows of one sequence run in this step: the next span that the budget affords, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from amem.engine.batch import BlendRows, Int64s, SequenceRows
from amem.engine.blend import resolve_policy
from amem.engine.sequence import Fate, Place, Sequence

Resolve = Callable[[Sequence, Place], Fate]
"""Decides what becomes of a chunk, and loads its stored rows into the sequence's pages if there are any."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Work left in a step and work of a whole step, in computed rows."""

    left: float
    whole: float


@dataclass(frozen=True, slots=True)
class Span:
    """Positions `start..stop` become computed; `rows` run for it (None when stored KV was enough)."""

    sequence: Sequence
    start: int
    stop: int
    cost: float
    rows: SequenceRows | None

    @property
    def sample(self) -> bool:
        return self.rows is not None and self.rows.sample


@dataclass(slots=True)
class _Rows:
    """Pieces of a span that have rows, as (start, stop, number of the blended chunk or -1)."""

    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    cost: float = 0.0

    def add(self, start: int, stop: int, chunk: int, price: float) -> None:
        self.pieces.append((start, stop, chunk))
        self.cost += (stop - start) * price

    def positions(self) -> Int64s:
        return np.concatenate([np.arange(start, stop) for start, stop, _ in self.pieces])

    def chunks(self) -> Int64s:
        return np.concatenate([np.full(stop - start, chunk, np.int64) for start, stop, chunk in self.pieces])


def plan_span(sequence: Sequence, budget: Budget, resolve: Resolve) -> Span:
    """The next span of a sequence. Rows of exact stored chunks are free and do not run."""
    start = at = sequence.computed
    last = sequence.length - 1
    rows = _Rows()
    while at < sequence.length:
        left = budget.left - rows.cost
        place = sequence.place_at(at) if at < last else None
        fate = resolve(sequence, place) if place else Fate.FRESH
        stop = min(place.stop, last) if place and fate is not Fate.FRESH else _fresh_stop(sequence, place, at)
        if fate is Fate.EXACT or (fate is Fate.BLENDED and not sequence.mode.ratio):
            at = stop
            continue
        price = max(sequence.mode.row_cost, 1e-3) if fate is Fate.BLENDED else 1.0
        afford = int(left / price)
        if afford <= 0 or (fate is Fate.BLENDED and rows.pieces and afford < stop - at <= budget.whole / price):
            break
        stop = min(stop, at + afford)
        rows.add(at, stop, place.index if place and fate is Fate.BLENDED else -1, price)
        at = stop
    return Span(sequence, start, at, rows.cost, _sequence_rows(sequence, rows, at) if rows.pieces else None)


def _fresh_stop(sequence: Sequence, place: Place | None, at: int) -> int:
    return min(place.stop if place else sequence.next_place(at), sequence.length)


def _sequence_rows(sequence: Sequence, rows: _Rows, stop: int) -> SequenceRows:
    positions = rows.positions()
    capture = None
    if sequence.capture is not None and stop > sequence.capture:
        capture = (max(sequence.capture, sequence.computed), stop)
    return SequenceRows(
        token_ids=sequence.ids[positions].astype(np.int64),
        positions=positions,
        block_table=sequence.numbers[: len(sequence.table)],
        sample=sequence.capture is None and stop == sequence.length,
        blend=_blend_rows(sequence, rows, positions),
        capture=capture,
    )


def _blend_rows(sequence: Sequence, rows: _Rows, positions: Int64s) -> BlendRows | None:
    if all(chunk < 0 for _, _, chunk in rows.pieces):
        return None
    chunk = rows.chunks()
    mode = sequence.mode
    prior = None if sequence.prior is None else np.nan_to_num(sequence.prior[positions])
    has_prior = sequence.prior is not None and not np.isnan(sequence.prior[positions[chunk >= 0]]).any()
    policy = resolve_policy(mode.policy, has_prior)
    sequence.tally.policy = policy
    return BlendRows(policy, mode.ratio, chunk >= 0, chunk, prior if has_prior else None, seed=sequence.seed)
