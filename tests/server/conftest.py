"""Servers for the tests of the HTTP room: the real engine process, the bundled model, a data directory each."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from serverlib import ServerThread, config_in, endless_sampling

from amem.server import chat


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    """One server for the whole run; take a user of your own."""
    running = ServerThread(config_in(tmp_path_factory.mktemp("amem") / "data"))
    yield running
    running.stop()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ServerThread]]:
    """Starts servers of one's own on one data directory, one at a time; they end with the test."""
    made: list[ServerThread] = []

    def make(engine: bool = True, **fields: Any) -> ServerThread:
        made.append(ServerThread(config_in(tmp_path / "data", **fields), engine))
        return made[-1]

    yield make
    for running in made:
        running.stop()


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of the servers in this process run as long as they may, however the model was trained."""
    monkeypatch.setattr(chat, "SamplingParams", endless_sampling)


_NUMBERS = itertools.count()


@pytest.fixture
def user() -> str:
    """A user that no other test has."""
    return f"user-{next(_NUMBERS)}"
