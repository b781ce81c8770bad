"""Background computation of chunk KV: canonical, once, in idle time, and gone when its memory is forgotten."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from amem.engine.batch import Batch, ChunkKV, SequenceRows
from amem.engine.config import EngineConfig
from amem.engine.engine import Engine
from amem.engine.messages import ChunksWritten, Failed, Finished, ForgetMemories, Message, Tokens, WriteChunks
from amem.engine.store import files
from amem.engine.types import ChunkSpec, GenerateRequest, SamplingParams, Segment, Tenant

TENANT = Tenant(b"a" * 16, b"x" * 32)
HEAD = tuple(range(3, 13))


def text(count: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, 101, count).tolist())


def chunk(number: int, tokens: int = 24) -> ChunkSpec:
    return ChunkSpec(text(tokens, number), HEAD + text(11, 50 + number), len(HEAD), f"m{number}", (f"p{number}",))


@pytest.fixture
def make_engine(checkpoint: Path) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(**options: Any) -> Engine:
        made.append(Engine(EngineConfig(str(checkpoint), **{"num_pages": 64, "page_size": 8, **options})))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def drain(engine: Engine) -> list[Message]:
    told: list[Message] = []
    while engine.has_work:
        told += engine.step()
        engine.scheduler.check()
    return told


def stored(engine: Engine, spec: ChunkSpec) -> ChunkKV:
    with engine.store.lease(TENANT, spec) as lease:
        assert lease is not None
        prior = lease.kv.prior
        return ChunkKV(lease.kv.k.clone(), lease.kv.v.clone(), None if prior is None else prior.clone())


def canonical(engine: Engine, spec: ChunkSpec) -> ChunkKV:
    """The chunk's KV from one forward over context and chunk, in pages of its own."""
    ids = np.array(spec.context + spec.token_ids)
    rows = SequenceRows(ids, np.arange(len(ids)), np.arange(32), sample=False, capture=(len(spec.context), len(ids)))
    kv = engine.runner.forward(Batch((rows,))).captured[0]
    assert kv is not None
    return kv


@pytest.mark.parametrize("rows", [2048, 13])
def test_stored_kv_is_canonical_however_it_was_cut(make_engine: Callable[..., Engine], rows: int) -> None:
    engine = make_engine(max_step_tokens=rows)
    specs = tuple(chunk(number) for number in range(3))
    engine.write(WriteChunks("w", TENANT, specs))
    drain(engine)
    fresh = make_engine()
    for spec in specs:
        expected = canonical(fresh, spec)
        found = stored(engine, spec)
        assert float((found.k - expected.k).abs().max()) < 1e-4
        assert float((found.v - expected.v).abs().max()) < 1e-4
        assert found.prior is not None
        assert found.prior.shape == (24,)
        assert bool((found.prior >= 0).all())
        assert float(found.prior.max()) > 0


def test_a_prompt_never_reaches_the_store(make_engine: Callable[..., Engine]) -> None:
    """A chunk that a request computed behind other text is stored as computed behind its own context."""
    engine, fresh = make_engine(), make_engine()
    spec = chunk(1)
    parts = (Segment(text(30, 9)), Segment(spec.token_ids, spec), Segment((5, 6)))
    engine.add(GenerateRequest("r", TENANT, parts, SamplingParams(max_tokens=4)))
    drain(engine)
    expected = canonical(fresh, spec)
    found = stored(engine, spec)
    assert float((found.k - expected.k).abs().max()) < 1e-4


def test_a_chunk_whose_pages_are_cached_is_still_stored_whole(make_engine: Callable[..., Engine]) -> None:
    """A prompt has computed context and chunk; the write shares the pages of the context and captures every row."""
    engine, fresh = make_engine(), make_engine()
    spec = chunk(1)
    parts = (Segment(spec.context), Segment(spec.token_ids), Segment((5, 6)))
    engine.add(GenerateRequest("r", TENANT, parts, SamplingParams(max_tokens=4)))
    drain(engine)
    engine.write(WriteChunks("w", TENANT, (spec,)))
    assert [m.written for m in drain(engine) if isinstance(m, ChunksWritten)] == [1]
    expected, found = canonical(fresh, spec), stored(engine, spec)
    assert float((found.k - expected.k).abs().max()) < 1e-4


def test_a_chunk_asked_for_twice_is_computed_once(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.write(WriteChunks("one", TENANT, (chunk(1), chunk(2))))
    engine.write(WriteChunks("two", TENANT, (chunk(2),)))
    told = {m.job_id: m for m in drain(engine) if isinstance(m, ChunksWritten)}
    assert told["two"] == ChunksWritten("two", 0, 1, 0, 0.0)
    assert (told["one"].written, told["one"].present) == (2, 0)
    assert told["one"].prefill_tokens == engine.stats()["write_charged"] > 48
    assert engine.stats()["chunks_written"] == 2
    engine.write(WriteChunks("three", TENANT, (chunk(1), chunk(2))))
    assert drain(engine) == [ChunksWritten("three", 0, 2, 0, 0.0)]


def test_the_same_text_twice_in_one_job_is_charged_once(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.write(WriteChunks("w", TENANT, (chunk(1), replace(chunk(1), memory="twin"))))
    told = [m for m in drain(engine) if isinstance(m, ChunksWritten)]
    assert [(m.written, m.present, m.failed) for m in told] == [(1, 1, 0)]
    assert told[0].prefill_tokens == engine.stats()["write_charged"]


def test_a_chunk_that_found_no_room_is_not_said_to_be_written(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(ram_bytes=1000)
    engine.write(WriteChunks("w", TENANT, (chunk(1),)))
    told = [m for m in drain(engine) if isinstance(m, ChunksWritten)]
    assert [(m.written, m.present, m.failed) for m in told] == [(0, 0, 1)]
    assert engine.stats()["chunks_written"] == 0
    assert engine.stats()["store_puts_dropped"] == 1


def test_an_empty_job_is_answered(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.write(WriteChunks("w", TENANT, ()))
    assert drain(engine) == [ChunksWritten("w", 0, 0, 0, 0.0)]


@pytest.mark.parametrize(
    "spec",
    [
        ChunkSpec((), HEAD, 10, "m"),
        ChunkSpec((5, 101), HEAD, 10, "m"),
        ChunkSpec((5, 2**40), HEAD, 10, "m"),
        ChunkSpec((5,), (-1,), 1, "m"),
        ChunkSpec(tuple([5] * 600), HEAD, 10, "m"),
    ],
)
def test_what_cannot_be_written_fails_alone(make_engine: Callable[..., Engine], spec: ChunkSpec) -> None:
    engine = make_engine()
    engine.write(WriteChunks("w", TENANT, (spec, chunk(1))))
    told = [m for m in drain(engine) if isinstance(m, ChunksWritten)]
    assert [(m.written, m.present, m.failed) for m in told] == [(1, 0, 1)]


def ask(engine: Engine, name: str, spec: ChunkSpec) -> Finished | Failed:
    """The end of a request with the chunk behind the preamble, where it was not computed."""
    parts = (Segment(HEAD), Segment(spec.token_ids, spec), Segment((5, 6, 7)))
    engine.add(GenerateRequest(name, TENANT, parts, SamplingParams(max_tokens=4, ignore_eos=True)))
    return next(m for m in drain(engine) if isinstance(m, (Finished, Failed)))


def test_a_chunk_that_fits_its_prompt_but_not_its_context_stays_ordinary_rows(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(num_pages=16)
    long = ChunkSpec(text(60, 1), HEAD + text(80, 2), len(HEAD), "m")
    end = ask(engine, "r", long)
    assert isinstance(end, Finished)
    assert end.report.prompt.fresh == end.report.prompt.total == 73
    assert end.report.fallback == "chunks_not_stored"
    assert engine.writer.in_flight == 0


def test_a_chunk_without_a_key_is_refused_and_harms_nobody(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    end = ask(engine, "bad", replace(chunk(1), trusted=99))
    assert isinstance(end, Failed)
    assert end.code == "invalid_request"
    assert isinstance(ask(engine, "good", chunk(1)), Finished)


def test_a_chunk_that_cannot_be_read_now_is_computed_and_the_report_says_so(
    make_engine: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shortage of descriptors costs no file, so the chunk is still there; but nothing was blended."""
    engine = make_engine(kv_dir=str(tmp_path / "kv"))
    engine.write(WriteChunks("w", TENANT, (chunk(1),)))
    drain(engine)
    engine.close()
    engine = make_engine(kv_dir=str(tmp_path / "kv"))

    def no_descriptor(path: Path, length: int | None) -> tuple[int, int]:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(files, "open_exact", no_descriptor)
    end = ask(engine, "r", chunk(1))
    assert isinstance(end, Finished)
    assert end.report.prompt.fresh == end.report.prompt.total == 37
    assert end.report.fallback == "chunks_not_stored"
    assert engine.store.contains(engine.store.key(TENANT, chunk(1))) is not None


def test_writes_give_way_to_requests(make_engine: Callable[..., Engine]) -> None:
    """A request that arrives during a long write gets its first token before the write is done, and all its pages."""
    engine = make_engine(num_pages=24, max_step_tokens=32)
    engine.write(WriteChunks("w", TENANT, tuple(chunk(number, 60) for number in range(6))))
    engine.step()
    parts = (Segment(text(150, 3)),)
    engine.add(GenerateRequest("r", TENANT, parts, SamplingParams(max_tokens=20, ignore_eos=True)))
    order = [type(m) for m in drain(engine)]
    assert order.index(Tokens) < order.index(ChunksWritten)
    assert order.index(Finished) < order.index(ChunksWritten)
    assert engine.stats()["chunks_written"] == 6


@pytest.mark.parametrize("memory", ["m1", "p1"])
def test_a_write_in_flight_ends_with_its_memory(make_engine: Callable[..., Engine], memory: str) -> None:
    engine = make_engine(max_step_tokens=8)
    engine.write(WriteChunks("w", TENANT, (chunk(1), chunk(2))))
    for _ in range(3):
        engine.step()
    engine.forget(ForgetMemories("f", TENANT, (memory,)))
    told = [m for m in drain(engine) if isinstance(m, ChunksWritten)]
    assert [(m.written, m.failed) for m in told] == [(1, 1)]
    assert engine.store.contains(engine.store.key(TENANT, chunk(1))) is None
    assert engine.writer.in_flight == 0


def test_kv_that_is_not_finite_is_not_stored(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    with torch.inference_mode():
        engine.runner.model.weights.layers[2].qkv.fill_(float("nan"))
    engine.write(WriteChunks("w", TENANT, (chunk(1),)))
    told = [m for m in drain(engine) if isinstance(m, ChunksWritten)]
    assert [(m.written, m.failed) for m in told] == [(0, 1)]
    assert engine.store.contains(engine.store.key(TENANT, chunk(1))) is None
    engine.add(GenerateRequest("r", TENANT, (Segment(HEAD),), SamplingParams(max_tokens=4)))
    assert [m.code for m in drain(engine) if hasattr(m, "code")] == ["numeric"]
    assert engine.pool.cached == 0
