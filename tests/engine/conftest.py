"""Small random Llama checkpoints, and runners on them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from amem.engine.config import EngineConfig
from amem.engine.model import load_model
from amem.engine.runner import Runner

sys.path.insert(0, str(Path(__file__).parent))

MakeCheckpoint = Callable[..., Path]
MakeRunner = Callable[..., Runner]

SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Saves a random model, strongly enough initialised that positions and contexts show in its logits."""
    logging.disable_progress_bar()

    def make(seed: int = 0, **overrides: Any) -> Path:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **overrides}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        directory = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint()


@pytest.fixture(scope="session")
def make_runner() -> MakeRunner:
    def make(directory: Path, **options: Any) -> Runner:
        config = EngineConfig(model=str(directory), **{"num_pages": 128, **options})
        return Runner(config, load_model(config))

    return make


@pytest.fixture
def runner(checkpoint: Path, make_runner: MakeRunner) -> Runner:
    """The default shape in float32, with fresh pages."""
    return make_runner(checkpoint)
