"""What is measured: every kernel at Llama 8B sizes, with the bytes or operations that it cannot avoid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional

from amem.kernels import triton as kernels

HEADS, KV_HEADS, DIM, HIDDEN, WIDTH, PAGE = 32, 8, 128, 4096, 14336, 64
DTYPE = torch.bfloat16
ELEMENT = 2
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """bytes, flops: the floor, one of the two.  rival: the same work by torch, None where torch has no such op.

    Targets: share of the machine's own copy or matmul peak; TFLOP/s; time at most as many times that of another case
    at the same TFLOP/s.
    """

    part: str
    name: str
    shape: str
    make: Callable[[], Run]
    bytes: int = 0
    flops: int = 0
    rival: Callable[[], Run] | None = None
    least_share: float | None = None
    least_tflops: float | None = None
    within: tuple[float, str] | None = None


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def angles(rows: int) -> tuple[Tensor, Tensor]:
    turned = torch.rand(rows, DIM // 2, device="cuda") * 6.28
    return turned.cos(), turned.sin()


def rowwise(rows: int) -> list[Case]:
    """Kernels that move each byte once: their floor is the copy of the same bytes."""
    token = ELEMENT * DIM
    qkv_heads = HEADS + 2 * KV_HEADS
    return [
        Case(
            "rowwise",
            "add_rms_norm",
            f"{rows} x {HIDDEN}",
            lambda: _add_rms_norm(rows),
            bytes=4 * rows * HIDDEN * ELEMENT,
            least_share=0.8,
            rival=lambda: _torch_add_rms_norm(rows),
        ),
        Case(
            "rowwise",
            "silu_mul",
            f"{rows} x {WIDTH}",
            lambda: _silu_mul(rows),
            bytes=3 * rows * WIDTH * ELEMENT,
            least_share=0.8,
            rival=lambda: _torch_silu_mul(rows),
        ),
        Case(
            "rowwise",
            "rope_write",
            f"{rows} rows, {HEADS}+{KV_HEADS} heads",
            lambda: _rope_write(rows),
            bytes=rows * (2 * qkv_heads * token + 4 * DIM + 8),
            least_share=0.8,
        ),
        Case(
            "rowwise",
            "rotate_scatter",
            f"{rows} tokens, 8 layers",
            lambda: _rotate_scatter(rows, 8),
            bytes=8 * rows * 4 * KV_HEADS * token + rows * (4 * DIM + 8),
            least_share=0.8,
        ),
        Case(
            "rowwise",
            "deviation",
            f"{rows} rows",
            lambda: _deviation(rows),
            bytes=rows * (4 * KV_HEADS * token + 4 * DIM + 12),
        ),
        Case("rowwise", "topk_rows", f"{rows} rows, 1 segment", lambda: _topk_rows(rows), bytes=rows * 12),
    ]


def attention() -> list[Case]:
    prefill = 8192
    spread, length = ceil(0.15 * 32768), 32768
    causal = prefill * (prefill + 1) // 2
    scattered = int(_scattered(spread, length, "cpu").add(1).sum())
    per_key = 4 * HEADS * DIM
    cache = 2 * KV_HEADS * DIM * ELEMENT
    found = [
        Case(
            "attention",
            "prefill",
            f"{prefill} tokens",
            lambda: _attend([torch.arange(prefill)]),
            flops=per_key * causal,
            rival=lambda: _torch_prefill(prefill),
            least_tflops=400.0,
        ),
        Case(
            "attention",
            "scattered 15%",
            f"{spread} rows of {length}",
            lambda: _attend([_scattered(spread, length, "cpu")]),
            flops=per_key * scattered,
            within=(1.3, "prefill"),
        ),
        Case(
            "attention",
            "question behind memory",
            f"32 rows behind {length}",
            lambda: _attend([torch.arange(length, length + 32)]),
            bytes=length * cache,
        ),
    ]
    for batch, context, least in ((1, 32768, None), (16, 32768, 0.85), (64, 4096, None)):
        found.append(
            Case(
                "attention",
                "decode",
                f"{batch} x {context}",
                lambda batch=batch, context=context: _attend([torch.tensor([context - 1])] * batch),
                bytes=batch * context * cache,
                least_share=least,
                rival=lambda batch=batch, context=context: _torch_decode(batch, context),
            )
        )
    return found


def _add_rms_norm(rows: int) -> Run:
    x, residual, weight = randn(rows, HIDDEN), randn(rows, HIDDEN), randn(HIDDEN)
    return lambda: kernels.add_rms_norm(x, residual, weight, 1e-5)


def _torch_add_rms_norm(rows: int) -> Run:
    x, residual, weight = randn(rows, HIDDEN), randn(rows, HIDDEN), randn(HIDDEN)
    return lambda: functional.rms_norm(x + residual, (HIDDEN,), weight, 1e-5)


def _silu_mul(rows: int) -> Run:
    gate_up = randn(rows, 2 * WIDTH)
    return lambda: kernels.silu_mul(gate_up)


def _torch_silu_mul(rows: int) -> Run:
    gate, up = randn(rows, 2 * WIDTH).chunk(2, -1)
    return lambda: functional.silu(gate) * up


def _pool(slots: int, layers: int = 1) -> Tensor:
    return torch.zeros(layers, 2, ceil(slots / PAGE) * PAGE, KV_HEADS, DIM, device="cuda", dtype=DTYPE)


def _rope_write(rows: int) -> Run:
    pool, qkv, slots = _pool(rows)[0], randn(rows, HEADS + 2 * KV_HEADS, DIM), torch.randperm(rows, device="cuda")
    cos, sin = angles(rows)
    return lambda: kernels.rope_write(qkv, cos, sin, slots, pool[0], pool[1], HEADS)


def _rotate_scatter(rows: int, layers: int) -> Run:
    pool, slots = _pool(rows, layers), torch.randperm(rows, device="cuda")
    k, v = randn(layers, rows, KV_HEADS, DIM), randn(layers, rows, KV_HEADS, DIM)
    cos, sin = angles(rows)
    return lambda: kernels.rotate_scatter(k, v, cos, sin, slots, pool[:, 0], pool[:, 1])


def _deviation(rows: int) -> Run:
    pool, qkv, slots = _pool(rows)[0], randn(rows, HEADS + 2 * KV_HEADS, DIM), torch.randperm(rows, device="cuda")
    cos, sin = angles(rows)
    k, v = qkv[:, HEADS : HEADS + KV_HEADS], qkv[:, HEADS + KV_HEADS :]
    return lambda: kernels.deviation(k, v, cos, sin, slots, pool[0], pool[1])


def _topk_rows(rows: int) -> Run:
    scores, segments = torch.rand(rows, device="cuda"), torch.zeros(rows, dtype=torch.int64, device="cuda")
    counts, total = torch.tensor([rows // 7], device="cuda"), rows // 7
    return lambda: kernels.topk_rows(scores, segments, counts, total)


def _scattered(rows: int, length: int, device: str) -> Tensor:
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    return order[:rows].sort().values.to(device)


def _attend(positions: list[Tensor]) -> Run:
    """Attention over shuffled pages of as many sequences as there are position lists."""
    blocks = [ceil((int(found[-1]) + 1) / PAGE) for found in positions]
    order = torch.randperm(sum(blocks), device="cuda")
    table = torch.zeros(len(blocks), max(blocks), dtype=torch.int64, device="cuda")
    cu_rows, used = [0], 0
    for row, (found, count) in enumerate(zip(positions, blocks, strict=True)):
        table[row, :count] = order[used : used + count]
        used += count
        cu_rows.append(cu_rows[-1] + len(found))
    k = randn(sum(blocks) * PAGE, KV_HEADS, DIM)
    v = randn(sum(blocks) * PAGE, KV_HEADS, DIM)
    q = randn(cu_rows[-1], HEADS, DIM)
    plan = kernels.plan_attention(torch.cat(positions).cuda(), cu_rows, table, PAGE, DTYPE)
    return lambda: kernels.paged_attention(q, k, v, plan)


def _torch_prefill(rows: int) -> Run:
    q, k, v = randn(1, HEADS, rows, DIM), randn(1, KV_HEADS, rows, DIM), randn(1, KV_HEADS, rows, DIM)
    return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _torch_decode(batch: int, context: int) -> Run:
    q = randn(batch, HEADS, 1, DIM)
    k, v = randn(batch, KV_HEADS, context, DIM), randn(batch, KV_HEADS, context, DIM)
    return lambda: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
