"""Muon (Jordan et al., 2024): momentum orthogonalised by Newton-Schulz, for the matrices; AdamW for the rest."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of each matrix in a batch [N, rows, columns], in bf16."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if tall else x).float()


def shared_orthogonalise(g: Tensor) -> Tensor:
    """The same, each worker taking its part of the batch where several train together."""
    if not dist.is_initialized() or g.shape[0] % dist.get_world_size():
        return orthogonalise(g)
    mine = orthogonalise(g.chunk(dist.get_world_size())[dist.get_rank()]).contiguous()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts)


class Muon(torch.optim.Optimizer):
    """Matrices of one shape are orthogonalised as one batch; Nesterov momentum."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                grads = torch.stack([p.grad for p in params])
                state = self.state[params[0]]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(grads)
                buffer = state["momentum"]
                buffer.lerp_(grads, 1 - group["momentum"])
                update = shared_orthogonalise(grads.lerp(buffer, group["momentum"]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, u in zip(params, update, strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).add_(u, alpha=-scale)
