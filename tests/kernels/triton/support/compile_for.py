"""Run as `compile_for.py TARGET [SHAPE ...]`: compiles every op through its launch code, one JSON line a kernel."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import machine_code
import torch
from compile_only import compile_only

from amem.kernels import triton as kernels


@dataclass(frozen=True)
class Shape:
    """A model's attention and the batch that meets it."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    hidden: int = 4096
    width: int = 14336
    page: int = 16
    dtype: torch.dtype = torch.bfloat16


SHAPES = {
    "llama8b": Shape(),
    "page64": Shape(page=64),
    "fp16": Shape(dtype=torch.float16),
    "fp32": Shape(dtype=torch.float32),
    "dim64": Shape(heads=32, dim=64, hidden=2048, width=8192),
    "dim80": Shape(heads=32, kv_heads=32, dim=80, hidden=2560, width=6912),
    "dim96": Shape(heads=32, kv_heads=32, dim=96, hidden=3072, width=8192),
    "dim256": Shape(heads=8, kv_heads=1, dim=256, hidden=2048, width=16384),
    "group7": Shape(heads=28, kv_heads=4, hidden=3584, width=18944),
    "demo": Shape(heads=6, kv_heads=2, dim=32, hidden=192, width=512),
}


def launch_all(shape: Shape, rows: int = 8192, sequences: int = 16, context: int = 32768) -> None:
    """Every op once, on meta tensors: prefill, decode (keys split), and one long row set behind a long context."""

    def empty(*sizes: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    long, half = torch.int64, shape.dim // 2
    qkv = empty(rows, shape.heads + 2 * shape.kv_heads, shape.dim)
    cos, sin = empty(rows, half, dtype=torch.float32), empty(rows, half, dtype=torch.float32)
    slots = empty(rows, dtype=long)
    pool = empty(4, 2, context * 4, shape.kv_heads, shape.dim)
    k, v = pool[1, 0], pool[1, 1]
    x = empty(rows, shape.hidden)
    kernels.add_rms_norm(x, None, empty(shape.hidden), 1e-5)
    kernels.add_rms_norm(x, x, empty(shape.hidden), 1e-5)
    kernels.silu_mul(empty(rows, 2 * shape.width))
    kernels.rope_write(qkv, cos, sin, slots, k, v, shape.heads)
    chunk = empty(4, rows, shape.kv_heads, shape.dim)
    kernels.rotate_scatter(chunk, chunk, cos, sin, slots, pool[:, 0], pool[:, 1])
    fresh_k, fresh_v = qkv[:, -2 * shape.kv_heads : -shape.kv_heads], qkv[:, -shape.kv_heads :]
    kernels.deviation(fresh_k, fresh_v, cos, sin, slots, k, v)
    scores = empty(rows, dtype=torch.float32)
    kernels.topk_rows(scores, slots, empty(3, dtype=long), rows // 4)
    table = empty(sequences, context // shape.page, dtype=long)
    for cu_rows in ([0, rows], [*range(sequences + 1)], [0, 100]):
        q = empty(cu_rows[-1], shape.heads, shape.dim)
        plan = kernels.plan_attention(slots[: cu_rows[-1]], cu_rows, table, shape.page, shape.dtype)
        kernels.paged_attention(q, k, v, plan)


def main(target: str, names: list[str]) -> None:
    for name in names:
        with compile_only(target) as launches:
            launch_all(SHAPES[name])
        seen = set()
        for launch in launches:
            if launch.kernel.hash not in seen:
                seen.add(launch.kernel.hash)
                made = machine_code.read(launch.kernel)
                constants = {key: value for key, value in launch.constants.items() if isinstance(value, int)}
                print(
                    "@@" + json.dumps({"shape": name, "kernel": launch.name, "constants": constants, **made}),
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or ["llama8b"])
