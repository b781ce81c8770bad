"""What was really done for one request, counted from the rows that ran."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from amem.engine.types import PromptTokens, Report


class Source(IntEnum):
    """Where the KV of a prompt token came from."""

    NONE = 0
    PREFIX = 1
    GPU = 2
    CPU = 3
    DISK = 4
    RECOMPUTED = 5
    FRESH = 6


_LOADED = (Source.GPU, Source.CPU, Source.DISK)


@dataclass(slots=True)
class Tally:
    """Mutable account of one request; times are seconds on the engine's clock.

    row_cost: layers that prefilling one row runs, of `layers`.  row_layers: what prefill ran.
    blended: the part of it that loaded chunk rows caused.
    """

    prompt: int
    arrival: float
    policy: str
    blending: bool
    layers: int
    row_cost: float
    row_layers: float = 0.0
    blended: float = 0.0
    completion: int = 0
    load_s: float = 0.0
    missing: int = 0
    admitted: float | None = None
    first_token: float | None = None
    _sources: NDArray[np.int8] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._sources = np.zeros(self.prompt, np.int8)

    def fill(self, start: int, stop: int, source: Source) -> None:
        """Name where KV was found. The first source stands: a preempted request does not reuse its own work."""
        span = self._sources[start : min(stop, self.prompt)]
        span[span == Source.NONE] = source

    def computed(self, positions: NDArray[np.int64]) -> None:
        """Rows without stored KV were run: nothing was saved, whatever was found before a preemption lost it."""
        self._sources[positions[positions < self.prompt]] = Source.FRESH

    def recomputed(self, positions: NDArray[np.int64]) -> None:
        """Loaded rows were run to the last layer."""
        mine = positions[positions < self.prompt]
        self._sources[mine[np.isin(self._sources[mine], _LOADED)]] = Source.RECOMPUTED

    @property
    def charged(self) -> float:
        """Prefill in token equivalents."""
        return self.row_layers / self.layers

    def report(self, now: float) -> Report:
        count = np.bincount(self._sources, minlength=len(Source))
        tokens = PromptTokens(**{source.name.lower(): int(count[source]) for source in Source if source})
        loaded = tokens.gpu + tokens.cpu + tokens.disk + tokens.recomputed
        admitted = now if self.admitted is None else self.admitted
        first = now if self.first_token is None else self.first_token
        return Report(
            prompt=tokens,
            completion_tokens=self.completion,
            charged=self.charged,
            recompute_ratio=tokens.recomputed / loaded if loaded else 0.0,
            effective_ratio=self.blended / (loaded * self.row_cost) if loaded else 0.0,
            policy=self.policy,
            fallback=self._fallback(loaded),
            queue_s=admitted - self.arrival,
            load_s=self.load_s,
            ttft_s=first - self.arrival,
            total_s=now - self.arrival,
        )

    def _fallback(self, loaded: int) -> str | None:
        if self.blending and self.missing and not loaded:
            return "chunks_not_stored"
        return None
