"""What tests of several rooms share: one real server for all of a run, and servers of one's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from amem.child import ServerChild

# Triton reads this when it is first imported, which transformers does: without a GPU its kernels run interpreted
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")


@pytest.fixture(scope="session")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerChild]:
    """A server that stays up for the whole run; use a user name of your own."""
    with ServerChild(tmp_path_factory.mktemp("server") / "data") as server:
        yield server


@pytest.fixture
def new_server(tmp_path: Path) -> Iterator[Callable[..., ServerChild]]:
    """Makes servers that are ended with the test; `start` them yourself."""
    made: list[ServerChild] = []

    def make(*options: str, data: str = "data") -> ServerChild:
        made.append(ServerChild(tmp_path / data, *options))
        return made[-1]

    yield make
    for server in made:
        server.close()
