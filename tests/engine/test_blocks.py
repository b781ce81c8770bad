"""The page pool: what is found, what is evicted first, what is cleared, and books that notice damage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from amem.engine.blocks import BlockPool, Page, Taint, chain_root
from amem.engine.types import Tenant

ROOT = chain_root(Tenant(b"a" * 16, b"s" * 32))
OTHER = chain_root(Tenant(b"b" * 16, b"t" * 32))
BLEND = Taint(b"gradual 0.15", frozenset({(4, b"key one")}))


class Cleared:
    """Counts how often each page was cleared."""

    def __init__(self) -> None:
        self.pages: list[int] = []

    def __call__(self, pages: Iterable[int]) -> None:
        self.pages += pages


def pool_of(pages: int = 8) -> tuple[BlockPool, Cleared]:
    cleared = Cleared()
    return BlockPool(pages, 4, cleared), cleared


def ids(*tokens: int) -> bytes:
    return np.array(tokens, np.int32).tobytes()


def cache(pool: BlockPool, tokens: tuple[int, ...], root: bytes = ROOT, taints: Sequence[Taint | None] = ()) -> None:
    """Leave the pages of a finished sequence in the pool."""
    pages = pool.allocate(pool.pages_for(len(tokens)), root)
    assert pages is not None
    parent = root
    for at, page in enumerate(pages):
        taint = taints[at] if taints else None
        parent = pool.publish(page, parent, ids(*tokens[at * 4 : at * 4 + 4]), taint)
    pool.release(pages)


def found(pool: BlockPool, *tokens: int, root: bytes = ROOT, allowed: Taint | None = None) -> int:
    match = pool.match(root, ids(*tokens), len(tokens), allowed)
    return 4 * len(match.pages) + match.tail_tokens


def test_full_and_partial_pages_are_found() -> None:
    pool, _ = pool_of()
    cache(pool, (1, 2, 3, 4, 5, 6))
    assert found(pool, 1, 2, 3, 4, 5, 6, 7) == 6
    assert found(pool, 1, 2, 3, 4, 5, 9) == 5
    assert found(pool, 1, 2, 3, 9) == 3
    assert found(pool, 2, 2, 3, 4) == 0
    pool.check([])


def test_a_match_is_no_longer_than_asked() -> None:
    pool, _ = pool_of()
    cache(pool, tuple(range(12)))
    for limit in range(13):
        match = pool.match(ROOT, ids(*range(12)), limit, None)
        assert 4 * len(match.pages) + match.tail_tokens == limit


def test_roots_are_apart() -> None:
    pool, _ = pool_of()
    cache(pool, (1, 2, 3, 4, 5))
    assert found(pool, 1, 2, 3, 4, 5, root=OTHER) == 0
    assert found(pool, 1, 2, 3, 4, 5, root=chain_root(None)) == 0


def test_the_same_secret_under_another_id_is_another_root() -> None:
    assert chain_root(Tenant(b"a" * 16, b"s" * 32)) != chain_root(Tenant(b"b" * 16, b"s" * 32))
    assert chain_root(Tenant(b"a" * 16, b"s" * 32)) != chain_root(Tenant(b"a" * 16, b"t" * 32))


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        (None, 4),
        (BLEND, 8),
        (Taint(BLEND.options, BLEND.marks | {(9, b"key two")}), 8),
        (Taint(b"gradual 0.30", BLEND.marks), 4),
        (Taint(BLEND.options, frozenset({(5, b"key one")})), 4),
        (Taint(BLEND.options, frozenset({(4, b"key two")})), 4),
        (Taint(BLEND.options, frozenset()), 4),
    ],
)
def test_blended_pages_serve_only_their_own_blend(allowed: Taint | None, expected: int) -> None:
    pool, _ = pool_of()
    cache(pool, tuple(range(8)), taints=(None, BLEND))
    assert found(pool, *range(8), allowed=allowed) == expected


def test_the_longer_of_two_chains_is_taken_and_exact_wins_a_tie() -> None:
    pool, _ = pool_of(12)
    cache(pool, tuple(range(8)))
    cache(pool, tuple(range(12)), taints=(None, BLEND, BLEND))
    longer = pool.match(ROOT, ids(*range(12)), 12, BLEND)
    assert (len(longer.pages), longer.taint) == (3, BLEND)
    tie = pool.match(ROOT, ids(*range(8)), 8, BLEND)
    assert (len(tie.pages), tie.taint) == (2, None)


def test_a_blended_page_never_stands_in_for_the_exact_one_of_the_same_ids() -> None:
    """Also when it came first: to call the exact page its twin would lose the exact page and all behind it."""
    pool, _ = pool_of()
    cache(pool, tuple(range(12)), taints=(None, BLEND, BLEND))
    assert found(pool, *range(12)) == 4
    cache(pool, tuple(range(12)))
    assert found(pool, *range(12)) == 12
    pool.check([])


def test_twins_are_kept_once() -> None:
    pool, _ = pool_of()
    cache(pool, (1, 2, 3, 4))
    cache(pool, (1, 2, 3, 4))
    assert pool.cached == 1
    pool.check([])


def test_uncached_pages_go_first_then_the_oldest_tails() -> None:
    pool, _ = pool_of(4)
    cache(pool, (1, 2, 3, 4, 5, 6, 7, 8))
    cache(pool, (9, 9, 9, 9))
    first = pool.allocate(1, ROOT)
    assert first is not None
    assert (pool.cached, pool.counters.evictions) == (3, 0)
    pool.allocate(1, ROOT)
    assert found(pool, 1, 2, 3, 4, 5, 6, 7, 8) == 4
    pool.allocate(1, ROOT)
    assert found(pool, 1, 2, 3, 4) == 0
    assert found(pool, 9, 9, 9, 9) == 4
    assert pool.counters.evictions == 2


def test_a_held_page_is_not_evicted() -> None:
    pool, _ = pool_of(2)
    cache(pool, (1, 2, 3, 4))
    match = pool.match(ROOT, ids(1, 2, 3, 4), 4, None)
    pool.share(match.pages)
    assert pool.allocate(2, ROOT) is None
    rest = pool.allocate(1, ROOT)
    assert rest is not None
    assert rest[0] is not match.pages[0]
    pool.check([list(match.pages), rest])


def test_used_pages_are_cleared_before_anyone_gets_them() -> None:
    pool, cleared = pool_of(2)
    pages = pool.allocate(2, ROOT)
    assert pages is not None
    assert cleared.pages == []
    pool.release(pages)
    pool.allocate(2, OTHER)
    assert sorted(cleared.pages) == [0, 1]


def test_forget_clears_cached_and_abandoned_pages_of_that_tenant_alone() -> None:
    pool, cleared = pool_of()
    for root in (ROOT, OTHER):
        cache(pool, (1, 2, 3, 4), root=root)
    for page in pool.holding(ROOT, None) + pool.holding(OTHER, None):
        page.memories = frozenset({"m"})
    abandoned = pool.allocate(1, ROOT)
    assert abandoned is not None
    abandoned[0].memories = frozenset({"m", "n"})
    pool.release(abandoned)
    assert pool.forget(ROOT, frozenset({"m"})) == 2
    assert len(cleared.pages) == 2
    assert found(pool, 1, 2, 3, 4) == 0
    assert found(pool, 1, 2, 3, 4, root=OTHER) == 4
    assert pool.forget(ROOT, frozenset({"m"})) == 0
    pool.check([])


def test_forget_refuses_while_a_sequence_holds_the_page() -> None:
    pool, _ = pool_of()
    pages = pool.allocate(1, ROOT)
    assert pages is not None
    pages[0].memories = frozenset({"m"})
    with pytest.raises(RuntimeError, match="still held"):
        pool.forget(ROOT, frozenset({"m"}))


def test_retracted_pages_are_not_found() -> None:
    pool, _ = pool_of()
    cache(pool, (1, 2, 3, 4))
    pool.retract(pool.match(ROOT, ids(1, 2, 3, 4), 4, None).pages)
    assert found(pool, 1, 2, 3, 4) == 0
    pool.check([])


def damage_count(pool: BlockPool, held: list[Page]) -> None:
    held[0].refs += 1


def damage_list(pool: BlockPool, held: list[Page]) -> None:
    pool.release(held)
    pool.share(held)
    held[0].refs = 0


def damage_index(pool: BlockPool, held: list[Page]) -> None:
    pool.publish(held[0], ROOT, ids(1), None)
    held[0].parent = OTHER


def damage_hash(pool: BlockPool, held: list[Page]) -> None:
    pool.publish(held[0], ROOT, ids(1), None)
    held[0].hash = None


@pytest.mark.parametrize("damage", [damage_count, damage_list, damage_index, damage_hash])
def test_the_books_notice_damage(damage: object) -> None:
    pool, _ = pool_of()
    held = pool.allocate(2, ROOT)
    assert held is not None
    pool.check([held])
    assert callable(damage)
    damage(pool, held)
    with pytest.raises(RuntimeError):
        pool.check([held])
