"""The paged KV pool."""

from __future__ import annotations

import torch
from torch import Tensor

from amem.engine.config import ModelConfig


class KVPool:
    """KV of every layer in pages, K rotated: one tensor [layers, 2, pages, page_size, kv_heads, head_dim].

    k[layer] and v[layer] are views by slot, [pages * page_size, kv_heads, head_dim].
    """

    def __init__(
        self, model: ModelConfig, layers: int, pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (layers, 2, pages, page_size, model.kv_heads, model.head_dim)
        self.pages = pages
        self.page_size = page_size
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        by_slot = self.data.flatten(2, 3)
        self.k_layers, self.v_layers = by_slot[:, 0], by_slot[:, 1]
        self.k: tuple[Tensor, ...] = tuple(self.k_layers.unbind())
        self.v: tuple[Tensor, ...] = tuple(self.v_layers.unbind())

    @property
    def layers(self) -> int:
        return len(self.k)


def page_bytes(model: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers, K and V."""
    return 2 * model.layers * page_size * model.kv_heads * model.head_dim * dtype.itemsize
