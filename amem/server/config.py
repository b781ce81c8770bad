"""What the server is told when it starts."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from amem.engine.launch import EngineLaunch
from amem.engine.types import Fidelity
from amem.memory.config import MemoryConfig
from amem.memory.plan import PlanConfig

MODEL_ALIAS = "amem"


class ConfigError(ValueError):
    """A configuration that must not be started: what is wrong, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one client. Sizes in bytes, times in seconds.

    active: chat requests in flight before 429. texts: memories in one call.
    """

    max_body_bytes: int = 4 << 20
    max_messages: int = 4096
    max_texts: int = 1024
    active: int = 256
    body_timeout_s: float = 30.0
    idle_connection_s: float = 75.0
    write_stall_s: float = 60.0
    keep_alive_comment_s: float = 15.0
    shutdown_s: float = 20.0
    forget_wait_s: float = 60.0


@dataclass(frozen=True, slots=True)
class AnswerDefaults:
    """Defaults of a chat request that names none itself.

    recall: memories looked up per question. memory_share: most of the context that memories may take, and what a
    session keeps resident. open_share: the same for single questions, which have less to do with each other.
    max_tokens: longest answer when the client sets no limit.
    """

    fidelity: Fidelity = Fidelity.BALANCED
    policy: str | None = None
    recall: int = 8
    memory_share: float = 0.5
    open_share: float = 0.125
    max_tokens: int = 1024


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything `amem.server.app.serve` needs. Raises ConfigError for an open address without an API key.

    model_dir: tokenizer and chat template, read by this process. engine: how the engine process is started.
    data_dir: memories and KV. port 0 lets the system choose one.
    """

    model_dir: Path
    data_dir: Path
    engine: EngineLaunch
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    answers: AnswerDefaults = field(default_factory=AnswerDefaults)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("the API key is empty; leave it out on loopback or set AMEM_API_KEY to a secret")
        if self.api_key is None and not is_loopback(self.host):
            raise ConfigError(
                f"{self.host} is reachable from other machines and no API key is set, so anybody could read every "
                "memory; set AMEM_API_KEY (or --api-key), or bind 127.0.0.1"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} is not between 0 and 65535")


@dataclass(frozen=True, slots=True)
class ReadyInfo:
    """What the ready banner says."""

    url: str
    model: str
    dtype: str
    device: str
    max_context: int
    kv_tokens: int
    kv_bytes: int
    data_dir: Path
    users: int
    auth: bool
    seconds: float


OnReady = Callable[[ReadyInfo], None]
OnProgress = Callable[[int, int], None]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost counts as open."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
