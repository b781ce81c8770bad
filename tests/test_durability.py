"""kill -9 of the whole server in the middle of acknowledged writes: what was acknowledged is there afterwards."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from amem import Amem, AmemError
from amem.child import ServerChild

WRITERS = 4
ACKNOWLEDGED = 200
ROUNDS = 2


class Writers:
    """Threads that remember one text after another and note each that was acknowledged."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name
        self.acknowledged: dict[str, str] = {}
        self.failed = 0
        self.threads = [threading.Thread(target=self._write, args=(number,)) for number in range(WRITERS)]
        for thread in self.threads:
            thread.start()

    def _write(self, number: int) -> None:
        client = Amem(self.url, retries=0)
        for count in range(100_000):
            text = f"{self.name}: writer {number} fact {count} is {random.random()}."
            try:
                (added,) = client.remember(f"user {number % 2}", text)
            except AmemError:
                self.failed += 1
                return
            self.acknowledged[text] = added["id"]

    def join(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


def everything(client: Amem) -> dict[str, str]:
    found: dict[str, str] = {}
    for user in ("user 0", "user 1"):
        after = None
        while True:
            page = client.list(user, limit=100, after=after)
            found |= {item["text"]: item["id"] for item in page}
            after = page.next
            if after is None:
                break
    return found


def test_no_acknowledged_memory_is_lost(new_server: Callable[..., ServerChild]) -> None:
    server = new_server()
    acknowledged: dict[str, str] = {}
    for number in range(ROUNDS):
        server.start()
        writers = Writers(server.url, f"round {number}")
        while len(writers.acknowledged) < ACKNOWLEDGED // ROUNDS:
            time.sleep(0.01)
            assert any(thread.is_alive() for thread in writers.threads)
        time.sleep(random.random() / 20)
        server.kill()
        writers.join()
        assert writers.failed == WRITERS
        acknowledged |= writers.acknowledged
    assert len(acknowledged) >= ACKNOWLEDGED
    server.start()
    found = everything(Amem(server.url))
    assert {text: found.get(text) for text in acknowledged} == acknowledged
    # at most one more for each writer and round: stored, but killed before the answer was out
    assert len(found) <= len(acknowledged) + WRITERS * ROUNDS


def test_the_engine_dies_with_its_server(new_server: Callable[..., ServerChild]) -> None:
    server = new_server()
    server.start()
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    assert children
    server.kill()
    until = time.monotonic() + 30
    while any(alive(int(child)) for child in children):
        assert time.monotonic() < until
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
