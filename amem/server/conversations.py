"""Which session a chat without a session id belongs to, and at which turn its memories stand.

A user has one open session for single questions. A conversation that goes on gets its own, named by its opening (up
to the first answer), so that it is found again after a restart and an edited opening becomes another conversation.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from amem.engine.types import Tenant
from amem.memory.types import Batch
from amem.text import Message

OPEN_SESSION = "auto"
_OPENINGS_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Thread:
    """Where the question stands in the conversation that the client sent.

    question: index of the last user message. opening: digest of the first question. session: name of the implicit
    session. anchors: name of each user message up to the question → its index.
    """

    question: int
    opening: str
    session: str
    anchors: dict[str, int]

    @property
    def anchor(self) -> str | None:
        """The turn that memories recalled now belong to; None for a first question, where they stand in front."""
        return None if self.session == OPEN_SESSION else list(self.anchors)[-1]


def thread_of(tenant: Tenant, messages: Sequence[Message]) -> Thread | None:
    """None when there is no user message to recall for. Digests are keyed by the tenant's secret."""
    asked = [index for index, message in enumerate(messages) if message.role == "user" and message.content.strip()]
    if not asked:
        return None
    question = asked[-1]
    anchors: dict[str, int] = {}
    repeats: Counter[str] = Counter()
    for index in asked:
        digest = _digest(tenant, messages[index : index + 1])
        anchors[f"{digest}-{repeats[digest]}"] = index
        repeats[digest] += 1
    spoken = [message for message in messages[:question] if message.role != "system"]
    answered = next((count for count, message in enumerate(spoken, 1) if message.role == "assistant"), None)
    session = OPEN_SESSION if answered is None else f"{OPEN_SESSION}-{_digest(tenant, spoken[:answered])}"
    first = asked[0]
    return Thread(question, _digest(tenant, messages[first : first + 1]), session, anchors)


class Openings:
    """What stood in front of a first question, so that a conversation that goes on keeps it there."""

    def __init__(self) -> None:
        self._batches: OrderedDict[tuple[str, str], tuple[Batch, ...]] = OrderedDict()

    def keep(self, user: str, opening: str, batches: tuple[Batch, ...]) -> None:
        self._batches[user, opening] = batches
        self._batches.move_to_end((user, opening))
        while len(self._batches) > _OPENINGS_KEPT:
            self._batches.popitem(last=False)

    def of(self, user: str, opening: str) -> tuple[Batch, ...] | None:
        return self._batches.get((user, opening))


def _digest(tenant: Tenant, messages: Sequence[Message]) -> str:
    text = json.dumps([[message.role, message.content.strip()] for message in messages], ensure_ascii=False)
    return hashlib.blake2b(text.encode(), key=tenant.secret, digest_size=12).hexdigest()
