"""A server of one's own in a child process, for the demo and the benches."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from amem.client import AmemError

START_SECONDS = 180.0
STOP_SECONDS = 30.0


class ServerChild:
    """`amem kv-serve` on a free loopback port, with its data in `data_dir` and its log beside it."""

    def __init__(self, data_dir: Path, *options: str) -> None:
        self.data_dir = data_dir
        self._log = data_dir.with_suffix(".log")
        self._options = options
        self._process: subprocess.Popen[str] | None = None
        self.ready: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return str(self.ready["url"])

    @property
    def pid(self) -> int:
        return self._running().pid

    def start(self) -> None:
        """Returns when the server answers. Raises AmemError with the end of its log if it does not."""
        command = [sys.executable, "-m", "amem", "kv-serve", "--json", "--port", "0"]
        command += ["--data-dir", str(self.data_dir), *self._options]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AMEM_")}
        with self._log.open("a") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
            )
        self._process = process
        guard = threading.Timer(START_SECONDS, process.kill)
        guard.start()
        try:
            line = process.stdout.readline() if process.stdout else ""
        finally:
            guard.cancel()
        if not line:
            process.wait()
            self._process = None
            raise AmemError(0, f"the server did not start: {self.log_tail()}", "not_started")
        self.ready = json.loads(line)

    def stop(self) -> None:
        """Ask it to end and wait until it has; it is killed when it takes too long."""
        process = self._running()
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._forget()

    def kill(self) -> None:
        """End it at once, as a power cut would: SIGKILL."""
        process = self._running()
        process.send_signal(signal.SIGKILL)
        process.wait()
        self._forget()

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace").strip()[-2000:] or "it said nothing"

    def __enter__(self) -> ServerChild:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Like `stop`, and nothing if it is not running."""
        if self._process is not None:
            self.stop()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise AmemError(0, "the server is not running", "not_started")
        return self._process

    def _forget(self) -> None:
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None
