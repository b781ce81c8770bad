"""The control of the engine against an oracle: what it answers, reuses, forgets and gives back."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from oracle import (
    EXACT,
    HEAD,
    PREAMBLE,
    QUESTION,
    TENANTS,
    Bench,
    answer,
    ids,
    memory,
    part,
)

from amem.engine.blocks import chain_root
from amem.engine.messages import Failed, Finished, ForgetMemories, WriteChunks
from amem.engine.types import (
    BlendOptions,
    ChunkSpec,
    FinishReason,
    Segment,
)


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


def test_pages_computed_behind_a_cached_memory_go_with_it() -> None:
    """The second request has the memory's ids as ordinary text; its own pages hold KV that read the memory."""
    bench, spec = Bench(), memory(0)
    bench.ask("one", HEAD, part(spec), QUESTION)
    end = bench.ask("two", HEAD, Segment(spec.token_ids), QUESTION, Segment((6, 5, 4, 3, 2)))
    assert end.report.prompt.prefix > 8
    bench.core.forget(ForgetMemories("f", TENANTS[0], (spec.memory,)))
    assert not bench.device.holds(spec.token_ids[0])


def test_pages_with_kv_computed_behind_an_absent_memory_go_with_it() -> None:
    """Memory 3 was computed behind memory 2, which is not in the prompt; its loaded KV has still read it."""
    bench = Bench()
    bench.core.write(WriteChunks("w", TENANTS[0], (memory(3),)))
    bench.drain()
    bench.core.pool.forget(chain_root(TENANTS[0]), None)
    assert not bench.device.holds(memory(2).token_ids[0])
    bench.ask("one", HEAD, part(memory(3)), QUESTION, options=BlendOptions())
    bench.add("two", HEAD, part(memory(3)), QUESTION, options=BlendOptions(), count=50)
    bench.step()
    assert bench.device.holds(memory(2).token_ids[0])
    assert bench.core.forget(ForgetMemories("f", TENANTS[0], (memory(2).memory,))).aborted == 1
    assert not bench.device.holds(memory(2).token_ids[0])


def test_a_chunk_behind_other_text_of_the_same_length_is_not_exact() -> None:
    bench = Bench()
    bench.core.write(WriteChunks("w", TENANTS[0], (memory(0),)))
    bench.drain()
    parts = (Segment((4, 5, 6)), part(memory(0)), QUESTION)
    end = bench.ask("r", *parts)
    assert end.report.prompt.fresh == end.report.prompt.total
    assert bench.tokens["r"] == answer(ids(parts), 5)


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
