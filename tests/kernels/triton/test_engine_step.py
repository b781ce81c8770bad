"""The engine on Triton kernels gives what it gives on torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import whole_step

from amem import kernels
from amem.engine.batch import StepOutput
from amem.kernels import triton as room


def step(device: torch.device) -> tuple[StepOutput, torch.Tensor]:
    """A chunk is loaded, one sequence filled, then everything runs in one batch. Also all pages afterwards."""
    runner = whole_step.runner(whole_step.model(whole_step.SMALL, torch.float32, device), num_pages=24)
    batch, places = whole_step.mixed_batch(whole_step.SMALL.vocab_size, context=37, loaded=50, fresh=9)
    runner.zero_pages(np.arange(24))
    filled = batch.sequences[0]
    runner.forward(type(batch)((type(filled)(filled.token_ids, filled.positions, places[1], sample=False),)))
    chunk = whole_step.stored_chunk(whole_step.SMALL, 50, torch.float32)
    runner.load_chunk(chunk, np.arange(50), places[2])
    return runner.forward(batch), runner.read_pages(np.arange(24)).cpu()


def test_a_mixed_batch_gives_the_same_logits_rows_and_pages(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, wanted_pages = step(torch.device("cpu"))
    asked: list[str] = []

    def op(name: str, tensor: torch.Tensor) -> object:
        asked.append(name)
        return getattr(room, name)

    if triton.knobs.runtime.interpret:
        monkeypatch.setattr(kernels, "_op", op)
    found, pages = step(device)
    assert not triton.knobs.runtime.interpret or set(room.__all__) <= set(asked)
    assert torch.allclose(found.logits.cpu(), wanted.logits, atol=1e-4, rtol=0)
    assert found.logits.shape == (3, whole_step.SMALL.vocab_size)
    assert torch.allclose(pages, wanted_pages, atol=1e-5, rtol=0)
    for mine, theirs in zip(found.kept, wanted.kept, strict=True):
        assert np.array_equal(mine, theirs)
    assert len(found.kept[2]) > 0
    assert np.array_equal(found.row_layers, wanted.row_layers)
