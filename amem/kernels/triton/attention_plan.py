"""Which tiles a batch of rows is cut into, from what the host knows: row counts and page counts, never positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amem.kernels.triton.chip import Chip, TileShape, chip_of, narrow_tile, wide_tile

MOST_PARTS = 64
_LEAST_KEY_TILES = 4
Int32s = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TileGroup:
    """Tiles of one shape, in the order in which they are started.

    tiles: [tiles, 4] int32 on the device: sequence, first row, rows, and how many rows of the group came before.
    rows: of all tiles together.  rows_per_tile: at most.  parts: programs that share the keys of a tile.
    """

    shape: TileShape
    tiles: Tensor
    rows: int
    rows_per_tile: int
    parts: int


@dataclass(frozen=True, slots=True)
class TilePlan:
    """What paged_attention has to know of a batch; made once, used by every layer with the same rows."""

    positions: Tensor
    cu_rows: tuple[int, ...]
    block_table: Tensor
    page_size: int
    dtype: torch.dtype
    _made: dict[tuple[int, int, int], tuple[TileGroup, ...]] = field(default_factory=dict, repr=False, compare=False)

    def groups(self, heads: int, kv_heads: int, head_dim: int) -> tuple[TileGroup, ...]:
        """Sequences of one row, and the others; made for the first layer, used by all."""
        key = (heads, kv_heads, head_dim)
        if key not in self._made:
            self._made[key] = self._cut(heads // kv_heads, kv_heads, head_dim)
        return self._made[key]

    def _cut(self, group: int, kv_heads: int, head_dim: int) -> tuple[TileGroup, ...]:
        chip, size = chip_of(self.positions.device), self.dtype.itemsize
        narrow, wide = narrow_tile(chip, size, group, head_dim), wide_tile(chip, size, group, head_dim)
        rows = np.diff(np.asarray(self.cu_rows, dtype=np.int64))
        longest = self.block_table.shape[1] * self.page_size
        found = []
        for shape, chosen, per_tile in ((wide, rows > 1, wide.queries // group), (narrow, rows == 1, 1)):
            tiles = _tiles(self.cu_rows, np.flatnonzero(chosen), per_tile)
            if len(tiles):
                parts = _parts(chip, shape, len(tiles) * kv_heads, longest)
                found.append(TileGroup(shape, self._send(tiles), int(tiles[:, 2].sum()), per_tile, parts))
        return tuple(found)

    def _send(self, tiles: Int32s) -> Tensor:
        """To the device without making the host wait for it."""
        host = torch.from_numpy(tiles)
        device = self.positions.device
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def plan_attention(
    positions: Tensor, cu_rows: Sequence[int], block_table: Tensor, page_size: int, dtype: torch.dtype
) -> TilePlan:
    """See `amem.kernels.reference.plan_attention`. Nothing is read from the device."""
    return TilePlan(positions, tuple(cu_rows), block_table, page_size, dtype)


def _tiles(cu_rows: Sequence[int], sequences: NDArray[np.int64], per_tile: int) -> Int32s:
    """Cuts each sequence's rows; tiles that stand deeper in their sequence, and so walk more keys, come first."""
    pieces = []
    for sequence in sequences.tolist():
        start, stop = cu_rows[sequence], cu_rows[sequence + 1]
        first = np.arange(start, stop, per_tile)
        count = np.minimum(per_tile, stop - first)
        pieces.append(np.stack([np.full_like(first, sequence), first, count, first - start]))
    if not pieces:
        return np.zeros((0, 4), dtype=np.int32)
    tiles = np.concatenate(pieces, axis=1).T
    tiles = tiles[np.argsort(-tiles[:, 3], kind="stable")]
    tiles[:, 3] = np.cumsum(tiles[:, 2]) - tiles[:, 2]
    return np.ascontiguousarray(tiles, dtype=np.int32)


def _parts(chip: Chip, shape: TileShape, programs: int, longest: int) -> int:
    """A power of two that fills the chip, as long as each part still has a few tiles of keys to walk."""
    room = chip.cores * shape.per_core // programs
    useful = ceil(longest / (shape.keys * _LEAST_KEY_TILES))
    most = max(1, min(room, useful, MOST_PARTS))
    return 1 << (most.bit_length() - 1)
