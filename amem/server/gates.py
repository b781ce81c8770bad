"""One gate per user: prompts are planned side by side, a change that erases text waits for them and goes alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary


class Gate:
    """A shared or exclusive lock for one event loop; a waiting eraser goes before later planners."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._planners = 0
        self._erasing = False
        self._waiting = 0

    @asynccontextmanager
    async def planning(self) -> AsyncIterator[None]:
        """Held from reading memories until the engine has been sent what was made of them."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._erasing and not self._waiting)
            self._planners += 1
        try:
            yield
        finally:
            await self._leave(planners=1)

    @asynccontextmanager
    async def erasing(self) -> AsyncIterator[None]:
        """Held while text and its KV are removed, so that no plan made before brings them back after."""
        async with self._changed:
            self._waiting += 1
            try:
                await self._changed.wait_for(lambda: not self._erasing and self._planners == 0)
                self._erasing = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            await self._leave(erasing=True)

    async def _leave(self, planners: int = 0, erasing: bool = False) -> None:
        self._planners -= planners
        self._erasing = self._erasing and not erasing
        await asyncio.shield(asyncio.ensure_future(self._notify()))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class Gates:
    """The gate of each user; a gate nobody holds is forgotten."""

    def __init__(self) -> None:
        self._gates: WeakValueDictionary[str, Gate] = WeakValueDictionary()

    def of(self, user: str) -> Gate:
        gate = self._gates.get(user)
        if gate is None:
            gate = self._gates[user] = Gate()
        return gate
