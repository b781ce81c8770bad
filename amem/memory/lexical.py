"""The full-text side: what of a memory is indexed, and how a question becomes a query.

Each memory is indexed together with the live memory just before it in its conversation, as a second column of lower
weight, so that "Denver." is found by the question that came before it. The index keeps no text; to take a memory out
one has to say what was put in, and that is always derivable from the rows: hence `reindexed`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from amem.memory.database import Transaction
from amem.memory.embed import is_function_word

_WORDS = ("unicode61", "remove_diacritics", "2")
_STEMS = ("porter", *_WORDS)
_RANK = "bm25(1.0, 0.65)"
_MAX_TERMS = 16
_COMMON_SHARE = 8  # a term in more than 1/8 of the rows says little and costs most of the time
_COMMON_ROWS = 500

_DOCUMENT = """
SELECT m.text, coalesce((SELECT p.text FROM memories p WHERE p.conversation = m.conversation AND p.ordinal < m.ordinal
  AND p.superseded_by IS NULL AND p.conversation IS NOT NULL ORDER BY p.ordinal DESC LIMIT 1), '')
FROM memories m WHERE m.seq = ? AND m.superseded_by IS NULL"""

_FOLLOWER = """
SELECT n.seq FROM memories m JOIN memories n ON n.conversation = m.conversation AND n.ordinal > m.ordinal
WHERE m.seq = ? AND n.superseded_by IS NULL AND n.conversation IS NOT NULL ORDER BY n.ordinal LIMIT 1"""


def insert(transaction: Transaction, seq: int) -> None:
    """Indexes the last memory of its conversation."""
    for text, context in transaction.execute(_DOCUMENT, (seq,)):
        transaction.run("INSERT INTO lexical(rowid, text, context) VALUES (?, ?, ?)", (seq, text, context))


@contextlib.contextmanager
def reindexed(transaction: Transaction, seq: int) -> Iterator[None]:
    """Around any change of a live memory: its own entry and that of the memory behind it follow the rows."""
    touched = [seq, *(row[0] for row in transaction.execute(_FOLLOWER, (seq,)))]
    for each in touched:
        for text, context in transaction.execute(_DOCUMENT, (each,)):
            sql = "INSERT INTO lexical(lexical, rowid, text, context) VALUES ('delete', ?, ?, ?)"
            transaction.run(sql, (each, text, context))
    yield
    for each in touched:
        insert(transaction, each)


def search(
    transaction: Transaction, query: str, limit: int, conversation: str | None = None
) -> list[tuple[int, float]]:
    """(seq, BM25) of the best matches, best first. No text is too strange: every word of it is data, never syntax."""
    match = _match(transaction, query)
    if not match:
        return []
    sql = f"SELECT rowid, rank FROM lexical WHERE lexical MATCH ? AND rank MATCH '{_RANK}'"
    values: list[str | int] = [match]
    if conversation is not None:
        sql += (
            " AND rowid IN (SELECT seq FROM memories m JOIN conversations c ON c.id = m.conversation WHERE name = ?)"
        )
        values.append(conversation)
    rows = transaction.execute(f"{sql} ORDER BY rank LIMIT ?", (*values, limit))
    return [(int(seq), -float(rank)) for seq, rank in rows]


def _match(transaction: Transaction, query: str) -> str:
    terms = list(dict.fromkeys(transaction.tokens(_WORDS, query)))
    content = [term for term in terms if not is_function_word(term)]
    chosen = _informative(transaction, content or terms)
    return " OR ".join('"' + term.replace('"', '""') + '"' for term in chosen)


def _informative(transaction: Transaction, terms: list[str]) -> list[str]:
    """The rarest known terms; common ones only where nothing rarer matches."""
    stems = {term: (transaction.tokens(_STEMS, term) or [term])[0] for term in terms}
    rows: dict[str, int] = {}
    for start in range(0, len(terms), 500):
        part = [stems[term] for term in terms[start : start + 500]]
        marks = ", ".join("?" * len(part))
        sql = f"SELECT term, doc FROM lexical_terms WHERE term IN ({marks})"
        rows.update(transaction.execute(sql, part))
    known = sorted((term for term in terms if stems[term] in rows), key=lambda term: rows[stems[term]])
    [(total,)] = transaction.execute("SELECT coalesce(max(seq), 0) FROM memories")
    common = max(_COMMON_ROWS, total // _COMMON_SHARE)
    return [term for term in known if rows[stems[term]] <= common][:_MAX_TERMS] or known[:1]
