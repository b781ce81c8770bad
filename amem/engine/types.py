"""The types that cross the border of the engine. No torch here: the HTTP process imports this file."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

TENANT_ID_BYTES = 16
TENANT_SECRET_BYTES = 32


class Fidelity(str, Enum):
    """How near a blended answer has to stay to the answer of a full prefill."""

    EXACT = "exact"
    HIGH = "high"
    BALANCED = "balanced"
    FAST = "fast"


class FinishReason(str, Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who owns a chunk. `secret` keys every hash of the tenant and never leaves the two processes."""

    id: bytes
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.id) != TENANT_ID_BYTES or len(self.secret) != TENANT_SECRET_BYTES:
            raise ValueError(
                f"a tenant is {TENANT_ID_BYTES} id bytes and {TENANT_SECRET_BYTES} secret bytes, "
                f"got {len(self.id)} and {len(self.secret)}"
            )


@dataclass(frozen=True, slots=True)
class ChunkSpec:
    """One memory chunk as the engine sees it.

    `token_ids` are its own rows. `context` is every id that it is computed behind: the trusted prefix, then the
    preceding chunks of its conversation. `trusted` is how many of them are the trusted prefix. `memory` owns the
    chunk; `behind` owns the text inside `context`, so that forgetting any of them finds the chunk.
    """

    token_ids: tuple[int, ...]
    context: tuple[int, ...]
    trusted: int
    memory: str
    behind: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """A span of the prompt. With `chunk`, its ids are `chunk.token_ids` and its KV may come from the store."""

    token_ids: tuple[int, ...]
    chunk: ChunkSpec | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Greedy at `temperature=0`. `top_k=0` and `top_p=1` mean off. `seed` makes a draw repeatable in any batch."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class BlendOptions:
    """`recompute_ratio` (0 to 1, share of chunk rows recomputed) overrides what `fidelity` stands for."""

    fidelity: Fidelity = Fidelity.BALANCED
    recompute_ratio: float | None = None
    policy: str | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One completion. Ids of all segments, in order, are the prompt."""

    id: str
    tenant: Tenant | None
    segments: tuple[Segment, ...]
    sampling: SamplingParams = SamplingParams()
    blend: BlendOptions = BlendOptions()
    priority: int = 0


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Where the KV of each prompt token came from. Counted from rows that ran; the sum is the prompt's length."""

    prefix: int = 0
    gpu: int = 0
    cpu: int = 0
    disk: int = 0
    recomputed: int = 0
    fresh: int = 0

    @property
    def total(self) -> int:
        return self.prefix + self.gpu + self.cpu + self.disk + self.recomputed + self.fresh

    @property
    def reused(self) -> int:
        return self.prefix + self.gpu + self.cpu + self.disk


@dataclass(frozen=True, slots=True)
class Report:
    """What was really done for one request.

    charged: prefill in token equivalents, row-layers run over the number of layers, every pass included.
    recompute_ratio: rows recomputed over chunk rows loaded (0 when none was loaded).
    effective_ratio: charged work on loaded chunk rows (checks included) over the work of prefilling them.
    fallback: why blending was not used although it was asked for, or None.
    Times are seconds: queue_s until admitted, load_s in tier reads, ttft_s from arrival to the first token.
    """

    prompt: PromptTokens
    completion_tokens: int
    charged: float
    recompute_ratio: float
    effective_ratio: float
    policy: str
    fallback: str | None
    queue_s: float
    load_s: float
    ttft_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of the chosen token and of the most probable ones, as (id, logprob), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ForgetReceipt:
    """What left the KV store: distinct chunks and bytes per tier, prefix pages zeroed, requests ended."""

    chunks: int = 0
    ram_bytes: int = 0
    disk_bytes: int = 0
    pages: int = 0
    aborted: int = 0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the engine serves; sent once, when it is ready."""

    name: str
    fingerprint: str
    dtype: str
    device: str
    layers: int
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    kv_bytes_per_token: int
    pages: int
    page_size: int
    weights_bytes: int


class EngineError(Exception):
    """A request that the engine refuses or lost. `code` is stable, the message is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
