"""The vector index against a plain search, through any changes, with and without a graph; and the embedder."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amem.memory import vectors as vectors_module
from amem.memory.embed import HashEmbedder, Vectors, stem, words
from amem.memory.vectors import VectorIndex

needs_graph = pytest.mark.skipif(importlib.util.find_spec("hnswlib") is None, reason="hnswlib is not installed")


def unit(rng: np.random.Generator, rows: int, dim: int = 32) -> Vectors:
    found = rng.standard_normal((rows, dim)).astype(np.float32)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


def plain(rows: dict[int, Vectors], query: Vectors, limit: int) -> list[int]:
    return sorted(rows, key=lambda seq: (-float(rows[seq] @ query), -seq))[:limit]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), steps=st.integers(1, 60))
def test_exact_search_follows_any_changes(seed: int, steps: int) -> None:
    rng, choose = np.random.default_rng(seed), random.Random(seed)
    index, rows = VectorIndex(32, 1 << 30), dict[int, Vectors]()
    for step in range(steps):
        if rows and choose.random() < 0.4:
            gone = choose.sample(list(rows), choose.randint(1, len(rows)))
            assert index.remove([*gone, 10**6 + step]) == len(gone)
            for seq in gone:
                del rows[seq]
        else:
            seqs = [choose.randint(1, 50) for _ in range(choose.randint(1, 5))]
            seqs = list(dict.fromkeys(seqs))
            fresh = unit(rng, len(seqs))
            index.put(seqs, fresh)
            rows.update(zip(seqs, fresh, strict=True))
        assert len(index) == len(rows)
        query = unit(rng, 1)[0]
        found = index.search(query, 7, -1.0)
        assert [seq for seq, _ in found] == plain(rows, query, 7)
        assert all(score == pytest.approx(float(rows[seq] @ query), abs=1e-5) for seq, score in found)
        assert index.scores(query, [*rows, 99]) == pytest.approx(
            {s: float(v @ query) for s, v in rows.items()}, abs=1e-5
        )


def test_a_floor_and_a_zero_query_find_nothing() -> None:
    index = VectorIndex(32, 1 << 30)
    rng = np.random.default_rng(1)
    index.put([1, 2, 3], unit(rng, 3))
    assert index.search(unit(rng, 1)[0], 10, 0.99) == []
    assert index.search(np.zeros(32, np.float32), 10, -1.0) == []


@needs_graph
def test_the_graph_finds_what_exact_search_finds() -> None:
    embedder = HashEmbedder()
    rng = random.Random(6)
    vocabulary = [
        f"{a}{b}" for a in ("lam", "tor", "vex", "quil", "bran", "dor") for b in ("ing", "ota", "ek", "ush", "ane")
    ]
    texts = [" ".join(rng.choices(vocabulary, k=8)) for _ in range(2500)]
    matrix = embedder.encode(texts)
    index = VectorIndex(embedder.dim, 2000)
    index.put(list(range(1, 1001)), matrix[:1000])
    index.wait()
    assert not index.has_graph
    index.put(list(range(1001, 2501)), matrix[1000:])
    index.wait()
    assert index.has_graph
    index.put([3001], embedder.encode(["lamota zeppelin"]))
    gone = list(range(1, 2501, 9))
    index.remove(gone)
    assert index.has_graph
    right = total = 0
    for query in embedder.encode([" ".join(rng.choices(vocabulary, k=4)) for _ in range(60)]):
        exact = {seq for seq, _ in index.exact(query, 10)}
        found = {seq for seq, _ in index.search(query, 10, -1.0)}
        assert len(found) == 10
        assert not found & set(gone)
        right, total = right + len(exact & found), total + 10
    assert right / total >= 0.95
    assert index.search(embedder.encode(["lamota zeppelins"])[0], 1, 0.0)[0][0] == 3001
    index.close()


@needs_graph
def test_changes_during_a_build_are_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    matrix, late = unit(rng, 600), unit(rng, 20)
    index = VectorIndex(32, 500)
    original = vectors_module._Builder.run

    def slow(builder: vectors_module._Builder) -> None:
        index.put(list(range(1001, 1021)), late)
        index.remove(list(range(1, 101)))
        index.put([200], late[:1])
        original(builder)

    monkeypatch.setattr(vectors_module._Builder, "run", slow)
    index.put(list(range(1, 601)), matrix)
    index.wait()
    assert index.has_graph
    for seq, vector in [*zip(range(1001, 1021), late, strict=True), (300, matrix[299])]:
        assert seq in {found for found, _ in index.search(vector, 2, 0.5)}
    assert {seq for seq, _ in index.search(late[0], 2, 0.99)} == {200, 1001}
    everything = {seq for seq, _ in index.search(matrix[0], 520, -1.0)}
    assert not everything & set(range(1, 101))
    index.close()


@needs_graph
def test_a_graph_with_too_many_dead_entries_is_built_again() -> None:
    index = VectorIndex(32, 100)
    rng = np.random.default_rng(5)
    matrix = unit(rng, 400)
    index.put(list(range(400)), matrix)
    index.wait()
    first = index._graph
    index.remove(list(range(200)))
    index.wait()
    assert index.has_graph
    assert index._graph is not first
    assert index.search(matrix[300], 1, 0.9) == [(300, pytest.approx(1.0, abs=1e-5))]
    index.remove(list(range(200, 350)))
    index.wait()
    assert not index.has_graph
    assert index.search(matrix[399], 1, 0.9)[0][0] == 399


@needs_graph
def test_close_stops_a_build() -> None:
    index = VectorIndex(64, 100)
    index.put(list(range(5000)), unit(np.random.default_rng(1), 5000, 64))
    builder = index._builder
    assert builder is not None
    index.close()
    assert not builder.is_alive()
    assert not index.has_graph


def test_without_hnswlib_search_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors_module, "_available", lambda: False)
    index = VectorIndex(32, 10)
    matrix = unit(np.random.default_rng(2), 100)
    index.put(list(range(100)), matrix)
    index.wait()
    assert not index.has_graph
    assert index.search(matrix[42], 1, 0.9)[0][0] == 42


def test_the_embedder_is_the_same_everywhere() -> None:
    code = "from amem.memory.embed import HashEmbedder; import sys, hashlib\n"
    code += "vectors = HashEmbedder().encode(['Alice lives in Denver, ünï']).astype('<f2')\n"
    code += "print(hashlib.sha256(vectors.tobytes()).hexdigest())"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("0", "1")
    }
    assert len(runs) == 1


def test_vectors_are_unit_or_zero_and_do_not_depend_on_the_batch() -> None:
    embedder = HashEmbedder()
    texts = ["Alice lives in Denver", "", "!!!", "a", "漢字", "x" * 10_000, "Alice Alice Alice"]
    batch = embedder.encode(texts)
    assert (batch.shape, batch.dtype) == ((7, 512), np.float32)
    norms = np.linalg.norm(batch, axis=1)
    assert norms == pytest.approx([1, 0, 0, 1, 1, 1, 1], abs=1e-5)
    for text, row in zip(texts, batch, strict=True):
        assert np.array_equal(embedder.encode([text])[0], row)
    assert embedder.encode([]).shape == (0, 512)


@pytest.mark.parametrize(
    ("near", "far"),
    [
        (("Alice lives in Denver", "where is Alice living"), ("Alice lives in Denver", "Bob plays the violin")),
        (("Maria enjoys sailing", "Mria enjoys sailling"), ("Maria enjoys sailing", "Peter enjoys knitting")),
        (("backup every night", "nightly backups"), ("backup every night", "lunch every Friday")),
        (("Donaudampfschiff", "Dampfschifffahrt"), ("Donaudampfschiff", "Gartenzaun")),
        (("我住在东京", "你住在东京吗"), ("我住在东京", "今天天气很好")),
    ],
)
def test_what_is_spelt_alike_is_near(near: tuple[str, str], far: tuple[str, str]) -> None:
    embedder = HashEmbedder()
    (a, b), (c, d) = embedder.encode(near), embedder.encode(far)
    assert float(a @ b) > max(float(c @ d) + 0.1, embedder.min_similarity)


def test_unrelated_texts_are_below_the_floor() -> None:
    embedder = HashEmbedder()
    rng = random.Random(8)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(4000)]
    matrix = embedder.encode([" ".join(vocabulary[i : i + 4]) for i in range(0, 4000, 4)])
    cosines = matrix[:500] @ matrix[500:].T
    assert (cosines > embedder.min_similarity).mean() < 1e-3


@pytest.mark.parametrize(
    "group", ["live lives living lived", "work works working worked", "company companies", "stop stopped"]
)
def test_inflections_share_a_stem(group: str) -> None:
    assert len({stem(word) for word in group.split()}) == 1


def test_words_are_normalised() -> None:
    assert words("ＦＵＬＬ Straße, Alice's") == ["full", "strasse", "alice", "s"]
