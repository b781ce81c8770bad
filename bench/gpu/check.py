"""`python -m bench.gpu.check`: every kernel under the real compiler, against float64. No test runner is needed.

Also the program that compute-sanitizer watches. Exits with 1 if a kernel is wrong, with 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from amem.kernels import reference
from amem.kernels import triton as kernels

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/kernels/triton/support"))

import naive

DEVICE = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
Check = Callable[[torch.dtype], float]


def attention(lengths: list[int], rows: list[int], heads: int, kv_heads: int, dim: int, page: int) -> Check:
    def check(dtype: torch.dtype) -> float:
        paged = naive.pages(lengths, kv_heads, dim, page, dtype, DEVICE)
        chosen = [torch.randperm(length)[:count].sort().values for length, count in zip(lengths, rows, strict=True)]
        cu_rows = [0]
        for found in chosen:
            cu_rows.append(cu_rows[-1] + len(found))
        positions = torch.cat(chosen).to(DEVICE)
        q = torch.randn(cu_rows[-1], heads, dim).to(DEVICE, dtype)
        plan = kernels.plan_attention(positions, cu_rows, paged.block_table, page, dtype)
        out = kernels.paged_attention(q, paged.k_slots, paged.v_slots, plan)
        return naive.worst(out, naive.attention_of(q, positions, cu_rows, paged))

    return check


def cached(rows: int, heads: int, kv_heads: int, dim: int) -> Check:
    """rope_write, rotate_scatter and deviation, each on the pages that the one before has written."""

    def check(dtype: torch.dtype) -> float:
        qkv = torch.randn(rows, heads + 2 * kv_heads, dim).to(dtype)
        cos, sin = naive.angles(torch.randint(0, 100_000, (rows,)), dim)
        slots = torch.randperm(rows + 9)[:rows]
        pool = torch.full((2, rows + 9, kv_heads, dim), float("nan"), dtype=dtype, device=DEVICE)
        given = [tensor.to(DEVICE) for tensor in (cos, sin, slots)]
        q = kernels.rope_write(qkv.to(DEVICE), *given, pool[0], pool[1], heads)
        turned = naive.rotate(qkv, cos, sin)
        k, v = qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        errors = [naive.worst(q, turned[:, :heads]), naive.worst(pool[0].cpu()[slots], turned[:, heads:-kv_heads])]
        kernels.rotate_scatter(v[None].to(DEVICE), k[None].to(DEVICE), *given, pool[:1], pool[1:])
        errors.append(naive.worst(pool[0].cpu()[slots], naive.rotate(v, cos, sin)))
        on_device = qkv.to(DEVICE)
        fresh = (on_device[:, heads : heads + kv_heads], on_device[:, heads + kv_heads :])
        found = kernels.deviation(*fresh, *given, pool[0], pool[1])
        gaps = turned[:, heads:-kv_heads] - pool[0].cpu()[slots].double(), v.double() - k.double()
        wanted = sum(gap.square().sum((1, 2)) for gap in gaps)
        return max(*errors, naive.worst(found.cpu().double() / wanted, torch.ones(rows)))

    return check


def normed(rows: int, width: int) -> Check:
    def check(dtype: torch.dtype) -> float:
        x, residual, weight = (
            torch.randn(rows, width).to(dtype),
            torch.randn(rows, width).to(dtype),
            torch.ones(width),
        )
        found = kernels.add_rms_norm(x.to(DEVICE), residual.to(DEVICE), weight.to(DEVICE, dtype), 1e-5)
        wanted = reference.add_rms_norm(x, residual, weight.to(dtype), 1e-5)
        return max(naive.worst(mine, theirs.double()) for mine, theirs in zip(found, wanted, strict=True))

    return check


def gated(rows: int, width: int) -> Check:
    def check(dtype: torch.dtype) -> float:
        gate_up = torch.randn(rows, 2 * width).to(dtype)
        return naive.worst(kernels.silu_mul(gate_up.to(DEVICE)), reference.silu_mul(gate_up.clone()).double())

    return check


def chosen_rows(rows: int) -> Check:
    def check(dtype: torch.dtype) -> float:
        scores, segments = torch.randint(0, 50, (rows,)).float(), torch.randint(-1, 3, (rows,))
        counts = torch.tensor([rows // 9, 0, rows])
        wanted = naive.topk_rows(scores, segments, counts)
        found = kernels.topk_rows(scores.to(DEVICE), segments.to(DEVICE), counts.to(DEVICE), len(wanted))
        return float(found.tolist() != wanted)

    return check


def checks() -> Iterator[tuple[str, Check]]:
    for heads, kv_heads, dim in ((4, 4, 64), (8, 2, 128), (7, 1, 80), (8, 1, 96), (2, 1, 256), (6, 2, 32)):
        name = f"{heads}/{kv_heads} heads of {dim}"
        yield f"attention, mixed, {name}", attention([90, 33, 250, 700], [1, 33, 40, 1], heads, kv_heads, dim, 16)
        yield f"rope_write, rotate_scatter, deviation, {name}", cached(50, heads, kv_heads, dim)
    for page in (1, 16, 48, 64, 128):
        yield f"attention, pages of {page}", attention([4097, 129], [1, 129], 8, 2, 128, page)
    yield "attention, scattered rows", attention([3000], [450], 8, 2, 128, 16)
    for rows, width in ((1, 1), (3, 500), (70, 4096)):
        yield f"add_rms_norm {rows} x {width}", normed(rows, width)
        yield f"silu_mul {rows} x {width}", gated(rows, width)
    for rows in (1, 1024, 5000):
        yield f"topk_rows {rows}", chosen_rows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [str(dtype).removeprefix("torch.") for dtype in TOLERANCE]
    parser.add_argument("--dtype", choices=names, action="append", help="all three by default")
    chosen = parser.parse_args().dtype or names
    if not torch.cuda.is_available():
        print("No GPU here: nothing was checked.")
        return 2
    wrong = 0
    for name, check in checks():
        for dtype_name in chosen:
            dtype = getattr(torch, dtype_name)
            torch.manual_seed(0)
            error = check(dtype)
            good = error <= TOLERANCE[dtype]
            wrong += not good
            print(f"{'ok   ' if good else 'WRONG'} {error:.1e} {dtype_name:9} {name}", flush=True)
    print(f"{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
