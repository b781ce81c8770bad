"""From logits to the next ids. A draw depends on (seed, position) alone: it is the same in any batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from amem.engine.types import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row of logits is sampled with; `position` is where the new id will stand."""

    params: SamplingParams
    seed: int
    position: int


@dataclass(frozen=True, slots=True)
class Sampled:
    token: int
    logprob: TokenLogprob | None = None


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a function of the two arguments alone (53 bits of BLAKE2b)."""
    counter = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(hashlib.blake2b(counter, digest_size=8).digest(), "little") >> 11) / 2.0**53


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Sampled]:
    """One id per row of `logits` [S, vocab] (finite float32), for the S `draws`.

    Greedy at temperature 0, otherwise by inverse transform over the ids that top_k, top_p and min_p leave, in this
    order. Log-probabilities are those of the model, before temperature and filters.
    """
    tokens = logits.argmax(-1)
    hot = [row for row, draw in enumerate(draws) if draw.params.temperature > 0]
    if hot:
        tokens[hot] = _draw(logits[hot], [draws[row] for row in hot])
    ids = tokens.tolist()
    wanted = [row for row, draw in enumerate(draws) if draw.params.logprobs is not None]
    logprobs = dict(zip(wanted, _logprobs(logits[wanted], wanted, ids, draws), strict=True)) if wanted else {}
    return [Sampled(token, logprobs.get(row)) for row, token in enumerate(ids)]


def _draw(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device).unsqueeze(1)

    vocab = logits.shape[-1]
    heat = column([max(draw.params.temperature, 1e-5) for draw in draws])
    scaled, order = (logits / heat).sort(dim=-1, descending=True, stable=True)
    kept = torch.arange(vocab, device=logits.device) < column([float(d.params.top_k or vocab) for d in draws])
    mass = scaled.masked_fill(~kept, -torch.inf).softmax(-1)
    kept &= mass.cumsum(-1) - mass < column([draw.params.top_p for draw in draws])
    kept &= mass >= mass[:, :1] * column([draw.params.min_p for draw in draws])
    kept[:, 0] = True
    total = mass.masked_fill(~kept, 0.0).double().cumsum(-1)
    points = torch.tensor([[uniform(draw.seed, draw.position)] for draw in draws], dtype=torch.float64)
    rank = torch.searchsorted(total, points.to(logits.device) * total[:, -1:], right=True)
    last = kept.sum(-1, keepdim=True) - 1
    return order.gather(1, torch.minimum(rank, last)).squeeze(1)


def _logprobs(
    logits: torch.Tensor, rows: Sequence[int], tokens: Sequence[int], draws: Sequence[Draw]
) -> list[TokenLogprob]:
    logp = logits.log_softmax(-1)
    count = max(draws[row].params.logprobs or 0 for row in rows)
    top = logp.topk(min(count, logp.shape[-1]))
    values, ids = top.values.tolist(), top.indices.tolist()
    found = []
    for at, row in enumerate(rows):
        best = draws[row].params.logprobs or 0
        chosen = float(logp[at, tokens[row]])
        found.append(TokenLogprob(chosen, tuple(zip(ids[at][:best], values[at][:best], strict=True))))
    return found
