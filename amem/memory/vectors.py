"""Nearest vectors of one user: an exact matrix, and above a size an HNSW graph beside it.

Both are caches in memory, derived from the rows of the database when it is opened; nothing of them is on disk. The
graph (Malkov & Yashunin, 2016, by hnswlib) is built in the background, and search is exact until it is there.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amem.memory.embed import Vectors

Found = list[tuple[int, float]]

_M, _EF_BUILD, _EF_SEARCH = 16, 200, 128
_BUILD_STEP = 256
_MAX_DEAD_SHARE = 0.2


class VectorIndex:
    """Thread-safe. Vectors are unit length, scores cosines. `graph_rows`: no graph below this number of vectors."""

    def __init__(self, dim: int, graph_rows: int) -> None:
        self.dim = dim
        self._graph_rows = graph_rows
        self._lock = threading.RLock()
        self._matrix: Vectors = np.zeros((16, dim), np.float32)
        self._seqs: NDArray[np.int64] = np.zeros(16, np.int64)
        self._slots: dict[int, int] = {}
        self._graph: _Graph | None = None
        self._builder: _Builder | None = None

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def has_graph(self) -> bool:
        return self._graph is not None

    def put(self, seqs: Sequence[int], vectors: Vectors) -> None:
        with self._lock:
            for seq, vector in zip(seqs, vectors, strict=True):
                slot = self._slots.setdefault(seq, len(self._slots))
                if slot >= len(self._seqs):
                    self._grow()
                self._matrix[slot] = vector
                self._seqs[slot] = seq
            if self._builder is not None:
                self._builder.changed.update(seqs)
            if self._graph is not None:
                self._graph.put(seqs, vectors)
            self._refresh()

    def remove(self, seqs: Sequence[int]) -> int:
        """Forgets vectors and overwrites them with zeros. Returns how many there were."""
        with self._lock:
            known = [seq for seq in seqs if seq in self._slots]
            for seq in known:
                slot, last = self._slots.pop(seq), len(self._slots)
                if slot != last:
                    self._matrix[slot] = self._matrix[last]
                    self._seqs[slot] = self._seqs[last]
                    self._slots[int(self._seqs[slot])] = slot
                self._matrix[last] = 0.0
            if self._builder is not None:
                self._builder.changed.update(known)
            if self._graph is not None:
                self._graph.remove(known)
            self._refresh()
            return len(known)

    def search(self, query: NDArray[np.float32], limit: int, floor: float) -> Found:
        """(seq, cosine) of at most `limit` vectors with cosine ≥ `floor`, best first."""
        with self._lock:
            limit = min(limit, len(self._slots))
            if limit == 0 or not query.any():
                return []
            found = self._graph.search(query, limit) if self._graph is not None else None
            if found is None:
                found = self.exact(query, limit)
        return [(seq, score) for seq, score in found if score >= floor]

    def exact(self, query: NDArray[np.float32], limit: int) -> Found:
        with self._lock:
            count = len(self._slots)
            scores = _cosines(self._matrix[:count], query)
            limit = min(limit, count)
            best = np.argpartition(-scores, limit - 1)[:limit] if limit else np.zeros(0, np.int64)
            best = best[np.lexsort((-self._seqs[best], -scores[best]))]
            return [(int(self._seqs[slot]), float(scores[slot])) for slot in best]

    def scores(self, query: NDArray[np.float32], seqs: Sequence[int]) -> dict[int, float]:
        """Cosines of these vectors, as far as they are here."""
        with self._lock:
            known = [seq for seq in seqs if seq in self._slots]
            cosines = _cosines(self._matrix[[self._slots[seq] for seq in known]], query)
        return {seq: float(cosine) for seq, cosine in zip(known, cosines, strict=True)}

    def close(self) -> None:
        with self._lock:
            builder, self._builder, self._graph_rows = self._builder, None, 1 << 62
        if builder is not None:
            builder.stop()

    def wait(self) -> None:
        """Returns when no graph is being built."""
        while (builder := self._builder) is not None:
            builder.join()

    def _grow(self) -> None:
        self._matrix = np.concatenate([self._matrix, np.zeros_like(self._matrix)])
        self._seqs = np.concatenate([self._seqs, np.zeros_like(self._seqs)])

    def _refresh(self) -> None:
        """Starts a build when a graph is due: none yet, or too many dead entries in the one there is."""
        if self._graph is not None and self._graph.dead > _MAX_DEAD_SHARE * max(1, len(self._slots)):
            self._graph = None
        if self._graph is None and self._builder is None and len(self._slots) >= self._graph_rows and _available():
            count = len(self._slots)
            self._builder = _Builder(self, self._seqs[:count].copy(), self._matrix[:count].copy())
            self._builder.start()

    def install(self, builder: _Builder, graph: _Graph) -> None:
        """Called by the builder: brings the graph up to date with what changed meanwhile, and puts it to use."""
        with self._lock:
            if self._builder is not builder:
                return
            self._builder = None
            gone = [seq for seq in builder.changed if seq not in self._slots]
            moved = [seq for seq in builder.changed if seq in self._slots]
            graph.remove(gone)
            if moved:
                graph.put(moved, self._matrix[[self._slots[seq] for seq in moved]])
            self._graph = graph


class _Builder(threading.Thread):
    def __init__(self, index: VectorIndex, seqs: NDArray[np.int64], matrix: Vectors) -> None:
        super().__init__(name="amem-vectors", daemon=True)
        self._index, self._seqs, self._matrix = index, seqs, matrix
        self._stopped = False
        self.changed: set[int] = set()

    def run(self) -> None:
        graph = _Graph(self._matrix.shape[1], len(self._seqs))
        for start in range(0, len(self._seqs), _BUILD_STEP):
            if self._stopped:
                return
            graph.put(self._seqs[start : start + _BUILD_STEP].tolist(), self._matrix[start : start + _BUILD_STEP])
        self._index.install(self, graph)

    def stop(self) -> None:
        self._stopped = True
        if threading.current_thread() is not self:
            self.join()


class _Graph:
    """An hnswlib index that grows on its own and never gives more neighbours than it has."""

    def __init__(self, dim: int, rows: int) -> None:
        import hnswlib

        self._index: Any = hnswlib.Index(space="ip", dim=dim)
        self._index.init_index(max_elements=max(16, rows * 2), ef_construction=_EF_BUILD, M=_M, random_seed=1)
        self._index.set_num_threads(1)
        self._live: set[int] = set()
        self._known: set[int] = set()

    @property
    def dead(self) -> int:
        return len(self._known) - len(self._live)

    def put(self, seqs: Sequence[int], vectors: Vectors) -> None:
        fresh = len(set(seqs) - self._known)
        if len(self._known) + fresh > self._index.get_max_elements():
            self._index.resize_index(2 * (len(self._known) + fresh))
        for seq in set(seqs) & (self._known - self._live):
            self._index.unmark_deleted(seq)
        self._index.add_items(vectors, list(seqs))
        self._known.update(seqs)
        self._live.update(seqs)

    def remove(self, seqs: Sequence[int]) -> None:
        for seq in seqs:
            if seq in self._live:
                self._index.mark_deleted(seq)
                self._live.discard(seq)

    def search(self, query: NDArray[np.float32], limit: int) -> Found | None:
        """None where the graph cannot answer, which happens when deleted entries cut off a part of it."""
        limit = min(limit, len(self._live))
        if limit == 0:
            return []
        self._index.set_ef(max(_EF_SEARCH, 2 * limit))
        try:
            labels, distances = self._index.knn_query(query[None], k=limit)
        except RuntimeError:
            return None
        return [(int(label), 1.0 - float(far)) for label, far in zip(labels[0], distances[0], strict=True)]


def _cosines(matrix: Vectors, query: NDArray[np.float32]) -> Vectors:
    """Not `@`: a BLAS spreads so small a product over threads, and then waits for them on a busy machine."""
    cosines: Vectors = np.einsum("ij,j->i", matrix, query)
    return cosines


def _available() -> bool:
    return importlib.util.find_spec("hnswlib") is not None
