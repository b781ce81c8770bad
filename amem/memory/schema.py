"""The tables of control.db and of a user's memory.db, and the check that a file really is one of them."""

from __future__ import annotations

from pathlib import Path

from amem.memory.database import Database, Transaction
from amem.memory.datadir import sync_directory
from amem.memory.errors import Damaged, DataDirError

_CONTROL_ID = 0x616D6331  # "amc1"
_TENANT_ID = 0x616D7431  # "amt1"
_VERSION = 1
_MAX_GROUP = 64

CONTROL = """
CREATE TABLE tenants(
  id BLOB PRIMARY KEY, user TEXT UNIQUE, secret BLOB, key BLOB, created REAL NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('new', 'live', 'erased'))
) WITHOUT ROWID;
CREATE TABLE session_owners(
  session TEXT NOT NULL, tenant BLOB NOT NULL REFERENCES tenants(id) ON DELETE CASCADE, PRIMARY KEY (session, tenant)
) WITHOUT ROWID;
CREATE INDEX session_owner_tenant ON session_owners(tenant);
"""

# `seq` is AUTOINCREMENT: a row number is never given twice, so a late vector can never name another memory.
# The full-text index keeps no text of its own (content=''), and it drops deleted words at once (secure-delete).
TENANT = """
CREATE TABLE conversations(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, next INTEGER NOT NULL);
CREATE TABLE memories(
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, text TEXT NOT NULL, digest BLOB NOT NULL,
  conversation INTEGER REFERENCES conversations(id), ordinal INTEGER NOT NULL, key TEXT, metadata TEXT,
  created REAL NOT NULL, updated REAL NOT NULL, seen INTEGER NOT NULL DEFAULT 1, version INTEGER NOT NULL DEFAULT 1,
  superseded_by TEXT
);
CREATE UNIQUE INDEX live_key ON memories(key) WHERE key IS NOT NULL AND superseded_by IS NULL;
CREATE INDEX live_digest ON memories(digest) WHERE superseded_by IS NULL;
CREATE INDEX live_place ON memories(conversation, ordinal) WHERE superseded_by IS NULL AND conversation IS NOT NULL;
CREATE INDEX any_conversation ON memories(conversation) WHERE conversation IS NOT NULL;
CREATE INDEX superseded ON memories(superseded_by) WHERE superseded_by IS NOT NULL;
CREATE TABLE vectors(
  seq INTEGER PRIMARY KEY REFERENCES memories(seq) ON DELETE CASCADE, embedder TEXT NOT NULL, data BLOB NOT NULL
);
CREATE VIRTUAL TABLE lexical USING fts5(
  text, context, content='', tokenize='porter unicode61 remove_diacritics 2'
);
INSERT INTO lexical(lexical, rank) VALUES ('secure-delete', 1);
CREATE VIRTUAL TABLE lexical_terms USING fts5vocab(lexical, 'row');
CREATE TABLE sessions(
  id TEXT PRIMARY KEY, epoch INTEGER NOT NULL, budget INTEGER NOT NULL, turn INTEGER NOT NULL,
  created REAL NOT NULL, used REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE residents(
  session TEXT NOT NULL REFERENCES sessions(id) ON DELETE CASCADE, place INTEGER NOT NULL, batch INTEGER NOT NULL,
  anchor TEXT, memory TEXT NOT NULL, tokens INTEGER NOT NULL, score REAL NOT NULL, hits INTEGER NOT NULL,
  turn INTEGER NOT NULL, PRIMARY KEY (session, place)
) WITHOUT ROWID;
CREATE UNIQUE INDEX resident_memory ON residents(memory, session);
CREATE TABLE requests(key TEXT PRIMARY KEY, digest BLOB, answer TEXT NOT NULL, created REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX request_age ON requests(created);
"""


def open_control(path: Path, key: bytes) -> Database:
    """Opens control.db, or makes it: under another name first, so that a crash leaves none or a whole one."""
    if not path.exists():
        draft = path.with_name("new-" + path.name)
        remove_files(draft)
        _open(draft, key, True, CONTROL, _CONTROL_ID, _MAX_GROUP).close()
        draft.replace(path)
        sync_directory(path.parent)
    return _open(path, key, False, CONTROL, _CONTROL_ID, _MAX_GROUP)


def remove_files(path: Path) -> None:
    """Unlinks a database and what SQLite keeps beside it."""
    for name in (path.name, f"{path.name}-wal", f"{path.name}-journal"):
        path.with_name(name).unlink(missing_ok=True)


def open_tenant(path: Path, key: bytes, create: bool, max_group: int) -> Database:
    """Opens a user's database, or creates it. A file without our tables is Damaged."""
    return _open(path, key, create, TENANT, _TENANT_ID, max_group)


def _open(path: Path, key: bytes, create: bool, tables: str, application: int, max_group: int) -> Database:
    database = Database(path, key, create, max_group)
    try:
        found, version = database.read(_identity)
        if create:
            database.write(lambda t: _create(t, tables, application))
        elif found != application:
            raise Damaged(f"the database {path} is empty or not ours; restore it from a backup")
        elif version > _VERSION:
            raise DataDirError(f"{path} has schema {version}, this amem knows {_VERSION}; use the newer amem")
    except BaseException:
        database.close()
        raise
    return database


def _identity(transaction: Transaction) -> tuple[int, int]:
    [(application,)] = transaction.execute("PRAGMA application_id")
    [(version,)] = transaction.execute("PRAGMA user_version")
    return application, version


def _create(transaction: Transaction, tables: str, application: int) -> None:
    transaction.execute(tables)
    transaction.execute(f"PRAGMA application_id = {application}")
    transaction.execute(f"PRAGMA user_version = {_VERSION}")
