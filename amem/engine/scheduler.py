"""Who runs in the next step. One budget of rows a step; no prefill phase and no decode phase.

Each sequence has ids that are known and KV that is computed; a step hands out rows until the budget is spent.
Requests come first, in the order of priority (larger is sooner) and arrival. Background writes get what is left, and
give their pages back when a request needs them. When pages run out, the last request in that order is preempted: its
pages stay in the cache as long as nobody needs them, and it is computed again from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from amem.engine.blocks import BlockPool, Match
from amem.engine.sequence import Sequence
from amem.engine.spans import Budget, Resolve, Span, plan_span


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """step_rows: rows of a step.  background_rows: the most of them for background writes; while a request runs,
    `shared_rows`.  background_sequences: writes in progress at a time."""

    step_rows: int = 2048
    max_sequences: int = 64
    background_rows: int = 512
    shared_rows: int = 64
    background_sequences: int = 4


@dataclass(slots=True)
class SchedulerCounters:
    preemptions: int = 0
    steps: int = 0


def _order(sequence: Sequence) -> tuple[int, float]:
    return -sequence.priority, sequence.tally.arrival


@dataclass(slots=True)
class Scheduler:
    """Owns every sequence and its pages. `copy(source, target)` copies the KV of one page."""

    config: SchedulerConfig
    pool: BlockPool
    resolve: Resolve
    copy: Callable[[int, int], None]
    counters: SchedulerCounters = field(default_factory=SchedulerCounters)
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    background: list[Sequence] = field(default_factory=list)
    writing: list[Sequence] = field(default_factory=list)

    def add(self, sequence: Sequence) -> None:
        queue = self.waiting if sequence.capture is None else self.background
        queue.append(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.background or self.writing)

    @property
    def sequences(self) -> Iterator[Sequence]:
        yield from (*self.running, *self.writing, *self.waiting, *self.background)

    # A step ----------------------------------------------------------------------------------------------------

    def plan(self) -> list[Span]:
        """The spans of the next step, pages in place. Newest ids of running answers first, then prompts."""
        self._admit()
        spans: list[Span] = []
        left = float(self.config.step_rows)
        for sequence in sorted(self.running, key=lambda sequence: not sequence.decoding):
            if left < 1:
                break
            if sequence in self.running and self._grow(sequence):
                spans.append(plan_span(sequence, Budget(left, self.config.step_rows), self.resolve))
                left -= spans[-1].cost
        spans += self._plan_background(left)
        self.counters.steps += bool(spans)
        return spans

    def commit(self, span: Span) -> None:
        """The rows of a span have run and are sound."""
        span.sequence.computed = span.stop
        span.sequence.publish(self.pool)

    def finish(self, sequence: Sequence, keep: bool) -> None:
        """End a sequence, wherever it is. `keep`: its pages may be found by later requests."""
        for queue in (self.running, self.waiting, self.writing, self.background):
            if sequence in queue:
                queue.remove(sequence)
        sequence.release(self.pool, keep)

    def touching(self, root: bytes, memories: frozenset[str] | None) -> list[Sequence]:
        """Sequences of a tenant that read, or hold pages with, one of `memories`; all of them for None."""
        return [
            sequence
            for sequence in self.sequences
            if sequence.root == root
            and (
                memories is None
                or sequence.tags.all & memories
                or any(page.memories & memories for page in sequence.table)
            )
        ]

    def check(self) -> None:
        """Prove the books of the pool. Raises RuntimeError with what is wrong."""
        self.pool.check(sequence.table for sequence in self.sequences)

    # Pages -----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        self.waiting.sort(key=_order)
        for sequence in list(self.waiting):
            if len(self.running) >= self.config.max_sequences:
                return
            if self._prefix_is_coming(sequence):
                continue
            while not self._start(sequence):
                if not self.writing:
                    return
                self._preempt(self.writing[-1])
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self.running.sort(key=_order)

    def _prefix_is_coming(self, sequence: Sequence) -> bool:
        """Another request is about to compute pages that this one could share: waiting is cheaper than both."""
        size = self.pool.page_size
        return any(
            other.root == sequence.root
            and other.computed // size < sequence.shared_with(other) // size
            and (not other.mode.enabled or other.mode.options() == sequence.mode.options())
            for other in self.running
            if other.computed < other.prompt
        )

    def _start(self, sequence: Sequence) -> bool:
        """Give a sequence the cached pages of its prefix and free ones for the rest, if there are enough."""
        limit = sequence.length - 1 if sequence.capture is None else sequence.capture
        match = self.pool.match(sequence.root, sequence.id_bytes(0, limit), limit, sequence.allowed)
        tails = (match, replace(match, tail=None, tail_tokens=0)) if match.tail else (match,)
        return any(self._hold(sequence, found) for found in tails)

    def _hold(self, sequence: Sequence, match: Match) -> bool:
        held = [*match.pages, *((match.tail,) if match.tail else ())]
        self.pool.share(held)
        needed = self.pool.pages_for(sequence.length) - len(match.pages)
        spare = len(self.running)
        fresh = self.pool.allocate(needed, sequence.root) if self.pool.free >= needed + spare else None
        if fresh is None:
            self.pool.release(held)
            return False
        if match.tail:
            self.copy(match.tail.number, fresh[0].number)
            self.pool.release([match.tail])
        sequence.hold(self.pool, match, fresh)
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """Pages for every known id of a running sequence. False when it had to be preempted itself."""
        while self.pool.pages_for(sequence.length) > len(sequence.table):
            pages = self.pool.allocate(1, sequence.root)
            if pages is not None:
                sequence.grow(pages[0])
                continue
            victim = (self.writing or self.running)[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.counters.preemptions += 1
        self.finish(sequence, keep=True)
        if sequence.capture is None:
            self.waiting.append(sequence)
        else:
            self.background.insert(0, sequence)

    # Background ------------------------------------------------------------------------------------------------

    def _plan_background(self, left: float) -> list[Span]:
        while self.background and len(self.writing) < self.config.background_sequences and not self.waiting:
            if not self._start(self.background[0]):
                break
            self.writing.append(self.background.pop(0))
        left = min(left, self.config.shared_rows if self.running else self.config.background_rows)
        spans: list[Span] = []
        for sequence in self.writing:
            if left < 1:
                break
            spans.append(plan_span(sequence, Budget(left, self.config.background_rows), self.resolve))
            left -= spans[-1].cost
        return spans
