"""Makes Triton's CPU interpreter strict enough to prove kernels with (triton 3.6 to 3.9).

As shipped it is silently wrong for bf16 and fp8, truncates when it casts down, and reads and writes raw addresses.
`install` repairs the arithmetic and refuses what a GPU would punish: an access outside every tensor argument, two
programs (or two lanes) that store to one address, a reduction over bits that numpy cannot add, a failed assert.

What still goes unseen: an access that lands in the wrong tensor argument, gaps inside a strided view, races between
reads and writes, atomics, anything about memory order (programs run one after another).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_FP8 = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}
_STORE_SAMPLE_BYTES = 16


class OutOfBounds(RuntimeError):
    """A lane loads or stores outside every tensor argument of its kernel."""


class Race(RuntimeError):
    """Two lanes of one store, or two programs of one launch, store to the same address."""


def install() -> None:
    """Once per process, after TRITON_INTERPRET is set and before any kernel runs."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "strict", False):
        return
    builder.strict = True
    _repair_arithmetic(builder)
    _repair_range()
    _refuse_soft_reductions()
    _watch_memory(builder)
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, debug=True)


def _soft(kind: Any) -> bool:
    """Types that numpy has no arithmetic for."""
    kind = kind.scalar
    return kind == tl.bfloat16 or kind.name in _FP8


def _widen(data: Any, kind: Any) -> Any:
    kind = kind.scalar
    if kind == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    if kind.name in _FP8:
        return torch.from_numpy(np.ascontiguousarray(data.view(np.uint8))).view(_FP8[kind.name]).float().numpy()
    return data.astype(np.float32)


def _round(x: Any, kind: Any) -> Any:
    """float32 to `kind`, to nearest even."""
    kind = kind.scalar
    if kind == tl.bfloat16:
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1).astype(np.uint32)) >> np.uint32(16)
        return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)
    if kind.name in _FP8:
        wide = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
        return wide.to(_FP8[kind.name]).view(torch.uint8).numpy()
    return x.astype(interpreter._get_np_dtype(kind))


def _repair_arithmetic(builder: Any) -> None:
    handle = interpreter.TensorHandle
    shipped_cast, shipped_binary, shipped_unary = builder.cast_impl, builder.binary_op, builder.unary_op

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if a.dtype.is_floating():
            product = np.matmul(_widen(a.data, a.dtype), _widen(b.data, b.dtype))
        else:
            product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(np.int32)
        return handle(product + d.data, d.dtype.scalar)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        old, new = source.dtype.scalar, target.scalar
        if old == new:
            return source
        if _soft(old) or (_soft(new) and old.is_floating()):
            wide = _widen(source.data, old) if old.is_floating() and old != tl.float64 else source.data
            if new.is_floating() and new != tl.float64:
                return handle(_round(wide, new), new)
            return handle(wide.astype(interpreter._get_np_dtype(new)), new)
        if _soft(new):
            return handle(_round(source.data.astype(np.float32), new), new)
        return shipped_cast(self, source, target)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (left.dtype.is_floating() and _soft(left.dtype)):
            return shipped_binary(self, left, right, op)
        result = op(_widen(left.data, left.dtype), _widen(right.data, right.dtype))
        if result.dtype == np.bool_:
            return handle(result, tl.int1)
        return handle(_round(result, left.dtype), left.dtype.scalar)

    def unary_op(self: Any, value: Any, op: Any) -> Any:
        if not (value.dtype.is_floating() and _soft(value.dtype)):
            return shipped_unary(self, value, op)
        return handle(_round(op(_widen(value.data, value.dtype)), value.dtype), value.dtype.scalar)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.binary_op, builder.unary_op = binary_op, unary_op
    builder.create_fp_to_fp = lambda self, source, target, rounding: cast_impl(self, source, target)


def _repair_range() -> None:
    """numpy 2.4 no longer turns an array of one into an index, which `range(0, scalar)` of triton 3.6 relies on."""
    shipped = interpreter._patch_lang_tensor

    def index(tensor: Any) -> int:
        return int(tensor.handle.data.reshape(-1)[0])

    def patch(tensor: Any, *scope: Any) -> None:
        shipped(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patch


def _refuse_soft_reductions() -> None:
    shipped = interpreter.ReduceScanOpInterface.check_tensor

    def check_tensor(self: Any, values: Any) -> Any:
        for value in values:
            if isinstance(value, tl.core.tensor) and value.dtype.is_floating() and _soft(value.dtype):
                raise TypeError("a reduction of bf16 or fp8 would run on raw bits here; cast to fp32 first")
        return shipped(self, values)

    interpreter.ReduceScanOpInterface.check_tensor = check_tensor


class _Launch:
    """Where the tensor arguments of one launch lie, and which program stored where."""

    def __init__(self, named: list[tuple[str, Any]]) -> None:
        spans = sorted(_span(name, tensor) for name, tensor in named if tensor.numel())
        merged: list[tuple[int, int, str]] = []
        for start, end, name in spans:
            if merged and start < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]), f"{merged[-1][2]}|{name}")
            else:
                merged.append((start, end, name))
        self.starts = np.array([start for start, _, _ in merged], np.uint64)
        self.ends = np.array([end for _, end, _ in merged], np.uint64)
        self.names = [name for _, _, name in merged]
        self.writers: dict[int, Any] = {}

    def check(self, program: Any, pointers: Any, mask: Any, kind: str) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if addresses.size == 0:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        near = np.searchsorted(self.starts, addresses, side="right") - 1
        bad = (near < 0) | (addresses + np.uint64(size) > self.ends[np.maximum(near, 0)])
        if bad.any():
            name = self.names[max(int(near[bad][0]), 0)]
            raise OutOfBounds(f"program {program}: {kind} out of bounds in {int(bad.sum())} lanes, nearest is {name}")
        if kind == "store":
            self._check_race(program, addresses, size)

    def _check_race(self, program: Any, addresses: Any, size: int) -> None:
        if np.unique(addresses).size != addresses.size:
            raise Race(f"program {program} stores twice to one address in one store")
        for address in addresses[:: max(1, _STORE_SAMPLE_BYTES // size)].tolist():
            writer = self.writers.setdefault(address, program)
            if writer != program:
                raise Race(f"programs {writer} and {program} both store to {address}")


def _span(name: str, tensor: torch.Tensor) -> tuple[int, int, str]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size(), name


def _tensors(named: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in named:
        if isinstance(value, tuple):
            flat += _tensors([(f"{name}[{index}]", item) for index, item in enumerate(value)])
        elif isinstance(value, torch.Tensor):
            flat.append((name, value))
    return flat


def _watch_memory(builder: Any) -> None:
    launches: list[_Launch] = []
    shipped_load, shipped_store = builder.create_masked_load, builder.create_masked_store
    executor = interpreter.GridExecutor
    shipped_init = executor._init_args_hst

    def load(self: Any, pointers: Any, mask: Any, other: Any, *args: Any, **options: Any) -> Any:
        launches[-1].check(self.grid_idx, pointers, mask, "load")
        return shipped_load(self, pointers, mask, other, *args, **options)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **options: Any) -> Any:
        launches[-1].check(self.grid_idx, pointers, mask, "store")
        return shipped_store(self, pointers, value, mask, *args, **options)

    def init_args(self: Any, arguments: Any, options: Any) -> Any:
        host, named = shipped_init(self, arguments, options)
        launches[:] = [_Launch(_tensors([*zip(self.arg_names, host, strict=False), *named.items()]))]
        return host, named

    builder.create_masked_load, builder.create_masked_store = load, store
    executor._init_args_hst = init_args
