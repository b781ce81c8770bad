"""Triton kernels, one op a file, with the signatures of `amem.kernels.reference`."""

from amem.kernels.triton.add_rms_norm import add_rms_norm
from amem.kernels.triton.attention_plan import plan_attention
from amem.kernels.triton.deviation import deviation
from amem.kernels.triton.paged_attention import paged_attention
from amem.kernels.triton.rope_write import rope_write
from amem.kernels.triton.rotate_scatter import rotate_scatter
from amem.kernels.triton.silu_mul import silu_mul
from amem.kernels.triton.topk_rows import topk_rows

__all__ = [
    "add_rms_norm",
    "deviation",
    "paged_attention",
    "plan_attention",
    "rope_write",
    "rotate_scatter",
    "silu_mul",
    "topk_rows",
]
