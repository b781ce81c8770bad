"""Which loaded rows are recomputed, layer by layer.

A policy is a rank by which candidates enter, and the share of them that is live in each layer. Wherever the share
falls, the rows with the largest deviation between fresh and cached K and V go on (CacheBlend, Yao et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amem import kernels
from amem.engine.batch import BlendRows, Bools, Float32s, Int64s
from amem.engine.config import BlendConfig
from amem.engine.model import Kept
from amem.engine.pool import KVPool
from amem.engine.rows import Rows
from amem.engine.types import Fidelity

FIDELITY: dict[Fidelity, tuple[str, float]] = {
    Fidelity.FAST: ("prior", 0.05),
    Fidelity.BALANCED: ("prior", 0.15),
    Fidelity.HIGH: ("prior", 0.30),
    Fidelity.EXACT: ("gradual", 1.0),
}

Rank = Callable[[BlendRows], Float32s]
Shares = Callable[[float, int, BlendConfig], list[float]]


class BlendError(ValueError):
    """A blend that cannot be run as asked."""


@dataclass(frozen=True, slots=True)
class Policy:
    """rank: scores by which candidates enter, None where order does not matter.

    shares(ratio, layers, config): the share of candidates that is live in each layer, never rising.
    """

    rank: Rank | None
    shares: Shares
    needs_prior: bool = False


def _flat(ratio: float, layers: int, config: BlendConfig) -> list[float]:
    return [ratio] * layers


def _none(ratio: float, layers: int, config: BlendConfig) -> list[float]:
    return [0.0] * layers


def _one_shot(ratio: float, layers: int, config: BlendConfig) -> list[float]:
    return [1.0, *[ratio] * (layers - 1)]


def _gradual(ratio: float, layers: int, config: BlendConfig) -> list[float]:
    """Everything in layer 0, then falling shares whose mean is the ratio."""
    return [1.0, *_falling(ratio, layers - 1, config.slope)]


def _prior_gradual(ratio: float, layers: int, config: BlendConfig) -> list[float]:
    falling = _falling(ratio, layers - 1, config.slope)
    return [max([min(1.0, ratio * config.preselect), *falling[:1]]), *falling]


def _falling(ratio: float, layers: int, slope: float) -> list[float]:
    """Shares that fall evenly around `ratio`; the last layer, which ends with the write, repeats the one before."""
    if layers < 3 or ratio <= 0:
        return [ratio] * layers
    tilts = [slope * (1 - 2 * min(index / (layers - 2), 1.0)) for index in range(layers)]
    mean = sum(tilts) / layers
    steepest = tilts[0] - mean
    room = min(1.0, (1.0 / ratio - 1.0) / steepest) if steepest > 0 else 1.0
    return [ratio * (1 + (tilt - mean) * room) for tilt in tilts]


def _by_chance(blend: BlendRows) -> Float32s:
    return np.random.default_rng(blend.seed).random(len(blend.candidate), dtype=np.float32)


def _by_prior(blend: BlendRows) -> Float32s:
    if blend.prior is None:
        raise BlendError(f"policy {blend.policy!r} needs a write-time prior, and these rows have none")
    return blend.prior


def _by_place(blend: BlendRows) -> Float32s:
    """The first rows of a chunk stand before the later ones (EPIC, Hu et al. 2024)."""
    starts = np.flatnonzero(np.diff(blend.chunk, prepend=np.int64(-2)))
    lengths = np.diff(np.append(starts, len(blend.chunk)))
    place = np.arange(len(blend.chunk)) - np.repeat(starts, lengths)
    return -place.astype(np.float32)


POLICIES: dict[str, Policy] = {
    "reuse": Policy(None, _none),
    "random": Policy(_by_chance, _flat),
    "epic": Policy(_by_place, _flat),
    "gradual": Policy(None, _gradual),
    "oracle_layer1": Policy(None, _one_shot),
    "prior": Policy(_by_prior, _flat, needs_prior=True),
    "prior_gradual": Policy(_by_prior, _prior_gradual, needs_prior=True),
}


def resolve_policy(policy: str, has_prior: bool) -> str:
    """The policy to run: `gradual` where a prior is needed and was not stored. Raises BlendError."""
    if policy not in POLICIES:
        raise BlendError(f"no policy {policy!r}; there are: {', '.join(sorted(POLICIES))}")
    return "gradual" if POLICIES[policy].needs_prior and not has_prior else policy


@dataclass(frozen=True, slots=True)
class BlendPlan:
    """What is known of a sequence's blend before it runs.

    enter: ascending indices of the rows that run.  segments: [entered] int64, the budget that each row competes for,
    -1 for a row that always runs.  counts: [layers, segments] rows that are live in each layer.
    """

    enter: Int64s
    segments: Int64s
    counts: Int64s


def plan_blend(blend: BlendRows, layers: int, config: BlendConfig, keep_last: bool) -> BlendPlan:
    """Ranks and budgets of one sequence. keep_last: the last row is sampled, so it runs whatever it is."""
    if blend.policy not in POLICIES:
        resolve_policy(blend.policy, has_prior=True)
    if not 0.0 <= blend.ratio <= 1.0:
        raise BlendError(f"the recompute ratio must lie in 0 to 1, got {blend.ratio}")
    policy = POLICIES[blend.policy]
    segments = _segments(blend, config, keep_last)
    sizes = np.bincount(segments[segments >= 0], minlength=0)
    shares = [1.0] * layers if blend.ratio == 1.0 else policy.shares(blend.ratio, layers, config)
    counts = _budgets(sizes, shares if blend.ratio > 0 else [0.0] * layers)
    scores = np.zeros(len(segments), dtype=np.float32) if policy.rank is None else policy.rank(blend)
    first = counts[0] if layers else sizes
    enter = kernels.topk_rows(
        torch.from_numpy(np.ascontiguousarray(scores)), torch.from_numpy(segments), torch.from_numpy(first)
    ).numpy()
    return BlendPlan(enter, segments[enter], counts)


def _segments(blend: BlendRows, config: BlendConfig, keep_last: bool) -> Int64s:
    candidate = blend.candidate.copy()
    if keep_last and len(candidate):
        candidate[-1] = False
    segments = np.full(len(candidate), -1, dtype=np.int64)
    if config.share == "chunk":
        segments[candidate] = np.unique(blend.chunk[candidate], return_inverse=True)[1]
    else:
        segments[candidate] = 0
    return segments


def _budgets(sizes: NDArray[np.int64], shares: Sequence[float]) -> Int64s:
    """Rows per layer and segment: each layer's total is rounded once, and no count rises with depth."""
    edges = np.concatenate([[0], np.cumsum(sizes)])
    rounded = np.floor(np.asarray(shares)[:, None] * edges + 0.5).astype(np.int64)
    counts: Int64s = np.minimum.accumulate(np.diff(rounded, axis=1), axis=0)
    return counts


class Selection:
    """The narrowing of a batch in which some sequences blend. One object for one forward."""

    def __init__(self, plans: Sequence[BlendPlan | None], rows: Sequence[int], config: BlendConfig) -> None:
        """plans: per sequence, None where it does not blend.  rows: rows of each sequence that enter."""
        self._write_all = config.write_checked
        empty = np.zeros((1, 0), dtype=np.int64)
        counts = [empty if plan is None else plan.counts for plan in plans]
        layers = max(len(found) for found in counts)
        self._counts: Int64s = np.concatenate([np.broadcast_to(c, (layers, c.shape[1])) for c in counts], axis=1)
        first = np.cumsum([0, *(found.shape[1] for found in counts)])
        self._bounds: list[tuple[int, int]] = list(zip(first[:-1].tolist(), first[1:].tolist(), strict=True))
        local = [
            np.full(count, -1, dtype=np.int64)
            if plan is None
            else np.where(plan.segments >= 0, plan.segments + at, -1)
            for plan, count, at in zip(plans, rows, first[:-1], strict=True)
        ]
        self.forced = tuple(int((found < 0).sum()) for found in local)
        self._starts = _bounds(rows)
        self._cu = self._starts
        self._segments = torch.from_numpy(np.concatenate(local))
        self._origin = torch.arange(len(self._segments))

    def __call__(self, layer: int, qkv: Tensor, rows: Rows, pool: KVPool) -> Kept | None:
        if layer == 0 or bool((self._counts[layer] == self._counts[layer - 1]).all()):
            return None
        kv_heads = pool.k[layer].shape[1]
        k, v = qkv[:, -2 * kv_heads : -kv_heads], qkv[:, -kv_heads:]
        scores = kernels.deviation(k, v, rows.cos, rows.sin, rows.slots, pool.k[layer], pool.v[layer])
        segments = self._segments.to(qkv.device)
        chosen = self._counts[layer]
        live = [n + int(chosen[a:b].sum()) for n, (a, b) in zip(self.forced, self._bounds, strict=True)]
        self._cu = _bounds(live)
        keep = kernels.topk_rows(scores, segments, torch.from_numpy(chosen).to(qkv.device), self._cu[-1])
        self._segments, self._origin = segments[keep], self._origin.to(qkv.device)[keep]
        return Kept(keep, self._cu, self._write_all)

    def kept(self) -> tuple[Int64s, ...]:
        """Per sequence, indices among its entered rows of the candidates that ran to the last layer."""
        origin: Int64s = self._origin.cpu().numpy()
        candidate: Bools = self._segments.cpu().numpy() >= 0
        spans = zip(self._starts[:-1], self._cu[:-1], self._cu[1:], strict=True)
        return tuple(origin[start:stop][candidate[start:stop]] - entered for entered, start, stop in spans)


def _bounds(counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(np.cumsum([0, *counts]).tolist())
