"""Models with random weights on any device, and one batch that holds everything an engine step can hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from amem.engine.batch import Batch, BlendRows, ChunkKV, SequenceRows
from amem.engine.config import EngineConfig, ModelConfig, RopeConfig
from amem.engine.model import Model
from amem.engine.runner import Runner
from amem.engine.weights import LayerWeights, Weights

LLAMA_8B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    max_context=8192,
    rope=RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 8192),
    tied_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    dtype="bfloat16",
    bos_token_id=None,
    eos_token_ids=(),
)
SMALL = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    max_context=512,
    rope=RopeConfig("llama3", 10000.0, 8.0, 1.0, 4.0, 64),
    tied_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    dtype="float32",
    bos_token_id=None,
    eos_token_ids=(),
)


def model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Model:
    """Random weights, strong enough that positions and contexts show in the logits; the same on every device."""
    draws = torch.Generator().manual_seed(1)

    def matrix(*shape: int) -> Tensor:
        if device.type == "meta":
            return torch.empty(*shape, dtype=dtype, device=device)
        return (torch.randn(*shape, generator=draws) / shape[-1] ** 0.5).to(device, dtype)

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm=matrix(config.hidden_size),
            qkv=matrix(config.qkv_heads * config.head_dim, config.hidden_size),
            qkv_bias=None,
            out=matrix(config.hidden_size, config.heads * config.head_dim),
            out_bias=None,
            post_norm=matrix(config.hidden_size),
            gate_up=matrix(2 * config.intermediate_size, config.hidden_size),
            gate_up_bias=None,
            down=matrix(config.hidden_size, config.intermediate_size),
            down_bias=None,
        )

    embedding = matrix(config.vocab_size, config.hidden_size)
    layers = tuple(layer() for _ in range(config.layers))
    weights = Weights(embedding, layers, matrix(config.hidden_size), matrix(config.vocab_size, config.hidden_size))
    return Model(config, weights, config.max_context)


def runner(made: Model, num_pages: int, page_size: int = 16) -> Runner:
    return Runner(EngineConfig(model="", num_pages=num_pages, page_size=page_size), made)


def tables(lengths: Sequence[int], page_size: int = 16) -> list[np.ndarray]:
    """A block table for each sequence, pages in shuffled order."""
    counts = [-(-length // page_size) for length in lengths]
    order = np.random.default_rng(0).permutation(sum(counts))
    edges = np.cumsum([0, *counts])
    return [order[start:stop] for start, stop in pairwise(edges.tolist())]


def mixed_batch(vocab: int, context: int, loaded: int, fresh: int) -> tuple[Batch, list[np.ndarray]]:
    """A prefill of `context` rows, a decode behind as many, a blend of `loaded` rows before `fresh` ones."""
    places = tables([context, context + 1, loaded + fresh])
    ids = np.random.default_rng(1).integers(0, vocab, 2 * context + loaded + fresh + 2)
    blend = BlendRows(
        policy="gradual",
        ratio=0.3,
        candidate=np.arange(loaded + fresh) < loaded,
        chunk=np.where(np.arange(loaded + fresh) < loaded, 0, -1),
    )
    sequences = (
        SequenceRows(ids[:context], np.arange(context), places[0]),
        SequenceRows(ids[context : context + 1], np.array([context]), places[1]),
        SequenceRows(ids[context + 1 :][: loaded + fresh], np.arange(loaded + fresh), places[2], blend=blend),
    )
    return Batch(sequences), places


def stored_chunk(config: ModelConfig, tokens: int, dtype: torch.dtype) -> ChunkKV:
    draws = torch.Generator().manual_seed(2)
    shape = (2, config.layers, tokens, config.kv_heads, config.head_dim)
    k, v = torch.randn(shape, generator=draws).to(dtype)
    return ChunkKV(k, v)
