"""amem: agent memory kept in the model's KV cache."""

from __future__ import annotations

__version__ = "0.2.0"
