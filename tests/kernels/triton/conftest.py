"""Kernels run on the GPU where there is one, elsewhere in the interpreter, made strict."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "support")]

if triton.knobs.runtime.interpret:
    import strict_interpreter

    strict_interpreter.install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """The same draws in every test, and one thread: more of them fight over the cores with numpy's."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
