"""Everything a model needs is run once before it serves; the compiled variants are compared in test_ahead_of_time."""

from __future__ import annotations

import pytest
import torch

from amem.kernels.triton import attention_plan, warm_up


def test_every_step_runs_and_is_told(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up, "MOST_PARTS", 2)
    shape = warm_up.ModelShape(4, 2, 16, 64, 96, 16, torch.bfloat16)
    told: list[tuple[int, int]] = []
    warm_up.warm_up(shape, device, lambda done, total: told.append((done, total)))
    steps = 7 + 2 * 2
    assert told == [(done, steps) for done in range(steps + 1)]


def test_a_plan_never_asks_for_more_parts_than_are_warmed() -> None:
    chip, shape = attention_plan.Chip("sm_90", 10_000), attention_plan.TileShape(16, 64, 4, 3, 16)
    assert attention_plan._parts(chip, shape, 1, 1 << 30) == attention_plan.MOST_PARTS
