"""One engine process seen from the HTTP process: started, spoken to, ended. No torch here."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from amem.engine.config import EngineConfig
from amem.engine.messages import Configure, FrameReader, Message, Shutdown, WireError, encode

_RECEIVE_BYTES = 1 << 18
_SLEEPING_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


@dataclass(frozen=True, slots=True)
class EngineLaunch:
    """How the engine process is started and watched. Times are seconds.

    hang_s: without a heartbeat, or busy without a finished step, for this long: killed and started again.
    backoff_s: the wait before a restart, doubled up to `backoff_max_s` while restarts keep failing.
    environment: added to a copy of this process's. An OpenMP pool that spins while it waits takes the cores that the
    HTTP process and its neighbours need, so by default it sleeps.
    """

    config: EngineConfig
    python: str = sys.executable
    start_timeout_s: float = 600.0
    stop_timeout_s: float = 10.0
    hang_s: float = 90.0
    backoff_s: float = 0.5
    backoff_max_s: float = 30.0
    environment: Mapping[str, str] = field(default_factory=dict)


class EngineProcess:
    """A running engine process and the socket to it."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, launch: EngineLaunch) -> EngineProcess:
        """Start it and send its configuration. Raises OSError when it cannot be started."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = (launch.python, "-m", "amem.engine", "--fd", str(theirs.fileno()))
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**_SLEEPING_THREADS, **os.environ, **launch.environment},
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        started = cls(process, reader, writer)
        started.send(Configure(launch.config))
        return started

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Message) -> None:
        """Queue a message. One to a process that has ended is lost: the reading side sees the end."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def messages(self) -> AsyncIterator[Message]:
        """Everything that the process says, until its end."""
        frames = FrameReader()
        with suppress(ConnectionError, WireError):
            while data := await self._reader.read(_RECEIVE_BYTES):
                for message in frames.feed(data):
                    yield message

    def shut_down(self) -> None:
        """Ask it to end. Its messages end when it has."""
        self.send(Shutdown())

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    async def reap(self, timeout: float) -> int:
        """Its exit code (negative: the signal). A process that outlives its last message by `timeout` is killed."""
        self._writer.close()
        try:
            return await asyncio.wait_for(self._process.wait(), timeout)
        except (asyncio.TimeoutError, asyncio.CancelledError):
            self.kill()
            return await self._process.wait()
