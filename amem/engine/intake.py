"""From a request to a sequence: what is refused, where the chunks lie, which of them are exact where they stand."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from amem.engine.blocks import chain_root
from amem.engine.sequence import BlendMode, Place, Sequence, Tags
from amem.engine.store.config import StoreError
from amem.engine.tally import Tally
from amem.engine.types import (
    BlendOptions,
    ChunkSpec,
    EngineError,
    GenerateRequest,
    SamplingParams,
    Segment,
    Tenant,
)

MAX_LOGPROBS = 20
_NO_BLEND = BlendMode(enabled=False, policy="exact", ratio=1.0)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a sequence must keep to, and what its rows cost.

    max_tokens: the longest sequence.  layers, row_cost: layers of the model, and how many of them prefilling one
    row runs.
    """

    vocab_size: int
    max_tokens: int
    layers: int
    row_cost: float
    eos: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Intake:
    """Builds sequences. `key` names a chunk in the store, `mode` says how options are blended on this model."""

    limits: Limits
    key: Callable[[Tenant, ChunkSpec], bytes]
    mode: Callable[[BlendOptions], BlendMode]

    def request(self, request: GenerateRequest, now: float) -> Sequence:
        """Raises EngineError `invalid_request` or `prompt_too_long`."""
        _check_sampling(request.sampling, self.limits.vocab_size)
        prompt = self._prompt(request.segments)
        sampling = request.sampling
        mode = self.mode(request.blend)
        ids = np.zeros(min(len(prompt) + sampling.max_tokens, self.limits.max_tokens), np.int32)
        ids[: len(prompt)] = prompt
        places = self._places(request.tenant, request.segments, prompt)
        return Sequence(
            id=request.id,
            tenant=request.tenant,
            root=chain_root(request.tenant),
            ids=ids,
            length=len(prompt),
            limit=len(ids),
            tally=self._tally(prompt, now, mode),
            mode=mode,
            places=places,
            tags=_tags((place.start, {place.spec.memory, *place.spec.behind}) for place in places),
            sampling=sampling,
            stops=frozenset(sampling.stop_token_ids).union(() if sampling.ignore_eos else self.limits.eos),
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            priority=request.priority,
        )

    def chunk(self, job: str, tenant: Tenant, spec: ChunkSpec, now: float) -> Sequence:
        """The background computation of a chunk behind its context. Raises EngineError when it cannot fit."""
        ids = self._prompt((Segment(spec.context), Segment(spec.token_ids)))
        start = len(spec.context)
        return Sequence(
            id=job,
            tenant=tenant,
            root=chain_root(tenant),
            ids=ids,
            length=len(ids),
            limit=len(ids),
            tally=self._tally(ids, now, _NO_BLEND),
            mode=_NO_BLEND,
            tags=_tags(((spec.trusted, set(spec.behind)), (start, {spec.memory}))),
            capture=start,
        )

    def _tally(self, ids: NDArray[np.int32], now: float, mode: BlendMode) -> Tally:
        return Tally(len(ids), now, mode.policy, mode.enabled, self.limits.layers, self.limits.row_cost)

    def _prompt(self, segments: tuple[Segment, ...]) -> NDArray[np.int32]:
        wide = np.concatenate([np.asarray(s.token_ids, np.int64) for s in segments] or [np.zeros(0, np.int64)])
        if not len(wide):
            raise EngineError("invalid_request", "the prompt is empty: send at least one token")
        if wide.min() < 0 or wide.max() >= self.limits.vocab_size:
            raise EngineError("invalid_request", f"a token id is not in 0..{self.limits.vocab_size - 1}")
        if len(wide) >= self.limits.max_tokens:
            raise EngineError(
                "prompt_too_long",
                f"the prompt has {len(wide)} tokens, this engine holds {self.limits.max_tokens} with the answer: "
                "shorten it or recall less",
            )
        return wide.astype(np.int32)

    def _places(
        self, tenant: Tenant | None, segments: tuple[Segment, ...], prompt: NDArray[np.int32]
    ) -> tuple[Place, ...]:
        places: list[Place] = []
        start = 0
        for segment in segments:
            stop = start + len(segment.token_ids)
            spec = segment.chunk
            if spec is not None and tenant is not None and start < stop:
                if spec.token_ids != segment.token_ids:
                    raise EngineError("invalid_request", f"segment at {start}: its ids are not those of its chunk")
                exact = len(spec.context) == start and tuple(prompt[:start].tolist()) == spec.context
                places.append(Place(len(places), start, stop, spec, self._key(tenant, spec), exact))
            start = stop
        return tuple(places)

    def _key(self, tenant: Tenant, spec: ChunkSpec) -> bytes:
        try:
            return self.key(tenant, spec)
        except StoreError as error:
            raise EngineError("invalid_request", f"a chunk has no key: {error}") from error


def _tags(named: Iterable[tuple[int, set[str]]]) -> Tags:
    starts: list[int] = []
    names: list[frozenset[str]] = []
    for start, memories in named:
        starts.append(start)
        names.append(frozenset(memories).union(names[-1] if names else ()))
    return Tags(tuple(starts), tuple(names))


def _check_sampling(params: SamplingParams, vocab_size: int) -> None:
    numbers = {"temperature": params.temperature, "top_p": params.top_p, "min_p": params.min_p}
    for name, value in numbers.items():
        if not math.isfinite(value) or value < 0:
            raise EngineError("invalid_request", f"{name} is {value}: it must be a number of at least 0")
    if not 0 < params.top_p <= 1 or params.min_p > 1:
        raise EngineError("invalid_request", f"top_p {params.top_p} or min_p {params.min_p} is not a probability")
    if params.top_k < 0 or params.max_tokens < 1:
        raise EngineError("invalid_request", f"top_k {params.top_k} or max_tokens {params.max_tokens} is too small")
    if params.logprobs is not None and not 0 <= params.logprobs <= MAX_LOGPROBS:
        raise EngineError("invalid_request", f"logprobs is {params.logprobs}: 0 to {MAX_LOGPROBS} are supported")
    if any(not 0 <= token < vocab_size for token in params.stop_token_ids):
        raise EngineError("invalid_request", "a stop token id is not in the vocabulary")
