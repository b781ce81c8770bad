"""What the compiler makes of every kernel for chips that are not here, through the launch code that ships."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(1800)  # a compiler of its own for each chip, on cores that others may hold

SUPPORT = Path(__file__).parent / "support"
ROOT = Path(__file__).parents[3]
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")
KERNELS = {
    "_add_rms_norm",
    "_attend",
    "_compact",
    "_deviation",
    "_join",
    "_mend",
    "_rope_write",
    "_rotate_scatter",
    "_silu_mul",
    "_take",
}
OTHER_SHAPES = ("page64", "fp16", "fp32", "dim64", "dim80", "dim96", "dim256", "group7", "demo")
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
LAYERS = 32


@functools.cache
def compiled(script: str, target: str, *arguments: str) -> list[dict[str, Any]]:
    """One process a target: triton 3.6 keeps state per architecture."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{SUPPORT}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(SUPPORT / script), target, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line[2:]) for line in done.stdout.splitlines() if line.startswith("@@")]


def check_fits(kernels: list[dict[str, Any]], target: str) -> None:
    for made in kernels:
        assert made["spills"] == 0, made
        assert made["shared"] <= SHARED_LIMIT[target], made


def check_code(kernels: list[dict[str, Any]], target: str) -> None:
    """The instructions that the tile shapes were chosen for."""
    for made in kernels:
        attention = made["kernel"] in ("_attend", "_mend")
        assert not attention or made["mma"] > 0, made
        if not target.startswith("sm_"):
            continue
        if attention and made["constants"]["QUERIES"] >= 64 and target in ("sm_90", "sm_100"):
            assert made["warp_group_mma"] > 0, made
        if made["kernel"] not in ("_take", "_compact"):
            assert made["global_128"] > 0, made
        if made["kernel"] in ("_add_rms_norm", "_silu_mul"):
            assert made["global_narrow"] == 0, made
        if made["kernel"] in ("_rope_write", "_rotate_scatter", "_deviation"):
            assert made["global_narrow"] <= 4 < made["global_128"], made


@pytest.mark.parametrize("target", TARGETS)
def test_llama_8b_compiles_without_spills(target: str) -> None:
    kernels = compiled("compile_for.py", target, "llama8b")
    assert {made["kernel"] for made in kernels} == KERNELS
    check_fits(kernels, target)
    check_code(kernels, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_other_shapes_compile_without_spills(target: str) -> None:
    kernels = compiled("compile_for.py", target, *OTHER_SHAPES)
    assert {made["shape"] for made in kernels} == set(OTHER_SHAPES)
    check_fits(kernels, target)


def test_an_engine_step_of_llama_8b_launches_what_it_should() -> None:
    """A prefill, a decode and a blend: each kernel as often as the layers ask for, and all of them warmed up."""
    first, *launches = compiled("trace_step.py", "sm_90")
    names = [launch["kernel"] for launch in launches]
    assert names.count("_rope_write") == names.count("_silu_mul") == LAYERS
    assert names.count("_add_rms_norm") == 2 * LAYERS + 1
    assert names.count("_deviation") == names.count("_take") == names.count("_compact") > 0
    assert names.count("_attend") == names.count("_mend") + LAYERS
    assert set(names) == KERNELS - {"_rotate_scatter"}
    assert {launch["hash"] for launch in launches} <= set(first["warmed"])
    for launch in launches:
        assert launch["shared"] <= SHARED_LIMIT["sm_90"], launch
        assert all(isinstance(size, int) and 0 < size < 2**31 for size in launch["grid"]), launch
        assert all(size < 2**16 for size in launch["grid"][1:]), launch


def test_the_checks_see_what_they_should() -> None:
    good = {"kernel": "_attend", "spills": 0, "shared": 0, "mma": 8, "warp_group_mma": 8, "global_128": 9}
    good |= {"constants": {"QUERIES": 128}, "global_narrow": 0}
    check_fits([good], "sm_90")
    check_code([good], "sm_90")
    for fault in ({"spills": 4}, {"shared": 232449}):
        with pytest.raises(AssertionError):
            check_fits([good | fault], "sm_90")
    for fault in ({"warp_group_mma": 0}, {"mma": 0}, {"global_128": 0}, {"kernel": "_silu_mul", "global_narrow": 1}):
        with pytest.raises(AssertionError):
            check_code([good | fault], "sm_90")
