"""amem: agent memory kept in the model's KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amem.client import Amem, AmemError, Answer, AsyncAmem

__all__ = ["Amem", "AmemError", "Answer", "AsyncAmem"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """The SDK, loaded when it is first named: the engine and the command line do without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import amem.client

    return getattr(amem.client, name)
