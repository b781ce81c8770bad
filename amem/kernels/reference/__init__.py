"""Every op in torch: the specification of the Triton kernels, and what runs on a CPU."""

from amem.kernels.reference.add_rms_norm import add_rms_norm
from amem.kernels.reference.deviation import deviation
from amem.kernels.reference.paged_attention import paged_attention, plan_attention
from amem.kernels.reference.rope_write import rope_write
from amem.kernels.reference.rotate_scatter import rotate_scatter
from amem.kernels.reference.silu_mul import silu_mul
from amem.kernels.reference.topk_rows import topk_rows

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
