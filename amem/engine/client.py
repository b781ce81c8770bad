"""The engine as the HTTP process sees it: asynchronous calls to a process that is kept alive. No torch here.

When the engine process dies it is started again. Requests without any output are run again once, the others end with
an error; writes and erasures are sent again until they are acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from amem.engine.launch import EngineLaunch, EngineProcess
from amem.engine.messages import (
    Abort,
    ChunksWritten,
    Failed,
    Finished,
    ForgetMemories,
    Forgotten,
    Generate,
    GetStats,
    Heartbeat,
    Loading,
    Message,
    Ready,
    Stats,
    Tokens,
    WireError,
    WriteChunks,
)
from amem.engine.pending import Order, Pending
from amem.engine.types import ChunkSpec, EngineError, ForgetReceipt, GenerateRequest, ModelInfo, Tenant

_log = logging.getLogger(__name__)
_WATCH_S = 1.0

Progress = Callable[[int, int], None]
_Kind = TypeVar("_Kind", ChunksWritten, Forgotten, Stats)


class EngineState(str, Enum):
    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"


@dataclass(slots=True)
class _Pulse:
    """When the engine was last seen to live and to get on, on the clock of the loop."""

    beat: float
    progress: float
    ready: bool = False
    steps: int = -1
    late: int = 0

    def see(self, heartbeat: Heartbeat, now: float) -> None:
        self.beat = now
        if not heartbeat.busy or heartbeat.steps != self.steps:
            self.progress = now
        self.steps = heartbeat.steps

    def fault(self, launch: EngineLaunch, now: float) -> str | None:
        """Why the process has to be killed. Two looks in a row, so that a stalled loop here is not blamed on it."""
        limit = launch.hang_s if self.ready else launch.start_timeout_s
        overdue = now - min(self.beat, self.progress) > limit
        self.late = self.late + 1 if overdue else 0
        if self.late < 2:
            return None
        return f"no progress for {limit:g} s" if self.ready else f"not ready after {limit:g} s"


def _send(process: EngineProcess, message: Message) -> None:
    try:
        process.send(message)
    except WireError as error:
        raise EngineError("invalid_request", str(error)) from error


class EngineClient:
    """One engine process and everything that is asked of it. Use from one event loop."""

    def __init__(self, launch: EngineLaunch) -> None:
        self._launch = launch
        self._process: EngineProcess | None = None
        self._model: ModelInfo | None = None
        self._pending = Pending()
        self._supervisor: asyncio.Task[None] | None = None
        self._first: asyncio.Future[ModelInfo] | None = None
        self._progress: Progress | None = None
        self._pulse = _Pulse(0.0, 0.0)
        self._closing = False
        self.state = EngineState.STOPPED
        self.reason: str | None = "the engine has not been started"
        self.restarts = 0

    @property
    def model(self) -> ModelInfo:
        """What the engine serves. Raises EngineError before it was ready for the first time."""
        if self._model is None:
            raise EngineError("unavailable", self.reason or "the engine is not ready yet")
        return self._model

    @property
    def pid(self) -> int | None:
        """The process id of the engine while there is one."""
        return None if self._process is None else self._process.pid

    async def start(self, progress: Progress | None = None) -> ModelInfo:
        """Start the engine and wait until it is ready. Raises EngineError `start_failed` with the engine's reason.

        progress: called with (bytes of weights read, bytes in all).
        """
        if self._supervisor is not None:
            raise EngineError("invalid_request", "the engine has been started already")
        self._progress = progress
        self._first = asyncio.get_running_loop().create_future()
        self._become(EngineState.STARTING, "the engine is loading its model")
        self._supervisor = asyncio.create_task(self._supervise(), name="amem-engine-supervisor")
        return await asyncio.shield(self._first)

    async def close(self) -> None:
        """End the engine process and everything in progress. May be called twice."""
        self._closing = True
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            if self._process is not None and self.state is EngineState.READY:
                self._process.shut_down()
                await asyncio.wait({supervisor}, timeout=self._launch.stop_timeout_s)
            supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await supervisor
        self._become(EngineState.STOPPED, "the engine was closed")
        self._pending.end("unavailable", "the engine was closed")

    # Calls -----------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Tokens | Finished]:
        """Tokens as they come, then one Finished. Closing the iterator aborts the request.

        Raises EngineError: the codes of `Failed`, `unavailable` while the engine is down, `engine_lost` when it died
        after the answer had begun.
        """
        process = self._live()
        stream = self._pending.open_stream(request)
        try:
            _send(process, Generate(request))
            while True:
                item = await stream.queue.get()
                if isinstance(item, EngineError):
                    raise item
                yield item
                if isinstance(item, Finished):
                    return
        finally:
            if self._pending.streams.get(request.id) is stream:
                del self._pending.streams[request.id]
                self.abort(request.id)

    def abort(self, request_id: str) -> None:
        """End a request early. Its iterator, if it is still read, gives a Finished with what was done until now."""
        if self._process is not None:
            self._process.send(Abort(request_id))

    async def write_chunks(self, tenant: Tenant, chunks: tuple[ChunkSpec, ...]) -> ChunksWritten:
        """Compute and store chunk KV in the engine's idle time. Waits for a new engine if this one dies."""
        return await self._ask(WriteChunks(uuid.uuid4().hex, tenant, chunks), ChunksWritten)

    async def forget(self, tenant: Tenant, memories: tuple[str, ...] | None) -> ForgetReceipt:
        """Erase the KV of memories from every tier; all of the tenant for None. Returns when it is gone.

        Waits for a new engine if this one dies: a new one on the same directory still has the bytes.
        """
        return (await self._ask(ForgetMemories(uuid.uuid4().hex, tenant, memories), Forgotten)).receipt

    async def stats(self) -> dict[str, float]:
        """The engine's counters and gauges, and `restarts`. Raises EngineError `unavailable` while it is down."""
        self._live()
        return (await self._ask(GetStats(uuid.uuid4().hex), Stats)).values | {"restarts": float(self.restarts)}

    def _live(self) -> EngineProcess:
        if self._process is None or self.state is not EngineState.READY:
            raise EngineError("unavailable", self.reason or f"the engine is {self.state.value}: try again soon")
        return self._process

    async def _ask(self, order: Order, kind: type[_Kind]) -> _Kind:
        if self.state in (EngineState.STOPPED, EngineState.FAILED):
            raise EngineError("unavailable", self.reason or f"the engine is {self.state.value}")
        job = self._pending.open_job(order)
        try:
            if self._process is not None and self.state is EngineState.READY:
                _send(self._process, order)
            answer = await job.answer
        finally:
            self._pending.jobs.pop(order.job_id, None)
        if not isinstance(answer, kind):
            raise EngineError("internal", f"the engine answered {kind.__name__} with {type(answer).__name__}")
        return answer

    # Supervision -----------------------------------------------------------------------------------------------

    def _become(self, state: EngineState, reason: str | None = None) -> None:
        self.state, self.reason = state, reason

    async def _supervise(self) -> None:
        delay = self._launch.backoff_s
        while True:
            reason = await self._run()
            if self._closing:
                return
            if self._model is None:
                self._give_up(reason)
                return
            _log.error("the engine ended: %s; restarting in %.1f s", reason, delay)
            self.restarts += 1
            self._become(EngineState.RESTARTING, f"the engine ended ({reason}) and is being restarted")
            self._pending.lose(reason)
            await asyncio.sleep(delay)
            delay = self._launch.backoff_s if self._pulse.ready else min(2 * delay, self._launch.backoff_max_s)

    def _give_up(self, reason: str) -> None:
        self._become(EngineState.FAILED, reason)
        self._pending.end("unavailable", reason)
        if self._first is not None and not self._first.done():
            self._first.set_exception(EngineError("start_failed", reason))

    async def _run(self) -> str:
        """One life of the engine process; why it ended."""
        now = asyncio.get_running_loop().time()
        self._pulse = _Pulse(now, now)
        try:
            process = self._process = await EngineProcess.start(self._launch)
        except OSError as error:
            return f"its process cannot be started: {error}"
        watch = asyncio.create_task(self._watch(process), name="amem-engine-watch")
        fault = None
        try:
            async for message in process.messages():
                fault = self._handle(message, process) or fault
        except asyncio.CancelledError:
            process.kill()
            raise
        finally:
            watch.cancel()
            self._process = None
            if self.state is EngineState.READY:
                self._become(EngineState.RESTARTING, "the engine has just ended and will be restarted")
            code = await process.reap(self._launch.stop_timeout_s)
        killed = watch.result() if watch.done() and not watch.cancelled() else None
        return fault or killed or (f"signal {-code}" if code < 0 else f"exit code {code}")

    async def _watch(self, process: EngineProcess) -> str:
        """Kills a process that hangs; why."""
        loop = asyncio.get_running_loop()
        while (fault := self._pulse.fault(self._launch, loop.time())) is None:
            await asyncio.sleep(min(_WATCH_S, self._launch.hang_s / 4))
        process.kill()
        return fault

    def _handle(self, message: Message, process: EngineProcess) -> str | None:
        """Act on a message. A reason when the engine says that it cannot start."""
        match message:
            case Heartbeat():
                self._pulse.see(message, asyncio.get_running_loop().time())
            case Loading(done, total):
                if self._progress is not None:
                    self._progress(done, total)
            case Ready(model):
                self._begin(model, process)
            case Failed("", _, reason):
                return reason
            case _:
                self._pending.deliver(message)
        return None

    def _begin(self, model: ModelInfo, process: EngineProcess) -> None:
        now = asyncio.get_running_loop().time()
        self._pulse = _Pulse(now, now, ready=True)
        self._model = model
        self._become(EngineState.READY)
        self._pending.resend(process.send)
        if self._first is not None and not self._first.done():
            self._first.set_result(model)
