"""Recall: any query is data, scores say where they come from, budgets hold, neighbours come in company."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amem.memory import recall
from amem.memory.config import MemoryConfig
from amem.memory.embed import HashEmbedder, Vectors
from amem.memory.errors import InvalidInput
from amem.memory.service import MemoryService
from amem.memory.types import NewMemory, RecallOptions

MakeService = Callable[..., MemoryService]


def words(text: str) -> int:
    return len(text.split())


def add(service: MemoryService, *texts: str, conversation: str | None = None) -> list[str]:
    return [one.id for one in service.add("u", [NewMemory(text) for text in texts], conversation)]


def texts(service: MemoryService, query: str, options: RecallOptions | None = None) -> list[str]:
    return [found.memory.text for found in service.recall("u", query, options)]


SYNTAX = [
    '"', '""', "'", "*", "a*", "^a", "NEAR(a b)", "a AND b", "a OR", "NOT a", "AND", "text:a", "{text context}:a",
    "(a", "a)", "a + b", "-a", "a:b:c", "lexical", "rowid", "rank", "--", ";", "/*", "a\nb", "🙂", "漢字かな", "é",
    "İstanbul", "ẞ", "ﬁ", "a_b", "foo.bar@baz", "%", "\\", "\u200b", "\u202e", "e\u0301", "\U000e0041", "a" * 5000,
    "a " * 5000, "𝒳",
]  # fmt: skip


@pytest.mark.parametrize("query", SYNTAX)
def test_full_text_syntax_is_only_words(service: MemoryService, query: str) -> None:
    add(service, "plain text about apples", query)
    assert len(service.recall("u", query)) <= 2
    if any(c.isalnum() for c in query):
        assert query in texts(service, query)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(query=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=80))
def test_no_query_raises(service: MemoryService, query: str) -> None:
    if not query.strip():
        with pytest.raises(InvalidInput):
            service.recall("u", query)
        return
    add(service, f"something {query}")
    service.recall("u", query)


def test_scores_say_where_they_come_from(service: MemoryService) -> None:
    add(service, "The red parrot speaks Portuguese", "parrots are birds", "parro", "unrelated")
    found = service.recall("u", "red parrots")
    assert [r.memory.text for r in found] == ["The red parrot speaks Portuguese", "parrots are birds", "parro"]
    for recalled in found:
        parts = dict(recalled.parts)
        gains = [parts[name] for name in ("lexical_rrf", "vector_rrf") if name in parts]
        assert recalled.score == pytest.approx(sum(gains))
        for name in ("lexical", "vector"):
            if f"{name}_rank" in parts:
                assert parts[f"{name}_rrf"] == pytest.approx(1 / (60 + parts[f"{name}_rank"]))
        assert 0 < parts.get("vector_cosine", 0.5) <= 1.0001
        assert parts.get("lexical_bm25", 1.0) > 0
    assert "lexical_rank" not in found[2].parts
    assert found[0].score > found[1].score > found[2].score


def test_fusion_is_the_sum_of_reciprocal_ranks() -> None:
    hits = recall.fuse([(1, 1.1), (2, 1.05), (3, 1.0)], [(3, 0.9), (4, 0.8), (1, 0.2)])
    assert [hit.seq for hit in hits] == [3, 1, 2, 4]
    assert hits[0].score == pytest.approx(1 / 61 + 1 / 63)
    assert hits[1].score == hits[0].score
    assert hits[0].parts == {
        "lexical_rank": 3.0, "lexical_bm25": 1.0, "lexical_rrf": 1 / 63,
        "vector_rank": 1.0, "vector_cosine": 0.9, "vector_rrf": 1 / 61,
    }  # fmt: skip


def test_k_and_the_budget_are_limits(open_service: MakeService) -> None:
    service = open_service(MemoryConfig(count_tokens=words))
    rng = random.Random(2)
    add(service, *(f"fact {i} " + "more " * rng.randint(0, 9) for i in range(80)))
    for k in (1, 3, 10, 50):
        assert len(service.recall("u", "fact more", RecallOptions(k=k))) == k
        for budget in (0, 1, 2, 7, 20, 100):
            found = service.recall("u", "fact more", RecallOptions(k=k, budget_tokens=budget))
            assert sum(words(r.memory.text) for r in found) == sum(r.tokens for r in found) <= budget
            assert len(found) <= k
            assert found or budget < 12


def test_one_that_is_too_large_hides_none_behind_it(open_service: MakeService) -> None:
    service = open_service(MemoryConfig(count_tokens=words))
    add(service, "vault code " * 20, "The vault code is 4711.", "Nobody knows the vault code.")
    assert words(texts(service, "vault code")[0]) == 40
    assert len(texts(service, "vault code", RecallOptions(budget_tokens=20))) == 2


def test_neighbours_come_in_company_and_never_instead(open_service: MakeService) -> None:
    service = open_service(MemoryConfig(count_tokens=words))
    talk = [f"turn {i}" for i in range(9)]
    talk[4] = "the zebra crossed here"
    add(service, *talk, conversation="a")
    add(service, "another zebra", conversation="b")
    plain = texts(service, "zebra crossed", RecallOptions(k=1))
    assert plain == ["the zebra crossed here"]
    options = RecallOptions(k=1, budget_tokens=100, neighbours=2)
    found = service.recall("u", "zebra crossed", options)
    assert [r.memory.text for r in found] == ["the zebra crossed here", "turn 3", "turn 5", "turn 2", "turn 6"]
    assert [dict(r.parts).get("neighbour_of_rank") for r in found] == [None, 1.0, 1.0, 1.0, 1.0]
    assert texts(service, "zebra", RecallOptions(k=5, budget_tokens=6, neighbours=2)) in (
        ["the zebra crossed here", "another zebra"],
        ["another zebra", "the zebra crossed here"],
    )
    assert len(texts(service, "zebra crossed", RecallOptions(k=1, budget_tokens=100, neighbours=0))) == 1
    assert len(texts(service, "zebra crossed", RecallOptions(k=1, neighbours=2))) == 1


def test_an_answer_is_found_by_the_question_before_it(service: MemoryService) -> None:
    rng = random.Random(4)
    pairs = [(f"Where did you buy the {thing}?", f"At {rng.choice('ABCDEFG')}-market {i}.")
             for i, thing in enumerate("lamp sofa kettle drill ladder tent".split())]  # fmt: skip
    add(service, *(text for pair in pairs for text in pair), conversation="c")
    add(service, *(answer for _, answer in pairs[::-1]))
    for question, answer in pairs:
        found = service.recall("u", question, RecallOptions(k=2))
        assert [r.memory.text for r in found] == [question, answer]
        assert found[1].memory.conversation == "c"
    ids = {memory.text: memory.id for memory in service.list("u").memories if memory.conversation}
    service.forget("u", [ids[pairs[0][0]]])
    assert pairs[0][1] not in texts(service, "Where did you buy the lamp?", RecallOptions(k=2, conversation="c"))


def test_one_conversation_can_be_searched_alone(service: MemoryService) -> None:
    add(service, "apples are red", conversation="a")
    add(service, "apples are green", conversation="b")
    add(service, "apples are ripe")
    assert texts(service, "apples", RecallOptions(conversation="b")) == ["apples are green"]
    assert texts(service, "apples", RecallOptions(conversation="none")) == []


def test_the_same_text_is_recalled_once(service: MemoryService) -> None:
    add(service, "apples are red", conversation="a")
    add(service, "apples are red", conversation="b")
    assert texts(service, "apples") == ["apples are red"]


def test_of_equals_the_newest_comes_first(service: MemoryService) -> None:
    hits = recall.fuse([(1, 2.0), (2, 2.0), (3, 1.0)], [(1, 0.5), (2, 0.5), (3, 0.5)])
    assert [(hit.seq, hit.parts["lexical_rank"], hit.parts["vector_rank"]) for hit in hits] == [
        (2, 1.0, 1.0),
        (1, 1.0, 1.0),
        (3, 3.0, 1.0),
    ]
    add(service, "Alice lives in Oslo", "alice LIVES in oslo")
    assert texts(service, "Where does Alice live?") == ["alice LIVES in oslo", "Alice lives in Oslo"]


def test_common_words_do_not_hide_rare_ones(service: MemoryService) -> None:
    add(service, *(f"the meeting about budget number {i}" for i in range(700)))
    add(service, "the meeting about zeppelins")
    assert texts(service, "meeting about budget and zeppelins", RecallOptions(k=1)) == ["the meeting about zeppelins"]
    assert len(texts(service, "meeting about", RecallOptions(k=5))) == 5


@pytest.mark.parametrize(
    "options",
    [
        RecallOptions(k=0),
        RecallOptions(k=-1),
        RecallOptions(k=10**9),
        RecallOptions(budget_tokens=-1),
        RecallOptions(neighbours=-1),
        RecallOptions(neighbours=99),
        RecallOptions(conversation=""),
    ],
)
def test_bad_options_are_refused(service: MemoryService, options: RecallOptions) -> None:
    add(service, "x")
    with pytest.raises(InvalidInput):
        service.recall("u", "x", options)


class Letters:
    """Another embedder: counts of letters."""

    name = "letters"
    dim = 26
    min_similarity = 0.5

    def encode(self, texts: Sequence[str]) -> Vectors:
        counts = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)
        norms = np.linalg.norm(counts, axis=1, keepdims=True)
        return np.asarray(counts / np.where(norms == 0, 1, norms), np.float32)


def test_another_embedder_encodes_everything_again(open_service: MakeService) -> None:
    service = open_service()
    add(service, "listen", "enlist", "apple")
    assert "enlist" not in texts(service, "silent")
    service.close()
    service = open_service(MemoryConfig(embedder=Letters()))
    assert set(texts(service, "silent")) == {"listen", "enlist"}
    service.close()
    service = open_service(MemoryConfig(embedder=HashEmbedder()))
    assert "enlist" not in texts(service, "silent")
    assert texts(service, "apples") == ["apple"]


def test_vectors_out_of_step_are_made_again(open_service: MakeService) -> None:
    service = open_service()
    ids = add(service, *(f"fruit number {i}" for i in range(30)), "pomegranate")
    record = service._control.find("u")
    assert record is not None
    with service._pool.lease(record) as memory:
        memory.database.write(lambda t: t.run("DELETE FROM vectors WHERE seq % 2 = 1"))
        memory.database.write(lambda t: t.run("UPDATE vectors SET data = x'00' WHERE seq % 5 = 0"))
        memory.database.write(lambda t: t.run("DELETE FROM vectors WHERE seq = 31"))
    service.close()
    service = open_service()
    [found] = [r for r in service.recall("u", "pomegranates") if r.memory.id == ids[30]]
    assert found.parts["vector_rank"] == 1.0
    with service._pool.lease(record) as memory:
        stored = memory.database.read(lambda t: t.execute("SELECT seq, data FROM vectors ORDER BY seq"))
        expected = MemoryConfig().embedder.encode([memory.get(id).text for id in ids]).astype("<f2")
    assert b"".join(data for _, data in stored) == expected.tobytes()


class Watched(HashEmbedder):
    """The built-in embedder, with the length of the longest text that it was given."""

    longest = 0

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.longest = max(self.longest, *map(len, texts))
        return super().encode(texts)


@pytest.mark.parametrize("form", ["{question} {noise}", "{noise} {question}"])
def test_a_very_long_query_is_a_question_at_one_of_its_ends(open_service: MakeService, form: str) -> None:
    embedder = Watched()
    service = open_service(MemoryConfig(embedder=embedder))
    service.add("u", [NewMemory("The vault code is 4711."), NewMemory("Tea is served at five.")])
    noise = " ".join(f"noise{number}" for number in range(60_000))
    found = service.recall("u", form.format(question="What is the vault code?", noise=noise))
    assert found[0].memory.text == "The vault code is 4711."
    assert embedder.longest < 20_000 < len(noise)
