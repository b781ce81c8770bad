"""How memories, recalls and sessions look in JSON; one shape on every route. Times are seconds since 1970."""

from __future__ import annotations

import dataclasses

from amem.engine.types import ForgetReceipt
from amem.memory.service import MemoryService
from amem.memory.types import Added, Memory, Recalled, Session
from amem.server.strict_json import Json


def memory_json(memory: Memory) -> Json:
    return {
        "id": memory.id,
        "text": memory.text,
        "conversation": memory.conversation,
        "ordinal": memory.ordinal,
        "key": memory.key,
        "metadata": None if memory.metadata is None else dict(memory.metadata),
        "created": memory.created,
        "updated": memory.updated,
        "seen": memory.seen,
        "version": memory.version,
        "state": memory.state.value,
        "superseded_by": memory.superseded_by,
    }


def added_json(added: Added) -> Json:
    return {"id": added.id, "outcome": added.outcome.value, "superseded": list(added.superseded)}


def recalled_json(recalled: Recalled, explain: bool) -> Json:
    body = memory_json(recalled.memory) | {"score": recalled.score, "tokens": recalled.tokens}
    return body | {"explain": dict(recalled.parts)} if explain else body


def session_json(session: Session) -> Json:
    batches = [{"anchor": batch.anchor, "memories": list(batch.memory_ids)} for batch in session.batches]
    return {
        "id": session.id,
        "session": session.id,
        "user": session.user,
        "epoch": session.epoch,
        "memories": list(session.memory_ids),
        "batches": batches,
        "tokens": session.tokens,
        "budget_tokens": session.budget_tokens,
        "created": session.created,
    }


def users_json(memory: MemoryService, after: str, limit: int) -> Json:
    """A page of users by name; the last name of one page is `after` of the next. Blocking."""
    found = memory.users(after, limit)
    following = found[-1].user if len(found) == limit else None
    return {"users": [dataclasses.asdict(one) for one in found], "count": memory.stats()["users"], "next": following}


def receipt_json(receipt: ForgetReceipt | None) -> Json:
    """What left the KV store. `pending`: the engine is down and erases it as soon as it is back."""
    if receipt is None:
        return {"pending": True}
    return {"pending": False} | dataclasses.asdict(receipt)
