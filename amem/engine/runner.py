"""Computes batches: owns the KV pages, chooses the rows that run, counts what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from amem import kernels
from amem.engine.batch import Batch, ChunkKV, Float32s, Int64s, SequenceRows, StepOutput
from amem.engine.blend import BlendPlan, Selection, plan_blend
from amem.engine.config import ConfigError, EngineConfig
from amem.engine.model import Capture, Model
from amem.engine.pool import KVPool, page_bytes
from amem.engine.rows import RowBuilder, RowSpec, slots_of
from amem.engine.sensitivity import ChunkRowsOnly, scratch_sequences


class RunnerError(ValueError):
    """A batch or a load that breaks the contract of `amem.engine.batch`."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """prior: [tokens] float32, how much layer 1 of a token changes with what stands before it.

    row_layers: what finding it out cost, in the unit of StepOutput.row_layers.
    """

    prior: Tensor
    row_layers: float


class Runner:
    """One model on one device with its paged KV pool, [layers, 2, pages, page_size, kv_heads, head_dim]."""

    def __init__(self, config: EngineConfig, model: Model) -> None:
        self.config = config
        self.model = model
        self.num_pages = _pages_that_fit(config, model)
        self.pool = self._pool(model.config.layers, self.num_pages)
        self._builder = RowBuilder(model.cos, model.sin, config.page_size, model.dtype)

    @property
    def row_cost(self) -> float:
        """Row-layers of prefilling one row that is not sampled: whole layers, and QKV alone in the last."""
        return self.model.config.layers - 1 + self.model.config.qkv_share

    def forward(self, batch: Batch) -> StepOutput:
        """Runs every row of the batch that its blend does not drop.

        KV of the rows that run is written to their slots; a dropped row's slots stay as they were loaded.
        Raises RunnerError on rows outside the model or the pool, BlendError on a blend that cannot run.
        """
        if not batch.sequences:
            raise RunnerError("a batch needs at least one sequence")
        for sequence in batch.sequences:
            self._check(sequence)
        layers = self.model.config.layers
        plans = [
            plan_blend(sequence.blend, layers, self.config.blend, sequence.sample) if sequence.blend else None
            for sequence in batch.sequences
        ]
        entered = [
            np.arange(len(sequence.positions)) if plan is None else plan.enter
            for sequence, plan in zip(batch.sequences, plans, strict=True)
        ]
        with torch.inference_mode():
            return self._run(batch, plans, entered)

    def _run(self, batch: Batch, plans: Sequence[BlendPlan | None], entered: Sequence[Int64s]) -> StepOutput:
        sequences = batch.sequences
        sizes = [len(rows) for rows in entered]
        selection = Selection(plans, sizes, self.config.blend) if any(plan is not None for plan in plans) else None
        captures = [self._capture(index, sequence) for index, sequence in enumerate(sequences)]
        positions = [sequence.positions[rows] for sequence, rows in zip(sequences, entered, strict=True)]
        specs = [RowSpec(found, s.block_table) for found, s in zip(positions, sequences, strict=True)]
        ids = np.concatenate([sequence.token_ids[rows] for sequence, rows in zip(sequences, entered, strict=True)])
        done = self.model.forward(
            torch.from_numpy(ids).to(self.model.device),
            self._builder.build(specs),
            self.pool,
            [sequence.sample for sequence in sequences],
            selection,
            [capture for capture in captures if capture is not None],
        )
        row_layers, blend_layers = self._charge(done.ran, sizes if selection is None else selection.forced)
        kept = [np.zeros(0, dtype=np.int64)] * len(sequences) if selection is None else selection.kept()
        return StepOutput(
            logits=done.logits,
            row_layers=row_layers,
            blend_row_layers=blend_layers,
            kept=tuple(found[rows] for found, rows in zip(positions, kept, strict=True)),
            captured=tuple(None if found is None else ChunkKV(found.k, found.v) for found in captures),
            finite=torch.isfinite(done.logits).all(-1).cpu().numpy(),
        )

    def load_chunk(self, kv: ChunkKV, positions: Int64s, block_table: Int64s, rows: Int64s | None = None) -> None:
        """Writes a stored chunk to the pages of every layer, its keys rotated to `positions`.

        kv: read only, may be mapped from a file.  positions: [tokens] int64, where the chunk's tokens stand now.
        rows: indices of the tokens to load, None for all. Raises RunnerError on a shape that is not this model's.
        """
        model = self.model.config
        shape = (model.layers, len(positions), model.kv_heads, model.head_dim)
        if tuple(kv.k.shape) != shape or tuple(kv.v.shape) != shape:
            raise RunnerError(f"a chunk of {shape} was expected, got K {tuple(kv.k.shape)} and V {tuple(kv.v.shape)}")
        self._check_places(positions, block_table)
        k, v = kv.k, kv.v
        if rows is not None:
            index = torch.from_numpy(rows)
            k, v, positions = k[:, index], v[:, index], positions[rows]
        device = self.model.device
        slots = torch.from_numpy(slots_of(positions, block_table, self.config.page_size)).to(device)
        with torch.inference_mode():
            cos, sin = self._builder.angles(torch.from_numpy(positions).to(device))
            k, v = k.to(device), v.to(device)
            kernels.rotate_scatter(k, v, cos, sin, slots, self.pool.k_layers, self.pool.v_layers)

    def zero_pages(self, pages: Int64s) -> None:
        """Overwrites pages with zeros in every layer."""
        with torch.inference_mode():
            self.pool.data.index_fill_(2, torch.from_numpy(pages).to(self.model.device), 0)

    def read_pages(self, pages: Int64s) -> Tensor:
        """A copy of pages: [layers, 2, pages, page_size, kv_heads, head_dim]."""
        with torch.inference_mode():
            return self.pool.data.index_select(2, torch.from_numpy(pages).to(self.model.device))

    def sensitivity(self, token_ids: Int64s, contexts: Sequence[Int64s]) -> Sensitivity:
        """How much each token of a chunk depends on what stands before it.

        Layer 1's K and V of the chunk behind contexts[0], its own, are compared with those behind each other context;
        the mean squared distance is the prior. Context rows run only layer 0's QKV. Contexts equal to the first are
        left out; raises RunnerError where nothing is left to compare with, or the model has one layer.
        """
        contexts = [*contexts[:1], *(other for other in contexts[1:] if not np.array_equal(other, contexts[0]))]
        if len(contexts) < 2 or self.model.config.layers < 2:
            raise RunnerError("sensitivity compares two different contexts in a model of at least two layers")
        sequences = scratch_sequences(token_ids, contexts, self.config.page_size)
        pages = sum(len(sequence.block_table) for sequence in sequences)
        for sequence in sequences:
            self._check_ids(sequence)
        hook = ChunkRowsOnly([len(context) for context in contexts], len(token_ids))
        ids = np.concatenate([sequence.token_ids for sequence in sequences])
        with torch.inference_mode():
            rows = self._builder.build([RowSpec(s.positions, s.block_table) for s in sequences])
            tokens = torch.from_numpy(ids).to(self.model.device)
            done = self.model.forward(tokens, rows, self._pool(2, pages), [False] * len(sequences), hook)
            row_layers, _ = self._charge(done.ran, [0] * len(sequences))
            return Sensitivity(hook.prior(), float(row_layers.sum()))

    def _pool(self, layers: int, pages: int) -> KVPool:
        return KVPool(self.model.config, layers, pages, self.config.page_size, self.model.dtype, self.model.device)

    def _capture(self, index: int, sequence: SequenceRows) -> Capture | None:
        if sequence.capture is None:
            return None
        start, stop = sequence.capture
        first = int(np.searchsorted(sequence.positions, start))
        found = sequence.positions[first : first + stop - start]
        if sequence.blend is not None or not np.array_equal(found, np.arange(start, stop)):
            raise RunnerError(
                f"positions {start} to {stop} cannot be captured: they are blended, or no rows of the step"
            )
        return Capture(index, first, stop - start, self.pool)

    def _charge(
        self, ran: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], forced: Sequence[int]
    ) -> tuple[Float32s, Float32s]:
        """Row-layers per sequence, of all its rows and of its candidates. forced: rows that are no candidates."""
        share = self.model.config.qkv_share
        bounds = np.asarray(ran, dtype=np.float64).reshape(len(ran), 2, -1)
        started, whole = np.diff(bounds, axis=2).transpose(1, 0, 2)
        fixed = np.asarray(forced)
        total = whole + (started - whole) * share
        candidates, whole_candidates = started - fixed, np.maximum(whole - fixed, 0)
        mine = whole_candidates + (candidates - whole_candidates) * share
        return total.sum(0).astype(np.float32), mine.sum(0).astype(np.float32)

    def _check(self, sequence: SequenceRows) -> None:
        if len(sequence.token_ids) != len(sequence.positions) or not len(sequence.positions):
            raise RunnerError(
                f"{len(sequence.token_ids)} ids for {len(sequence.positions)} positions, at least one needed"
            )
        if (np.diff(sequence.positions) <= 0).any():
            raise RunnerError("positions must rise from row to row")
        self._check_ids(sequence)
        self._check_places(sequence.positions, sequence.block_table)

    def _check_ids(self, sequence: SequenceRows) -> None:
        ids, vocabulary = sequence.token_ids, self.model.config.vocab_size
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise RunnerError(f"token ids must lie in 0 to {vocabulary - 1}, got {ids.min()} to {ids.max()}")
        if sequence.positions[-1] >= self.model.max_context:
            raise RunnerError(f"position {sequence.positions[-1]} is beyond the context of {self.model.max_context}")

    def _check_places(self, positions: Int64s, block_table: Int64s) -> None:
        if not len(positions):
            return
        blocks = int(positions.max()) // self.config.page_size + 1
        if positions.min() < 0 or blocks > len(block_table) or positions.max() >= self.model.max_context:
            raise RunnerError(f"positions {positions.min()} to {positions.max()} do not fit {len(block_table)} pages")
        used = block_table[:blocks]
        if used.min() < 0 or used.max() >= self.num_pages:
            raise RunnerError(f"pages must lie in 0 to {self.num_pages - 1}, got {used.min()} to {used.max()}")


def _pages_that_fit(config: EngineConfig, model: Model) -> int:
    one = page_bytes(model.config, config.page_size, model.dtype)
    pages = config.num_pages or config.kv_bytes // one
    if pages < 1:
        raise ConfigError("kv_bytes", f"{config.kv_bytes} bytes hold no page; one of this model needs {one}")
    return pages
