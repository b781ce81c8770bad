"""The data directory: one process at a time, one format number, private files, and no name that a user chose.

LOCK        locked for the life of the process
FORMAT      "amem-data 1"
master.key  32 random bytes that open control.db; whoever has it and the directory can read everything
control.db  users, their keys and secrets
t/<id>/memory.db   one encrypted database per user; <id> is random
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from amem.memory.errors import DataDirError

FORMAT_VERSION = 1
_FORMAT_NAME = "amem-data"
_MASTER_KEY_BYTES = 32


class DataDir:
    """Opens (creates) and locks the directory. Raises DataDirError when it is in use or of a newer format."""

    def __init__(self, root: Path) -> None:
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.root = root = root.resolve()  # databases are opened without following links
            self._lock = _lock(root / "LOCK")
        except OSError as error:
            raise DataDirError(f"cannot use the data directory {root}: {error}; check that it is writable") from error
        try:
            self._check_format()
            self.master_key = self._master_key()
            (root / "t").mkdir(mode=0o700, exist_ok=True)
        except BaseException:
            self.close()
            raise

    @property
    def control_path(self) -> Path:
        return self.root / "control.db"

    def tenant_path(self, tenant_id: bytes) -> Path:
        return self.root / "t" / tenant_id.hex() / "memory.db"

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _check_format(self) -> None:
        path = self.root / "FORMAT"
        if not path.exists():
            if self.control_path.exists():
                raise DataDirError(f"{path} is missing although {self.control_path} exists; restore it from a backup")
            write_durably(path, f"{_FORMAT_NAME} {FORMAT_VERSION}\n".encode())
            return
        words = path.read_bytes()[:64].split()
        if len(words) != 2 or words[0] != _FORMAT_NAME.encode() or not words[1].isdigit():
            raise DataDirError(f"{path} is not readable as a format number; this is not an amem data directory")
        found = int(words[1])
        if found > FORMAT_VERSION:
            raise DataDirError(
                f"{self.root} has format {found}, this amem knows {FORMAT_VERSION}; use the newer amem that wrote it"
            )

    def _master_key(self) -> bytes:
        path = self.root / "master.key"
        if not path.exists():
            if self.control_path.exists():
                raise DataDirError(f"{path} is missing: without it {self.control_path} cannot be read; restore it")
            write_durably(path, secrets.token_bytes(_MASTER_KEY_BYTES))
        key = path.read_bytes()
        if len(key) != _MASTER_KEY_BYTES:
            raise DataDirError(
                f"{path} has {len(key)} bytes instead of {_MASTER_KEY_BYTES}; restore it from a backup"
            )
        return key


def write_durably(path: Path, data: bytes) -> None:
    """Writes a new private file whole or not at all: temporary file, fsync, rename, fsync of the directory."""
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise DataDirError(
            f"{path.parent} is in use by another amem process; stop it or choose another directory"
        ) from None
    return descriptor
