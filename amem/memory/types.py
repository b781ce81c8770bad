"""The types that cross the border of the memory layer. All frozen; times are seconds since 1970."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

Metadata = Mapping[str, object]


class State(str, Enum):
    LIVE = "live"
    SUPERSEDED = "superseded"


class Outcome(str, Enum):
    """What `add` did with an item: stored it, counted it as seen again, or stored it in place of others."""

    ADDED = "added"
    SEEN = "seen"
    SUPERSEDED = "superseded"


@dataclass(frozen=True, slots=True)
class NewMemory:
    """Something to remember.

    A later memory with the same `key` supersedes the one that holds it. `conversation` places the memory behind those
    added to that conversation before. `metadata` is any JSON object. `created` is when it was said (default: now).
    """

    text: str
    key: str | None = None
    metadata: Metadata | None = None
    conversation: str | None = None
    created: float | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """A stored memory.

    `seq` numbers the memories of a user in the order of arrival and is never reused. `ordinal` is the place in the
    conversation, 0 without one. `seen` counts how often the same was added. `version` grows with each update.
    """

    id: str
    seq: int
    text: str
    conversation: str | None
    ordinal: int
    key: str | None
    metadata: Metadata | None
    created: float
    updated: float
    seen: int
    version: int
    state: State
    superseded_by: str | None

    @property
    def place(self) -> tuple[str, int, float, int]:
        """Sort key of the canonical order: conversations together, each in the order in which it was held."""
        return (self.conversation or "", self.ordinal, self.created, self.seq)


@dataclass(frozen=True, slots=True)
class Added:
    """`id` holds the text now. `superseded` are the memories that it took the place of."""

    id: str
    outcome: Outcome
    superseded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """Memories in the order of arrival; `next` is the cursor of the following page, None on the last."""

    memories: tuple[Memory, ...]
    next: str | None


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What an erasure removed from the files before it returned.

    `ids` are the memories that are gone, earlier versions behind them included. `rows` counts database rows of every
    kind, `sessions` the live sessions that began a new epoch (or, for a whole user, ended).
    """

    ids: tuple[str, ...]
    rows: int
    vectors: int
    sessions: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RecallOptions:
    """`k` memories at most, `budget_tokens` in all (None: no limit), best first.

    `neighbours`: where the budget allows, each hit brings this many memories from either side of its conversation.
    They come on top of `k`, and never in place of a hit. Without a budget there are none.
    """

    k: int = 10
    budget_tokens: int | None = None
    neighbours: int = 1
    conversation: str | None = None


@dataclass(frozen=True, slots=True)
class Recalled:
    """A memory with the score that ranked it. `parts` holds where the score came from:

    lexical_rank, lexical_bm25, lexical_rrf, vector_rank, vector_cosine, vector_rrf: the two rankings and what each
    gave to the sum; neighbour_of_rank: the rank of the hit in whose company it came.
    """

    memory: Memory
    score: float
    parts: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Memories that entered a session together, in canonical order. `anchor` names the turn that needed them."""

    anchor: str | None
    memory_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Session:
    """A working set that only grows at its end, so that nothing in front of a resident memory moves.

    A new `epoch` means that something was taken out or changed, and that prompts planned before are void.
    `tokens` is the size of the resident memories by the counter of the configuration.
    """

    id: str
    user: str
    epoch: int
    batches: tuple[Batch, ...]
    budget_tokens: int
    tokens: int
    created: float

    @property
    def memory_ids(self) -> tuple[str, ...]:
        return tuple(id for batch in self.batches for id in batch.memory_ids)


@dataclass(frozen=True, slots=True)
class UserSummary:
    """`memories` counts live ones. A user whose database is damaged is listed with `damaged` and no counts."""

    user: str
    memories: int
    superseded: int
    sessions: int
    bytes: int
    created: float
    damaged: bool = False
