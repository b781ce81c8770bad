"""A config is either served as it stands or refused with the field named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amem.engine.config import BlendConfig, ConfigError, EngineConfig, ModelConfig, RopeConfig

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
    "eos_token_id": 7,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read(directory: Path, **overrides: Any) -> ModelConfig:
    values = {**LLAMA, **overrides}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    return ModelConfig.from_hf(directory)


def test_what_config_json_leaves_out_is_derived(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.kv_heads, config.head_dim, config.norm_eps) == (8, 8, 1e-6)
    assert config.rope == RopeConfig("default", 10000.0)
    assert not config.tied_embeddings
    assert config.eos_token_ids == (7,)


def test_generation_config_names_the_ends(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert read(tmp_path).eos_token_ids == (3, 5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rope_theta": 5e5}, RopeConfig("default", 5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}, RopeConfig("linear", 5e5, 4.0)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 64)),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 64)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, RopeConfig("default", 2e4)),
    ],
)
def test_rope_settings_of_both_generations(tmp_path: Path, settings: dict[str, Any], expected: RopeConfig) -> None:
    assert read(tmp_path, **settings).rope == expected


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("model_type", {"model_type": "mixtral"}),
        ("model_type", {"model_type": ...}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("auto_map", {"auto_map": {"AutoModel": "evil.py"}}),
        ("quantization_config", {"quantization_config": {"bits": 4}}),
        ("sliding_window", {"sliding_window": 4096}),
        ("rope_type", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("rope_type", {"rope_scaling": {"rope_type": "longrope"}}),
        ("factor", {"rope_scaling": {"type": "linear"}}),
        ("high_freq_factor", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("rope_parameters", {"rope_scaling": "linear"}),
        ("num_key_value_heads", {"num_key_value_heads": 3}),
        ("head_dim", {"head_dim": 7}),
        ("vocab_size", {"vocab_size": ...}),
        ("hidden_size", {"hidden_size": "64"}),
        ("num_hidden_layers", {"num_hidden_layers": 0}),
        ("num_attention_heads", {"num_attention_heads": 2.5}),
        ("max_position_embeddings", {"max_position_embeddings": True}),
        ("rms_norm_eps", {"rms_norm_eps": float("nan")}),
        ("eos_token_id", {"eos_token_id": ["</s>"]}),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path: Path, field: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, **settings)
    assert error.value.field == field
    assert str(error.value).startswith(field)


def test_dynamic_scaling_is_refused_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no stored key would stay true"):
        read(tmp_path, rope_scaling={"type": "dynamic", "factor": 2.0})


@pytest.mark.parametrize("text", [None, "", "[]", "{", "\xff"])
def test_an_unreadable_config_is_an_error_of_the_model(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(tmp_path)
    assert error.value.field == "model"


@pytest.mark.parametrize(
    ("field", "value"),
    [("dtype", "int8"), ("page_size", 0), ("kv_bytes", 0), ("num_pages", 0), ("max_context", 0), ("ram_bytes", -1)],
)
def test_engine_limits_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig(model="", **{field: value})
    assert error.value.field == field


@pytest.mark.parametrize(("field", "value"), [("share", "row"), ("slope", 1.5), ("preselect", 0.5)])
def test_blend_settings_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        BlendConfig(**{field: value})
    assert error.value.field == field


def test_the_share_of_a_check_is_its_linear_work(tmp_path: Path) -> None:
    config = read(tmp_path, num_key_value_heads=2)
    qkv, out, mlp = 64 * (8 + 4) * 8, 64 * 64, 3 * 64 * 96
    assert config.qkv_share == pytest.approx(qkv / (qkv + out + mlp))
