"""One encrypted SQLite file: durable writes with group commit, checked reads, typed errors.

SQLite comes from apsw-sqlite3mc, not from the standard library, for two reasons: plain SQLite serves flipped bits as
rows (its pages have no checksum, these are authenticated), and versions before 3.51.3 can corrupt a WAL database that
is written and checkpointed at the same time. The page cipher gives encryption at rest, and erasure by dropping a key.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import apsw

from amem.memory.errors import Conflict, Damaged, MemoryFault, Unavailable

T = TypeVar("T")
Row = tuple[Any, ...]
Value = str | bytes | int | float | None

MIN_SQLITE = 3_051_003
KEY_BYTES = 32

# Before the first read. EXCLUSIVE comes before WAL: no shared-memory file, and no second process can get in.
_PRAGMAS = (
    "locking_mode = EXCLUSIVE",
    "journal_mode = WAL",
    "synchronous = FULL",  # a commit that returned survives a power cut; NORMAL does not promise that
    "secure_delete = ON",  # freed bytes are zeroed
    "mmap_size = 0",  # a bad sector is an error code, not a SIGBUS
    "foreign_keys = ON",
    "trusted_schema = OFF",
    "cell_size_check = ON",
    "wal_autocheckpoint = 1000",
)


class Transaction:
    """What a write may do. Hooks given to `after_commit` run once the commit is durable, in commit order."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self.hooks: list[Callable[[], None]] = []

    def execute(self, sql: str, values: Sequence[Value] = ()) -> list[Row]:
        return self._connection.execute(sql, tuple(values)).fetchall()

    def run(self, sql: str, values: Sequence[Value] = ()) -> int:
        """Executes one statement and returns the number of rows that it changed."""
        self._connection.execute(sql, tuple(values)).fetchall()
        return int(self._connection.changes())

    def tokens(self, tokenizer: Sequence[str], text: str) -> list[str]:
        """`text` as an FTS5 tokenizer splits it: its name, then its arguments."""
        split = self._connection.fts5_tokenizer(tokenizer[0], list(tokenizer[1:]))
        found = split(text.encode(), apsw.FTS5_TOKENIZE_QUERY, None, include_offsets=False, include_colocated=False)
        return [str(token) for token in found]

    def after_commit(self, hook: Callable[[], None]) -> None:
        self.hooks.append(hook)


class _Job(Generic[T]):
    def __init__(self, operation: Callable[[Transaction], T]) -> None:
        self.operation = operation
        self.done = False
        self.error: BaseException | None = None
        self.results: list[T] = []


class Database:
    """One file, one connection, any number of threads.

    There is no writer thread: of the threads that wait to write, the one that gets the lock runs everything that is
    queued in one transaction, so that one fsync serves them all.
    """

    def __init__(self, path: Path, key: bytes, create: bool, max_group: int = 64) -> None:
        """Raises Damaged when the file is missing (and not `create`), corrupt, or encrypted with another key."""
        require_sqlite()
        self.path = path
        self.broken = False
        self._max_group = max_group
        self._lock = threading.RLock()
        self._queue: deque[_Job[Any]] = deque()
        if not create and not (path.is_file() and path.stat().st_size):
            raise Damaged(f"the database {path} is missing or empty; restore it from a backup")
        with self._translated():
            self._connection = _connect(path, key, create)

    def read(self, operation: Callable[[Transaction], T]) -> T:
        with self._lock, self._translated():
            self._check_open()
            return operation(Transaction(self._connection))

    def write(self, operation: Callable[[Transaction], T]) -> T:
        """Runs `operation` in a transaction and returns when it is durable. An exception in it undoes only itself."""
        job: _Job[T] = _Job(operation)
        self._queue.append(job)
        with self._lock:
            while not job.done:
                self._run_group([self._queue.popleft() for _ in range(min(len(self._queue), self._max_group))])
        if job.error is not None:
            raise job.error
        return job.results[0]

    def empty_wal(self) -> None:
        """Moves the write-ahead log into the file and truncates it, so that it keeps no older page."""
        with self._lock, self._translated():
            self._check_open()
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        with self._lock:
            self.broken = True
            with contextlib.suppress(apsw.Error):
                self._connection.close()

    def _run_group(self, jobs: list[_Job[Any]]) -> None:
        hooks: list[Callable[[], None]] = []
        try:
            self._check_open()
            with self._translated():
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    for job in jobs:
                        hooks += self._run_one(job)
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
        except BaseException as error:
            hooks = []
            for job in jobs:
                job.error = error
        for job in jobs:
            job.done = True
        try:
            for hook in hooks:
                hook()
        except BaseException:
            self.broken = True  # what the hooks keep in step is rebuilt when the file is opened again
            raise

    def _run_one(self, job: _Job[Any]) -> list[Callable[[], None]]:
        """Runs one operation in a savepoint. Errors that end the whole transaction are passed on."""
        transaction = Transaction(self._connection)
        self._connection.execute("SAVEPOINT job")
        try:
            job.results.append(job.operation(transaction))
        except Exception as error:
            if not self._connection.in_transaction or isinstance(error, apsw.CorruptError | apsw.IOError):
                raise
            self._connection.execute("ROLLBACK TO job")
            self._connection.execute("RELEASE job")
            job.error = error if isinstance(error, MemoryFault) else self._translate(error)
            return []
        self._connection.execute("RELEASE job")
        return transaction.hooks

    def _check_open(self) -> None:
        if self.broken:
            raise Unavailable("the database was closed after an error or by a shutdown; try again")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except apsw.Error as error:
            raise self._translate(error) from error
        except OSError as error:
            raise Unavailable(f"cannot open {self.path}: {error.strerror}; check the disk and limits") from error

    def _translate(self, error: Exception) -> Exception:
        if isinstance(error, apsw.NotADBError | apsw.CorruptError):
            self.broken = True
            return Damaged(f"the database {self.path} is damaged ({error}); restore it from a backup")
        if isinstance(error, apsw.FullError):
            return Unavailable("the disk is full; free some space and try again")
        if isinstance(error, apsw.BusyError | apsw.LockedError):
            return Unavailable(f"the database {self.path} is locked by another process; stop it")
        if isinstance(error, apsw.IOError | apsw.CantOpenError | apsw.ReadOnlyError):
            # After a failed fsync the state of the file is unknown: never retry on this handle.
            self.broken = True
            return Unavailable(f"the database {self.path} cannot be read or written ({error}); check the disk")
        if isinstance(error, apsw.ConstraintError):
            return Conflict(f"a concurrent change got in between ({error}); try again")
        return error


def require_sqlite() -> None:
    """Raises Unavailable unless SQLite is the encrypting build and new enough."""
    found = apsw.sqlite_lib_version()
    if apsw.SQLITE_VERSION_NUMBER < MIN_SQLITE or not getattr(apsw, "mc_version", None):
        raise Unavailable(
            f"amem needs apsw-sqlite3mc with SQLite 3.51.3 or later, found SQLite {found}"
            f"{'' if getattr(apsw, 'mc_version', None) else ' without encryption'}; "
            "run: pip uninstall apsw && pip install --force-reinstall apsw-sqlite3mc"
        )


def _connect(path: Path, key: bytes, create: bool) -> apsw.Connection:
    if len(key) != KEY_BYTES:
        raise ValueError(f"a database key has {KEY_BYTES} bytes, got {len(key)}")
    if create:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600))
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_NOFOLLOW)
    try:
        connection.execute("PRAGMA cipher = 'chacha20'").fetchall()
        connection.execute(f"PRAGMA key = 'raw:{key.hex()}'").fetchall()
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}").fetchall()
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        connection.set_busy_timeout(1000)
    except BaseException:
        connection.close()
        raise
    return connection
