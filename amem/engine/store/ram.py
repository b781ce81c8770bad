"""The RAM tier: one buffer per chunk, laid out like a file's payload, overwritten before it is given back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from amem.engine.batch import ChunkKV
from amem.engine.store.config import ChunkLayout, StoreError


@dataclass(frozen=True, slots=True)
class RamBlock:
    """data: [layers, 2, tokens, kv_heads, head_dim] in the KV dtype, contiguous.  prior: [tokens] float32 or None."""

    data: torch.Tensor
    prior: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.prior is None else self.prior.nbytes)

    @property
    def kv(self) -> ChunkKV:
        """Views, not copies."""
        return ChunkKV(self.data[:, 0], self.data[:, 1], self.prior)

    def payload(self) -> memoryview:
        return self.data.view(-1).view(torch.uint8).numpy().data

    def prior_bytes(self) -> bytes:
        return b"" if self.prior is None else self.prior.numpy().tobytes()

    def finite(self) -> bool:
        low, high = torch.aminmax(self.data)
        whole = bool(torch.isfinite(low) & torch.isfinite(high))
        return whole and (self.prior is None or bool(torch.isfinite(self.prior).all()))

    def erase(self) -> None:
        self.data.zero_()
        if self.prior is not None:
            self.prior.zero_()


def copy_block(kv: ChunkKV, layout: ChunkLayout, tokens: int) -> RamBlock:
    """A block of its own with the bytes of `kv`. Raises StoreError when shape or dtype are not the layout's."""
    shape = (layout.layers, tokens, layout.kv_heads, layout.head_dim)
    for name, tensor in (("k", kv.k), ("v", kv.v)):
        if tuple(tensor.shape) != shape or tensor.dtype != layout.dtype:
            raise StoreError(
                f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, the store keeps {shape} of {layout.dtype}"
            )
    if kv.prior is not None and (tuple(kv.prior.shape) != (tokens,) or kv.prior.dtype != torch.float32):
        raise StoreError(
            f"prior is {tuple(kv.prior.shape)} of {kv.prior.dtype}, expected ({tokens},) of torch.float32"
        )
    # An inference tensor could not be overwritten later by a thread that is not in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        data = torch.empty(layout.shape(tokens), dtype=layout.dtype)
        data[:, 0].copy_(kv.k)
        data[:, 1].copy_(kv.v)
        prior = None if kv.prior is None else torch.empty(tokens).copy_(kv.prior)
    return RamBlock(data, prior)
