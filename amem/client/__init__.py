"""The SDK: `Amem` (blocking, standard library only) and `AsyncAmem` (asyncio, on aiohttp) over amem's HTTP API.

    client = Amem()
    client.remember("alice", ["Alice lives in Seattle and works at Boeing.", "Alice's sister Maria lives in Denver."])
    client.ask("alice", "Where does Alice's sister live?")

Both have the same methods with the same arguments; `amem.client.calls` documents each. Every failure is an
`AmemError`.
"""

from __future__ import annotations

from amem.client.answers import AmemError, Answer, Page
from amem.client.asynchronous import AsyncAmem, AsyncAnswerStream
from amem.client.blocking import Amem, AnswerStream

__all__ = ["Amem", "AmemError", "Answer", "AnswerStream", "AsyncAmem", "AsyncAnswerStream", "Page"]
