"""Rotary frequencies and angle tables, as the model's own settings say."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from amem.engine.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each rotated pair: [head_dim / 2] float32."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    return plain


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended (Llama 3.1)."""
    waves_in_context = rope.original_context * plain / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = ((waves_in_context - rope.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1 - keep) * plain / rope.factor + keep * plain


def angle_tables(rope: RopeConfig, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, [positions, head_dim / 2] float32 each.

    Angles are float32 products, as in the models' own training code.
    """
    steps = torch.arange(positions, dtype=torch.float32)
    angles = torch.outer(steps, inverse_frequencies(rope, head_dim))
    return angles.cos(), angles.sin()
