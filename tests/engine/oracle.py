"""A device whose KV is a hash of every id so far, under the real core, scheduler, pool, writer and store.

A page that is stale, swapped, cleared too early, shared across a blend or given to the wrong sequence gives another
hash, and so another answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from amem.engine.batch import Batch, ChunkKV, Int64s, SequenceRows, StepOutput
from amem.engine.core import Core, Parts
from amem.engine.intake import Intake, Limits
from amem.engine.messages import Failed, Finished, Message, Tokens
from amem.engine.scheduler import SchedulerConfig
from amem.engine.sequence import BlendMode
from amem.engine.store.config import ChunkLayout, StoreConfig
from amem.engine.store.store import ChunkStore
from amem.engine.types import (
    BlendOptions,
    ChunkSpec,
    Fidelity,
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
