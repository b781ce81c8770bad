"""Kernels with one thing wrong in them: each must be stopped, or give an answer that its tests refuse."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import test_add_rms_norm
import test_deviation
import test_paged_attention
import test_rope_write
import test_rotate_scatter
import test_silu_mul
import test_topk_rows
import torch
import triton
from triton.runtime.errors import InterpreterError

from amem.kernels import triton as kernels
from amem.kernels.triton import attention_plan

SOURCES = Path(kernels.__file__).parent
CPU = torch.device("cpu")
ROWS = torch.arange(70, 100)


@dataclass(frozen=True)
class Bug:
    """`old` in FILE.py becomes `new`; `shown_by` is an assertion or an error figure that the op's tests look at."""

    op: str
    old: str
    new: str
    shown_by: Callable[[], float | None]
    file: str = ""


def attend() -> float:
    return test_paged_attention.run([ROWS, torch.tensor([90])], CPU, page=8)


def attend_in_whole_pages() -> float:
    return test_paged_attention.run([ROWS, torch.tensor([90])], CPU, page=64)


def attend_in_parts() -> float:
    return test_paged_attention.run([torch.tensor([130])], CPU, heads=2, kv_heads=1)


def mend() -> float:
    found, wanted, positions = test_paged_attention.poisoned(CPU, 30, float("nan"), False)
    return float((found - wanted)[positions < 30].abs().max())


def scatter() -> float:
    return test_rotate_scatter.run(20, 8, 16, CPU)


def write() -> float:
    return test_rope_write.run(20, 2, 1, 16, CPU)


def deviate() -> float:
    return test_deviation.run(20, 2, 16, CPU)


def choose() -> None:
    test_topk_rows.check(
        torch.randint(0, 3, (1100,)).float(), torch.randint(-1, 2, (1100,)), torch.tensor([99, 7]), CPU
    )


def choose_odd() -> None:
    test_topk_rows.test_scores_of_every_kind(CPU)


def norm() -> None:
    test_add_rms_norm.test_against_float64(500, True, CPU)


def norm_narrow() -> None:
    test_add_rms_norm.test_rounds_where_the_reference_does(4096, torch.bfloat16, CPU)


def gate() -> None:
    test_silu_mul.test_against_float64(5, 1025, CPU)


BUGS = {
    "mask hides a row from itself": Bug("paged_attention", "<= position[:, None]", "< position[:, None]", attend),
    "mask shows one key too many": Bug("paged_attention", "<= position[:, None]", "<= position[:, None] + 1", attend),
    "page stride": Bug("paged_attention", "page * PAGE + at % PAGE", "page * (PAGE + 1) + at % PAGE", attend),
    "page offset": Bug("paged_attention", "page * PAGE + at % PAGE", "page * PAGE + key % PAGE * 0", attend),
    "no tail mask on the table": Bug("paged_attention", "mask=at < stop, other=0)", "mask=at >= 0, other=0)", attend),
    "no tail mask on values": Bug("paged_attention", "here = (at < stop)", "here = (at >= 0)", attend_in_whole_pages),
    "no head offset": Bug(
        "paged_attention",
        "(k + kv_head * DIM, v + kv_head * DIM, k_slot, v_slot, table)\n    found",
        "(k, v, k_slot, v_slot, table)\n    found",
        attend,
    ),
    "query heads of another group": Bug(
        "paged_attention", "lane // GROUP, kv_head", "lane // GROUP, 0 * kv_head", attend
    ),
    "no scale": Bug("paged_attention", "input_precision=precision) * scale", "input_precision=precision)", attend),
    "old sums do not fade": Bug("paged_attention", "found * fade[:, None]", "found", attend),
    "parts overlap": Bug("paged_attention", "start + span, stop)", "start + span + KEYS, stop)", attend_in_parts),
    "parts weigh the same": Bug(
        "paged_attention", "weight = weight / tl.sum(weight, 0)", "weight = 1.0 / PARTS", attend_in_parts
    ),
    "nothing is mended": Bug("paged_attention", "tl.load(tile + 2), 0)", "0, 0)", mend),
    "loading: rotation sign": Bug(
        "rotate_scatter", "low * cosine - high", "low * cosine + high", scatter, "rotation"
    ),
    "loading: frequencies of another pair": Bug(
        "rotate_scatter", "+ pair[None, :]\n", "+ pair[None, :] // 2\n", scatter
    ),
    "loading: angle of another token": Bug("rotate_scatter", "angle = (wide *", "angle = (wide // 2 *", scatter),
    "loading: no tail mask": Bug("rotate_scatter", "inside = (token < tokens)", "inside = (token >= 0)", scatter),
    "loading: one layer for all": Bug("rotate_scatter", "k_slots + layer *", "k_slots + 0 *", scatter),
    "loading: no head offset": Bug("rotate_scatter", "column = head * (2 * HALF) +", "column = 0 * head +", scatter),
    "fresh: rotation sign": Bug("rope_write", "high * cosine + low", "high * cosine - low", write, "rotation"),
    "fresh: values from the keys": Bug(
        "rope_write", "head - HEADS - KV_HEADS)", "head - HEADS - 2 * KV_HEADS)", write
    ),
    "fresh: queries keep their place": Bug("rope_write", "if head < HEADS + KV_HEADS:", "if head < HEADS:", write),
    "deviation without values": Bug(
        "deviation", "_squares(low, v_old + at,", "0 * _squares(low, v_old + at,", deviate
    ),
    "deviation of unrotated keys": Bug("deviation", "low * cosine - high * sine", "low", deviate),
    "choice: the border counted among those above": Bug("topk_rows", "digits > chosen", "digits >= chosen", choose),
    "choice: one tie too few": Bug(
        "topk_rows", "tl.cumsum(tied, 0) <= wanted", "tl.cumsum(tied, 0) < wanted", choose
    ),
    "choice: ties forgotten between blocks": Bug("topk_rows", "ties += tl.sum(tied, 0)", "ties += 0", choose),
    "choice: NaN like any number": Bug(
        "topk_rows", 'score != score, float("inf")', "score != score, 0.0", choose_odd
    ),
    "choice: sign": Bug("topk_rows", "0xFFFFFFFF, 0x80000000", "0x80000000, 0x80000000", choose_odd),
    "norm: mean over the block": Bug("add_rms_norm", "/ WIDTH + eps", "/ BLOCK + eps", norm),
    "norm: sum not rounded": Bug(
        "add_rms_norm", "value = value.to(total.dtype.element_ty).to(tl.float32)", "pass", norm_narrow
    ),
    "norm: no tail mask": Bug("add_rms_norm", "inside = column < WIDTH", "inside = column >= 0", norm),
    "gate: halves swapped": Bug("silu_mul", "+ WIDTH + column, mask", "+ column, mask", gate),
    "gate: no tail mask": Bug("silu_mul", "inside = column < WIDTH", "inside = column >= 0", gate),
}


def loaded(name: str, text: str, directory: Path) -> ModuleType:
    """A module of its own; triton reads a kernel's source from its file."""
    path = directory / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"mutant_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "shown_by",
    sorted({bug.shown_by for bug in BUGS.values()}, key=lambda f: f.__name__),
    ids=lambda shown_by: shown_by.__name__,
)
def test_what_shows_a_bug_passes_without_one(shown_by: Callable[[], float | None]) -> None:
    error = shown_by()
    assert error is None or error < 1e-5


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="on a GPU a planted bug may destroy the process")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = BUGS[name]
    monkeypatch.setattr(attention_plan, "_parts", lambda *_: 2 if bug.shown_by is attend_in_parts else 1)
    changed = bug.file or bug.op
    text = (SOURCES / f"{changed}.py").read_text()
    assert text.count(bug.old) == 1
    mutant = loaded(changed, text.replace(bug.old, bug.new), tmp_path)
    if bug.file:
        helpers, mutant = mutant, loaded(bug.op, (SOURCES / f"{bug.op}.py").read_text(), tmp_path)
        for helper in ("rotate_into", "copy_into"):
            setattr(mutant, helper, getattr(helpers, helper))
    monkeypatch.setattr(kernels, bug.op, getattr(mutant, bug.op))
    assert seen(bug)


def seen(bug: Bug) -> bool:
    """Stopped by an assertion, an access out of bounds or a race, or betrayed by its error."""
    try:
        error = bug.shown_by()
    except AssertionError:
        return True
    except InterpreterError as stopped:
        return "OutOfBounds" in str(stopped) or "Race" in str(stopped)
    return error is not None and not error < 1e-4
