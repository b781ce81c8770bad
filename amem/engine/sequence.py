"""The state of one sequence: its ids, its pages, what of it is computed, and what it was computed from."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from amem.engine.batch import ChunkKV, Float32s, Int64s
from amem.engine.blocks import BlockPool, Match, Page, Taint
from amem.engine.tally import Source, Tally
from amem.engine.types import ChunkSpec, SamplingParams, Tenant


class Fate(Enum):
    """What became of a chunk of the prompt."""

    FRESH = "fresh"
    EXACT = "exact"
    BLENDED = "blended"


@dataclass(frozen=True, slots=True)
class Place:
    """A chunk in a prompt. `exact`: what stands in front of it is what it was computed behind."""

    index: int
    start: int
    stop: int
    spec: ChunkSpec
    key: bytes
    exact: bool


@dataclass(frozen=True, slots=True)
class BlendMode:
    """How the chunks of a request are blended. `enabled=False` uses stored KV only where it is exact.

    row_cost: work of a loaded row as a share of a computed one, what the budget of a step is charged.
    """

    enabled: bool
    policy: str
    ratio: float
    row_cost: float = 1.0

    def options(self) -> bytes:
        return f"{self.policy} {self.ratio:.6f}".encode()


@dataclass(frozen=True, slots=True)
class Tags:
    """Memories whose text stands at or before a position: `names[i]` from position `starts[i]` on."""

    starts: tuple[int, ...] = ()
    names: tuple[frozenset[str], ...] = ()

    def before(self, position: int) -> frozenset[str]:
        """Every memory that starts in front of `position`."""
        at = bisect_left(self.starts, position)
        return self.names[at - 1] if at else frozenset()

    @property
    def all(self) -> frozenset[str]:
        return self.names[-1] if self.names else frozenset()


@dataclass(slots=True, eq=False)
class Sequence:
    """`ids[:length]` are known, KV of the first `computed` of them lies in the pages of `table`.

    limit: most ids that it may ever have.  capture: a background write wants the KV from this position on.
    """

    id: str
    tenant: Tenant | None
    root: bytes
    ids: NDArray[np.int32]
    length: int
    limit: int
    tally: Tally
    mode: BlendMode
    places: tuple[Place, ...] = ()
    tags: Tags = Tags()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stops: frozenset[int] = frozenset()
    seed: int = 0
    priority: int = 0
    capture: int | None = None

    computed: int = 0
    table: list[Page] = field(default_factory=list)
    numbers: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    chain: list[bytes] = field(default_factory=list)
    fates: dict[int, Fate] = field(default_factory=dict)
    prior: Float32s | None = None
    marks: frozenset[tuple[int, bytes]] = frozenset()
    inherited: frozenset[str] = frozenset()
    captured: list[ChunkKV] = field(default_factory=list)
    _place_starts: tuple[int, ...] = field(init=False)
    _taint: Taint | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._place_starts = tuple(place.start for place in self.places)

    @property
    def prompt(self) -> int:
        return self.tally.prompt

    @property
    def decoding(self) -> bool:
        """Only the newest sampled id is still to be computed."""
        return self.length > self.prompt and self.computed == self.length - 1

    @property
    def allowed(self) -> Taint | None:
        """The most tainted KV that this request would accept: what it would blend itself."""
        if not self.mode.enabled:
            return None
        marks = frozenset((place.start, place.key) for place in self.places if not place.exact)
        return Taint(self.mode.options(), marks)

    def place_at(self, position: int) -> Place | None:
        at = bisect_right(self._place_starts, position) - 1
        return self.places[at] if at >= 0 and position < self.places[at].stop else None

    def next_place(self, position: int) -> int:
        """Where the next chunk behind `position` starts, or the end of the ids."""
        at = bisect_right(self._place_starts, position)
        return self._place_starts[at] if at < len(self._place_starts) else self.length

    def id_bytes(self, start: int, stop: int) -> bytes:
        return self.ids[start:stop].tobytes()

    def shared_with(self, other: Sequence) -> int:
        """How many leading ids the two prompts share, short of the last one of each."""
        length = min(self.prompt, other.prompt) - 1
        differs = np.flatnonzero(self.ids[:length] != other.ids[:length])
        return int(differs[0]) if len(differs) else length

    def append(self, token: int) -> None:
        self.ids[self.length] = token
        self.length += 1

    # Pages -----------------------------------------------------------------------------------------------------

    def hold(self, pool: BlockPool, match: Match, fresh: list[Page]) -> None:
        """Begin with matched pages and freshly allocated ones behind them."""
        self.table = [*match.pages, *fresh]
        self.numbers = np.zeros(pool.pages_for(self.limit), np.int64)
        self.numbers[: len(self.table)] = [page.number for page in self.table]
        self.computed = len(match.pages) * pool.page_size + match.tail_tokens
        self.chain = [page.hash or b"" for page in match.pages]
        self.marks = match.taint.marks if match.taint else frozenset()
        behind = (*match.pages[-1:], *((match.tail,) if match.tail else ()))
        self.inherited = frozenset().union(*(page.memories for page in behind))
        for at, page in enumerate(self.table):
            page.memories |= self._memories_at(at, len(match.pages), pool.page_size)
        self.tally.fill(0, self.computed, Source.PREFIX)

    def grow(self, page: Page) -> None:
        page.memories |= self.tags.all | self.inherited
        self.numbers[len(self.table)] = page.number
        self.table.append(page)

    def _memories_at(self, at: int, matched: int, page_size: int) -> frozenset[str]:
        own = self.tags.before((at + 1) * page_size)
        return own if at < matched else own | self.inherited

    def taint_before(self, position: int) -> Taint | None:
        marks = frozenset(mark for mark in self.marks if mark[0] < position)
        if not marks:
            return None
        if self._taint is None or self._taint.marks != marks:
            self._taint = Taint(self.mode.options(), marks)
        return self._taint

    def publish(self, pool: BlockPool) -> None:
        """Make every full computed page findable."""
        size = pool.page_size
        while (len(self.chain) + 1) * size <= self.computed:
            self._publish_page(pool, (len(self.chain) + 1) * size)

    def release(self, pool: BlockPool, keep: bool) -> None:
        """Give every page back; with `keep`, the last, partial page stays findable too.

        All that a follow-up has to compute again is the last sampled id: its KV was never needed.
        """
        if keep and self.table:
            self.publish(pool)
            if self.computed > len(self.chain) * pool.page_size:
                self._publish_page(pool, self.computed)
        pool.release(self.table)
        self.table, self.chain, self.fates, self.captured = [], [], {}, []
        self.marks, self.inherited, self.computed = frozenset(), frozenset(), 0

    def _publish_page(self, pool: BlockPool, stop: int) -> None:
        at = len(self.chain)
        parent = self.chain[-1] if self.chain else self.root
        ids = self.id_bytes(at * pool.page_size, stop)
        self.chain.append(pool.publish(self.table[at], parent, ids, self.taint_before(stop)))
