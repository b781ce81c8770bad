"""Who is who: user name → random tenant id, secret and database key. The only place where user names are stored.

control.db is encrypted with a key derived from the master key, so the keys inside it are wrapped by that. Erasing a
user deletes the name, the secret and the key in one durable transaction; from then on the user's file is noise, in
backups of the directory too. What is left to do after that (unlinking) is finished at the next start if need be.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field

from amem.engine.types import TENANT_ID_BYTES, TENANT_SECRET_BYTES
from amem.memory.database import KEY_BYTES, Row, Transaction
from amem.memory.datadir import DataDir
from amem.memory.errors import NotFound
from amem.memory.schema import open_control

_FIELDS = "user, id, secret, key, created, state"


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """`new` until the database file exists: a live tenant whose file is missing is damaged, a new one is created."""

    user: str
    id: bytes
    secret: bytes = field(repr=False)
    key: bytes = field(repr=False)
    created: float
    new: bool


class Control:
    def __init__(self, directory: DataDir) -> None:
        key = hashlib.blake2b(b"amem control.db", key=directory.master_key, digest_size=KEY_BYTES).digest()
        self._database = open_control(directory.control_path, key)

    def find(self, user: str) -> TenantRecord | None:
        rows = self._database.read(lambda t: t.execute(f"SELECT {_FIELDS} FROM tenants WHERE user = ?", (user,)))
        return _record(rows[0]) if rows else None

    def create(self, user: str, now: float) -> TenantRecord:
        """Durable when it returns. Two threads that create the same user get the same record."""
        fresh = (user, secrets.token_bytes(TENANT_ID_BYTES), secrets.token_bytes(TENANT_SECRET_BYTES))

        def insert(transaction: Transaction) -> TenantRecord:
            transaction.run(
                f"INSERT INTO tenants({_FIELDS}) VALUES (?, ?, ?, ?, ?, 'new') ON CONFLICT(user) DO NOTHING",
                (*fresh, secrets.token_bytes(KEY_BYTES), now),
            )
            return _record(transaction.execute(f"SELECT {_FIELDS} FROM tenants WHERE user = ?", (user,))[0])

        return self._database.write(insert)

    def mark_live(self, tenant_id: bytes) -> None:
        self._database.write(
            lambda t: t.run("UPDATE tenants SET state = 'live' WHERE id = ? AND state = 'new'", (tenant_id,))
        )

    def users(self, after: str, limit: int) -> list[TenantRecord]:
        sql = f"SELECT {_FIELDS} FROM tenants WHERE user > ? ORDER BY user LIMIT ?"
        return [_record(row) for row in self._database.read(lambda t: t.execute(sql, (after, limit)))]

    def count(self) -> int:
        [(users,)] = self._database.read(lambda t: t.execute("SELECT count(user) FROM tenants"))
        return int(users)

    def erase(self, tenant_id: bytes) -> None:
        """Destroys name, secret and key. The id stays until `finish`, so that a crash leaves no file behind."""

        def destroy(transaction: Transaction) -> None:
            transaction.run("DELETE FROM session_owners WHERE tenant = ?", (tenant_id,))
            transaction.run(
                "UPDATE tenants SET user = NULL, secret = NULL, key = NULL, state = 'erased' WHERE id = ?",
                (tenant_id,),
            )

        self._database.write(destroy)
        self._database.empty_wal()

    def erased(self) -> list[bytes]:
        return [
            row[0] for row in self._database.read(lambda t: t.execute("SELECT id FROM tenants WHERE user IS NULL"))
        ]

    def finish(self, tenant_id: bytes) -> None:
        self._database.write(lambda t: t.run("DELETE FROM tenants WHERE id = ? AND user IS NULL", (tenant_id,)))

    def own_session(self, session: str, tenant_id: bytes, ended: list[str]) -> None:
        """Notes whose a session is, for requests that name only the session; `ended` ones are dropped."""

        def note(transaction: Transaction) -> None:
            transaction.run("INSERT OR IGNORE INTO session_owners VALUES (?, ?)", (session, tenant_id))
            for gone in ended:
                transaction.run("DELETE FROM session_owners WHERE session = ? AND tenant = ?", (gone, tenant_id))

        self._database.write(note)

    def disown_session(self, session: str, tenant_id: bytes) -> None:
        sql = "DELETE FROM session_owners WHERE session = ? AND tenant = ?"
        self._database.write(lambda t: t.run(sql, (session, tenant_id)))

    def session_owner(self, session: str) -> str:
        """The user of a session id. Raises NotFound also where two users chose the same id: then name the user."""
        sql = "SELECT user FROM session_owners JOIN tenants ON id = tenant WHERE session = ? LIMIT 2"
        rows = self._database.read(lambda t: t.execute(sql, (session,)))
        if len(rows) != 1:
            raise NotFound(f"there is no session {session!r}; start one, or name its user", "session")
        return str(rows[0][0])

    def close(self) -> None:
        self._database.close()


def _record(row: Row) -> TenantRecord:
    user, tenant_id, secret, key, created, state = row
    return TenantRecord(user, tenant_id, secret, key, created, state == "new")
