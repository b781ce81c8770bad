"""The engine, in this process, asked the way the server asks it; every answer comes back with its report."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from amem.bench.workload import Question
from amem.engine.config import EngineConfig
from amem.engine.engine import Engine
from amem.engine.messages import ChunksWritten, Failed, Finished, Tokens, WriteChunks
from amem.engine.sequence import Sequence as Running
from amem.engine.types import (
    BlendOptions,
    ChunkSpec,
    Fidelity,
    GenerateRequest,
    Report,
    SamplingParams,
    Segment,
    Tenant,
)
from amem.memory.plan import PlacedBatch, PlanConfig, Planner
from amem.text import ChatFormat, Message

EXACT = BlendOptions(fidelity=Fidelity.EXACT)


class BenchError(RuntimeError):
    """The engine refused or failed a bench request."""


@dataclass(frozen=True, slots=True)
class Answer:
    """text: the answer, detokenised.  logits: [vocab] float32 of the first token.  seconds: wall clock to its end."""

    text: str
    logits: torch.Tensor
    report: Report
    seconds: float


class _Recorder(Engine):
    """Keeps what each request's first token was drawn from: the bench compares distributions, not only answers."""

    def __init__(self, config: EngineConfig) -> None:
        self.first: dict[str, torch.Tensor] = {}
        super().__init__(config)

    def _emit(self, sequences: list[Running], logits: torch.Tensor) -> None:
        for sequence, row in zip(sequences, logits, strict=True):
            if sequence.id not in self.first:
                self.first[sequence.id] = row.clone()
        super()._emit(sequences, logits)


class Harness:
    """One engine and one planner. Tenants are made from labels, so sides of a comparison never share KV."""

    def __init__(self, config: EngineConfig, plan: PlanConfig | None = None) -> None:
        self.config = config
        self.engine = _Recorder(config)
        self.chat = ChatFormat.load(Path(config.model))
        self.planner = Planner(self.chat, plan)
        self._asked = 0

    def close(self) -> None:
        self.engine.close()

    def segments(
        self, question: str, batch: PlacedBatch | None, history: Sequence[Message] = (), chunks: bool = True
    ) -> tuple[Segment, ...]:
        """The prompt of a question over one front batch; `chunks=False` makes the memory ordinary text."""
        messages = (*history, Message("user", question))
        plan = self.planner.prompt(messages, [batch] if batch else [])
        return plan.segments if chunks else tuple(replace(segment, chunk=None) for segment in plan.segments)

    def ask(self, segments: tuple[Segment, ...], tenant: Tenant, blend: BlendOptions, max_tokens: int = 24) -> Answer:
        """Runs one request to its end, alone. Raises BenchError when the engine fails it."""
        self._asked += 1
        name = f"bench-{self._asked}"
        began = time.perf_counter()
        self.engine.add(GenerateRequest(name, tenant, segments, SamplingParams(max_tokens=max_tokens), blend))
        stream, text = self.chat.stream(), ""
        while True:
            for message in self.engine.step():
                if isinstance(message, Tokens) and message.request_id == name:
                    text += stream.push(self._said(message))
                elif isinstance(message, Failed) and message.request_id == name:
                    raise BenchError(f"{message.code}: {message.message}")
                elif isinstance(message, Finished) and message.request_id == name:
                    seconds = time.perf_counter() - began
                    first = self.engine.first.pop(name)
                    return Answer((text + stream.finish()).strip(), first, message.report, seconds)

    def answers(
        self, asked: Sequence[tuple[tuple[Segment, ...], Tenant, BlendOptions]], max_tokens: int = 24
    ) -> list[str]:
        """The answers of many requests that run together. Raises BenchError when one fails."""
        names = [f"many-{number}" for number in range(len(asked))]
        streams = {name: self.chat.stream() for name in names}
        texts = dict.fromkeys(names, "")
        left = set(names)
        for name, (segments, tenant, blend) in zip(names, asked, strict=True):
            self.engine.add(GenerateRequest(name, tenant, segments, SamplingParams(max_tokens=max_tokens), blend))
        while left:
            for message in self.engine.step():
                if isinstance(message, Tokens):
                    texts[message.request_id] += streams[message.request_id].push(self._said(message))
                elif isinstance(message, Failed):
                    raise BenchError(f"{message.code}: {message.message}")
                elif isinstance(message, Finished):
                    texts[message.request_id] += streams[message.request_id].finish()
                    left.discard(message.request_id)
                    del self.engine.first[message.request_id]
        return [texts[name].strip() for name in names]

    def _said(self, message: Tokens) -> list[int]:
        return [token for token in message.token_ids if token not in self.engine.model.eos_token_ids]

    def write(self, tenant: Tenant, specs: Iterable[ChunkSpec]) -> tuple[ChunksWritten, float]:
        """Computes and stores canonical KV; returns what was done and the seconds it took."""
        began = time.perf_counter()
        job = WriteChunks(f"write-{time.monotonic_ns()}", tenant, tuple(specs))
        self.engine.write(job)
        while True:
            for message in self.engine.step():
                if isinstance(message, ChunksWritten) and message.job_id == job.job_id:
                    return message, time.perf_counter() - began

    def specs(self, batch: PlacedBatch) -> list[ChunkSpec]:
        return [spec for item in batch.memories for spec in self.planner.chunk_specs(item.memory, item.predecessors)]


def tenant(label: str) -> Tenant:
    """A tenant of its own for a side of a comparison."""
    return Tenant(
        hashlib.blake2b(label.encode(), digest_size=16).digest(),
        hashlib.blake2b(label.encode(), digest_size=32).digest(),
    )


def divergence(full: torch.Tensor, other: torch.Tensor) -> float:
    """KL(full ‖ other) in nats of two next-token distributions given as logits [vocab]."""
    p, q = torch.log_softmax(full.double(), -1), torch.log_softmax(other.double(), -1)
    return max(0.0, float((p.exp() * (p - q)).sum()))


def right(answer: Answer, question: Question) -> bool:
    return answer.text.strip(" .").lower() == question.answer.strip(" .").lower()


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if not n:
        return (0.0, 1.0)
    p, z2 = hits / n, z * z
    middle, spread = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return ((middle - spread) / (1 + z2 / n), (middle + spread) / (1 + z2 / n))
