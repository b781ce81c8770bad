"""A GPU that compiles and never runs (triton 3.6 to 3.9).

Inside `compile_only(target)` every `kernel[grid](...)` on meta tensors is compiled for `target`, specialised on its
arguments as at run time, and launches nothing. Not under TRITON_INTERPRET, and one target per process: triton 3.6
keeps state per architecture, and a second target would get worse or broken code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
_NO_DEVICE = 1000  # a number that no real device has: compiled kernels are cached per device


@dataclass(frozen=True)
class Launch:
    """One launch that a GPU would have seen. constants: what the kernel was specialised on."""

    name: str
    grid: tuple[int, ...]
    kernel: Any
    constants: dict[str, Any]


class _Driver:
    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return _NO_DEVICE

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    @staticmethod
    def is_active() -> bool:
        return True


@contextlib.contextmanager
def compile_only(target: str) -> Iterator[list[Launch]]:
    """The launches, in order, filled while the block runs."""
    launches: list[Launch] = []
    shipped, active = JITFunction.run, driver._active

    def run(self: Any, *arguments: Any, grid: Any = None, warmup: bool = False, **options: Any) -> Any:
        kernel = shipped(self, *arguments, grid=grid, warmup=True, **options)
        constants = {name: value for name, value in options.items() if name.isupper()}
        launches.append(Launch(self.fn.__name__, tuple(grid), kernel, constants))
        return kernel

    driver.set_active(_Driver(TARGETS[target]))
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = shipped
        driver._active = active
