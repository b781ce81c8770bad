"""The page pool: which pages are free, shared or cached, under which hash, and whose memories they hold.

A cached page is found by the hash of everything in front of it and its own ids. The root of each chain is keyed by
the tenant's secret, so that no chain of one tenant is reachable from another's. KV that was blended carries a
`Taint`: it is part of the hash, and only a request that would blend the same may use it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from amem.engine.types import Tenant

ID_BYTES = 4
_HASH_BYTES = 16
_NO_MEMORIES: frozenset[str] = frozenset()


def chain_root(tenant: Tenant | None) -> bytes:
    """The hash in front of a tenant's first block (16 bytes). Requests without a tenant share one root."""
    secret = b"" if tenant is None else tenant.id + tenant.secret
    return hashlib.blake2b(b"amem prefix", key=secret, digest_size=_HASH_BYTES).digest()


@dataclass(frozen=True, slots=True)
class Taint:
    """What makes KV approximate: how it was blended, and which stored chunks it was blended from.

    options: policy and ratio, as bytes.  marks: (start position, chunk key) of every blended chunk so far.
    """

    options: bytes
    marks: frozenset[tuple[int, bytes]]
    digest: bytes = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        state = hashlib.blake2b(self.options, digest_size=_HASH_BYTES)
        for start, key in sorted(self.marks):
            state.update(start.to_bytes(8, "little") + key)
        object.__setattr__(self, "digest", state.digest())

    def within(self, allowed: Taint | None) -> bool:
        """Whether a request that would blend `allowed` gets nothing worse than it asked for."""
        return allowed is not None and self.options == allowed.options and self.marks <= allowed.marks


def block_hash(parent: bytes, ids: bytes, taint: Taint | None) -> bytes:
    state = hashlib.blake2b(parent, digest_size=_HASH_BYTES)
    state.update(ids)
    if taint is not None:
        state.update(taint.digest)
    return state.digest()


@dataclass(slots=True, eq=False)
class Page:
    """One page of KV. `ids` (int32 bytes) says what a published page holds; a last, partial page has fewer."""

    number: int
    refs: int = 0
    root: bytes | None = None
    memories: frozenset[str] = _NO_MEMORIES
    parent: bytes = b""
    ids: bytes = b""
    hash: bytes | None = None
    taint: Taint | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """The longest usable cached prefix: shared full `pages`, then `tail_tokens` of `tail`, which has to be copied."""

    pages: tuple[Page, ...] = ()
    tail: Page | None = None
    tail_tokens: int = 0
    taint: Taint | None = None


@dataclass(frozen=True, slots=True)
class _Node:
    """One page of a path through the cache, and the path in front of it."""

    hash: bytes
    page: Page | None = None
    before: _Node | None = None

    @property
    def tainted(self) -> bool:
        return self.page is not None and self.page.taint is not None

    def pages(self) -> tuple[Page, ...]:
        pages: list[Page] = []
        node: _Node | None = self
        while node is not None and node.page is not None:
            pages.append(node.page)
            node = node.before
        return tuple(reversed(pages))


@dataclass(slots=True)
class PoolCounters:
    evictions: int = 0
    zeroed: int = 0


@dataclass(slots=True)
class BlockPool:
    """All pages of the KV pool. `zero` clears pages by number; a page is cleared before it is handed out again."""

    pages: int
    page_size: int
    zero: Callable[[Sequence[int]], None]
    counters: PoolCounters = field(default_factory=PoolCounters)
    _all: list[Page] = field(init=False, repr=False)
    _free: OrderedDict[int, Page] = field(init=False, repr=False)
    _children: dict[tuple[bytes, bytes], dict[int, Page]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._all = [Page(number) for number in range(self.pages)]
        self._free = OrderedDict((page.number, page) for page in self._all)
        self._children = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds; cached ones are among them."""
        return len(self._free)

    @property
    def cached(self) -> int:
        return sum(1 for page in self._free.values() if page.hash is not None)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    # Finding ---------------------------------------------------------------------------------------------------

    def match(self, root: bytes, ids: bytes, limit: int, allowed: Taint | None) -> Match:
        """The longest cached prefix of `ids` (int32 bytes) of at most `limit` tokens that `allowed` may use."""
        step = self.page_size * ID_BYTES
        frontier, at = [_Node(root)], 0
        while at + step <= limit * ID_BYTES:
            block = ids[at : at + step]
            longer = [
                _Node(page.hash, page, node)
                for node in frontier
                for page in self._usable(node.hash, block, allowed)
                if page.ids == block and page.hash is not None
            ]
            if not longer:
                break
            frontier, at = longer, at + step
        rest = ids[at : min(at + step, limit * ID_BYTES)]
        tails = [(node, *self._tail(node.hash, rest, allowed)) for node in frontier]
        node, tail, tokens = max(tails, key=lambda found: (found[2], not found[0].tainted))
        pages = node.pages()
        last = tail or (pages[-1] if pages else None)
        return Match(pages, tail, tokens, last.taint if last else None)

    def _usable(self, parent: bytes, block: bytes, allowed: Taint | None) -> list[Page]:
        children = self._children.get((parent, block[:ID_BYTES]), {}).values()
        return [page for page in children if page.taint is None or page.taint.within(allowed)]

    def _tail(self, parent: bytes, rest: bytes, allowed: Taint | None) -> tuple[Page | None, int]:
        best, length = None, 0
        for page in self._usable(parent, rest, allowed) if rest else ():
            common = _common_ids(page.ids, rest)
            if common > length:
                best, length = page, common
        return best, length

    # Taking and giving back ------------------------------------------------------------------------------------

    def share(self, pages: Iterable[Page]) -> None:
        """Hold cached pages, so that they are not evicted."""
        for page in pages:
            if page.refs == 0:
                del self._free[page.number]
            page.refs += 1

    def allocate(self, count: int, root: bytes) -> list[Page] | None:
        """`count` cleared pages for the tenant of `root`, or None (and nothing taken) when too few are free."""
        if count > len(self._free):
            return None
        pages = [self._free.popitem(last=False)[1] for _ in range(count)]
        for page in pages:
            if page.hash is not None:
                self.counters.evictions += 1
                self._unpublish(page)
        self._clear([page for page in pages if page.root is not None])
        for page in pages:
            page.refs, page.root = 1, root
        return pages

    def release(self, pages: Sequence[Page]) -> None:
        """Give back one hold of each page. Later pages of a sequence are evicted before earlier ones."""
        for page in reversed(pages):
            page.refs -= 1
            if page.refs == 0:
                self._free[page.number] = page
                if page.hash is None:
                    self._free.move_to_end(page.number, last=False)

    def publish(self, page: Page, parent: bytes, ids: bytes, taint: Taint | None) -> bytes:
        """Make a page findable behind `parent`; the hash of its chain. A twin that is cached already stays alone."""
        digest = block_hash(parent, ids, taint)
        children = self._children.setdefault((parent, ids[:ID_BYTES]), {})
        if page.hash is None and all(twin.hash != digest for twin in children.values()):
            page.parent, page.ids, page.hash, page.taint = parent, ids, digest, taint
            children[page.number] = page
        return digest

    def retract(self, pages: Iterable[Page]) -> None:
        """Let nobody find these pages any more: what they hold is not sound."""
        for page in pages:
            self._unpublish(page)

    # Forgetting ------------------------------------------------------------------------------------------------

    def holding(self, root: bytes, memories: frozenset[str] | None) -> list[Page]:
        """Pages of a tenant with bytes computed at or after one of `memories`; all of its pages for None."""
        return [page for page in self._all if page.root == root and (memories is None or page.memories & memories)]

    def forget(self, root: bytes, memories: frozenset[str] | None) -> int:
        """Drop and clear such pages; how many. Sequences that hold one have to be ended before: RuntimeError."""
        pages = self.holding(root, memories)
        if any(page.refs for page in pages):
            raise RuntimeError("a page to be forgotten is still held by a sequence: end the sequence first")
        for page in pages:
            self._unpublish(page)
            self._free.move_to_end(page.number, last=False)
        self._clear(pages)
        return len(pages)

    def _unpublish(self, page: Page) -> None:
        if page.hash is not None:
            place = (page.parent, page.ids[:ID_BYTES])
            del self._children[place][page.number]
            if not self._children[place]:
                del self._children[place]
        page.parent, page.ids, page.hash, page.taint = b"", b"", None, None

    def _clear(self, pages: Sequence[Page]) -> None:
        if pages:
            self.zero([page.number for page in pages])
        for page in pages:
            page.root, page.memories = None, _NO_MEMORIES
        self.counters.zeroed += len(pages)

    # Books -----------------------------------------------------------------------------------------------------

    def check(self, tables: Iterable[Sequence[Page]]) -> None:
        """Prove the books against the tables of all live sequences. Raises RuntimeError with what is wrong."""
        held = [0] * self.pages
        for table in tables:
            for page in table:
                held[page.number] += 1
        for page in self._all:
            if page.refs != held[page.number]:
                raise RuntimeError(f"page {page.number} counts {page.refs} holders, {held[page.number]} hold it")
            if (page.number in self._free) != (page.refs == 0):
                raise RuntimeError(f"page {page.number} with {page.refs} holders is on the wrong list")
            siblings = self._children.get((page.parent, page.ids[:ID_BYTES]), {})
            if page.hash is not None and siblings.get(page.number) is not page:
                raise RuntimeError(f"page {page.number} is published but cannot be found")
        published = sum(page.hash is not None for page in self._all)
        if published != sum(map(len, self._children.values())) or not all(self._children.values()):
            raise RuntimeError("the index names a page that is not published")


def _common_ids(one: bytes, other: bytes) -> int:
    """How many leading ids two int32 byte strings share."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size // ID_BYTES
    differs = next(at for at in range(size) if one[at] != other[at])
    return differs // ID_BYTES
