"""What is known of a chip: how wide it is, and the tile shapes measured or compiled to fit it. No autotuning."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
from triton.runtime import driver


@dataclass(frozen=True, slots=True)
class Chip:
    """arch: sm_90, gfx942, ... or interpreter.  cores: multiprocessors or compute units."""

    arch: str
    cores: int


@dataclass(frozen=True, slots=True)
class TileShape:
    """queries: rows of the score matrix, query rows times heads of a group.  keys: its columns.

    stages: depth of the software pipeline.  per_core: programs a multiprocessor should be given, by splitting keys.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    per_core: int


_USUAL_DIM = 128
_NARROW = {2: TileShape(16, 64, 4, 3, 16), 4: TileShape(16, 16, 4, 1, 8)}
_WIDE = {2: TileShape(128, 64, 8, 3, 1), 4: TileShape(32, 16, 4, 1, 1)}
_WIDE_ON = {
    "sm_80": {2: TileShape(128, 32, 8, 3, 1), 4: TileShape(32, 16, 4, 1, 1)},
    "sm_86": {2: TileShape(128, 32, 8, 3, 1), 4: TileShape(32, 16, 4, 1, 1)},
    "sm_89": {2: TileShape(128, 32, 8, 3, 1), 4: TileShape(32, 16, 4, 1, 1)},
    "gfx942": {2: TileShape(128, 64, 8, 1, 1), 4: TileShape(32, 16, 4, 1, 1)},
}


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The chip that kernels on `device` are compiled for."""
    if triton.knobs.runtime.interpret:
        return Chip("interpreter", 8)
    target = driver.active.get_current_target()
    arch = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return Chip(arch, cores)


def narrow_tile(chip: Chip, element_bytes: int, group: int, head_dim: int) -> TileShape:
    """For one row of a sequence, such as decode: the fewest score rows that a matrix unit takes, at least `group`."""
    shape = _NARROW[element_bytes]
    stages = 1 if chip.arch.startswith("gfx") else shape.stages
    keys = shape.keys // 2 if head_dim > _USUAL_DIM else shape.keys
    return replace(shape, queries=max(shape.queries, triton.next_power_of_2(group)), keys=keys, stages=stages)


def wide_tile(chip: Chip, element_bytes: int, group: int, head_dim: int) -> TileShape:
    """For many rows of a sequence: in 16 bit at least 64 score rows, so that Hopper multiplies by warp group."""
    shape = _WIDE_ON.get(chip.arch, _WIDE)[element_bytes]
    if head_dim > _USUAL_DIM:
        shape = replace(shape, queries=shape.queries // 2, keys=shape.keys // 2)
    return replace(shape, queries=max(shape.queries, triton.next_power_of_2(group)))
