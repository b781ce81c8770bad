"""What the HTTP process waits for from the engine, and what becomes of it when the engine dies. No torch here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from amem.engine.messages import (
    ChunksWritten,
    Failed,
    Finished,
    ForgetMemories,
    Forgotten,
    Generate,
    GetStats,
    Message,
    Stats,
    Tokens,
    WireError,
    WriteChunks,
)
from amem.engine.types import EngineError, GenerateRequest

Order = WriteChunks | ForgetMemories | GetStats
Answer = ChunksWritten | Forgotten | Stats


@dataclass(slots=True)
class Stream:
    """A request in progress. `begun`: some of its answer has come, so it cannot be run again."""

    request: GenerateRequest
    queue: asyncio.Queue[Tokens | Finished | EngineError] = field(default_factory=asyncio.Queue)
    begun: bool = False
    retried: bool = False


@dataclass(slots=True)
class Job:
    """An order that one message answers."""

    order: Order
    answer: asyncio.Future[Answer]

    @property
    def lasting(self) -> bool:
        """Sent again to a new engine until it is answered."""
        return not isinstance(self.order, GetStats)


@dataclass(slots=True)
class Pending:
    streams: dict[str, Stream] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)

    def open_stream(self, request: GenerateRequest) -> Stream:
        """Raises EngineError when the id is in use."""
        if request.id in self.streams:
            raise EngineError("invalid_request", f"request id {request.id!r} is in use")
        stream = self.streams[request.id] = Stream(request)
        return stream

    def open_job(self, order: Order) -> Job:
        job = self.jobs[order.job_id] = Job(order, asyncio.get_running_loop().create_future())
        return job

    def deliver(self, message: Message) -> None:
        """Hand an answer to whoever waits for it; nobody may, after an abort or a cancelled call."""
        match message:
            case Tokens(request_id):
                if stream := self.streams.get(request_id):
                    stream.begun = True
                    stream.queue.put_nowait(message)
            case Finished(request_id):
                if stream := self.streams.pop(request_id, None):
                    stream.queue.put_nowait(message)
            case Failed(name, code, text):
                self._fail(name, EngineError(code, text))
            case ChunksWritten(job_id) | Forgotten(job_id) | Stats(job_id):
                job = self.jobs.pop(job_id, None)
                if job is not None and not job.answer.done():
                    job.answer.set_result(message)

    def lose(self, reason: str) -> None:
        """The engine died. What may be run again stays, everything else ends."""
        for name, stream in list(self.streams.items()):
            if stream.begun or stream.retried:
                self._fail(
                    name, EngineError("engine_lost", f"the engine died while it answered ({reason}): ask again")
                )
            stream.retried = True
        for name, job in list(self.jobs.items()):
            if not job.lasting:
                self._fail(name, EngineError("unavailable", f"the engine died ({reason}): it is being restarted"))

    def resend(self, send: Callable[[Message], None]) -> None:
        """Ask a new engine for everything again: erasures last, so that they catch what was asked before them.

        What was asked after an erasure no longer has the forgotten text in it. What does not go over the wire ends.
        """
        orders = sorted(self.jobs.items(), key=lambda job: isinstance(job[1].order, ForgetMemories))
        asked: list[tuple[str, Message]] = [(name, Generate(stream.request)) for name, stream in self.streams.items()]
        for name, message in [*asked, *((name, job.order) for name, job in orders)]:
            try:
                send(message)
            except WireError as error:
                self._fail(name, EngineError("invalid_request", str(error)))

    def end(self, code: str, reason: str) -> None:
        """Nothing will be answered any more."""
        for name in (*self.streams, *self.jobs):
            self._fail(name, EngineError(code, reason))

    def _fail(self, name: str, error: EngineError) -> None:
        if stream := self.streams.pop(name, None):
            stream.queue.put_nowait(error)
        job = self.jobs.pop(name, None)
        if job is not None and not job.answer.done():
            job.answer.set_exception(error)
