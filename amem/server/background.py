"""Keeps the KV store in step with the text: computes KV after a memory is stored, erases it before one is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from amem.engine.client import EngineClient, EngineState
from amem.engine.types import ChunkSpec, EngineError, ForgetReceipt, Tenant
from amem.memory.errors import MemoryFault
from amem.memory.plan import Planner
from amem.memory.service import MemoryService
from amem.memory.types import State
from amem.server.erasures import ErasureJournal, PendingErasure
from amem.server.gates import Gates
from amem.server.threads import Threads

T = TypeVar("T")

_JOB_MEMORIES = 32
_RETRY_S = 5.0
_PASSING = frozenset({"unavailable", "engine_lost", "overloaded"})
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rooms:
    """The parts of the product that are kept in step."""

    memory: MemoryService
    engine: EngineClient
    planner: Planner
    threads: Threads


class KvKeeper:
    """Background jobs on one event loop. `start` begins the work, `close` stops it; what is unwritten is computed
    by the first question instead."""

    def __init__(self, rooms: Rooms, journal: ErasureJournal, forget_wait_s: float) -> None:
        self.gates = Gates()
        self._memory = rooms.memory
        self._engine = rooms.engine
        self._planner = rooms.planner
        self._threads = rooms.threads
        self._journal = journal
        self._forget_wait_s = forget_wait_s
        self._queue: dict[str, dict[str, None]] = {}
        self._computing = 0
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begins to work, first on what an earlier process left unerased."""
        for erasure in self._journal.pending():
            self._spawn(self._erase_later(erasure))
        self._spawn(self._write_forever())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def waiting(self) -> int:
        """Memories whose KV is still to be computed."""
        return self._computing + sum(len(ids) for ids in self._queue.values())

    def compute(self, user: str, ids: Sequence[str]) -> None:
        """Computes and stores the KV of these memories when the engine has time."""
        if ids:
            self._queue.setdefault(user, {}).update(dict.fromkeys(ids))
            self._wake.set()

    async def erase(
        self, user: str, ids: tuple[str, ...] | None, change: Callable[[], Awaitable[T]]
    ) -> tuple[T, ForgetReceipt | None]:
        """Erases the KV of `ids` (None: of the user) and of all behind them, then makes the `change` to the text.

        The receipt is None when the engine is away: then the erasure is on disk and done as soon as it is back.
        """
        async with self.gates.of(user).erasing():
            tenant = await self._threads.run(self._memory.tenant, user)
            if tenant is None:
                return await change(), ForgetReceipt()
            behind = await self._behind(user, ids)
            receipt = await self._erase_now(tenant, ids)
            try:
                result = await change()
            except MemoryFault:
                self.compute(user, (*(ids or ()), *behind))
                raise
        self.compute(user, behind)
        return result, receipt

    async def erase_inside(self, user: str, ids: tuple[str, ...]) -> ForgetReceipt | None:
        """Erases the KV of memories whose text has just gone; the caller holds the user's gate."""
        tenant = await self._threads.run(self._memory.tenant, user) if ids else None
        if tenant is None:
            return ForgetReceipt()
        receipt = await self._erase_now(tenant, ids)
        self.compute(user, await self._behind(user, ids))
        return receipt

    async def _behind(self, user: str, ids: tuple[str, ...] | None) -> tuple[str, ...]:
        if ids is None:
            return ()
        window = self._planner.config.window
        found = await self._threads.run(self._memory.successors, user, ids, window)
        return tuple(memory.id for memory in found if memory.id not in ids)

    async def _erase_now(self, tenant: Tenant, ids: tuple[str, ...] | None) -> ForgetReceipt | None:
        if self._engine.state is EngineState.READY:
            with suppress(EngineError, asyncio.TimeoutError):
                return await asyncio.wait_for(self._engine.forget(tenant, ids), self._forget_wait_s)
        erasure = await self._threads.run(self._journal.add, tenant, ids)
        self._spawn(self._erase_later(erasure))
        return None

    async def _erase_later(self, erasure: PendingErasure) -> None:
        while True:
            try:
                await self._engine.forget(erasure.tenant, erasure.memories)
                break
            except EngineError as error:
                _log.warning("an erasure waits for the engine: %s", error.code)
                await asyncio.sleep(_RETRY_S)
        await self._threads.run(self._journal.done, erasure)

    async def _write_forever(self) -> None:
        while True:
            await self._wake.wait()
            if not self._queue:
                self._wake.clear()
                continue
            user, ids = self._take()
            self._computing = len(ids)
            try:
                await self._write(user, ids)
            except EngineError as error:
                if error.code not in _PASSING:
                    _log.warning("KV of %d memories is not computed ahead: %s", len(ids), error.code)
                    continue
                self.compute(user, ids)
                await asyncio.sleep(_RETRY_S)
            except Exception as error:
                # A question computes what it needs itself, so one bad job must not end the others.
                _log.error("KV of %d memories is not computed ahead: %s", len(ids), type(error).__name__)
            finally:
                self._computing = 0

    def _take(self) -> tuple[str, list[str]]:
        user, waiting = next(iter(self._queue.items()))
        ids = list(waiting)[:_JOB_MEMORIES]
        del self._queue[user]
        if rest := dict.fromkeys(list(waiting)[_JOB_MEMORIES:]):
            self._queue[user] = rest
        return user, ids

    async def _write(self, user: str, ids: list[str]) -> None:
        async with self.gates.of(user).planning():
            tenant = await self._threads.run(self._memory.tenant, user)
            specs = await self._threads.run(self._specs, user, ids)
            if tenant is None or not specs:
                return
            job = asyncio.ensure_future(self._engine.write_chunks(tenant, specs))
            await asyncio.sleep(0)  # The job is on its way before an eraser may pass the gate.
        try:
            await asyncio.shield(job)
        except asyncio.CancelledError:
            job.cancel()
            raise

    def _specs(self, user: str, ids: Sequence[str]) -> tuple[ChunkSpec, ...]:
        specs: list[ChunkSpec] = []
        for id in ids:
            with suppress(MemoryFault):
                memory = self._memory.get(user, id)
                if memory.state is not State.LIVE:
                    continue
                before = self._memory.predecessors(user, id, self._planner.config.window)
                specs += self._planner.chunk_specs(memory, before)
        return tuple(specs)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
