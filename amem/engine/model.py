"""One forward over rows with positions, for prefill, decode and blending alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from amem import kernels
from amem.engine.config import ConfigError, EngineConfig, ModelConfig
from amem.engine.pool import KVPool
from amem.engine.rope import angle_tables
from amem.engine.rows import Rows
from amem.engine.weights import LayerWeights, Progress, Weights, fingerprint, load_weights

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Kept:
    """Which rows go on: ascending indices [kept] and their bounds.

    write_all: K and V of the dropped rows are written before they leave; otherwise their slots stay untouched.
    """

    rows: Tensor
    cu: tuple[int, ...]
    write_all: bool


class Narrowing(Protocol):
    """Drops rows at a layer, between its QKV projection and its page write.

    It sees fresh QKV of the live rows, [rows, qkv_heads, head_dim] unrotated, and the cached KV still in their slots.
    None keeps every row. Rows of one sequence never become rows of another.
    """

    def __call__(self, layer: int, qkv: Tensor, rows: Rows, pool: KVPool) -> Kept | None: ...


class Capture:
    """Collects unrotated K and V of rows first..first+tokens of a sequence that no narrowing touches.

    k, v: [layers, tokens, kv_heads, head_dim].
    """

    def __init__(self, sequence: int, first: int, tokens: int, pool: KVPool) -> None:
        self._sequence, self._first, self._tokens = sequence, first, tokens
        shape = (pool.layers, tokens, *pool.k[0].shape[1:])
        self.k = torch.empty(shape, dtype=pool.data.dtype, device=pool.data.device)
        self.v = torch.empty_like(self.k)

    def take(self, layer: int, qkv: Tensor, rows: Rows) -> None:
        start = rows.cu[self._sequence] + self._first
        kv_heads = self.k.shape[2]
        found = qkv[start : start + self._tokens]
        self.k[layer] = found[:, -2 * kv_heads : -kv_heads]
        self.v[layer] = found[:, -kv_heads:]


@dataclass(frozen=True, slots=True)
class Forwarded:
    """logits: [sampled sequences, vocab] float32.

    ran: per layer the row bounds that its QKV ran for, and those that the whole layer ran for.
    """

    logits: Tensor
    ran: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


class Model:
    """A Llama-family decoder. Holds weights and angle tables, no state of any request."""

    def __init__(self, config: ModelConfig, weights: Weights, max_context: int, fingerprint: str = "") -> None:
        self.config = config
        self.weights = weights
        self.fingerprint = fingerprint
        self.max_context = max_context
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        cos, sin = angle_tables(config.rope, config.head_dim, max_context)
        self.cos, self.sin = cos.to(self.device), sin.to(self.device)

    def forward(
        self,
        token_ids: Tensor,
        rows: Rows,
        pool: KVPool,
        sample: Sequence[bool],
        narrowing: Narrowing | None = None,
        captures: Sequence[Capture] = (),
    ) -> Forwarded:
        """Runs the first `pool.layers` layers, writing K and V of every live row to the pool.

        token_ids: [rows] int64.  sample: per sequence, the logits of its last row are wanted. Rows that no logits
        need stop at the last layer's page write.
        """
        x, residual = functional.embedding(token_ids, self.weights.embedding), None
        ran: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for index, layer in enumerate(self.weights.layers[: pool.layers]):
            entered = rows.cu
            x, residual = kernels.add_rms_norm(x, residual, layer.input_norm, self.config.norm_eps)
            qkv = functional.linear(x, layer.qkv, layer.qkv_bias).view(
                -1, self.config.qkv_heads, self.config.head_dim
            )
            for capture in captures:
                capture.take(index, qkv, rows)
            kept = None if narrowing is None else narrowing(index, qkv, rows, pool)
            if kept is not None:
                if kept.write_all:
                    self._write(index, qkv, rows, pool)
                qkv, residual, rows = self._narrow(kept, qkv, residual, rows)
            q = self._write(index, qkv, rows, pool)
            if index == pool.layers - 1 and (last := _sampled_rows(rows, sample)) is not None:
                q, residual, rows = self._narrow(last, q, residual, rows)
            ran.append((entered, rows.cu))
            x, residual = self._attend_and_mix(index, layer, q, residual, rows, pool)
        x, _ = kernels.add_rms_norm(x, residual, self.weights.norm, self.config.norm_eps)
        return Forwarded(functional.linear(x, self.weights.head).float(), tuple(ran))

    def _write(self, index: int, qkv: Tensor, rows: Rows, pool: KVPool) -> Tensor:
        heads = self.config.heads
        return kernels.rope_write(qkv, rows.cos, rows.sin, rows.slots, pool.k[index], pool.v[index], heads)

    def _narrow(self, kept: Kept, x: Tensor, residual: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Rows]:
        return x[kept.rows], residual[kept.rows], rows.narrow(kept.rows, kept.cu, self.dtype)

    def _attend_and_mix(
        self, index: int, layer: LayerWeights, q: Tensor, residual: Tensor, rows: Rows, pool: KVPool
    ) -> tuple[Tensor, Tensor]:
        attended = kernels.paged_attention(q, pool.k[index], pool.v[index], rows.attention)
        x = functional.linear(attended.flatten(1), layer.out, layer.out_bias)
        x, residual = kernels.add_rms_norm(x, residual, layer.post_norm, self.config.norm_eps)
        gated = kernels.silu_mul(functional.linear(x, layer.gate_up, layer.gate_up_bias))
        return functional.linear(gated, layer.down, layer.down_bias), residual


def _sampled_rows(rows: Rows, sample: Sequence[bool]) -> Kept | None:
    """The last row of each sampled sequence, or None where those are all the rows."""
    last = [end - 1 for end, wanted in zip(rows.cu[1:], sample, strict=True) if wanted]
    if len(last) == rows.cu[-1]:
        return None
    cu = [0]
    for wanted in sample:
        cu.append(cu[-1] + bool(wanted))
    return Kept(torch.tensor(last, dtype=torch.int64, device=rows.positions.device), tuple(cu), write_all=True)


def load_model(config: EngineConfig, progress: Progress | None = None) -> Model:
    """The model of an engine. Raises ConfigError or WeightsError."""
    directory = Path(config.model)
    shape = ModelConfig.from_hf(directory)
    device = torch.device(config.device)
    dtype = _dtype(config, shape, device)
    context = config.max_context or shape.max_context
    if context > shape.max_context:
        raise ConfigError("max_context", f"{context} is above the model's own {shape.max_context}")
    weights = load_weights(directory, shape, dtype, device, progress)
    return Model(shape, weights, context, fingerprint(directory, shape, dtype))


def _dtype(config: EngineConfig, shape: ModelConfig, device: torch.device) -> torch.dtype:
    name = config.dtype
    if name == "auto":
        return torch.float32 if device.type == "cpu" else _DTYPES.get(shape.dtype, torch.bfloat16)
    return _DTYPES[name]
