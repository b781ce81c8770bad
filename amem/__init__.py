"""amem: agent memory kept in the model's KV cache."""

from __future__ import annotations

from amem.client import Amem, AmemError, Answer, AsyncAmem

__all__ = ["Amem", "AmemError", "Answer", "AsyncAmem"]
__version__ = "0.2.0"
