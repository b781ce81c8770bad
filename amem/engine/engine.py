"""The engine on a real model: loads it, opens its store, and puts the core together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from amem.engine.batch import Batch, ChunkKV, Int64s, SequenceRows, StepOutput
from amem.engine.blend import FIDELITY, POLICIES, BlendError, resolve_policy
from amem.engine.config import EngineConfig
from amem.engine.core import Core, Parts
from amem.engine.intake import Intake, Limits
from amem.engine.model import Model, load_model
from amem.engine.runner import Runner
from amem.engine.scheduler import SchedulerConfig
from amem.engine.sensitivity import sampled_contexts
from amem.engine.sequence import BlendMode
from amem.engine.store.config import ChunkLayout, StoreConfig
from amem.engine.store.store import ChunkStore
from amem.engine.types import BlendOptions, ChunkSpec, EngineError, Fidelity, ModelInfo

_SAMPLED_CONTEXTS = (32, 64)


class Engine(Core):
    """`add`, `abort`, `write`, `forget`, `step`, as in Core. `close` when done: the store syncs and unlocks.

    progress: called with (bytes of weights read, bytes in all) while the model loads.
    Raises ConfigError, WeightsError or StoreError when it cannot start.
    """

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> None:
        model = load_model(config, progress)
        self.runner = Runner(config, model)
        shape = model.config
        layout = ChunkLayout(shape.layers, shape.kv_heads, shape.head_dim, model.dtype, model.fingerprint)
        path = None if config.kv_dir is None else Path(config.kv_dir)
        self.store = ChunkStore(StoreConfig(path, config.ram_bytes, config.disk_bytes, config.fsync), layout)
        context = min(model.max_context, self.runner.num_pages * config.page_size)
        limits = Limits(shape.vocab_size, context, shape.layers, self.runner.row_cost, shape.eos_token_ids)
        self.model = _model_info(config, model, self.runner, context)
        parts = Parts(
            device=_Device(self.runner),
            store=self.store,
            intake=Intake(limits, self.store.key, _Modes(config, shape.layers)),
            pages=self.runner.num_pages,
            page_size=config.page_size,
            scheduler=SchedulerConfig(config.max_step_tokens, config.max_sequences),
        )
        super().__init__(parts)
        self._warm_up()

    def _warm_up(self) -> None:
        """A prompt and a decode that leave nothing behind, so that the first question does not pay for set-up."""
        size = self.runner.config.page_size
        for positions in (np.arange(size), np.arange(size - 1, size)):
            ids = np.zeros(len(positions), np.int64)
            self.runner.forward(Batch((SequenceRows(ids, positions, np.zeros(1, np.int64)),)))
        self.runner.zero_pages(np.zeros(1, np.int64))

    def close(self) -> None:
        """Writes what the store still holds in memory for disk, and lets go of its directory."""
        self.store.close()


@dataclass(frozen=True, slots=True)
class _Modes:
    """What blend options mean on this model."""

    config: EngineConfig
    layers: int

    def __call__(self, options: BlendOptions) -> BlendMode:
        policy, ratio = FIDELITY[options.fidelity]
        if options.fidelity is Fidelity.EXACT and options.recompute_ratio is None:
            return BlendMode(enabled=False, policy="exact", ratio=1.0)
        if options.recompute_ratio is not None:
            ratio = options.recompute_ratio
        if not math.isfinite(ratio) or not 0 <= ratio <= 1:
            raise EngineError("invalid_request", f"recompute_ratio is {ratio}: it must lie between 0 and 1")
        policy = options.policy or policy
        try:
            resolve_policy(policy, has_prior=True)
        except BlendError as error:
            raise EngineError("invalid_request", str(error)) from error
        shares = POLICIES[policy].shares(ratio, self.layers, self.config.blend)
        return BlendMode(True, policy, ratio, row_cost=sum(shares) / len(shares))


@dataclass(frozen=True, slots=True)
class _Device:
    """The runner as the core sees it."""

    runner: Runner

    def forward(self, batch: Batch) -> StepOutput:
        return self.runner.forward(batch)

    def zero(self, pages: Iterable[int]) -> None:
        self.runner.zero_pages(np.fromiter(pages, np.int64))

    def copy(self, source: int, target: int) -> None:
        data = self.runner.pool.data
        with torch.inference_mode():
            data[:, :, target] = data[:, :, source]

    def load_chunk(self, kv: ChunkKV, positions: Int64s, block_table: Int64s, rows: Int64s | None = None) -> None:
        self.runner.load_chunk(kv, positions, block_table, rows)

    def prior(self, spec: ChunkSpec) -> tuple[torch.Tensor, float] | None:
        """Write-time sensitivity of a chunk and its cost in token equivalents; None where the model cannot tell."""
        shape = self.runner.model.config
        if shape.layers < 2:
            return None
        context = np.asarray(spec.context, np.int64)
        room = self.runner.model.max_context - spec.trusted - len(spec.token_ids)
        lengths = [length for length in _SAMPLED_CONTEXTS if length <= room]
        if not lengths:
            return None
        seed = self.runner.config.seed
        others = sampled_contexts(shape.vocab_size, context[: spec.trusted], lengths, seed)
        found = self.runner.sensitivity(np.asarray(spec.token_ids, np.int64), [context, *others])
        return found.prior.float().cpu(), found.row_layers / shape.layers


def _model_info(config: EngineConfig, model: Model, runner: Runner, context: int) -> ModelInfo:
    shape = model.config
    return ModelInfo(
        name=config.name or Path(config.model).resolve().name,
        fingerprint=model.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        layers=shape.layers,
        vocab_size=shape.vocab_size,
        max_context=context,
        eos_token_ids=shape.eos_token_ids,
        kv_bytes_per_token=2 * shape.layers * shape.kv_heads * shape.head_dim * model.dtype.itemsize,
        pages=runner.num_pages,
        page_size=config.page_size,
        weights_bytes=model.weights.nbytes,
    )
