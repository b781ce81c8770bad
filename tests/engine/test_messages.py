"""Messages survive the wire whole, in any cut of the byte stream; anything else is refused."""

from __future__ import annotations

import struct

import msgpack
import pytest

from amem.engine import messages as m
from amem.engine.config import BlendConfig, EngineConfig
from amem.engine.types import (
    BlendOptions,
    ChunkSpec,
    Fidelity,
    FinishReason,
    ForgetReceipt,
    GenerateRequest,
    PromptTokens,
    Report,
    SamplingParams,
    Segment,
    Tenant,
    TokenLogprob,
)

TENANT = Tenant(b"a" * 16, b"b" * 32)
CHUNK = ChunkSpec((4, 5), (1, 2, 3), 3, "m1", ("m0", "m2", "m3"))
REQUEST = GenerateRequest(
    "r",
    TENANT,
    (Segment((1, 2, 3)), Segment((4, 5), CHUNK)),
    SamplingParams(seed=7, stop_token_ids=(9, 10, 11)),
    BlendOptions(Fidelity.HIGH, 0.2, "gradual"),
)
REPORT = Report(PromptTokens(fresh=3, disk=2), 2, 3.5, 0.1, 0.2, "gradual", None, 0.0, 0.1, 0.2, 0.3)
MESSAGES: list[m.Message] = [
    m.Configure(EngineConfig("model", num_pages=7, kv_dir="kv", fsync=False, blend=BlendConfig(share="chunk"))),
    m.Configure(EngineConfig("model", dtype="bfloat16", max_context=None)),
    m.Generate(REQUEST),
    m.Generate(GenerateRequest("no tenant", None, ())),
    m.Abort("r"),
    m.WriteChunks("j", TENANT, (CHUNK, CHUNK)),
    m.ForgetMemories("j", TENANT, ("a", "b", "c", "d")),
    m.ForgetMemories("j", TENANT, None),
    m.Tokens("r", (1, 2), (TokenLogprob(-1.0, ((1, -1.0), (2, -3.0))),)),
    m.Finished("r", FinishReason.STOP, REPORT),
    m.Failed("r", "internal", "why ☃"),
    m.ChunksWritten("j", 1, 2, 3, 4.0),
    m.Forgotten("j", ForgetReceipt(1, 2, 3, 4, 5)),
    m.Stats("j", {"a": 1.0}),
    m.Heartbeat(3, True),
    m.Shutdown(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(message: m.Message) -> None:
    assert m.FrameReader().feed(m.encode(message)) == [message]


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
def test_any_cut_of_the_stream(step: int) -> None:
    data = b"".join(m.encode(message) for message in MESSAGES)
    reader, out = m.FrameReader(), []
    for start in range(0, len(data), step):
        out += reader.feed(data[start : start + step])
    assert out == MESSAGES


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", msgpack.packb(["Nothing"]), msgpack.packb(["Abort"]), msgpack.packb(["Abort", "x", 1])],
)
def test_foreign_frames_are_refused(body: bytes) -> None:
    with pytest.raises(m.WireError):
        m.decode(body)


def test_an_absurd_length_is_refused_before_it_is_buffered() -> None:
    with pytest.raises(m.WireError):
        m.FrameReader().feed(struct.pack("<I", m.MAX_FRAME_BYTES + 1))


def test_secrets_do_not_print() -> None:
    assert "b" * 32 not in repr(TENANT)
    assert "bbb" not in repr(m.Generate(REQUEST))
