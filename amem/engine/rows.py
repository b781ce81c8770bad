"""The rows of a forward on the device, and how they become fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from amem import kernels
from amem.engine.batch import Int64s


@dataclass(frozen=True, slots=True)
class Rows:
    """The live rows of a batch.

    positions, slots: [rows] int64.  cos, sin: [rows, head_dim / 2] float32 of the positions.
    cu: rows of sequence s are cu[s]..cu[s+1], known to the host.  block_table: [sequences, blocks] int64, padded.
    """

    positions: Tensor
    slots: Tensor
    cos: Tensor
    sin: Tensor
    cu: tuple[int, ...]
    block_table: Tensor
    attention: kernels.AttentionPlan

    def narrow(self, keep: Tensor, cu: tuple[int, ...], dtype: torch.dtype) -> Rows:
        """The rows `keep` (ascending indices), with their new bounds. dtype: of the queries."""
        positions = self.positions[keep]
        page_size = self.attention.page_size
        return Rows(
            positions=positions,
            slots=self.slots[keep],
            cos=self.cos[keep],
            sin=self.sin[keep],
            cu=cu,
            block_table=self.block_table,
            attention=kernels.plan_attention(positions, cu, self.block_table, page_size, dtype),
        )


@dataclass(frozen=True, slots=True)
class RowSpec:
    """The rows of one sequence on the host: positions [rows] and block_table [blocks]."""

    positions: Int64s
    block_table: Int64s


class RowBuilder:
    """Makes device rows from host arrays.  cos, sin: [max_context, head_dim / 2] float32."""

    def __init__(self, cos: Tensor, sin: Tensor, page_size: int, dtype: torch.dtype) -> None:
        self._cos, self._sin = cos, sin
        self._page_size = page_size
        self._dtype = dtype

    def build(self, sequences: Sequence[RowSpec]) -> Rows:
        cu = tuple(np.cumsum([0, *(len(sequence.positions) for sequence in sequences)]).tolist())
        width = max((len(sequence.block_table) for sequence in sequences), default=0)
        table = np.zeros((len(sequences), width), dtype=np.int64)
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence.block_table)] = sequence.block_table
        slots = [slots_of(sequence.positions, sequence.block_table, self._page_size) for sequence in sequences]
        positions = self._send(np.concatenate([sequence.positions for sequence in sequences]))
        block_table = self._send(table)
        plan = kernels.plan_attention(positions, cu, block_table, self._page_size, self._dtype)
        cos, sin = self.angles(positions)
        return Rows(positions, self._send(np.concatenate(slots)), cos, sin, cu, block_table, plan)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._cos[positions], self._sin[positions]

    def _send(self, values: Int64s) -> Tensor:
        return torch.from_numpy(values).to(self._cos.device)


def slots_of(positions: Int64s, block_table: Int64s, page_size: int) -> Int64s:
    """Slot of each position: block_table[p // page] * page + p % page."""
    slots: Int64s = block_table[positions // page_size] * page_size + positions % page_size
    return slots
