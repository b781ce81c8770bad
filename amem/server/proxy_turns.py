"""Where the proxy puts memories: in front of the user message that recalled them, there again on every later call.

What a message recalled is kept as a session named after all messages up to it, so that a history that is sent again
gets the same memories at the same places, byte for byte, and the provider's cached prefix stays whole. Another branch
of a conversation has other names. A memory that was forgotten is in none of them any more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from amem.engine.types import Tenant
from amem.memory.errors import NotFound
from amem.memory.service import MemoryService
from amem.memory.types import RecallOptions, State
from amem.text import PREAMBLE

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Remembering:
    """How much is recalled for one message: at most `memories`, of at most `tokens`."""

    memories: int = 8
    tokens: int = 1000


@dataclass(frozen=True, slots=True)
class Remembered:
    """Messages with memory in them, and how many memories that were."""

    messages: list[Any]
    memories: int


class ProxyTurns:
    """Blocking; called from worker threads."""

    def __init__(self, memory: MemoryService, options: Remembering) -> None:
        self._memory = memory
        self._options = options

    def remember(self, user: str, messages: Sequence[Any]) -> Remembered:
        """A copy of `messages` with the user's memories in front of the user messages that they were recalled for.

        Raises MemoryFault; an unknown user has no memories.
        """
        found = list(messages)
        tenant = self._memory.tenant(user)
        if tenant is None:
            return Remembered(found, 0)
        placed: set[str] = set()
        name = hashlib.blake2b(key=tenant.secret, digest_size=16)
        for index, message in enumerate(messages):
            name.update(json.dumps(message, sort_keys=True).encode() + b"\n")
            question = _question(message)
            if question is None:
                continue
            last = index == len(messages) - 1
            texts = self._recalled(tenant, user, f"turn-{name.hexdigest()}", question if last else None, placed)
            if texts:
                found[index] = message | {"content": _with_notes(message["content"], texts)}
        return Remembered(found, len(placed))

    def _recalled(self, tenant: Tenant, user: str, turn: str, question: str | None, placed: set[str]) -> list[str]:
        """Texts of the memories of a turn, in canonical order; `question` is None where only kept ones count."""
        try:
            session = self._memory.session(user, turn)
        except NotFound:
            if question is None:
                return []
            session = self._memory.start_session(user, self._options.tokens, turn)
            options = RecallOptions(k=self._options.memories, budget_tokens=self._options.tokens)
            ranked = self._memory.recall(user, question, options)
            session = self._memory.admit(user, turn, [item for item in ranked if item.memory.id not in placed], None)
        memories = self._memory.get_many(user, session.memory_ids)
        live = [id for id in session.memory_ids if id in memories and memories[id].state is State.LIVE]
        placed.update(live)
        return [memories[id].text for id in live]


def _question(message: Any) -> str | None:
    """The text of a user message, None for anything else."""
    if not isinstance(message, dict) or message.get("role") != "user":
        return None
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) and content.strip() else None


def _with_notes(content: str | list[Any], texts: Sequence[str]) -> str | list[Any]:
    notes = PREAMBLE + "".join(f"- {text}\n" for text in texts) + "\n"
    return notes + content if isinstance(content, str) else [{"type": "text", "text": notes}, *content]
