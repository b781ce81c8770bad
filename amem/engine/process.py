"""The engine process: orders come in over a socket, steps run, answers go out. Imports torch only once it runs.

It lives as long as the other end of the socket does. A crash here loses no memory: the other side starts a new one.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from amem.engine.config import ModelConfig
from amem.engine.messages import (
    Abort,
    Configure,
    Failed,
    ForgetMemories,
    Forgotten,
    FrameReader,
    Generate,
    GetStats,
    Heartbeat,
    Loading,
    Message,
    Ready,
    Shutdown,
    Stats,
    WriteChunks,
    encode,
)

if TYPE_CHECKING:
    from amem.engine.engine import Engine

_log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
_ORPHAN_GRACE_S = 10.0
_RECEIVE_BYTES = 1 << 18
START_FAILED = "start_failed"


class Link:
    """Messages over a socket: a thread reads them into a queue, any thread sends. `None` in the queue is its end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._sending = threading.Lock()
        threading.Thread(target=self._read, name="amem-engine-reader", daemon=True).start()

    def first(self, timeout: float) -> Message | None:
        """The next message alone; None at the end or when none came in time."""
        try:
            return self._inbox.get(timeout=timeout)
        except queue.Empty:
            return None

    def receive(self, timeout: float) -> list[Message | None]:
        """Everything that has arrived; waits up to `timeout` seconds for the first."""
        found: list[Message | None] = []
        try:
            found.append(self._inbox.get(timeout=timeout) if timeout else self._inbox.get_nowait())
            while True:
                found.append(self._inbox.get_nowait())
        except queue.Empty:
            return found

    def send(self, messages: Iterable[Message]) -> None:
        """Raises OSError when nobody is there any more."""
        data = b"".join(encode(message) for message in messages)
        if data:
            with self._sending:
                self._connection.sendall(data)

    def _read(self) -> None:
        frames = FrameReader()
        try:
            while data := self._connection.recv(_RECEIVE_BYTES):
                for message in frames.feed(data):
                    self._inbox.put(message)
        except (OSError, ValueError) as error:
            _log.error("the connection to the engine is broken: %s", error)
        self._inbox.put(None)
        time.sleep(_ORPHAN_GRACE_S)
        os._exit(1)  # still here: a step does not end, and there is nobody to report it to


class Service:
    """Drives one engine from one link."""

    def __init__(self, engine: Engine, link: Link) -> None:
        self._engine = engine
        self._link = link
        self._steps = 0
        self._computes_here = engine.model.device == "cpu"
        self._busy = False
        self._stopping = False

    def stop(self, *_: object) -> None:
        """End after the current step. Safe in a signal handler."""
        self._stopping = True

    def run(self) -> None:
        threading.Thread(target=self._beat, name="amem-engine-heartbeat", daemon=True).start()
        while not self._stopping:
            self._busy = self._engine.has_work
            for message in self._link.receive(0 if self._busy else HEARTBEAT_S):
                self._obey(message)
            self._busy = self._engine.has_work
            if self._busy and not self._stopping:
                self._link.send(self._engine.step())
                self._steps += 1

    def _obey(self, message: Message | None) -> None:
        match message:
            case Generate(request):
                self._engine.add(request)
            case Abort(request_id):
                self._engine.abort(request_id)
            case WriteChunks():
                self._engine.write(message)
            case ForgetMemories():
                self._link.send([self._forget(message)])
            case GetStats(job_id):
                self._link.send([Stats(job_id, self._engine.stats())])
            case None | Shutdown():
                self._stopping = True
            case _:
                _log.error("a %s is not an order to an engine", type(message).__name__)

    def _forget(self, message: ForgetMemories) -> Message:
        try:
            return Forgotten(message.job_id, self._engine.forget(message))
        except Exception as error:
            _log.exception("an erasure did not finish")
            return Failed(message.job_id, "internal", f"the erasure did not finish: {error}; ask again")

    def _progress(self) -> int:
        """Changes while the engine gets on. A step of a large model on a CPU takes minutes, but also CPU time."""
        return self._steps + (int(time.process_time()) if self._computes_here else 0)

    def _beat(self) -> None:
        try:
            while True:
                self._link.send([Heartbeat(self._progress(), self._busy)])
                time.sleep(HEARTBEAT_S)
        except OSError:
            return  # the reader has seen the end too


def _expected(error: Exception) -> bool:
    """Our own exceptions say what is wrong; a traceback would bury it."""
    return type(error).__module__.startswith("amem.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve one engine over an inherited socket. Exit codes: 0 asked to end, 2 could not start."""
    parser = argparse.ArgumentParser(prog="python -m amem.engine", description="The engine process of amem.")
    parser.add_argument("--fd", type=int, required=True, help="descriptor of a connected socket")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s engine %(levelname)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the other process decides
    link = Link(socket.socket(fileno=options.fd))
    try:
        return _serve(link)
    except (BrokenPipeError, ConnectionResetError):
        return 0


def _serve(link: Link) -> int:
    first = link.first(timeout=_ORPHAN_GRACE_S)
    if not isinstance(first, Configure):
        _log.error("the first message has to be Configure")
        return 2
    try:
        engine = _start(first, link)
    except Exception as error:
        if not _expected(error):
            _log.exception("the engine cannot start")
        link.send([Failed("", START_FAILED, f"{error}")])
        return 2
    try:
        service = Service(engine, link)
        signal.signal(signal.SIGTERM, service.stop)
        link.send([Ready(engine.model)])
        service.run()
    finally:
        engine.close()
    return 0


def _start(message: Configure, link: Link) -> Engine:
    ModelConfig.from_hf(message.config.model)  # refused in milliseconds, before torch is imported
    from amem.engine.engine import Engine

    return Engine(message.config, lambda done, total: link.send([Loading(done, total)]))
