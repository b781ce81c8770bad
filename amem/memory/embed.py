"""Text to vectors. The protocol, and the built-in embedder: feature hashing, no weights, no download, no state.

A word is a bundle of hashed features: its stem, and the 3- and 4-letter pieces of its spelling (Bojanowski et al.,
2017), so that inflections, typos and compounds land near each other; neighbouring words add a pair feature. Features
are summed with signs by their hash (Weinberger et al., 2009). It knows spelling, not meaning: it is a fuzzy lexical
measure, and any real encoder can stand in for it through the same protocol.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
_Features = tuple[NDArray[np.int64], NDArray[np.float64]]  # buckets, and what is added to each

_WORD = re.compile(r"\w+")
_FUNCTION_WORDS = frozenset(
    """
    a about all also am an and any are as at be been being but by can could did do does for from had has have
    having he her hers him his how i if in into is it its just me my of off on or our out s she should so some t
    than that the their them then there these they this those to too up us very was we were what when where which
    while who whom whose why will with would you your
    """.split()
)
_FUNCTION_WEIGHT = 0.08
_PIECE_WEIGHT = 1.2
_PAIR_WEIGHT = 0.4
_IDEOGRAPHS = "\u2e80"  # from here on words are not separated by spaces, and a character or two is a word
_SPREAD = 4  # buckets a whole-word feature is spread over, so that one collision costs a quarter of it


class Embedder(Protocol):
    """`encode` gives one unit vector (or zero) a text, [n, dim] float32. Called from several threads at once.

    Vectors of different `name` or `dim` are never compared: after a change all texts are encoded again. Below
    `min_similarity` (cosine) two texts have nothing to do with each other.
    """

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def min_similarity(self) -> float: ...
    def encode(self, texts: Sequence[str]) -> Vectors: ...


class HashEmbedder:
    """The built-in embedder. The same text gives the same vector in every process and version of Python."""

    def __init__(self, dim: int = 512) -> None:
        if dim < 64:
            raise ValueError(f"dim must be at least 64, got {dim}: below that unrelated texts look alike")
        self.name = f"hash-1-{dim}"
        self.dim = dim
        self.min_similarity = 0.18
        self._word = lru_cache(maxsize=50_000)(self._word_features)
        self._pair = lru_cache(maxsize=50_000)(self._pair_features)

    def encode(self, texts: Sequence[str]) -> Vectors:
        out = np.zeros((len(texts), self.dim), np.float32)
        for row, text in enumerate(texts):
            found = words(text)
            buckets, values = [], []
            for word, times in Counter(found).items():
                weight = (_FUNCTION_WEIGHT if word in _FUNCTION_WORDS else 1.0) * (1.0 + np.log(times))
                where, what = self._word(word)
                buckets.append(where)
                values.append(what * weight)
            content = [word for word in found if word not in _FUNCTION_WORDS]
            for pair in set(pairwise(content)):
                where, what = self._pair(*pair)
                buckets.append(where)
                values.append(what)
            if buckets:
                summed = np.bincount(np.concatenate(buckets), np.concatenate(values), minlength=self.dim)
                out[row] = summed / (np.linalg.norm(summed) or 1.0)
        return out

    def _word_features(self, word: str) -> _Features:
        padded = f"<{word}>"
        sizes = (1, 2) if max(word) >= _IDEOGRAPHS else (3, 4)
        pieces = sorted({padded[i : i + n] for n in sizes for i in range(len(padded) - n + 1)} - {"<", ">"})
        buckets, signs = self._hash([f"w {stem(word)} {i}" for i in range(_SPREAD)] + [f"p {p}" for p in pieces])
        signs[:_SPREAD] /= np.sqrt(_SPREAD)
        signs[_SPREAD:] *= _PIECE_WEIGHT / np.sqrt(max(1, len(pieces)))
        return buckets, signs

    def _pair_features(self, left: str, right: str) -> _Features:
        buckets, signs = self._hash([f"b {stem(left)} {stem(right)} {i}" for i in range(_SPREAD)])
        return buckets, signs * (_PAIR_WEIGHT / np.sqrt(_SPREAD))

    def _hash(self, features: Sequence[str]) -> _Features:
        digests = b"".join([blake2b(feature.encode(), digest_size=4).digest() for feature in features])
        hashed = np.frombuffer(digests, "<u4")
        return (hashed >> 1).astype(np.int64) % self.dim, np.where(hashed & 1, 1.0, -1.0)


def words(text: str) -> list[str]:
    """Words of a text, compatibility-normalised and case-folded."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def is_function_word(word: str) -> bool:
    return word in _FUNCTION_WORDS


def stem(word: str) -> str:
    """A light English stemmer: plural, -ed, -ing and final e, so that lives, living and lived meet."""
    if len(word) > 4 and word.endswith("ies"):
        word = word[:-3] + "y"
    elif len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending in ("ing", "ed"):
        if len(word) > len(ending) + 2 and word.endswith(ending):
            word = word[: -len(ending)]
            if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz":
                word = word[:-1]
            break
    return word[:-1] if len(word) > 3 and word.endswith("e") else word
