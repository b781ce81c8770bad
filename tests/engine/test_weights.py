"""A checkpoint is loaded whole and named, or refused with the tensors at fault."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amem.engine.config import ModelConfig, RopeConfig
from amem.engine.weights import Weights, WeightsError, fingerprint, load_weights

CPU = torch.device("cpu")


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(directory, ModelConfig.from_hf(directory), dtype, CPU)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def test_matrices_are_fused_in_order(checkpoint: Path) -> None:
    raw = load_file(checkpoint / "model.safetensors")
    layer = load(checkpoint).layers[2]
    prefix = "model.layers.2."
    qkv = torch.cat([raw[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"])
    gate_up = torch.cat([raw[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")])
    assert torch.equal(layer.qkv, qkv)
    assert torch.equal(layer.gate_up, gate_up)
    assert torch.equal(layer.down, raw[f"{prefix}mlp.down_proj.weight"])


def test_shards_equal_one_file(copy: Path) -> None:
    whole = load(copy)
    raw = load_file(copy / "model.safetensors")
    names = sorted(raw)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: raw[name] for name in part}, copy / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").unlink()
    sharded = load(copy)
    assert torch.equal(whole.head, sharded.head)
    assert all(torch.equal(a.qkv, b.qkv) for a, b in zip(whole.layers, sharded.layers, strict=True))


def test_tied_embeddings_are_one_tensor(make_checkpoint: Callable[..., Path]) -> None:
    directory = make_checkpoint(tie_word_embeddings=True)
    weights = load(directory)
    assert weights.head.data_ptr() == weights.embedding.data_ptr()
    parts = [p for layer in weights.layers for p in dataclasses.astuple(layer) if p is not None]
    assert weights.nbytes == weights.embedding.nbytes + weights.norm.nbytes + sum(p.nbytes for p in parts)


def test_missing_and_unexpected_tensors_are_named(copy: Path) -> None:
    raw = load_file(copy / "model.safetensors")
    raw["model.layers.9.mlp.extra.weight"] = raw.pop("model.layers.1.mlp.down_proj.weight")
    save_file(raw, copy / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"missing .*layers\.1\.mlp\.down_proj.*unexpected .*layers\.9\.mlp\.extra"
    ):
        load(copy)


def test_a_wrong_shape_is_named(copy: Path) -> None:
    raw = load_file(copy / "model.safetensors")
    raw["model.norm.weight"] = torch.ones(63)
    save_file(raw, copy / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.norm\.weight has shape \(63,\), config\.json says \(64,\)"):
        load(copy)


def test_pickles_are_never_opened(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="only safetensors"):
        load(copy)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "absent.safetensors", 3])
def test_an_index_never_leads_out_of_the_directory(copy: Path, name: object) -> None:
    (copy / "model.safetensors").rename(copy.parent / "model.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(WeightsError, match="not a file of"):
        load(copy)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_an_error(copy: Path, text: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match="not a weight index"):
        load(copy)


@pytest.mark.parametrize("size", [0, 7, 5000])
def test_a_truncated_file_is_an_error(copy: Path, size: int) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:size])
    with pytest.raises(WeightsError, match="cannot be read"):
        load(copy)


def test_progress_rises_to_the_total(checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = ModelConfig.from_hf(checkpoint)
    load_weights(checkpoint, config, torch.bfloat16, CPU, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == ((checkpoint / "model.safetensors").stat().st_size,) * 2
    assert len(seen) > 10


def test_the_fingerprint_follows_what_shapes_the_kv(copy: Path) -> None:
    config = ModelConfig.from_hf(copy)
    seen = {fingerprint(copy, config, torch.float32)}
    seen.add(fingerprint(copy, config, torch.bfloat16))
    seen.add(fingerprint(copy, dataclasses.replace(config, rope=RopeConfig("linear", 1e4, 2.0)), torch.float32))
    seen.add(fingerprint(copy, dataclasses.replace(config, norm_eps=1e-5), torch.float32))
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    seen.add(fingerprint(copy, config, torch.float32))
    assert len(seen) == 5


def test_the_fingerprint_ignores_what_does_not(copy: Path) -> None:
    config = ModelConfig.from_hf(copy)
    other = dataclasses.replace(config, max_context=64, eos_token_ids=(9,), dtype="float16")
    assert fingerprint(copy, config, torch.float32) == fingerprint(copy, other, torch.float32)
