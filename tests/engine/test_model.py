"""Logits and greedy tokens equal those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import amem
from amem.engine.batch import Batch, SequenceRows
from amem.engine.config import ConfigError, EngineConfig
from amem.engine.model import load_model
from amem.engine.runner import Runner

Make = Callable[..., Any]
DEMO = Path(amem.__file__).parent / "models" / "demo"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "group of 1": {"num_key_value_heads": 4},
    "group of 4": {"num_key_value_heads": 1},
    "group of 7": {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56, "head_dim": 32},
    "head of 64": {"head_dim": 64},
    "head of 80": {"head_dim": 80},
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd sizes": {"vocab_size": 37, "intermediate_size": 50, "num_hidden_layers": 1, "rms_norm_eps": 1e-5},
}


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def pair(request: pytest.FixtureRequest, make_checkpoint: Make, make_runner: Make) -> tuple[Runner, LlamaForCausalLM]:
    directory = make_checkpoint(**VARIANTS[request.param])
    return make_runner(directory), LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def greedy(runner: Runner, prompt: list[int], steps: int) -> Iterator[torch.Tensor]:
    """Logits of each step, the argmax of the one before as its only row."""
    table = np.arange(-(-(len(prompt) + steps) // runner.config.page_size))
    ids, done = np.array(prompt), 0
    for _ in range(steps):
        batch = Batch((SequenceRows(ids, np.arange(done, done + len(ids)), table),))
        logits = runner.forward(batch).logits[0]
        done += len(ids)
        ids = np.array([int(logits.argmax())])
        yield logits


def assert_same_greedy(runner: Runner, judge: LlamaForCausalLM, prompt: list[int], steps: int) -> None:
    tokens, seen, cache = torch.tensor([prompt]), [], None
    for logits in greedy(runner, prompt, steps):
        with torch.no_grad():
            out = judge(tokens, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        judged = out.logits[0, -1]
        assert float((logits - judged).abs().max()) < 1e-4
        seen.append(int(logits.argmax()))
        assert seen[-1] == int(judged.argmax())
        tokens = torch.tensor([seen[-1:]])


def test_greedy_over_64_steps_equals_transformers(pair: tuple[Runner, LlamaForCausalLM]) -> None:
    runner, judge = pair
    prompt = np.random.default_rng(3).integers(0, runner.model.config.vocab_size, 75).tolist()
    assert_same_greedy(runner, judge, prompt, 64)


def test_the_bundled_model_equals_transformers(make_runner: Make) -> None:
    runner = make_runner(DEMO)
    judge = LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    prompt = np.random.default_rng(4).integers(0, runner.model.config.vocab_size, 300).tolist()
    assert_same_greedy(runner, judge, prompt, 64)


@pytest.mark.parametrize(("dtype", "floor"), [("bfloat16", 0.15), ("float16", 0.02)])
def test_half_precision_stays_near_float32(checkpoint: Path, make_runner: Make, dtype: str, floor: float) -> None:
    prompt = np.random.default_rng(5).integers(0, 101, 60).tolist()
    wide = next(greedy(make_runner(checkpoint), prompt, 1))
    runner = make_runner(checkpoint, dtype=dtype)
    near = next(greedy(runner, prompt, 1))
    assert runner.pool.data.dtype == getattr(torch, dtype)
    assert near.dtype == torch.float32
    assert 0 < float((near - wide).abs().max()) < floor * float(wide.std())


def test_a_context_beyond_the_models_own_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="max_context: 513 is above"):
        load_model(EngineConfig(model=str(checkpoint), max_context=513))
