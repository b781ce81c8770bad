"""What was acknowledged survives kill -9, once; what was not is there whole or not at all."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from amem.memory.service import MemoryService

PARTS = 3  # memories of one call

WRITER = """
import sys, threading
from pathlib import Path
from amem.memory.service import MemoryService
from amem.memory.types import NewMemory
service = MemoryService(Path(sys.argv[1]))
life, lock = sys.argv[2], threading.Lock()
def work(thread):
    for i in range(100_000):
        name = f"{life}-{thread}-{i}"
        service.add(f"user {thread % 2}", [NewMemory(f"{name}-{part}") for part in range(3)], idempotency_key=name)
        with lock:
            sys.stdout.write(f"user {thread % 2}\\t{name}\\n")
            sys.stdout.flush()
threads = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@pytest.mark.parametrize("rounds", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_9_loses_no_acknowledged_memory(tmp_path: Path, rounds: int) -> None:
    rng = random.Random(9)
    data, log = tmp_path / "data", tmp_path / "acknowledged"
    for life in range(rounds):
        with log.open("ab") as out:
            writer = subprocess.Popen([sys.executable, "-c", WRITER, str(data), str(life)], stdout=out)
            begun, size = time.monotonic(), log.stat().st_size
            while log.stat().st_size == size and time.monotonic() - begun < 60:
                time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 0.1))
            writer.send_signal(signal.SIGKILL)
            assert writer.wait(60) == -signal.SIGKILL
    acknowledged = [line.split("\t") for line in log.read_text().splitlines()]
    assert len(acknowledged) >= rounds
    service = MemoryService(data)
    stored: dict[str, list[str]] = {}
    for user in {user for user, _ in acknowledged}:
        page = service.list(user, limit=1000)
        texts = [memory.text for memory in page.memories]
        while page.next is not None:
            page = service.list(user, limit=1000, after=page.next)
            texts += [memory.text for memory in page.memories]
        stored[user] = texts
    for user, texts in stored.items():
        assert len(texts) == len(set(texts))
        calls = {text.rpartition("-")[0] for text in texts}
        assert set(texts) == {f"{call}-{part}" for call in calls for part in range(PARTS)}
        assert {name for owner, name in acknowledged if owner == user} <= calls
    user, name = acknowledged[-1]
    found = service.recall(user, f"{name}-1".replace("-", " "))
    assert f"{name}-1" in [recalled.memory.text for recalled in found]
    service.close()


SESSIONS = """
import os, sys
from pathlib import Path
from amem.memory.service import MemoryService
from amem.memory.types import NewMemory
service = MemoryService(Path(sys.argv[1]))
service.add("u", [NewMemory(f"fact {i}") for i in range(5)])
session = service.start_session("u", 1000)
session = service.admit("u", session.id, service.recall("u", "fact"), "turn 1")
print(session.id, *session.memory_ids, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_session_survives_kill_9(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SESSIONS, str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ), timeout=60)
    assert done.returncode == -signal.SIGKILL
    id, *memories = done.stdout.split()
    service = MemoryService(tmp_path / "data")
    assert service.session("u", id).memory_ids == tuple(memories)
    assert len(memories) == 5
    service.close()
