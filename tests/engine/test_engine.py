"""The whole engine on a real small model: the same answers in any company, honest reports, real forgetting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from amem.engine.config import EngineConfig
from amem.engine.engine import Engine
from amem.engine.messages import ChunksWritten, Failed, Finished, ForgetMemories, Message, Tokens, WriteChunks
from amem.engine.types import (
    BlendOptions,
    ChunkSpec,
    Fidelity,
    FinishReason,
    GenerateRequest,
    Report,
    SamplingParams,
    Segment,
    Tenant,
)

ALICE = Tenant(b"a" * 16, b"x" * 32)
BOB = Tenant(b"b" * 16, b"y" * 32)
HEAD = tuple(range(3, 13))
EXACT = BlendOptions(Fidelity.EXACT)
MakeEngine = Callable[..., "Driver"]


def text(count: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, 101, count).tolist())


def chunk(number: int, tokens: int = 24, behind: tuple[ChunkSpec, ...] = ()) -> ChunkSpec:
    context = HEAD + tuple(token for spec in behind for token in spec.token_ids)
    return ChunkSpec(text(tokens, 100 + number), context, len(HEAD), f"m{number}", tuple(s.memory for s in behind))


class Driver:
    """An engine and the answers that it has given."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, Finished | Failed] = {}
        self.written: dict[str, ChunksWritten] = {}

    def drain(self) -> None:
        while self.engine.has_work:
            self.take(self.engine.step())
            self.engine.scheduler.check()

    def take(self, messages: list[Message]) -> None:
        for message in messages:
            if isinstance(message, Tokens):
                self.tokens.setdefault(message.request_id, []).extend(message.token_ids)
            elif isinstance(message, (Finished, Failed)):
                self.ends[message.request_id] = message
            elif isinstance(message, ChunksWritten):
                self.written[message.job_id] = message

    def add(
        self, name: str, *parts: ChunkSpec | tuple[int, ...], tenant: Tenant | None = ALICE, **fields: Any
    ) -> None:
        segments = tuple(Segment(p.token_ids, p) if isinstance(p, ChunkSpec) else Segment(p) for p in parts)
        fields = {"sampling": SamplingParams(max_tokens=8, ignore_eos=True), **fields}
        self.engine.add(GenerateRequest(name, tenant, segments, **fields))

    def ask(self, name: str, *parts: ChunkSpec | tuple[int, ...], **fields: Any) -> Report:
        self.add(name, *parts, **fields)
        self.drain()
        end = self.ends[name]
        assert isinstance(end, Finished), end
        return end.report

    def write(self, *specs: ChunkSpec, tenant: Tenant = ALICE) -> ChunksWritten:
        name = f"w{len(self.written)}"
        self.engine.write(WriteChunks(name, tenant, specs))
        self.drain()
        return self.written[name]

    def drop_pages(self, tenant: Tenant = ALICE) -> None:
        """Empty the prefix cache, not the store."""
        from amem.engine.blocks import chain_root

        self.engine.pool.forget(chain_root(tenant), None)


@pytest.fixture
def make_engine(checkpoint: Path) -> Iterator[MakeEngine]:
    made: list[Driver] = []

    def make(**options: Any) -> Driver:
        fields = {"num_pages": 64, "page_size": 8, "ram_bytes": 16 << 20, **options}
        made.append(Driver(Engine(EngineConfig(model=str(checkpoint), **fields))))
        return made[-1]

    yield make
    for driver in made:
        driver.engine.close()


def test_greedy_answers_are_those_of_transformers(make_engine: MakeEngine, checkpoint: Path) -> None:
    driver = make_engine(max_step_tokens=16)
    prompt = text(60, 1)
    report = driver.ask("r", prompt, sampling=SamplingParams(max_tokens=32, ignore_eos=True))
    reference = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        ids = reference.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None)
    assert driver.tokens["r"] == ids[0, len(prompt) :].tolist()
    assert report.prompt.fresh == report.prompt.total == 60
    assert report.completion_tokens == 32
    assert 0 < report.ttft_s <= report.total_s


def test_answers_are_the_same_alone_and_in_any_batch(make_engine: MakeEngine) -> None:
    prompts = {f"r{number}": text(5 + 13 * number, number) for number in range(5)}
    warm = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, seed=11, ignore_eos=True)
    cold = SamplingParams(max_tokens=12, ignore_eos=True)
    alone: dict[str, list[int]] = {}
    for at, (name, prompt) in enumerate(prompts.items()):
        driver = make_engine()
        driver.ask(name, prompt, sampling=warm if at % 2 else cold)
        alone |= driver.tokens
    for options in ({}, {"max_step_tokens": 7}, {"num_pages": 17}, {"max_sequences": 2}):
        driver = make_engine(**options)
        for at, (name, prompt) in enumerate(prompts.items()):
            driver.add(name, prompt, sampling=warm if at % 2 else cold)
        driver.drain()
        assert driver.tokens == alone, options


def test_seeds_repeat_and_differ(make_engine: MakeEngine) -> None:
    driver = make_engine()
    hot = SamplingParams(max_tokens=16, temperature=1.5, seed=1, ignore_eos=True)
    for name, sampling in {"a": hot, "b": hot, "c": replace(hot, seed=2), "d": replace(hot, seed=None)}.items():
        driver.ask(name, text(9, 0), sampling=sampling)
    assert driver.tokens["a"] == driver.tokens["b"]
    assert len({tuple(driver.tokens[name]) for name in "acd"}) == 3


def test_the_end_of_sequence_and_stop_ids_end_an_answer_untold(make_engine: MakeEngine) -> None:
    driver = make_engine()
    driver.ask("free", text(9, 0))
    told = driver.tokens["free"]
    stop = SamplingParams(max_tokens=8, ignore_eos=True, stop_token_ids=(told[3],))
    report = driver.ask("stop", text(9, 0), sampling=stop)
    cut = told.index(told[3])
    assert driver.tokens.get("stop", []) == told[:cut]
    assert driver.ends["stop"].reason is FinishReason.STOP
    assert report.completion_tokens == cut


def test_logprobs_come_with_the_tokens(make_engine: MakeEngine) -> None:
    driver = make_engine()
    driver.add("r", text(9, 0), sampling=SamplingParams(max_tokens=3, ignore_eos=True, logprobs=2))
    found = [m for _ in range(9) for m in driver.engine.step() if isinstance(m, Tokens)]
    assert len(found) == 3
    for message in found:
        assert message.logprobs[0].top[0] == (message.token_ids[0], pytest.approx(message.logprobs[0].logprob))
        assert len(message.logprobs[0].top) == 2


def test_written_chunks_are_loaded_not_prefilled(make_engine: MakeEngine) -> None:
    driver = make_engine()
    one, two = chunk(1), chunk(2)
    written = driver.write(one, two, one)
    assert (written.written, written.present, written.failed) == (2, 1, 0)
    assert written.prefill_tokens > 48
    assert driver.write(one).present == 1
    driver.drop_pages()
    report = driver.ask("r", HEAD, two, one, text(6, 5), blend=BlendOptions(recompute_ratio=0.25))
    prompt = report.prompt
    assert (prompt.prefix, prompt.disk, prompt.fresh, prompt.total) == (0, 0, 16, 64)
    assert prompt.cpu + prompt.recomputed == 48
    assert 0 < prompt.recomputed <= 12
    assert report.recompute_ratio == prompt.recomputed / 48
    assert 0 < report.effective_ratio < 0.6
    assert 16 - 1 < report.charged < 16 + 0.6 * 48
    assert report.policy == "prior"
    assert report.fallback is None


def test_everything_recomputed_is_full_prefill(make_engine: MakeEngine) -> None:
    driver = make_engine()
    parts = (HEAD, chunk(2), chunk(1), text(6, 5))
    driver.ask("full", *parts, blend=EXACT)
    driver.write(chunk(1), chunk(2))
    driver.drop_pages()
    report = driver.ask("all", *parts, blend=BlendOptions(recompute_ratio=1.0))
    assert report.prompt.recomputed > 20
    assert driver.tokens["all"] == driver.tokens["full"]


def test_no_recompute_is_pure_reuse(make_engine: MakeEngine) -> None:
    driver = make_engine()
    driver.write(chunk(1), chunk(2))
    driver.drop_pages()
    report = driver.ask("r", HEAD, chunk(2), chunk(1), text(6, 5), blend=BlendOptions(recompute_ratio=0.0))
    assert (report.prompt.cpu, report.prompt.recomputed, report.prompt.fresh) == (48, 0, 16)
    assert report.effective_ratio == 0


def test_chunks_in_their_own_order_are_exact(make_engine: MakeEngine) -> None:
    driver = make_engine()
    one = chunk(1)
    two = chunk(2, behind=(one,))
    parts = (HEAD, one, two, text(6, 5))
    driver.ask("full", *parts, blend=EXACT)
    driver.write(one, two)
    driver.drop_pages()
    report = driver.ask("loaded", *parts, blend=EXACT)
    assert (report.prompt.cpu, report.prompt.fresh) == (48, 16)
    assert report.charged < 17
    assert driver.tokens["loaded"] == driver.tokens["full"]


def test_a_missing_chunk_is_computed_now_and_stored_for_later(make_engine: MakeEngine) -> None:
    driver = make_engine()
    parts = (HEAD, chunk(2), chunk(1), text(6, 5))
    cold = driver.ask("cold", *parts)
    assert cold.prompt.fresh == 64
    assert cold.fallback == "chunks_not_stored"
    driver.drop_pages()
    warm = driver.ask("warm", *parts)
    assert warm.prompt.cpu + warm.prompt.recomputed == 48
    assert warm.fallback is None


def test_a_session_reuses_its_blended_pages(make_engine: MakeEngine) -> None:
    driver = make_engine()
    driver.write(chunk(1), chunk(2))
    driver.drop_pages()
    first = (HEAD, chunk(2), chunk(1), text(6, 5))
    driver.ask("first", *first)
    second = driver.ask("second", *first, tuple(driver.tokens["first"]), text(9, 6))
    assert second.prompt.prefix == 64 + 8 - 1
    assert second.prompt.fresh == 9 + 1
    assert second.charged < 11
    other = driver.ask("exact", *first, blend=EXACT)
    assert other.prompt.prefix < 64 - 6


def test_forget_removes_bytes_and_ends_readers(make_engine: MakeEngine) -> None:
    driver = make_engine()
    one, two = chunk(1), chunk(2)
    driver.write(one, two)
    driver.ask("before", HEAD, two, one, text(6, 5))
    driver.add("reader", HEAD, one, text(4, 8), sampling=SamplingParams(max_tokens=100, ignore_eos=True))
    driver.add("other", HEAD, two, text(4, 8))
    for _ in range(3):
        driver.take(driver.engine.step())
    holding = driver.engine.pool.holding(driver.engine.scheduler.running[0].root, frozenset({"m1"}))
    numbers = np.array([page.number for page in holding])
    assert driver.engine.runner.read_pages(numbers).abs().sum() > 0
    receipt = driver.engine.forget(ForgetMemories("f", ALICE, ("m1",)))
    assert (receipt.chunks, receipt.aborted) == (1, 1)
    assert receipt.pages == len(numbers)
    assert receipt.ram_bytes > 0
    assert float(driver.engine.runner.read_pages(numbers).abs().sum()) == 0
    driver.drain()
    assert isinstance(driver.ends["reader"], Failed)
    assert driver.ends["reader"].code == "memory_forgotten"
    assert isinstance(driver.ends["other"], Finished)
    again = driver.ask("again", HEAD, two, one, text(6, 5))
    assert again.prompt.fresh >= 24 + 6


def test_forget_finds_chunks_computed_behind_a_memory(make_engine: MakeEngine) -> None:
    driver = make_engine()
    one = chunk(1)
    two = chunk(2, behind=(one,))
    driver.write(one, two, chunk(3))
    receipt = driver.engine.forget(ForgetMemories("f", ALICE, ("m1",)))
    assert receipt.chunks == 2
    assert driver.engine.store.contains(driver.engine.store.key(ALICE, two)) is None
    assert driver.engine.store.contains(driver.engine.store.key(ALICE, chunk(3))) is not None


def test_forgetting_a_tenant_leaves_the_others(make_engine: MakeEngine) -> None:
    driver = make_engine()
    for tenant in (ALICE, BOB):
        driver.write(chunk(1), tenant=tenant)
        driver.ask(f"q{tenant.id[0]}", HEAD, chunk(1), text(6, 5), tenant=tenant)
    receipt = driver.engine.forget(ForgetMemories("f", ALICE, None))
    assert receipt.chunks == 1
    assert driver.ask("alice", HEAD, chunk(1), text(6, 5)).prompt.fresh == 40
    assert driver.ask("bob", HEAD, chunk(1), text(6, 5), tenant=BOB).prompt.prefix == 39


def test_one_tenant_never_hits_what_another_has(make_engine: MakeEngine) -> None:
    driver = make_engine()
    parts = (HEAD, chunk(1), text(6, 5))
    driver.write(chunk(1))
    driver.ask("alice", *parts)
    assert driver.ask("bob", *parts, tenant=BOB).prompt.fresh == 40
    assert driver.ask("nobody", *parts, tenant=None).prompt.fresh == 40


@pytest.mark.parametrize(
    ("segments", "fields", "code"),
    [
        ((), {}, "invalid_request"),
        (((5, 101),), {}, "invalid_request"),
        (((5, -1),), {}, "invalid_request"),
        ((tuple([5] * 512),), {}, "prompt_too_long"),
        (((5,),), {"sampling": SamplingParams(max_tokens=0)}, "invalid_request"),
        (((5,),), {"sampling": SamplingParams(temperature=float("nan"))}, "invalid_request"),
        (((5,),), {"sampling": SamplingParams(temperature=-1.0)}, "invalid_request"),
        (((5,),), {"sampling": SamplingParams(top_p=0.0)}, "invalid_request"),
        (((5,),), {"sampling": SamplingParams(min_p=1.5)}, "invalid_request"),
        (((5,),), {"sampling": SamplingParams(top_k=-1)}, "invalid_request"),
        (((5,),), {"sampling": SamplingParams(logprobs=21)}, "invalid_request"),
        (((5,),), {"sampling": SamplingParams(stop_token_ids=(101,))}, "invalid_request"),
        (((5,),), {"blend": BlendOptions(recompute_ratio=1.5)}, "invalid_request"),
        (((5,),), {"blend": BlendOptions(recompute_ratio=float("nan"))}, "invalid_request"),
        (((5,),), {"blend": BlendOptions(policy="magic")}, "invalid_request"),
    ],
)
def test_what_cannot_run_is_refused_and_harms_nobody(
    make_engine: MakeEngine, segments: tuple[tuple[int, ...], ...], fields: dict[str, Any], code: str
) -> None:
    driver = make_engine()
    driver.add("good", text(9, 0))
    driver.add("bad", *segments, **fields)
    driver.drain()
    assert isinstance(driver.ends["bad"], Failed)
    assert driver.ends["bad"].code == code
    assert isinstance(driver.ends["good"], Finished)


def test_a_request_id_in_use_is_refused(make_engine: MakeEngine) -> None:
    driver = make_engine()
    driver.add("r", text(9, 0))
    driver.add("r", text(9, 0))
    told = driver.engine.step()
    assert [message.code for message in told if isinstance(message, Failed)] == ["invalid_request"]


def test_a_huge_answer_ends_at_the_context(make_engine: MakeEngine) -> None:
    driver = make_engine(num_pages=8)
    report = driver.ask("r", text(30, 0), sampling=SamplingParams(max_tokens=10**9, ignore_eos=True))
    assert report.completion_tokens == 8 * 8 - 30
    assert driver.ends["r"].reason is FinishReason.LENGTH


def test_chunks_come_from_disk_after_a_restart(make_engine: MakeEngine, tmp_path: Path) -> None:
    driver = make_engine(kv_dir=str(tmp_path / "kv"))
    driver.write(chunk(1), chunk(2))
    driver.engine.close()
    driver = make_engine(kv_dir=str(tmp_path / "kv"))
    report = driver.ask("r", HEAD, chunk(2), chunk(1), text(6, 5))
    assert report.prompt.disk + report.prompt.recomputed == 48
    assert report.prompt.fresh == 16
    assert report.load_s > 0


def test_stats_are_flat_numbers(make_engine: MakeEngine) -> None:
    driver = make_engine()
    driver.ask("r", HEAD, text(6, 5))
    stats = driver.engine.stats()
    assert stats["prompt_tokens_fresh"] == 16
    assert stats["completion_tokens"] == 8
    assert stats["pages_free"] == stats["pages"] == 64
    assert all(isinstance(value, (int, float)) for value in stats.values())
