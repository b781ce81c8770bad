"""Run as `trace_step.py TARGET`: a whole engine step of Llama 8B on meta tensors, one JSON line a launch.

Meta tensors hold nothing, so a grid that depended on device data could not be computed here.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import whole_step
from compile_only import compile_only

from amem.engine.blend import Selection, plan_blend
from amem.engine.config import BlendConfig
from amem.engine.pool import KVPool
from amem.engine.rows import RowBuilder, RowSpec
from amem.kernels.triton.warm_up import ModelShape, warm_up

PAGE = 16


def run_step() -> None:
    """What Runner.forward does on the host and the device, up to reading the logits back."""
    meta, config = torch.device("meta"), whole_step.LLAMA_8B
    made = whole_step.model(config, torch.bfloat16, meta)
    pool = KVPool(config, config.layers, 4096, PAGE, torch.bfloat16, meta)
    batch, _ = whole_step.mixed_batch(config.vocab_size, context=2000, loaded=4000, fresh=50)
    plans = [
        plan_blend(s.blend, config.layers, BlendConfig(), s.sample) if s.blend else None for s in batch.sequences
    ]
    entered = [
        np.arange(len(s.positions)) if plan is None else plan.enter
        for s, plan in zip(batch.sequences, plans, strict=True)
    ]
    specs = [RowSpec(s.positions[rows], s.block_table) for s, rows in zip(batch.sequences, entered, strict=True)]
    rows = RowBuilder(made.cos, made.sin, PAGE, torch.bfloat16).build(specs)
    selection = Selection(plans, [len(found) for found in entered], BlendConfig())
    ids = torch.empty(sum(len(found) for found in entered), dtype=torch.int64, device=meta)
    done = made.forward(ids, rows, pool, [True] * 3, selection)
    if done.logits.shape != (3, config.vocab_size):
        raise RuntimeError(f"logits of shape {tuple(done.logits.shape)}")


def warm() -> None:
    config = whole_step.LLAMA_8B
    sizes = (config.heads, config.kv_heads, config.head_dim, config.hidden_size, config.intermediate_size)
    warm_up(ModelShape(*sizes, PAGE, torch.bfloat16), torch.device("meta"))


def main(target: str) -> None:
    with compile_only(target) as warmed:
        warm()
    print("@@" + json.dumps({"warmed": sorted({launch.kernel.hash for launch in warmed})}))
    with compile_only(target) as launches:
        run_step()
    for launch in launches:
        kernel = launch.kernel
        line = {"kernel": launch.name, "grid": launch.grid, "hash": kernel.hash, "shared": kernel.metadata.shared}
        print("@@" + json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
