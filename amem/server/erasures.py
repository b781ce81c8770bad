"""Erasures that the engine has not acknowledged yet, on disk, so that they outlive this process."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from amem.engine.types import TENANT_SECRET_BYTES, Tenant


@dataclass(frozen=True, slots=True)
class PendingErasure:
    """KV that has to go: of these memories, or of the whole tenant when `memories` is None."""

    path: Path
    tenant: Tenant
    memories: tuple[str, ...] | None


class ErasureJournal:
    """One small file per erasure. Holds ids only, never a text or a secret: stored KV is found by ids alone."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def add(self, tenant: Tenant, memories: tuple[str, ...] | None) -> PendingErasure:
        """On disk when it returns."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._directory / f"{secrets.token_hex(8)}.json"
        record = {"tenant": tenant.id.hex(), "memories": None if memories is None else list(memories)}
        temporary = path.with_suffix(".tmp")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        self._sync_directory()
        return PendingErasure(path, tenant, memories)

    def done(self, erasure: PendingErasure) -> None:
        erasure.path.unlink(missing_ok=True)
        self._sync_directory()

    def pending(self) -> list[PendingErasure]:
        """What an earlier process left. A file that cannot be read is an error: KV may still have to go."""
        found = []
        for path in sorted(self._directory.glob("*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            tenant = Tenant(bytes.fromhex(record["tenant"]), bytes(TENANT_SECRET_BYTES))
            memories = None if record["memories"] is None else tuple(record["memories"])
            found.append(PendingErasure(path, tenant, memories))
        return found

    def _sync_directory(self) -> None:
        handle = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
