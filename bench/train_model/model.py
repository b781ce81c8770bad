"""A plain Llama for training: Hugging Face parameter names, eager or compiled blocks, optional attention mask."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

LOGIT_SCALE = 0.2
SLOW_PAIR = 12
SPECIAL_TOKENS = 6
LOW = 9
SHARP = (6.0, 6.0, 4.0, 3.0, 2.0, 2.0)
BROAD = (0.0, 1.0, 3.0, 4.0, 3.0, 2.0)


@dataclass(frozen=True)
class Shape:
    vocabulary: int = 1792
    hidden: int = 192
    layers: int = 12
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 256
    rope_theta: float = 1e6
    eps: float = 1e-5
    context: int = 4096


def rope_tables(shape: Shape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for integer positions [T]: each fp32 [T, 1, head_dim / 2]."""
    half = shape.head_dim // 2
    inverse = shape.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = positions.float()[:, None, None] * inverse
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, T, H, head_dim] by its position's angles, in fp32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        s = shape
        self.shape = s
        self.norm1, self.norm2 = nn.Parameter(torch.ones(s.hidden)), nn.Parameter(torch.ones(s.hidden))
        sizes = {
            "q": (s.heads * s.head_dim, s.hidden),
            "k": (s.kv_heads * s.head_dim, s.hidden),
            "v": (s.kv_heads * s.head_dim, s.hidden),
            "o": (s.hidden, s.heads * s.head_dim),
            "gate": (s.mlp, s.hidden),
            "up": (s.mlp, s.hidden),
            "down": (s.hidden, s.mlp),
        }
        for name, size in sizes.items():
            scale = size[1] ** -0.5 * (0.3 if name in ("o", "down") else 1.0)
            self.register_parameter(name, nn.Parameter(torch.randn(size) * scale))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        """x [B, T, hidden]; bias: additive mask, broadcast to [B, heads, T, T]."""
        s, (b, t, _) = self.shape, x.shape
        h = F.rms_norm(x, (s.hidden,), self.norm1, s.eps)
        weight = torch.cat((self.q, self.k, self.v))
        q, k, v = F.linear(h, weight).split([self.q.shape[0], self.k.shape[0], self.v.shape[0]], -1)
        q = rotate(q.view(b, t, s.heads, s.head_dim), cos, sin).transpose(1, 2)
        k = rotate(k.view(b, t, s.kv_heads, s.head_dim), cos, sin).repeat_interleave(s.heads // s.kv_heads, 2)
        v = v.view(b, t, s.kv_heads, s.head_dim).repeat_interleave(s.heads // s.kv_heads, 2).transpose(1, 2)
        scores = torch.matmul(q, k.permute(0, 2, 3, 1)) * s.head_dim**-0.5
        mixed = torch.matmul((scores + bias).softmax(-1, dtype=torch.float32).to(v.dtype), v)
        x = x + F.linear(mixed.transpose(1, 2).reshape(b, t, -1), self.o)
        h = F.rms_norm(x, (s.hidden,), self.norm2, s.eps)
        gate, up = F.linear(h, torch.cat((self.gate, self.up))).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


class Llama(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Parameter(torch.randn(shape.vocabulary, shape.hidden) * 0.5)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))

    def hidden(self, ids: Tensor, step: Callable[..., Tensor] = Block.forward) -> Tensor:
        """Final hidden states [B, T, hidden] of ids [B, T] under a causal mask."""
        t = ids.shape[1]
        cos, sin = rope_tables(self.shape, torch.arange(t))
        bias = torch.full((t, t), -1e9).triu(1).to(torch.bfloat16)
        x = F.embedding(ids, self.embed)
        for block in self.blocks:
            x = step(block, x, cos, sin, bias)
        return F.rms_norm(x, (self.shape.hidden,), self.norm, self.shape.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed) * LOGIT_SCALE


@torch.no_grad()
def look_back(block: Block, head: int, center: float, gains: tuple[float, ...]) -> None:
    """Make a head's scores a bump around `center` tokens back: sum of gains[i] * cos(f_i * (distance - center))."""
    s = block.shape
    half, start, kv = s.head_dim // 2, head * s.head_dim, head // (s.heads // s.kv_heads) * s.head_dim
    block.q[start : start + s.head_dim] *= 0.1
    block.k[kv : kv + s.head_dim] *= 0.1
    for i, gain in enumerate(gains):
        angle = torch.tensor(s.rope_theta ** (-i / half) * center)
        block.k[kv + i, 0] = 1.0
        block.q[start + i, 0] = gain * torch.cos(angle)
        block.q[start + half + i, 0] = -gain * torch.sin(angle)


@torch.no_grad()
def shape_for_recall(model: Llama, noise: float = 0.3, match: float = 5.0, copy: float = 2.0) -> None:
    """Start near a look-up by several keys, instead of waiting for the phase changes that would find it.

    Tokens live in the first half of the residual stream (coordinate 0 is constant). Heads of the first two layers
    look a fixed distance back and write the previous tokens into the second half: each position then carries a bag
    of the words before it. Heads of layers 3 to 8 compare bags, through the slow half of the rotary pairs that
    barely turn within a context, and copy the token found. In the spirit of mimetic initialisation (Trockman &
    Kolter 2023); everything stays trainable.
    """
    s = model.shape
    half, d, group = s.hidden // 2, s.head_dim, s.heads // s.kv_heads
    part = half // s.kv_heads
    model.embed[:, 0] = 1.0
    model.embed[:, half:] *= 0.1
    model.embed[:SPECIAL_TOKENS, 1:] = 0.0
    model.embed[:SPECIAL_TOKENS, 1:LOW] = torch.randn(SPECIAL_TOKENS, LOW - 1) * 0.5 * (half / LOW) ** 0.5
    slow = [i for i in range(d) if i % (d // 2) >= SLOW_PAIR]
    kernels = (((1.0, SHARP), (2.0, SHARP)), ((3.0, SHARP), (5.5, BROAD)))
    for i, block in enumerate(model.blocks):
        for p in (block.q, block.k, block.v, block.o, block.gate, block.up, block.down):
            p *= noise
        for g in range(s.kv_heads if i < 2 or 3 <= i <= 8 else 0):
            tokens = slice(g * part, (g + 1) * part)
            bag = slice(half + g * part, half + (g + 1) * part)
            rows = torch.arange(g * d, g * d + part)
            block.v[rows, torch.arange(tokens.start, tokens.stop)] += 1.0
            block.v[g * d : (g + 1) * d, : LOW if i < 2 else 1] = 0.0
            for h in range(g * group, (g + 1) * group):
                columns = torch.arange(h * d, h * d + part)
                if i < 2:
                    center, gains = kernels[i][h - g * group]
                    look_back(block, h, center, tuple(gain * (1 + i) for gain in gains))
                    block.o[torch.arange(bag.start, bag.stop), columns] += 0.7
                    continue
                block.o[torch.arange(tokens.start, tokens.stop), columns] += copy / group
                mix = torch.randn(len(slow), half) * (match / half**0.5)
                if h == g * group:
                    block.k[[g * d + j for j in slow], half:] += mix
                    keep = mix
                block.q[[h * d + j for j in slow], half:] += keep
                keep_own = torch.cat((torch.zeros_like(keep[:, :LOW]), 0.7 * keep[:, LOW:]), 1)
                block.q[[h * d + j for j in slow], :half] += keep_own


def export(model: Llama, directory: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (bf16) as a LlamaForCausalLM.

    The logit scale is folded into the final norm, since Llama has none.
    """
    s = model.shape
    state = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm * LOGIT_SCALE}
    attention = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
    for i, block in enumerate(model.blocks):
        prefix = f"model.layers.{i}."
        state[prefix + "input_layernorm.weight"] = block.norm1
        state[prefix + "post_attention_layernorm.weight"] = block.norm2
        for name, target in attention.items():
            state[f"{prefix}self_attn.{target}.weight"] = getattr(block, name)
        for name in ("gate", "up", "down"):
            state[f"{prefix}mlp.{name}_proj.weight"] = getattr(block, name)
    tensors = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in state.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": s.vocabulary,
        "hidden_size": s.hidden,
        "intermediate_size": s.mlp,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "max_position_embeddings": s.context,
        "rms_norm_eps": s.eps,
        "rope_theta": s.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": s.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 5,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 5, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
