"""Gates of the bundled model in plain torch: python -m bench.train_model.evaluate [--model DIR] [--questions N].

Per task, on held-out words: accuracy of full prefill, of context-free reuse (each chunk's KV computed behind the
trusted prefix alone, keys rotated to their place in the prompt), and after recomputing 15 % of the memory rows,
chosen at random or by an oracle that knows the full prefill's KV. The question is always computed.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from amem.bench.world import CROSS_CHUNK_TASKS, GATE, TASKS, Example, examples
from bench.train_model.make_tokenizer import DEMO
from bench.train_model.model import Shape, rope_tables, rotate
from bench.train_model.prompts import Encoder, Prompt

METHODS = ("full", "reuse", "random", "oracle_layer1", "oracle_all")


@dataclass(frozen=True)
class Cache:
    """Per layer: unrotated keys and values, fp32 [T, kv_heads, head_dim]."""

    keys: list[Tensor]
    values: list[Tensor]


class Model:
    """Forward over chosen rows of a prompt, with an exact position mask and unrotated keys."""

    def __init__(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        self.shape = Shape(
            config["vocab_size"],
            config["hidden_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["head_dim"],
            config["intermediate_size"],
            config["rope_theta"],
            config["rms_norm_eps"],
        )
        self.weights = {k: v.float() for k, v in load_file(directory / "model.safetensors").items()}

    def _rows(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w, s, p = self.weights, self.shape, f"model.layers.{layer}."
        h = F.rms_norm(x, (s.hidden,), w[p + "input_layernorm.weight"], s.eps)
        q, k, v = (F.linear(h, w[f"{p}self_attn.{n}_proj.weight"]) for n in "qkv")
        n = x.shape[0]
        return q.view(n, s.heads, -1), k.view(n, s.kv_heads, -1), v.view(n, s.kv_heads, -1)

    def _rest(self, layer: int, x: Tensor, mixed: Tensor) -> Tensor:
        w, s, p = self.weights, self.shape, f"model.layers.{layer}."
        x = x + F.linear(mixed, w[p + "self_attn.o_proj.weight"])
        h = F.rms_norm(x, (s.hidden,), w[p + "post_attention_layernorm.weight"], s.eps)
        gate, up = (F.linear(h, w[f"{p}mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        return x + F.linear(F.silu(gate) * up, w[p + "mlp.down_proj.weight"])

    @torch.no_grad()
    def forward(self, ids: Tensor, rows: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Logits [R, vocabulary] of rows R (positions into ids [T]); all other rows' KV come from the cache."""
        s, out = self.shape, Cache([], [])
        cos, sin = rope_tables(s, torch.arange(len(ids)))
        x = self.weights["model.embed_tokens.weight"][ids[rows]]
        visible = torch.arange(len(ids))[None] <= rows[:, None]
        for layer in range(s.layers):
            q, k, v = self._rows(layer, x)
            keys = torch.empty(len(ids), *k.shape[1:]) if cache is None else cache.keys[layer].clone()
            values = torch.empty_like(keys) if cache is None else cache.values[layer].clone()
            keys[rows], values[rows] = k, v
            out.keys.append(keys)
            out.values.append(values)
            q, keys = rotate(q, cos[rows], sin[rows]), rotate(keys, cos, sin)
            q, keys, values = (z.transpose(0, 1)[None] for z in (q, keys, values))
            mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, enable_gqa=True)
            x = self._rest(layer, x, mixed[0].transpose(0, 1).reshape(len(rows), -1))
        x = F.rms_norm(x, (s.hidden,), self.weights["model.norm.weight"], s.eps)
        return F.linear(x, self.weights["model.embed_tokens.weight"]), out


def context_free(model: Model, ids: Tensor, prompt: Prompt) -> Cache:
    """KV of every row of the memory as if its chunk stood alone behind the trusted prefix."""
    head = ids[: prompt.prefix]
    _, first = model.forward(head, torch.arange(len(head)))
    parts = [[(k, v)] for k, v in zip(first.keys, first.values, strict=True)]
    for start, end in prompt.chunks:
        alone = torch.cat((head, ids[start:end]))
        _, cache = model.forward(alone, torch.arange(len(alone)))
        for layer, (k, v) in enumerate(zip(cache.keys, cache.values, strict=True)):
            parts[layer].append((k[len(head) :], v[len(head) :]))
    pad = len(ids) - prompt.chunks[-1][1]
    keys = [F.pad(torch.cat([k for k, _ in p]), (0, 0, 0, 0, 0, pad)) for p in parts]
    values = [F.pad(torch.cat([v for _, v in p]), (0, 0, 0, 0, 0, pad)) for p in parts]
    return Cache(keys, values)


def deviation(full: Cache, alone: Cache, layers: range) -> Tensor:
    """Squared distance of keys and values per row, each layer scaled to mean 1: [T]."""
    total = torch.zeros(full.keys[0].shape[0])
    for layer in layers:
        for a, b in ((full.keys, alone.keys), (full.values, alone.values)):
            d = (a[layer] - b[layer]).square().sum((1, 2))
            total += d / d.mean().clamp_min(1e-9)
    return total


def answers(model: Model, prompt: Prompt, share: float, rng: random.Random) -> dict[str, bool]:
    """Whether each method greedily gives the first answer, end token included."""
    start, end = prompt.answers[0]
    ids = torch.tensor(prompt.ids[:end])
    begin, stop = prompt.prefix, prompt.chunks[-1][1]
    everything = torch.arange(len(ids))
    logits, full = model.forward(ids, everything)
    alone = context_free(model, ids, prompt)
    budget = max(1, round(share * (stop - begin)))
    picks: dict[str, Tensor] = {
        "reuse": torch.empty(0, dtype=torch.long),
        "random": torch.tensor(sorted(rng.sample(range(begin, stop), budget))),
    }
    for name, layers in (("oracle_layer1", range(1, 2)), ("oracle_all", range(model.shape.layers))):
        score = deviation(full, alone, layers)[begin:stop]
        picks[name] = score.topk(budget).indices.sort().values + begin
    out = {"full": bool((logits[start - 1 : end - 1].argmax(-1) == ids[start:end]).all())}
    for name, pick in picks.items():
        rows = torch.cat((pick, everything[stop:]))
        got, _ = model.forward(ids, rows, alone)
        got = got[len(pick) + start - 1 - stop : len(pick) + end - 1 - stop]
        out[name] = bool((got.argmax(-1) == ids[start:end]).all())
    return out


def held_out_examples(task: str, n: int, seed: int = 7) -> list[Example]:
    return examples(task, "heldout", seed, n, GATE)


def evaluate(directory: Path, questions: int, share: float = 0.15) -> dict[str, dict[str, float]]:
    """Accuracy per task and method on fixed held-out examples."""
    model, encoder, table = Model(directory), Encoder(DEMO), {}
    for task in TASKS:
        rng = random.Random(f"random/{task}")
        right = dict.fromkeys(METHODS, 0)
        for example in held_out_examples(task, questions):
            for name, ok in answers(model, encoder.prompt(example), share, rng).items():
                right[name] += ok
        table[task] = {name: count / questions for name, count in right.items()}
        print(task, table[task], flush=True)
    return table


def gates(table: dict[str, dict[str, float]]) -> dict[str, object]:
    """The gates' figures and whether each holds."""

    def mean(method: str, tasks: tuple[str, ...]) -> float:
        return sum(table[t][method] for t in tasks) / len(tasks)

    passing = tuple(t for t in TASKS if table[t]["full"] >= 0.9)
    cross = tuple(t for t in CROSS_CHUNK_TASKS if t in passing)
    oracle = max(("oracle_layer1", "oracle_all"), key=lambda m: mean(m, cross) if cross else 0.0)
    loss = mean("full", cross) - mean("reuse", cross) if cross else 0.0
    gain = mean(oracle, cross) - mean("random", cross) if cross else 0.0
    return {
        "overall": mean("full", TASKS),
        "passing": passing,
        "not_passing": tuple(t for t in TASKS if t not in passing),
        "reuse_loss": loss,
        "oracle": oracle,
        "oracle_gain": gain,
        "holds": mean("full", TASKS) >= 0.95 and len(passing) == len(TASKS) and loss >= 0.2 and gain >= 0.1,
    }


def markdown(table: dict[str, dict[str, float]], summary: dict[str, object], note: str) -> str:
    lines = [f"# Evaluation of the bundled model\n\n{note}\n", "| task | " + " | ".join(METHODS) + " |"]
    lines.append("|---" * (len(METHODS) + 1) + "|")
    for task, row in table.items():
        mark = "*" if task in CROSS_CHUNK_TASKS else ""
        lines.append(f"| {task}{mark} | " + " | ".join(f"{row[m]:.3f}" for m in METHODS) + " |")
    lines.append("\n\\* needs one chunk to be read in the light of another.\n")
    lines += [f"- {name}: {value}" for name, value in summary.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "evaluation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.time()
    table = evaluate(args.model, args.questions)
    summary = gates(table)
    note = f"{args.questions} held-out questions per task, fp32, 15 % recomputed, {time.time() - clock:.0f} s."
    args.out.with_suffix(".json").write_text(json.dumps({"tasks": table, "gates": summary}, indent=2) + "\n")
    args.out.with_suffix(".md").write_text(markdown(table, summary, note))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
