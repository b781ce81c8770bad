"""What can go wrong in the memory layer. Every error says what, why and what to do; `code` is for machines."""

from __future__ import annotations

from typing import ClassVar


class MemoryFault(Exception):
    """Base of every error that this layer raises on purpose. `param` names the argument at fault, if one is."""

    code: ClassVar[str] = "memory_fault"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidInput(MemoryFault):
    """The caller sent something that cannot be stored or looked up. Nothing was changed."""

    code = "invalid_input"


class NotFound(MemoryFault):
    """The user has no such memory or session. What belongs to another user is not found either."""

    code = "not_found"


class Conflict(MemoryFault):
    """The request contradicts what is stored: a stale version, a superseded memory, a reused idempotency key."""

    code = "conflict"


class Damaged(MemoryFault):
    """A database file fails its checks. Only its own tenant is affected, and it is never replaced by an empty one."""

    code = "damaged"


class Unavailable(MemoryFault):
    """The operation could not be made durable now (disk full, I/O error, shutting down). It was not acknowledged."""

    code = "unavailable"


class DataDirError(MemoryFault):
    """The data directory cannot be used: in use by another process, written by a newer amem, or unreadable."""

    code = "data_dir"
