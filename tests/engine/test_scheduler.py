"""The control of the engine against an oracle: a device whose KV is a hash of every id so far.

A page that is stale, swapped, cleared too early, shared across a blend or given to the wrong sequence gives another
hash, and so another answer. Core, scheduler, pool, writer and store are the real ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from amem.engine.batch import Batch, ChunkKV, Int64s, SequenceRows, StepOutput
from amem.engine.blocks import chain_root
from amem.engine.core import Core, Parts
from amem.engine.intake import Intake, Limits
from amem.engine.messages import Failed, Finished, ForgetMemories, Message, Tokens, WriteChunks
from amem.engine.scheduler import SchedulerConfig
from amem.engine.sequence import BlendMode
from amem.engine.store.config import ChunkLayout, StoreConfig
from amem.engine.store.store import ChunkStore
from amem.engine.types import (
    BlendOptions,
    ChunkSpec,
    Fidelity,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    Segment,
    Tenant,
)

PAGE = 4
PLAIN = 32  # ids below are ordinary text; each memory has ids of its own above
VOCAB = 96
PREAMBLE = (1, 2, 3)
TENANTS = (Tenant(b"a" * 16, b"x" * 32), Tenant(b"b" * 16, b"y" * 32))
EXACT = BlendOptions(Fidelity.EXACT)


def fold(before: int, token: int) -> int:
    digest = hashlib.blake2b(f"{before}/{token}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") | 1


def answer(prompt: Iterable[int], count: int) -> list[int]:
    """What the oracle says behind a prompt, computed without pages, batches or a scheduler."""
    state, told = 0, []
    for token in prompt:
        state = fold(state, token)
    for _ in range(count):
        told.append(state % PLAIN)
        state = fold(state, told[-1])
    return told


def pack(values: Int64s) -> torch.Tensor:
    """64-bit values as four exact float32 each: [1, tokens, 1, 4]."""
    words = values.astype(np.uint64).view(np.uint16).reshape(1, len(values), 1, 4)
    return torch.from_numpy(words.astype(np.float32))


def unpack(kv: torch.Tensor) -> list[int]:
    return [int(value) for value in kv.numpy().astype(np.uint16).reshape(-1).view(np.uint64)]


@dataclass
class Oracle:
    """A device. Recomputes every second candidate; reading a cleared slot is an error."""

    pages: int
    kv: list[int] = field(init=False)
    lineage: dict[int, frozenset[int]] = field(default_factory=lambda: {0: frozenset()})
    broken: int = -1
    raises: int = -1
    most_rows: int = 0

    def __post_init__(self) -> None:
        self.kv = [0] * (self.pages * PAGE)

    def forward(self, batch: Batch) -> StepOutput:
        slots = [self.slot(s, position) for s in batch.sequences for position in s.positions]
        assert len(slots) == len(set(slots)), "two rows of a batch share a slot"
        self.most_rows = max(self.most_rows, batch.rows)
        if any(self.raises in sequence.token_ids for sequence in batch.sequences):
            raise RuntimeError("the device does not like this token")
        ends, costs, blends, kept, captured = [], [], [], [], []
        for sequence in batch.sequences:
            run = self.rows_that_run(sequence)
            for position, token in zip(sequence.positions, sequence.token_ids, strict=True):
                if position in run:
                    self.run(sequence, int(position), int(token))
            chosen = [] if sequence.blend is None else sequence.positions[sequence.blend.candidate]
            kept.append(np.array([position for position in chosen if position in run], np.int64))
            costs.append(float(len(run)))
            blends.append(float(len(kept[-1])))
            captured.append(self.capture(sequence))
            if sequence.sample:
                ends.append(self.read(sequence, int(sequence.positions[-1])))
        logits = torch.full((len(ends), VOCAB), -10.0)
        for row, state in enumerate(ends):
            logits[row, state % PLAIN] = 10.0
        finite = np.array([state % PLAIN != self.broken for state in ends], bool)
        return StepOutput(logits, np.array(costs), np.array(blends), tuple(kept), tuple(captured), finite)

    def rows_that_run(self, sequence: SequenceRows) -> set[int]:
        if sequence.blend is None:
            return set(sequence.positions.tolist())
        pairs = zip(sequence.positions.tolist(), sequence.blend.candidate, strict=True)
        return {position for position, candidate in pairs if not candidate or position % 2}

    def run(self, sequence: SequenceRows, position: int, token: int) -> None:
        before = self.read(sequence, position - 1) if position else 0
        state = fold(before, token)
        self.kv[self.slot(sequence, position)] = state
        self.lineage[state] = self.lineage[before] | {token}

    def read(self, sequence: SequenceRows, position: int) -> int:
        seen = [self.kv[self.slot(sequence, p)] for p in range(position + 1)]
        assert all(seen), "a row reads a slot that was cleared or never written"
        return seen[-1]

    def capture(self, sequence: SequenceRows) -> ChunkKV | None:
        if sequence.capture is None:
            return None
        values = np.array([self.read(sequence, p) for p in range(*sequence.capture)], np.uint64)
        return ChunkKV(pack(values), torch.zeros(1, len(values), 1, 4))

    def load_chunk(self, kv: ChunkKV, positions: Int64s, table: Int64s, rows: Int64s | None = None) -> None:
        values = unpack(kv.k)
        for index in range(len(positions)) if rows is None else rows:
            place = int(positions[index])
            self.kv[int(table[place // PAGE]) * PAGE + place % PAGE] = values[index]

    def zero(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.kv[page * PAGE : (page + 1) * PAGE] = [0] * PAGE

    def copy(self, source: int, target: int) -> None:
        self.kv[target * PAGE : (target + 1) * PAGE] = self.kv[source * PAGE : (source + 1) * PAGE]

    def prior(self, spec: ChunkSpec) -> None:
        return None

    @staticmethod
    def slot(sequence: SequenceRows, position: int) -> int:
        return int(sequence.block_table[position // PAGE]) * PAGE + int(position) % PAGE

    def holds(self, token: int) -> bool:
        return any(token in self.lineage[state] for state in self.kv)


def mode(options: BlendOptions) -> BlendMode:
    exact = options.fidelity is Fidelity.EXACT
    return BlendMode(not exact, "exact" if exact else "gradual", 0.5, row_cost=0.5)


class Bench:
    """A core on an oracle, and what it has told."""

    def __init__(self, pages: int = 24, **options: int) -> None:
        self.device = Oracle(pages)
        self.store = ChunkStore(StoreConfig(None, 1 << 20, 0), ChunkLayout(1, 1, 4, torch.float32, "oracle"))
        intake = Intake(Limits(VOCAB, pages * PAGE, 1, 1.0), self.store.key, mode)
        config = SchedulerConfig(**{"step_rows": 16, "max_sequences": 4, "background_rows": 8, **options})
        self.core = Core(Parts(self.device, self.store, intake, pages, PAGE, config))
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, Message] = {}

    def step(self) -> None:
        for message in self.core.step():
            if isinstance(message, Tokens):
                self.tokens.setdefault(message.request_id, []).extend(message.token_ids)
            elif isinstance(message, (Finished, Failed)):
                assert message.request_id not in self.ends, "answered twice"
                self.ends[message.request_id] = message
        self.core.scheduler.check()

    def drain(self) -> None:
        for _ in range(5000):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to rest")

    def ask(self, name: str, *parts: Segment, tenant: Tenant = TENANTS[0], options: BlendOptions = EXACT) -> Finished:
        self.add(name, *parts, tenant=tenant, options=options)
        self.drain()
        end = self.ends[name]
        assert isinstance(end, Finished), end
        return end

    def add(
        self,
        name: str,
        *parts: Segment,
        tenant: Tenant | None = TENANTS[0],
        options: BlendOptions = EXACT,
        count: int = 5,
        priority: int = 0,
    ) -> None:
        sampling = SamplingParams(max_tokens=count)
        self.core.add(GenerateRequest(name, tenant, parts, sampling, options, priority))


def memory(number: int, tenant: int = 0, length: int = 6) -> ChunkSpec:
    """A chunk of ids that no other memory and no plain text has. Memory 3 is computed behind memory 2."""
    token = PLAIN + 8 * tenant + number
    before = memory(2, tenant) if number == 3 else None
    context = PREAMBLE + (before.token_ids if before else ())
    behind = (before.memory,) if before else ()
    return ChunkSpec((token,) * length, context, len(PREAMBLE), f"t{tenant}m{number}", behind)


def part(spec: ChunkSpec) -> Segment:
    return Segment(spec.token_ids, spec)


def ids(parts: Iterable[Segment]) -> list[int]:
    return [token for segment in parts for token in segment.token_ids]


HEAD = Segment(PREAMBLE)
QUESTION = Segment((9, 8, 7))


class Machine(RuleBasedStateMachine):
    """Random arrivals, aborts, writes and erasures over too few pages."""

    @initialize(pages=st.integers(12, 24), rows=st.integers(3, 20))
    def start(self, pages: int, rows: int) -> None:
        self.bench = Bench(pages, step_rows=rows, background_rows=rows)
        self.asked: dict[str, tuple[list[int], bool]] = {}
        self.jobs = 0

    @rule(
        tenant=st.integers(0, 1),
        numbers=st.lists(st.integers(0, 3), max_size=3, unique=True),
        question=st.lists(st.integers(0, 3), min_size=1, max_size=9),
        exact=st.booleans(),
        count=st.integers(1, 12),
        priority=st.integers(0, 2),
    )
    def ask(
        self, tenant: int, numbers: list[int], question: list[int], exact: bool, count: int, priority: int
    ) -> None:
        name = f"r{len(self.asked)}"
        parts = (HEAD, *(part(memory(number, tenant)) for number in numbers), Segment(tuple(question)))
        options = EXACT if exact else BlendOptions()
        self.asked[name] = (ids(parts), exact)
        self.bench.add(name, *parts, tenant=TENANTS[tenant], options=options, count=count, priority=priority)

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.bench.step()

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.asked:
            self.bench.core.abort(data.draw(st.sampled_from(sorted(self.asked))))

    @rule(tenant=st.integers(0, 1), number=st.integers(0, 3))
    def write(self, tenant: int, number: int) -> None:
        self.jobs += 1
        self.bench.core.write(WriteChunks(f"w{self.jobs}", TENANTS[tenant], (memory(number, tenant),)))

    @rule(tenant=st.integers(0, 1), number=st.integers(0, 3))
    def forget(self, tenant: int, number: int) -> None:
        spec = memory(number, tenant)
        self.bench.core.forget(ForgetMemories("f", TENANTS[tenant], (spec.memory,)))
        assert not self.bench.device.holds(spec.token_ids[0])
        for gone in (spec, memory(3, tenant)) if number == 2 else (spec,):
            assert self.bench.store.contains(self.bench.store.key(TENANTS[tenant], gone)) is None

    @invariant()
    def answers_are_right_so_far(self) -> None:
        for name, told in getattr(self, "bench", Bench(1)).tokens.items():
            prompt, exact = self.asked[name]
            assert not exact or told == answer(prompt, len(told))

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.drain()
        self.answers_are_right_so_far()
        assert set(self.bench.ends) == set(self.asked)
        assert self.bench.core.pool.free == self.bench.device.pages
        assert self.bench.core.writer.in_flight == 0
        self.bench.store.close()


Machine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMachine = Machine.TestCase


def test_a_prompt_that_never_fits_is_refused() -> None:
    bench = Bench(pages=4)
    bench.add("long", Segment(tuple(range(16))))
    bench.add("fits", Segment(tuple(range(15))), count=9)
    bench.drain()
    assert isinstance(bench.ends["long"], Failed)
    assert bench.ends["long"].code == "prompt_too_long"
    assert isinstance(bench.ends["fits"], Finished)
    assert bench.ends["fits"].reason is FinishReason.LENGTH


def test_preempted_requests_say_the_same() -> None:
    bench = Bench(pages=10, max_sequences=4)
    for number in range(4):
        bench.add(f"r{number}", Segment((number, 5, 6, 7)), count=24)
    bench.drain()
    assert bench.core.scheduler.counters.preemptions > 0
    for number in range(4):
        assert bench.tokens[f"r{number}"] == answer((number, 5, 6, 7), 24)
        report = bench.ends[f"r{number}"].report
        assert report.prompt.fresh == report.prompt.total == 4


def test_priority_runs_first() -> None:
    bench = Bench(max_sequences=1)
    bench.add("first", Segment((1, 2)), count=2)
    bench.add("late", Segment((3, 4)), count=2)
    bench.add("urgent", Segment((5, 6)), count=2, priority=1)
    bench.drain()
    assert list(bench.ends) == ["urgent", "first", "late"]


def test_a_step_keeps_its_budget() -> None:
    bench = Bench(pages=40, step_rows=7)
    for number in range(3):
        bench.add(f"r{number}", Segment(tuple(range(number, number + 20))))
    bench.drain()
    assert bench.device.most_rows == 7
    for number in range(3):
        assert bench.tokens[f"r{number}"] == answer(range(number, number + 20), 5)


def test_one_prefix_asked_by_many_is_computed_once() -> None:
    bench = Bench(pages=60, step_rows=8, max_sequences=8)
    head = tuple(range(24))
    for number in range(8):
        bench.add(f"r{number}", Segment(head), Segment((number, number)))
    bench.drain()
    for number in range(8):
        assert bench.tokens[f"r{number}"] == answer((*head, number, number), 5)
    charged = sum(end.report.charged for end in bench.ends.values() if isinstance(end, Finished))
    assert charged == len(head) + 8 * 2


def test_waiting_for_a_prefix_ends_with_the_one_that_computes_it() -> None:
    bench = Bench(pages=60, step_rows=4)
    head = Segment(tuple(range(24)))
    bench.add("first", head, QUESTION)
    bench.add("second", head, Segment((5, 5)))
    bench.step()
    bench.core.abort("first")
    bench.drain()
    assert bench.tokens["second"] == answer((*head.token_ids, 5, 5), 5)


def test_an_exact_request_never_reads_blended_pages() -> None:
    bench = Bench()
    one, two = memory(1), memory(2)
    bench.core.write(WriteChunks("w", TENANTS[0], (one, two)))
    bench.drain()
    parts = (HEAD, part(two), part(one), QUESTION)
    blended = bench.ask("blended", *parts, options=BlendOptions())
    assert blended.report.prompt.prefix == 9  # left by the write of `two`, which stands where it was computed
    assert (blended.report.prompt.cpu, blended.report.prompt.recomputed) == (3, 3)
    assert blended.report.recompute_ratio == 0.5
    assert bench.tokens["blended"] != answer(ids(parts), 5)
    exact = bench.ask("exact", *parts)
    assert bench.tokens["exact"] == answer(ids(parts), 5)
    assert exact.report.prompt.prefix == 9
    again = bench.ask("again", *parts, options=BlendOptions())
    assert again.report.prompt.prefix == len(ids(parts)) - 1


def test_another_blend_never_reads_blended_pages() -> None:
    bench = Bench(pages=40)
    one, two, three = memory(1), memory(2), memory(4)
    bench.core.write(WriteChunks("w", TENANTS[0], (one, two, three)))
    bench.drain()
    bench.ask("one", HEAD, part(two), part(one), QUESTION, options=BlendOptions())
    other = bench.ask("other", HEAD, part(three), part(one), QUESTION, options=BlendOptions())
    assert other.report.prompt.prefix == 9  # left by the write of `three`
    text = bench.ask("text", HEAD, Segment(two.token_ids), Segment(one.token_ids), QUESTION, options=BlendOptions())
    parts = (HEAD, part(two), part(one), QUESTION)
    assert bench.tokens["text"] == answer(ids(parts), 5)
    assert text.report.prompt.prefix < 12


def test_a_chunk_at_its_own_place_is_exact() -> None:
    bench = Bench()
    one = memory(1)
    two = ChunkSpec(memory(2).token_ids, PREAMBLE + one.token_ids, 3, "t0m2", ("t0m1",))
    bench.core.write(WriteChunks("w", TENANTS[0], (one, two)))
    bench.drain()
    bench.core.pool.forget(chain_root(TENANTS[0]), None)
    parts = (HEAD, part(one), part(two), QUESTION)
    found = bench.ask("r", *parts)
    assert bench.tokens["r"] == answer(ids(parts), 5)
    assert found.report.policy == "exact"
    assert found.report.recompute_ratio == 0
    assert (found.report.prompt.prefix, found.report.prompt.cpu, found.report.prompt.fresh) == (0, 12, 6)


def test_a_session_prefills_only_what_is_new() -> None:
    bench = Bench(pages=40)
    chunks = (memory(1), memory(2))
    bench.core.write(WriteChunks("w", TENANTS[0], chunks))
    bench.drain()
    first = (HEAD, part(chunks[1]), part(chunks[0]), QUESTION)
    bench.ask("first", *first, options=BlendOptions())
    history = (*first, Segment(tuple(bench.tokens["first"])))
    second = bench.ask("second", *history, QUESTION, options=BlendOptions())
    assert second.report.prompt.fresh == len(QUESTION.token_ids) + 1  # the last id of an answer has no KV yet
    assert second.report.prompt.prefix == len(ids(history)) - 1
    assert second.report.charged == second.report.prompt.fresh


def test_one_tenant_never_finds_the_pages_of_another() -> None:
    bench = Bench()
    text = Segment(tuple(range(20)))
    bench.ask("a", text)
    assert bench.ask("b", text, tenant=TENANTS[1]).report.prompt.prefix == 0
    assert bench.ask("a again", text).report.prompt.prefix == 19


def test_forget_ends_requests_and_clears_their_pages() -> None:
    bench = Bench()
    one = memory(1)
    bench.add("reader", HEAD, part(one), QUESTION, count=50)
    bench.add("other", HEAD, QUESTION, count=50)
    for _ in range(4):
        bench.step()
    receipt = bench.core.forget(ForgetMemories("f", TENANTS[0], (one.memory,)))
    assert receipt.aborted == 1
    assert receipt.pages > 0
    assert not bench.device.holds(one.token_ids[0])
    bench.drain()
    assert isinstance(bench.ends["reader"], Failed)
    assert bench.ends["reader"].code == "memory_forgotten"
    assert bench.tokens["other"] == answer(ids((HEAD, QUESTION)), 50)
    again = bench.ask("again", HEAD, part(one), QUESTION)
    assert again.report.prompt.fresh >= 6 + 3


def test_numbers_that_are_not_finite_end_their_request_alone() -> None:
    bench = Bench(pages=40, step_rows=6)
    prompt = Segment(tuple(range(14)))
    bench.device.broken = next(token for token in answer(range(14), 8) if token not in answer((7, 7, 7), 8))
    bench.add("sick", prompt, count=8)
    bench.add("well", Segment((7, 7, 7)), count=8)
    bench.drain()
    assert isinstance(bench.ends["sick"], Failed)
    assert bench.ends["sick"].code == "numeric"
    assert bench.tokens["well"] == answer((7, 7, 7), 8)
    bench.device.broken = -1
    assert bench.ask("again", prompt).report.prompt.prefix == 0


def test_a_forward_that_raises_ends_the_request_that_caused_it_alone() -> None:
    bench = Bench(pages=40)
    bench.device.raises = 30
    bench.core.write(WriteChunks("w", TENANTS[0], (memory(1), ChunkSpec((30,), PREAMBLE, 3, "bad"))))
    for name, tokens in {"a": (1, 2), "sick": (4, 30), "b": (5, 6, 7)}.items():
        bench.add(name, Segment(tokens))
    bench.drain()
    assert isinstance(bench.ends["sick"], Failed)
    assert bench.ends["sick"].code == "internal"
    assert bench.tokens == {"a": answer((1, 2), 5), "b": answer((5, 6, 7), 5)}
    assert bench.core.stats()["chunks_failed"] == bench.core.stats()["chunks_written"] == 1


@pytest.mark.parametrize("length", range(1, 14))
def test_prompts_of_any_length_are_found_again(length: int) -> None:
    bench = Bench(pages=40)
    prompt = tuple(range(length))
    bench.ask("first", Segment(prompt))
    again = bench.ask("again", Segment(prompt))
    assert bench.tokens["again"] == bench.tokens["first"] == answer(prompt, 5)
    assert again.report.prompt.prefix == length - 1
    longer = bench.ask("longer", Segment(prompt), Segment((31,)))
    assert longer.report.prompt.prefix >= length
    assert bench.tokens["longer"] == answer((*prompt, 31), 5)


@pytest.mark.parametrize("stored", [(), (1,), (2,), (1, 2)])
def test_a_session_goes_on_whatever_was_stored_when_it_began(stored: tuple[int, ...]) -> None:
    """Chunks missing at the first question are stored by the second; their pages still serve it."""
    bench = Bench(pages=40)
    if stored:
        bench.core.write(WriteChunks("w", TENANTS[0], tuple(memory(number) for number in stored)))
        bench.drain()
    first = (HEAD, part(memory(2)), part(memory(1)), QUESTION)
    bench.ask("first", *first, options=BlendOptions())
    second = bench.ask("second", *first, Segment(tuple(bench.tokens["first"])), QUESTION, options=BlendOptions())
    assert second.report.prompt.fresh == 4


@pytest.mark.parametrize("step", range(6))
def test_an_abort_at_any_moment_gives_everything_back(step: int) -> None:
    bench = Bench(step_rows=6)
    parts = (HEAD, part(memory(1)), part(memory(2)), QUESTION)
    bench.add("gone", *parts, options=BlendOptions(), count=40)
    bench.add("stays", *parts, count=12)
    for _ in range(step):
        bench.step()
    bench.core.abort("gone")
    bench.drain()
    assert isinstance(bench.ends["gone"], Finished)
    assert bench.ends["gone"].reason is FinishReason.ABORT
    assert bench.tokens["stays"] == answer(ids(parts), 12)
    assert bench.core.pool.free == bench.core.pool.pages
