"""Frequencies are the model's own, to the bit where transformers is the judge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from amem.engine.config import RopeConfig
from amem.engine.rope import angle_tables, inverse_frequencies

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize(
    ("rope", "settings"),
    [
        (RopeConfig("default", 1e4), {"rope_type": "default", "rope_theta": 1e4}),
        (RopeConfig("linear", 5e5, 4.0), {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}),
        (RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 8192), {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}),
    ],
)
def test_angles_equal_transformers(rope: RopeConfig, settings: dict[str, Any], head_dim: int) -> None:
    config = LlamaConfig(hidden_size=head_dim * 2, num_attention_heads=2, rope_parameters=settings)
    judge = LlamaRotaryEmbedding(config)
    cos, sin = angle_tables(rope, head_dim, 20000)
    judged = judge(torch.zeros(1), torch.arange(20000)[None])
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), judge.inv_freq, rtol=1e-6, atol=0)
    # one ulp of frequency is 1e-3 rad at position 20,000, so angles are compared where it is small
    torch.testing.assert_close(cos[:2000], judged[0][0, :2000, : head_dim // 2], rtol=0, atol=3e-4)
    torch.testing.assert_close(sin[:2000], judged[1][0, :2000, : head_dim // 2], rtol=0, atol=3e-4)


def test_llama3_slows_long_waves_and_keeps_short_ones() -> None:
    plain = inverse_frequencies(RopeConfig("default", 5e5), 128)
    scaled = inverse_frequencies(RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 8192), 128)
    assert torch.equal(scaled[:16], plain[:16])
    torch.testing.assert_close(scaled[-16:], plain[-16:] / 8)
    assert bool((scaled.diff() < 0).all())
