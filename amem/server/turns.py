"""One question's prompt: recall, the session's resident memories, and what fits into the context."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from amem.engine.types import TENANT_ID_BYTES, TENANT_SECRET_BYTES, Tenant
from amem.memory.errors import NotFound
from amem.memory.plan import PlacedBatch, PlacedMemory, Planner, PromptPlan
from amem.memory.service import MemoryService
from amem.memory.types import Batch, Memory, Recalled, RecallOptions, Session, State
from amem.server.config import AnswerDefaults
from amem.server.conversations import OPEN_SESSION, Openings, Thread, thread_of
from amem.server.errors import ApiError, bad_request
from amem.server.schema import ChatRequest
from amem.text import TextError

_ANSWER_ROOM = 256


@dataclass(frozen=True, slots=True)
class UsedMemory:
    """A memory in the prompt. `score` is None when it is resident and was not recalled for this question."""

    id: str
    score: float | None


@dataclass(frozen=True, slots=True)
class Turn:
    """What the engine is asked to run, and how it came about. `dropped`: memories that did not fit."""

    plan: PromptPlan
    tenant: Tenant | None = None
    session: str | None = None
    memories: tuple[UsedMemory, ...] = ()
    dropped: int = 0


class TurnPlanner:
    """Blocking; called from worker threads, under the user's gate."""

    def __init__(self, memory: MemoryService, planner: Planner, defaults: AnswerDefaults) -> None:
        self._memory = memory
        self._planner = planner
        self._defaults = defaults
        self._openings = Openings()
        self._secret = secrets.token_bytes(TENANT_SECRET_BYTES)

    def plan(self, chat: ChatRequest, user: str | None, max_context: int) -> Turn:
        """Raises ApiError 400 for a prompt that does not fit or that the template refuses, NotFound for a session."""
        if user is None:
            return self._without_memory(chat, None, max_context)
        tenant = self._memory.tenant(user)
        if tenant is None:
            if chat.amem.session is not None:
                raise NotFound(f"the user has no session {chat.amem.session!r}; start one first", "session")
            return self._without_memory(chat, self._passing(user), max_context)
        thread = thread_of(tenant, chat.messages)
        if thread is None:
            return self._without_memory(chat, tenant, max_context)
        session = self._session(chat, user, thread, max_context)
        recalled = self._recall(chat, user, max_context)
        session = self._admit(user, session, recalled, thread)
        placed = self._placed(user, session, recalled, thread, implicit=chat.amem.session is None)
        return self._fitted(chat, tenant, session, placed, recalled, max_context)

    def _passing(self, user: str) -> Tenant:
        """A tenant for a user who has no memories: kept nowhere, but nobody else hits the pages of its prompts."""
        digest = hashlib.blake2b(user.encode(), key=self._secret, digest_size=TENANT_ID_BYTES + TENANT_SECRET_BYTES)
        return Tenant(digest.digest()[:TENANT_ID_BYTES], digest.digest()[TENANT_ID_BYTES:])

    def _without_memory(self, chat: ChatRequest, tenant: Tenant | None, max_context: int) -> Turn:
        plan = self._prompt(chat, ())
        if plan.tokens >= max_context:
            raise _too_long(plan.tokens, max_context)
        return Turn(plan, tenant)

    def _session(self, chat: ChatRequest, user: str, thread: Thread, max_context: int) -> Session:
        if chat.amem.session is not None:
            return self._memory.session(user, chat.amem.session)
        is_open = thread.session == OPEN_SESSION
        share = self._defaults.open_share if is_open else self._defaults.memory_share
        budget = max(1, int(max_context * share))
        try:
            return self._memory.session(user, thread.session)
        except NotFound:
            session = self._memory.start_session(user, budget, thread.session)
        for batch in self._opening(user, thread):
            found = [Recalled(m, 0.0, tokens=self._planner.count(m.text)) for m in self._opened(user, batch)]
            session = self._memory.admit(user, session.id, found, None)
        return session

    def _opened(self, user: str, batch: Batch) -> list[Memory]:
        return _live(self._memory.get_many(user, batch.memory_ids), batch.memory_ids)

    def _opening(self, user: str, thread: Thread) -> tuple[Batch, ...]:
        if thread.session == OPEN_SESSION:
            return ()
        kept = self._openings.of(user, thread.opening)
        if kept is not None:
            return kept
        try:
            return self._memory.session(user, OPEN_SESSION).batches
        except NotFound:
            return ()

    def _recall(self, chat: ChatRequest, user: str, max_context: int) -> list[Recalled]:
        k = self._defaults.recall if chat.amem.recall is None else chat.amem.recall
        if k == 0 or chat.question is None:
            return []
        budget = int(max_context * self._defaults.memory_share)
        return self._memory.recall(user, chat.question, RecallOptions(k=k, budget_tokens=budget))

    def _admit(self, user: str, session: Session, recalled: Sequence[Recalled], thread: Thread) -> Session:
        if recalled:
            session = self._memory.admit(user, session.id, recalled, thread.anchor if session.batches else None)
        if thread.session == OPEN_SESSION:
            self._openings.keep(user, thread.opening, session.batches)
        return session

    def _placed(
        self, user: str, session: Session, recalled: Sequence[Recalled], thread: Thread, implicit: bool
    ) -> list[PlacedBatch]:
        """Resident memories at their turns. In an implicit session, other branches of the conversation stay out."""
        places: list[tuple[int | None, list[Memory]]] = []
        live = self._memory.get_many(user, session.memory_ids)
        for batch in session.batches:
            if batch.anchor is None or batch.anchor in thread.anchors or not implicit:
                turn = None if batch.anchor is None else thread.anchors.get(batch.anchor)
                places.append((turn, _live(live, batch.memory_ids)))
        standing = {memory.id for _, memories in places for memory in memories}
        absent = sorted((r.memory for r in recalled if r.memory.id not in standing), key=lambda memory: memory.place)
        places.append((None if thread.anchor is None else thread.question, absent))
        places.sort(key=lambda place: -1 if place[0] is None else place[0])
        return [PlacedBatch(tuple(self._behind(user, m) for m in found), turn) for turn, found in places if found]

    def _behind(self, user: str, memory: Memory) -> PlacedMemory:
        if memory.conversation is None:
            return PlacedMemory(memory)
        return PlacedMemory(memory, self._memory.predecessors(user, memory.id, self._planner.config.window))

    def _fitted(
        self,
        chat: ChatRequest,
        tenant: Tenant,
        session: Session,
        placed: list[PlacedBatch],
        recalled: Sequence[Recalled],
        max_context: int,
    ) -> Turn:
        """The prompt with as many memories as leave room for an answer: all, or the best of those just recalled."""
        room = max_context - min(chat.sampling.max_tokens or _ANSWER_ROOM, _ANSWER_ROOM)
        standing = [item.memory.id for batch in placed for item in batch.memories]
        best = [found.memory.id for found in recalled]
        kept = set(standing)
        plan = self._prompt(chat, placed)
        while plan.tokens > room and kept:
            kept = set(best if len(kept) > len(best) else best[: len(kept) // 2])
            plan = self._prompt(chat, _only(placed, kept))
        if plan.tokens >= max_context:
            raise _too_long(plan.tokens, max_context)
        scores = {found.memory.id: found.score for found in recalled}
        used = tuple(UsedMemory(id, scores.get(id)) for id in standing if id in kept)
        return Turn(plan, tenant, session.id, used, len(standing) - len(used))

    def _prompt(self, chat: ChatRequest, placed: Sequence[PlacedBatch]) -> PromptPlan:
        try:
            return self._planner.prompt(chat.messages, placed)
        except TextError as error:
            raise bad_request(str(error), "messages") from error


def _live(found: Mapping[str, Memory], ids: Sequence[str]) -> list[Memory]:
    """These memories in this order, without those that were forgotten since the session was read."""
    return [found[id] for id in ids if id in found and found[id].state is State.LIVE]


def _only(placed: Sequence[PlacedBatch], kept: set[str]) -> list[PlacedBatch]:
    return [PlacedBatch(tuple(m for m in batch.memories if m.memory.id in kept), batch.turn) for batch in placed]


def _too_long(tokens: int, max_context: int) -> ApiError:
    message = (
        f"The prompt has {tokens} tokens and the model's context is {max_context}, which has to hold the answer too. "
        "Shorten the messages."
    )
    return bad_request(message, "messages", "context_length_exceeded")
