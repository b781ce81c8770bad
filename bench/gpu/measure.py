"""Times on a GPU, and the machine's own peaks that they are held against."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from triton import testing

QUANTILES = (0.5, 0.2, 0.8)
COPY_BYTES = 2 << 30
MATMUL_SIDE = 8192


@dataclass(frozen=True)
class Seconds:
    """Median, 20th and 80th percentile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Peaks:
    """copy: bytes read and written per second.  matmul: bf16 floating-point operations per second."""

    copy: float
    matmul: float


def timed(run: Callable[[], object], milliseconds: int = 300) -> Seconds:
    """On the device's clock, the L2 cache flushed before every run, the first runs not counted."""
    found = testing.do_bench(run, warmup=50, rep=milliseconds, quantiles=list(QUANTILES))
    return Seconds(*(value / 1e3 for value in found))


def peaks() -> Peaks:
    """A copy of 2 GiB and a square matmul: what this card gives to code that is not ours."""
    return Peaks(_copy_peak(), _matmul_peak())


def _copy_peak() -> float:
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / timed(lambda: target.copy_(source)).median


def _matmul_peak() -> float:
    left, right = (torch.randn(MATMUL_SIDE, MATMUL_SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * MATMUL_SIDE**3 / timed(lambda: left @ right).median


def machine() -> dict[str, str | None]:
    """What the figures belong to. `gpu` is None where there is none."""
    has_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "driver": _driver() if has_gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
