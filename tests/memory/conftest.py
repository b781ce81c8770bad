"""A service in an empty directory, and a look into its files from outside."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest

from amem.memory.config import MemoryConfig
from amem.memory.service import MemoryService

MakeService = Callable[..., MemoryService]
Decrypt = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def open_service(tmp_path: Path) -> Iterator[MakeService]:
    """Opens services that are closed with the test."""
    opened: list[MemoryService] = []

    def make(config: MemoryConfig | None = None, path: Path | None = None) -> MemoryService:
        opened.append(MemoryService(path or tmp_path / "data", config))
        return opened[-1]

    yield make
    for service in opened:
        service.close()


@pytest.fixture
def service(open_service: MakeService) -> MemoryService:
    return open_service()


@pytest.fixture
def decrypted(tmp_path: Path) -> Decrypt:
    """Copies a data directory with cp (opening it here would drop SQLite's locks) and turns each database into plain
    bytes, free pages included."""

    def decrypt(data: Path) -> dict[str, bytes]:
        copy = tmp_path / "copy"
        subprocess.run(["rm", "-rf", str(copy)], check=True)
        subprocess.run(["cp", "-r", str(data), str(copy)], check=True)
        master = (copy / "master.key").read_bytes()
        control = copy / "control.db"
        keys = {control: hashlib.blake2b(b"amem control.db", key=master, digest_size=32).digest()}
        with_key = _connect(control, keys[control])
        for tenant, key in with_key.execute("SELECT id, key FROM tenants WHERE key IS NOT NULL"):
            keys[copy / "t" / tenant.hex() / "memory.db"] = key
        with_key.close()
        for path, key in keys.items():
            connection = _connect(path, key)
            connection.execute("PRAGMA journal_mode = DELETE").fetchall()
            connection.execute("PRAGMA rekey = ''").fetchall()
            connection.close()
        return {str(path.relative_to(copy)): path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    return decrypt


def _connect(path: Path, key: bytes) -> apsw.Connection:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    connection.execute("PRAGMA cipher = 'chacha20'").fetchall()
    connection.execute(f"PRAGMA key = 'raw:{key.hex()}'").fetchall()
    return connection
