"""The write-time prior: which tokens of a chunk change most when something else stands before them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from amem.engine.batch import Int64s, SequenceRows
from amem.engine.model import Kept
from amem.engine.pool import KVPool
from amem.engine.rows import Rows


def sampled_contexts(vocabulary: int, trusted: Int64s, lengths: Sequence[int], seed: int) -> list[Int64s]:
    """To compare with a chunk's own context: the trusted prefix alone, then with `lengths[i]` random tokens each."""
    generator = np.random.default_rng(seed)
    sampled = [generator.integers(0, vocabulary, length, dtype=np.int64) for length in lengths]
    return [trusted, *(np.concatenate([trusted, tokens]) for tokens in sampled)]


def scratch_sequences(token_ids: Int64s, contexts: Sequence[Int64s], page_size: int) -> list[SequenceRows]:
    """The chunk behind each context, in pages of a pool of its own."""
    sequences: list[SequenceRows] = []
    page = 0
    for context in contexts:
        ids = np.concatenate([context, token_ids])
        blocks = -(-len(ids) // page_size)
        table = np.arange(page, page + blocks, dtype=np.int64)
        sequences.append(SequenceRows(ids, np.arange(len(ids), dtype=np.int64), table, sample=False))
        page += blocks
    return sequences


class ChunkRowsOnly:
    """Narrowing that drops context rows once layer 0 has their KV, and ends at layer 1 with the chunk's K and V."""

    def __init__(self, context_lengths: Sequence[int], chunk: int) -> None:
        self._context_lengths = context_lengths
        self._chunk = chunk
        self._kv: Tensor | None = None

    def __call__(self, layer: int, qkv: Tensor, rows: Rows, pool: KVPool) -> Kept | None:
        if layer == 0:
            starts = torch.tensor(rows.cu[:-1]) + torch.tensor(self._context_lengths)
            keep = (starts[:, None] + torch.arange(self._chunk)).flatten().to(qkv.device)
            cu = tuple(range(0, len(keep) + 1, self._chunk)) if self._chunk else rows.cu
            return Kept(keep, cu, write_all=True)
        heads = 2 * pool.k[0].shape[1]
        self._kv = qkv[:, -heads:].float().reshape(len(self._context_lengths), self._chunk, heads, -1)
        return None

    def prior(self) -> Tensor:
        """[chunk] float32: mean over the other contexts of the squared distance of K and V from the first's."""
        if self._kv is None:
            return torch.zeros(self._chunk)
        return (self._kv[1:] - self._kv[:1]).square().sum((-2, -1)).mean(0).cpu()
