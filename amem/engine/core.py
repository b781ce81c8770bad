"""The engine as a plain object: add, abort, write, forget, step. One thread drives it; each step is one forward."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import torch

from amem.engine.batch import Batch, ChunkKV, Int64s, StepOutput
from amem.engine.blocks import BlockPool, chain_root
from amem.engine.intake import Intake
from amem.engine.loading import ChunkReader, Loader
from amem.engine.messages import (
    Failed,
    Finished,
    ForgetMemories,
    Message,
    Tokens,
    WriteChunks,
)
from amem.engine.sampling import Draw, Sampled, sample
from amem.engine.scheduler import Scheduler, SchedulerConfig
from amem.engine.sequence import Sequence
from amem.engine.spans import Span
from amem.engine.types import ChunkSpec, EngineError, FinishReason, ForgetReceipt, GenerateRequest, Report, Tenant
from amem.engine.writer import ChunkShelf, Writer

_log = logging.getLogger(__name__)


class Device(Protocol):
    """What the core needs of the machine: forwards, and the bytes of pages."""

    def forward(self, batch: Batch) -> StepOutput: ...
    def zero(self, pages: Iterable[int]) -> None: ...
    def copy(self, source: int, target: int) -> None: ...
    def load_chunk(self, kv: ChunkKV, positions: Int64s, block_table: Int64s, rows: Int64s | None = None) -> None: ...
    def prior(self, spec: ChunkSpec) -> tuple[torch.Tensor, float] | None: ...


class Store(ChunkReader, ChunkShelf, Protocol):
    """What the core needs of a store."""

    def forget(self, tenant: Tenant, memories: tuple[str, ...] | None) -> ForgetReceipt: ...
    def stats(self) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine is put together from. `clock`: seconds."""

    device: Device
    store: Store
    intake: Intake
    pages: int
    page_size: int
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    clock: Callable[[], float] = time.monotonic


@dataclass(slots=True)
class Totals:
    """Sums over everything that has ended."""

    requests: int = 0
    failed: int = 0
    prompt: Counter[str] = field(default_factory=Counter)
    completion: int = 0
    charged: float = 0.0

    def add(self, report: Report) -> None:
        self.requests += 1
        self.prompt.update(asdict(report.prompt))
        self.completion += report.completion_tokens
        self.charged += report.charged


class Core:
    """Every request is answered by Tokens and one Finished or Failed, every write by one ChunksWritten."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.pool = BlockPool(parts.pages, parts.page_size, parts.device.zero)
        self.writer = Writer(parts.store, parts.intake, self._submit, parts.device.prior, parts.clock)
        self._loader = Loader(parts.store, parts.device, self.writer.want)
        self.scheduler = Scheduler(parts.scheduler, self.pool, self._loader.resolve, parts.device.copy)
        self.totals = Totals()
        self._live: dict[str, Sequence] = {}
        self._outbox: list[Message] = []

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._outbox)

    # Orders ----------------------------------------------------------------------------------------------------

    def add(self, request: GenerateRequest) -> None:
        """Queue a request. One that cannot be run is answered by Failed in the next step."""
        try:
            if request.id in self._live:
                raise EngineError("invalid_request", f"request id {request.id!r} is in use")
            sequence = self._parts.intake.request(request, self._parts.clock())
        except EngineError as error:
            self.totals.failed += 1
            self._outbox.append(Failed(request.id, error.code, str(error)))
            return
        self._live[request.id] = sequence
        self._submit(sequence)

    def abort(self, request_id: str) -> None:
        """End a request; its report says what was done until now. Unknown ids are none: it may just have ended."""
        sequence = self._live.get(request_id)
        if sequence is not None:
            self._finish(sequence, FinishReason.ABORT)

    def write(self, message: WriteChunks) -> None:
        """Compute and store missing chunks in idle time."""
        self._outbox += self.writer.write(message)

    def forget(self, message: ForgetMemories) -> ForgetReceipt:
        """Erase chunks and pages of memories. Requests that read them end with `memory_forgotten`.

        Raises StoreError when the store could not finish; asking again is safe.
        """
        root = chain_root(message.tenant)
        memories = None if message.memories is None else frozenset(message.memories)
        aborted = 0
        for sequence in self.scheduler.touching(root, memories):
            if sequence.capture is None:
                aborted += 1
                self._fail(sequence, "memory_forgotten", "a memory that this request reads was forgotten: ask again")
            else:
                self.scheduler.finish(sequence, keep=False)
                self._outbox += self.writer.drop(sequence)
        pages = self.pool.forget(root, memories)
        receipt = self._parts.store.forget(message.tenant, message.memories)
        return replace(receipt, pages=pages, aborted=aborted)

    # A step ----------------------------------------------------------------------------------------------------

    def step(self) -> list[Message]:
        """Run one forward and return what is to be told."""
        now = self._parts.clock()
        spans = self.scheduler.plan()
        for span in spans:
            tally = span.sequence.tally
            tally.admitted = now if tally.admitted is None else tally.admitted
        for span in spans:
            if span.rows is None:
                self.scheduler.commit(span)
        self._run([span for span in spans if span.rows is not None])
        told, self._outbox = self._outbox, []
        return told

    def _run(self, spans: list[Span]) -> None:
        """One forward for all; when it raises, one for each, so that a request that cannot run fails alone.

        An error of the accelerator itself is raised: its context is lost, and only a new process helps.
        """
        if not spans:
            return
        try:
            output = self._parts.device.forward(Batch(tuple(span.rows for span in spans if span.rows)))
        except torch.AcceleratorError:
            raise
        except Exception as error:
            _log.exception("a forward of %d sequences failed", len(spans))
            if len(spans) == 1:
                code = "overloaded" if isinstance(error, torch.OutOfMemoryError) else "internal"
                self._end(spans[0].sequence, code, f"the model could not be run: {error}")
                return
            for span in spans:
                self._run([span])
            return
        self._commit(spans, output)

    def _commit(self, spans: list[Span], output: StepOutput) -> None:
        sampled = [span for span in spans if span.sample]
        sound = dict(zip(map(id, sampled), output.finite.tolist(), strict=True))
        for at, span in enumerate(spans):
            self._account(span, output, at)
            if sound.get(id(span), True):
                self.scheduler.commit(span)
            else:
                self.pool.retract(span.sequence.table)
                self._end(span.sequence, "numeric", "the model gave numbers that are not finite for this prompt")
            if span.sequence.capture is not None:
                self._captured(span, output.captured[at])
        kept = [at for at, span in enumerate(sampled) if sound[id(span)]]
        if kept:
            logits = output.logits if len(kept) == len(sampled) else output.logits[kept]
            self._emit([sampled[at].sequence for at in kept], logits)

    def _account(self, span: Span, output: StepOutput, at: int) -> None:
        sequence, rows = span.sequence, span.rows
        if sequence.decoding or rows is None:
            return
        tally = sequence.tally
        tally.row_layers += float(output.row_layers[at])
        tally.blended += float(output.blend_row_layers[at])
        tally.recomputed(output.kept[at])
        tally.computed(rows.positions if rows.blend is None else rows.positions[~rows.blend.candidate])

    def _captured(self, span: Span, kv: ChunkKV | None) -> None:
        sequence = span.sequence
        if kv is not None:
            sequence.captured.append(kv)
            if not bool(kv.k.isfinite().all() & kv.v.isfinite().all()):
                self.pool.retract(sequence.table)
                self._end(sequence, "numeric", "the KV of a chunk is not finite")
                return
        if sequence.computed == sequence.length:
            self._outbox += self.writer.finish(sequence)
            self.scheduler.finish(sequence, keep=True)

    def _emit(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        draws = [Draw(sequence.sampling, sequence.seed, sequence.length) for sequence in sequences]
        now = self._parts.clock()
        for sequence, drawn in zip(sequences, sample(logits, draws), strict=True):
            self._advance(sequence, drawn, now)

    def _advance(self, sequence: Sequence, drawn: Sampled, now: float) -> None:
        tally = sequence.tally
        tally.first_token = now if tally.first_token is None else tally.first_token
        if drawn.token in sequence.stops:
            self._finish(sequence, FinishReason.STOP)
            return
        sequence.append(drawn.token)
        tally.completion += 1
        logprobs = () if drawn.logprob is None else (drawn.logprob,)
        self._outbox.append(Tokens(sequence.id, (drawn.token,), logprobs))
        if sequence.length == sequence.limit:
            self._finish(sequence, FinishReason.LENGTH)

    # Ends ------------------------------------------------------------------------------------------------------

    def _submit(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        report = sequence.tally.report(self._parts.clock())
        self.scheduler.finish(sequence, keep=True)
        del self._live[sequence.id]
        self.totals.add(report)
        self._outbox.append(Finished(sequence.id, reason, report))

    def _end(self, sequence: Sequence, code: str, message: str) -> None:
        if sequence.capture is None:
            self._fail(sequence, code, message)
        else:
            self.scheduler.finish(sequence, keep=False)
            self._outbox += self.writer.drop(sequence)

    def _fail(self, sequence: Sequence, code: str, message: str) -> None:
        self.scheduler.finish(sequence, keep=False)
        del self._live[sequence.id]
        self.totals.failed += 1
        self._outbox.append(Failed(sequence.id, code, message))

    def stats(self) -> dict[str, float]:
        """Counters since the start and gauges of now; the store's begin with `store_`."""
        totals, scheduler = self.totals, self.scheduler
        values: dict[str, float] = {
            "requests": totals.requests,
            "requests_failed": totals.failed,
            "requests_running": len(scheduler.running),
            "requests_waiting": len(scheduler.waiting),
            "completion_tokens": totals.completion,
            "prefill_charged": totals.charged,
            "writes_waiting": self.writer.in_flight,
            "chunks_written": self.writer.counters.written,
            "chunks_failed": self.writer.counters.failed,
            "write_charged": self.writer.counters.charged,
            "steps": scheduler.counters.steps,
            "preemptions": scheduler.counters.preemptions,
            "pages": self.pool.pages,
            "pages_free": self.pool.free,
            "pages_cached": self.pool.cached,
            "pages_evicted": self.pool.counters.evictions,
            "pages_zeroed": self.pool.counters.zeroed,
        }
        values |= {f"prompt_tokens_{source}": float(count) for source, count in totals.prompt.items()}
        return values | {f"store_{name}": value for name, value in self._parts.store.stats().items()}
