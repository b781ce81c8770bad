"""What the engine is told: the model's shape, read from a Hugging Face directory, and its own limits. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_UNSET = object()


class ConfigError(ValueError):
    """A model or an option that the engine cannot serve. `field` names the setting at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021); `llama3` is the frequency-wise interpolation of Llama 3.1."""

    kind: Literal["default", "linear", "llama3"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> RopeConfig:
        """From config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`."""
        found = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if not isinstance(found, Mapping):
            raise ConfigError("rope_parameters", f"expected an object, got {found!r}")
        kind = found.get("rope_type", found.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise ConfigError("rope_type", f"{kind!r} {_why_not_rope(str(kind))}; served: default, linear, llama3")
        if found.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
            raise ConfigError("partial_rotary_factor", "only whole heads are rotated by this engine")
        theta = _positive(found, "rope_theta", _positive(values, "rope_theta", 10000.0))
        if kind == "default":
            return cls(theta=theta)
        factor = _positive(found, "factor")
        if kind == "linear":
            return cls("linear", theta, factor)
        low, high = _positive(found, "low_freq_factor"), _positive(found, "high_freq_factor")
        if high <= low:
            raise ConfigError("high_freq_factor", f"must be above low_freq_factor, got {high} and {low}")
        return cls("llama3", theta, factor, low, high, _whole(found, "original_max_position_embeddings"))


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a Llama-family decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    max_context: int
    rope: RopeConfig
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def qkv_heads(self) -> int:
        return self.heads + 2 * self.kv_heads

    @property
    def qkv_share(self) -> float:
        """The share of a layer's linear work that is the QKV projection: what a check costs per row."""
        qkv = self.hidden_size * self.qkv_heads * self.head_dim
        rest = self.hidden_size * (self.heads * self.head_dim + 3 * self.intermediate_size)
        return qkv / (qkv + rest)

    @classmethod
    def from_hf(cls, path: str | Path) -> ModelConfig:
        """Reads config.json (and generation_config.json) of a local directory. Raises ConfigError."""
        directory = Path(path)
        values = _read_json(directory / "config.json")
        _refuse_unsupported(values)
        heads = _whole(values, "num_attention_heads")
        hidden = _whole(values, "hidden_size")
        kv_heads = _whole(values, "num_key_value_heads", heads)
        head_dim = _whole(values, "head_dim", hidden // heads)
        if heads % kv_heads:
            raise ConfigError("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
        if head_dim % 2:
            raise ConfigError("head_dim", f"must be even to be rotated in pairs, got {head_dim}")
        generation = directory / "generation_config.json"
        ends = (_read_json(generation) if generation.is_file() else {}).get(
            "eos_token_id", values.get("eos_token_id")
        )
        return cls(
            vocab_size=_whole(values, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_whole(values, "intermediate_size"),
            layers=_whole(values, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=_positive(values, "rms_norm_eps", 1e-6),
            max_context=_whole(values, "max_position_embeddings"),
            rope=RopeConfig.from_hf(values),
            tied_embeddings=bool(values.get("tie_word_embeddings", False)),
            attention_bias=bool(values.get("attention_bias", False)),
            mlp_bias=bool(values.get("mlp_bias", False)),
            dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32"),
            bos_token_id=values.get("bos_token_id"),
            eos_token_ids=_ids(ends),
        )


@dataclass(frozen=True, slots=True)
class BlendConfig:
    """How recompute budgets are spent.

    share: "global", the best rows of a sequence wherever they lie; "chunk", to each chunk its part.
    slope: gradual filtering starts at (1 + slope) x ratio behind the check and ends at (1 - slope) x ratio.
    preselect: candidates that a prior lets in, as a multiple of the ratio, before deviation filters them.
    write_checked: also write the fresh K and V of rows that a check has measured and then dropped.
    """

    share: Literal["global", "chunk"] = "global"
    slope: float = 0.4
    preselect: float = 2.0
    write_checked: bool = False

    def __post_init__(self) -> None:
        if self.share not in ("global", "chunk"):
            raise ConfigError("share", f"must be 'global' or 'chunk', got {self.share!r}")
        if not 0.0 <= self.slope <= 1.0:
            raise ConfigError("slope", f"must lie in 0 to 1, got {self.slope}")
        if self.preselect < 1.0:
            raise ConfigError("preselect", f"must be at least 1, got {self.preselect}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The engine's limits and budgets.

    model: directory of the checkpoint.  name: what it is served as ("" for the directory's name).
    dtype: float32, bfloat16, float16, or auto (float32 on a CPU, the checkpoint's on a GPU).
    kv_bytes: budget of the paged KV pool; num_pages overrides it.  max_context: None for the model's own.
    kv_dir, ram_bytes, disk_bytes, fsync: the chunk store (kv_dir None: RAM alone; disk_bytes 0:
    nothing is written, but what lies in kv_dir is still erased with its memory).
    """

    model: str
    name: str = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "cpu"
    page_size: int = 16
    kv_bytes: int = 512 << 20
    num_pages: int | None = None
    max_step_tokens: int = 2048
    max_sequences: int = 64
    max_context: int | None = None
    kv_dir: str | None = None
    ram_bytes: int = 512 << 20
    disk_bytes: int = 8 << 30
    fsync: bool = True
    seed: int = 0
    blend: BlendConfig = BlendConfig()

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError("dtype", f"must be auto, float32, bfloat16 or float16, got {self.dtype!r}")
        for field in ("page_size", "kv_bytes", "max_step_tokens", "max_sequences", "num_pages", "max_context"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(field, f"must be at least 1, got {value}")
        for field in ("ram_bytes", "disk_bytes"):
            if getattr(self, field) < 0:
                raise ConfigError(field, f"must not be negative, got {getattr(self, field)}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("model", f"{path} is missing; give the directory of a Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise ConfigError("model", f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError("model", f"{path} is not a JSON object")
    return values


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    if values.get("model_type") != "llama":
        raise ConfigError("model_type", f"{values.get('model_type')!r} is not served; this engine serves 'llama'")
    refused = {
        "auto_map": "the checkpoint brings its own code, which is never run",
        "quantization_config": "quantised weights are not served; convert the checkpoint to safetensors in bf16",
        "sliding_window": "windowed attention is not served: a chunk's KV would not hold what lies outside it",
    }
    for field, reason in refused.items():
        if values.get(field):
            raise ConfigError(field, reason)
    if values.get("hidden_act", "silu") != "silu":
        raise ConfigError("hidden_act", f"{values['hidden_act']!r} is not served; only 'silu' is")


def _why_not_rope(kind: str) -> str:
    if kind == "dynamic":
        return "changes the frequencies with the prompt's length, so no stored key would stay true"
    return "is not served"


def _positive(values: Mapping[str, Any], field: str, default: Any = _UNSET) -> float:
    value = values.get(field)
    if value is None and default is not _UNSET:
        return float(default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConfigError(field, f"must be a positive number, got {value!r}")
    return float(value)


def _whole(values: Mapping[str, Any], field: str, default: Any = _UNSET) -> int:
    value = _positive(values, field, default)
    if value != int(value):
        raise ConfigError(field, f"must be a whole number, got {value!r}")
    return int(value)


def _ids(value: Any) -> tuple[int, ...]:
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) for item in found):
        raise ConfigError("eos_token_id", f"must be an id or a list of ids, got {value!r}")
    return tuple(found)
