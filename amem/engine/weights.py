"""Weights from safetensors files, fused as the forward wants them; and the fingerprint of what shapes the KV."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from amem.engine.config import ModelConfig

KV_LAYOUT_VERSION = 1
_HASH_BLOCK = 4 << 20

Progress = Callable[[int, int], None]


class WeightsError(ValueError):
    """A checkpoint that does not hold what its config says."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Matrices are [out, in]; qkv stacks queries, keys, values; gate_up stacks gate, up."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Weights:
    """embedding, head: [vocab, hidden] (one tensor where they are tied).  norm: [hidden]."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor

    @property
    def nbytes(self) -> int:
        parts = [self.embedding, self.norm, self.head]
        for layer in self.layers:
            parts.extend(part for field in fields(layer) if (part := getattr(layer, field.name)) is not None)
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in parts}.values())


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, in order of name. Raises WeightsError; never opens a pickle."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        return (directory / "model.safetensors",)
    if not index.is_file():
        raise WeightsError(f"{directory} has neither model.safetensors nor {index.name}; only safetensors are read")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is not a weight index: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (directory / name).is_file():
            raise WeightsError(f"{index} names {name!r}, which is not a file of {directory}")
    return tuple(directory / name for name in names)


def fingerprint(directory: Path, config: ModelConfig, dtype: torch.dtype) -> str:
    """Hex digest of everything that changes a chunk's KV bytes or their meaning.

    Contents of the weight files, the shape and RoPE settings, compute and KV dtype, layout version.
    """
    digest = xxhash.xxh3_128()
    for path in weight_files(directory):
        with path.open("rb") as file:
            while block := file.read(_HASH_BLOCK):
                digest.update(block)
        digest.update(b"\0end of file\0")
    unrelated = {"max_context", "dtype", "bos_token_id", "eos_token_ids"}
    shape = {name: value for name, value in asdict(config).items() if name not in unrelated}
    digest.update(json.dumps([KV_LAYOUT_VERSION, str(dtype), shape], sort_keys=True).encode())
    return digest.hexdigest()


def load_weights(
    directory: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
) -> Weights:
    """Maps the files and builds the fused matrices. Raises WeightsError naming every tensor missing or unexpected.

    progress: called with (bytes done, bytes in all) after each tensor.
    """
    try:
        source = _Checkpoint(weight_files(directory), dtype, device, progress)
        source.compare(set(_expected(config)))
        layers = tuple(_layer(source, f"model.layers.{index}.", config) for index in range(config.layers))
        embedding = source.take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        norm = source.take("model.norm.weight", (config.hidden_size,))
        tied = config.tied_embeddings
        head = embedding if tied else source.take("lm_head.weight", (config.vocab_size, config.hidden_size))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"the weights in {directory} cannot be read: {error}") from error
    if progress is not None:
        progress(source.total, source.total)
    return Weights(embedding, layers, norm, head)


class _Checkpoint:
    """Tensors by name over the files of a checkpoint."""

    def __init__(
        self, files: tuple[Path, ...], dtype: torch.dtype, device: torch.device, progress: Progress | None
    ) -> None:
        self._handles: list[Any] = [safe_open(path, framework="pt") for path in files]
        self._where = {name: handle for handle in self._handles for name in sorted(handle.keys())}
        self._dtype, self._device = dtype, device
        self._progress = progress
        self._done, self.total = 0, sum(path.stat().st_size for path in files)

    def compare(self, expected: set[str]) -> None:
        found = {name for name in self._where if not name.endswith("rotary_emb.inv_freq")}
        missing, unexpected = sorted(expected - found), sorted(found - expected - {"lm_head.weight"})
        if missing or unexpected:
            raise WeightsError(
                f"the checkpoint does not fit its config.json: missing {missing or 'nothing'}, "
                f"unexpected {unexpected or 'nothing'}"
            )

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor on the device; no copy is made where dtype and device are already right."""
        tensor: Tensor = self._where[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise WeightsError(f"{name} has shape {tuple(tensor.shape)}, config.json says {shape}")
        self._done += tensor.nbytes
        if self._progress is not None:
            self._progress(min(self._done, self.total), self.total)
        return tensor.to(device=self._device, dtype=self._dtype)

    def stack(self, names: list[str], shapes: list[tuple[int, ...]]) -> Tensor:
        """The tensors one above the other in one allocation."""
        total = sum(shape[0] for shape in shapes)
        out = torch.empty((total, *shapes[0][1:]), dtype=self._dtype, device=self._device)
        for part, name, shape in zip(torch.split(out, [shape[0] for shape in shapes]), names, shapes, strict=True):
            part.copy_(self.take(name, shape))
        return out


def _layer(source: _Checkpoint, prefix: str, config: ModelConfig) -> LayerWeights:
    hidden, wide = config.hidden_size, config.intermediate_size
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    qkv, qkv_rows = [f"{attention}{name}_proj." for name in "qkv"], [q, kv, kv]
    gate_up, gate_up_rows = [f"{mlp}gate_proj.", f"{mlp}up_proj."], [wide, wide]

    def fused(names: list[str], rows: list[int], biased: bool) -> tuple[Tensor, Tensor | None]:
        weight = source.stack([f"{name}weight" for name in names], [(count, hidden) for count in rows])
        bias = source.stack([f"{name}bias" for name in names], [(count,) for count in rows]) if biased else None
        return weight, bias

    qkv_weight, qkv_bias = fused(qkv, qkv_rows, config.attention_bias)
    gate_up_weight, gate_up_bias = fused(gate_up, gate_up_rows, config.mlp_bias)
    return LayerWeights(
        input_norm=source.take(f"{prefix}input_layernorm.weight", (hidden,)),
        qkv=qkv_weight,
        qkv_bias=qkv_bias,
        out=source.take(f"{attention}o_proj.weight", (hidden, q)),
        out_bias=source.take(f"{attention}o_proj.bias", (hidden,)) if config.attention_bias else None,
        post_norm=source.take(f"{prefix}post_attention_layernorm.weight", (hidden,)),
        gate_up=gate_up_weight,
        gate_up_bias=gate_up_bias,
        down=source.take(f"{mlp}down_proj.weight", (hidden, wide)),
        down_bias=source.take(f"{mlp}down_proj.bias", (hidden,)) if config.mlp_bias else None,
    )


def _expected(config: ModelConfig) -> Iterator[str]:
    yield "model.embed_tokens.weight"
    yield "model.norm.weight"
    if not config.tied_embeddings:
        yield "lm_head.weight"
    for index in range(config.layers):
        prefix = f"model.layers.{index}."
        yield f"{prefix}input_layernorm.weight"
        yield f"{prefix}post_attention_layernorm.weight"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}self_attn.{name}.weight"
            if config.attention_bias:
                yield f"{prefix}self_attn.{name}.bias"
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield f"{prefix}mlp.{name}.weight"
            if config.mlp_bias:
                yield f"{prefix}mlp.{name}.bias"
