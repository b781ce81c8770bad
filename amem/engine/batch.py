"""The contract between the scheduler, which chooses rows, and the runner, which computes them.

A row is (token id, absolute position, sequence, KV slot). Row r attends to the KV entries 0..position[r] of its own
sequence and to nothing else. Decode, chunked prefill, prefix hits and blending differ only in which rows are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]
Float32s = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BlendRows:
    """Which rows of a sequence may be dropped, and how they are judged.

    candidate: [R], True for a row whose KV was loaded from the store (it may be kept as loaded); a row that is not
        a candidate is always computed in every layer.
    chunk: [R], number of the chunk that a candidate row belongs to, -1 for other rows.
    ratio: rows recomputed over candidates, the mean over the layers behind the checks.
    prior: [R] write-time sensitivity of each row, or None.
    """

    policy: str
    ratio: float
    candidate: Bools
    chunk: Int64s
    prior: Float32s | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """The rows of one sequence in one step.

    token_ids, positions: [R], positions strictly ascending.
    block_table: [B] page numbers; position p lies in slot block_table[p // page] * page + p % page.
    sample: the logits of the last row are wanted.
    capture: (start, stop) positions whose unrotated K and V are wanted, all of them rows of this step.
    """

    token_ids: Int64s
    positions: Int64s
    block_table: Int64s
    sample: bool = True
    blend: BlendRows | None = None
    capture: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward. No two rows of a batch share a slot."""

    sequences: tuple[SequenceRows, ...]

    @property
    def rows(self) -> int:
        return sum(len(sequence.positions) for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class ChunkKV:
    """The KV of a chunk as it is stored.

    k: [layers, tokens, kv_heads, head_dim], unrotated, in the KV dtype.  v: the same shape and dtype.
    prior: [tokens] float32 write-time sensitivity, or None.
    """

    k: torch.Tensor
    v: torch.Tensor
    prior: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.k.shape[1])


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one forward did.

    logits: [sequences with sample, vocab] float32, in the order of the batch.
    row_layers: [sequences] layers run per row, summed: a whole layer counts 1, its QKV projection alone (a check, and
        a row in the last layer that no logits need) its share of the layer's linear work.
    blend_row_layers: [sequences] the part of row_layers that candidate rows caused.
    kept: per sequence, the candidate positions that were recomputed to the last layer (empty without a blend).
    captured: per sequence, the unrotated KV asked for, or None.
    finite: [sequences with sample] False where the logits hold a NaN or an infinity.
    """

    logits: torch.Tensor
    row_layers: Float32s
    blend_row_layers: Float32s
    kept: tuple[Int64s, ...]
    captured: tuple[ChunkKV | None, ...]
    finite: Bools
