"""Stores keep users between requests: a log of each user's events, and a state of the model.

The log is the truth, and the state is a cache of it. A state that another model made is not used;
the state is then computed anew from the log. A store knows no model.

All stores are safe when several callers use them at once. Whoever adds events says how many events
the log had when the new state was computed. If the log has another number of events by now, the
store refuses the change, and the caller tries again.
"""

from __future__ import annotations

import sqlite3
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from tim4rec_jax.errors import UserError


class StoreError(UserError):
    """The store cannot be used now. Nothing is wrong with what it was asked, so ask again."""


class Snapshot(NamedTuple):
    """What a store holds of a user at one moment.

    Attributes:
        events: the number of events in the log.
        last: the time of the latest event, in whole seconds since 1970; `None` without events.
        state: the state after all events, if the model that asks has made it.
    """

    events: int
    last: int | None
    state: bytes | None


class Change(NamedTuple):
    """Events to add to a user's log, and the state after them.

    Attributes:
        user: the id of the user.
        expected: the number of events in the log when the state was computed.
        items: the original ids of the items of the new events.
        timestamps: the times of the new events, in whole seconds since 1970.
        state: the state after all events; `None` for a model without states.
    """

    user: str
    expected: int
    items: Sequence[str]
    timestamps: Sequence[int]
    state: bytes | None


@runtime_checkable
class Store(Protocol):
    """What a `Recommender` asks of a store."""

    def snapshots(self, users: Sequence[str], model: str) -> list[Snapshot]:
        """A snapshot of each user, in the same order; a new user has no events.

        Args:
            users: the ids of the users.
            model: the fingerprint of the model that asks; only its own states are returned.
        """
        ...

    def history(self, user: str) -> tuple[list[str], list[int]]:
        """The items and times of all events of a user by time; events of one time as they came."""
        ...

    def apply(self, changes: Sequence[Change], model: str) -> list[bool]:
        """Makes each change completely or not at all.

        Args:
            changes: at most one change per user.
            model: the fingerprint of the model that made the states.

        Returns:
            For each change, whether it was made; False if the log has another number of events
            than the change expects.
        """
        ...

    def delete(self, user: str) -> bool:
        """Forgets a user: the log, the state, and all that is left of them in files of the store.

        Returns:
            Whether the store knew the user.
        """
        ...

    def close(self) -> None:
        """Releases what the store holds open; it cannot be used any more."""
        ...


@dataclass
class _User:
    items: list[str] = field(default_factory=list)
    timestamps: list[int] = field(default_factory=list)
    model: str = ""
    state: bytes | None = None


class MemoryStore:
    """Keeps users in the memory of this process."""

    def __init__(self):
        self._users: dict[str, _User] = {}
        self._lock = threading.Lock()

    def snapshots(self, users: Sequence[str], model: str) -> list[Snapshot]:
        """See `Store`."""
        with self._lock:
            found = [self._users.get(user) or _User() for user in users]
            return [
                Snapshot(
                    len(user.items),
                    user.timestamps[-1] if user.timestamps else None,
                    user.state if user.model == model else None,
                )
                for user in found
            ]

    def history(self, user: str) -> tuple[list[str], list[int]]:
        """See `Store`."""
        with self._lock:
            found = self._users.get(user) or _User()
            return list(found.items), list(found.timestamps)

    def apply(self, changes: Sequence[Change], model: str) -> list[bool]:
        """See `Store`."""
        with self._lock:
            return [self._apply(change, model) for change in changes]

    def _apply(self, change: Change, model: str) -> bool:
        user = self._users.get(change.user) or _User()
        if len(user.items) != change.expected:
            return False
        for item, timestamp in zip(change.items, change.timestamps, strict=True):
            place = bisect_right(user.timestamps, timestamp)
            user.items.insert(place, item)
            user.timestamps.insert(place, timestamp)
        user.model, user.state = model, change.state
        self._users[change.user] = user
        return True

    def delete(self, user: str) -> bool:
        """See `Store`."""
        with self._lock:
            return self._users.pop(user, None) is not None

    def close(self) -> None:
        """See `Store`."""


_VERSION = 1
_SCHEMA = """
CREATE TABLE events (
  user TEXT, timestamp INTEGER, number INTEGER, item TEXT, PRIMARY KEY (user, timestamp, number)
) WITHOUT ROWID;
CREATE TABLE users (user TEXT PRIMARY KEY, events INTEGER, last INTEGER, model TEXT, state BLOB);
"""
# What to do, by the beginning of SQLite's name of an error.
_REMEDIES = {
    "SQLITE_READONLY": "make the file and its folder writable, or name another file",
    "SQLITE_CANTOPEN": "name a file in a folder that exists and is writable",
    "SQLITE_BUSY": "end the other process that writes to it, or wait for it",
    "SQLITE_CORRUPT": "put a copy of the file in its place, or name another file",
    "SQLITE_NOTADB": "name another file",
    "SQLITE_FULL": "free space on the disk",
    "SQLITE_IOERR": "see to the disk, or name another file",
    "SQLITE_ERROR": "name another file",
}


class SQLiteStore:
    """Keeps users in an SQLite file on a local disk, which threads and processes may share.

    An update is one transaction. After a crash of the process, the update is in the file
    completely or not at all. A power cut may lose the last updates.
    """

    def __init__(self, path: str | Path, *, timeout: int | float = 60.0):
        """Opens the file, or makes it.

        Args:
            path: the file. SQLite keeps two more files beside it.
            timeout: how many seconds to wait for other processes that write.

        Raises:
            StoreError: the file cannot be opened, or not be written to.
            UserError: the file is not such a store.
        """
        self.path = Path(path)
        # All threads share one connection, because SQLite takes one writer at a time anyway. The
        # histories that recommendations need are read on another one, which waits for no writer.
        self._lock, self._reading = threading.Lock(), threading.Lock()
        with self._naming_what_fails():
            self._connection = self._connect(timeout)
            try:
                self._is_new()  # refuses another program's file before it is changed
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = NORMAL")
                # What is deleted or replaced is overwritten, and does not stay in unused pages.
                self._connection.execute("PRAGMA secure_delete = ON")
                with self._transaction():
                    for statement in _SCHEMA.split(";") if self._is_new() else ():
                        self._connection.execute(statement)
                    # Also where it is there already: only a write tells whether one can write.
                    self._connection.execute(f"PRAGMA user_version = {_VERSION}")
                self._reader = self._connect(timeout)
            except BaseException:
                self._connection.close()
                raise

    def _connect(self, timeout: int | float) -> sqlite3.Connection:
        return sqlite3.connect(
            self.path, timeout=timeout, isolation_level=None, check_same_thread=False
        )

    def _is_new(self) -> bool:
        """Whether the file is empty yet.

        Raises:
            UserError: it holds something else than a store.
        """
        [version] = self._connection.execute("PRAGMA user_version").fetchone()
        tables = {name for (name,) in self._connection.execute("SELECT name FROM sqlite_schema")}
        if (version or tables) and (version != _VERSION or not {"events", "users"} <= tables):
            raise UserError(
                f"{self.path} is not a store of version {_VERSION} of this package; "
                "name another file"
            )
        return not tables

    def check(self) -> None:
        """Reads the whole file, some seconds for each GB, to see whether it is sound.

        Raises:
            StoreError: it is damaged.
        """
        with self._naming_what_fails(), self._reading:
            # Of a file with other tables than ours it would find nothing.
            self._reader.execute("SELECT user, timestamp, number, item FROM events LIMIT 1")
            self._reader.execute("SELECT user, events, last, model, state FROM users LIMIT 1")
            [found] = self._reader.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            remedy = _REMEDIES["SQLITE_CORRUPT"]
            raise StoreError(f"the store {self.path} is damaged ({found}); {remedy}")

    def snapshots(self, users: Sequence[str], model: str) -> list[Snapshot]:
        """See `Store`."""
        select = "SELECT events, last, CASE WHEN model = ? THEN state END FROM users WHERE user = ?"
        with self._naming_what_fails(), self._reading:
            rows = [self._reader.execute(select, (model, user)).fetchone() for user in users]
        return [Snapshot(*row) if row else Snapshot(0, None, None) for row in rows]

    def history(self, user: str) -> tuple[list[str], list[int]]:
        """See `Store`."""
        select = "SELECT item, timestamp FROM events WHERE user = ? ORDER BY timestamp, number"
        with self._naming_what_fails(), self._reading:
            rows = self._reader.execute(select, (user,)).fetchall()
        return [item for item, _ in rows], [timestamp for _, timestamp in rows]

    def apply(self, changes: Sequence[Change], model: str) -> list[bool]:
        """See `Store`; all changes are one transaction."""
        with self._naming_what_fails(), self._lock, self._transaction():
            return [self._apply(change, model) for change in changes]

    def _apply(self, change: Change, model: str) -> bool:
        execute = self._connection.execute
        row = execute("SELECT events, last FROM users WHERE user = ?", (change.user,)).fetchone()
        events, last = row or (0, None)
        if events != change.expected:
            return False
        self._connection.executemany(
            "INSERT INTO events VALUES (?, ?, ?, ?)",
            [
                (change.user, timestamp, events + number, item)
                for number, (item, timestamp) in enumerate(
                    zip(change.items, change.timestamps, strict=True)
                )
            ],
        )
        last = max([*change.timestamps, *([] if last is None else [last])], default=None)
        execute(
            "INSERT OR REPLACE INTO users VALUES (?, ?, ?, ?, ?)",
            (change.user, events + len(change.items), last, model, change.state),
        )
        return True

    def delete(self, user: str) -> bool:
        """See `Store`.

        The user's bytes are overwritten in the file, and the write-ahead log is emptied.

        Raises:
            StoreError: besides what makes every call fail, another process has been reading for so
                long that the log could not be emptied. The user is deleted all the same, and a
                second call tries to empty the log again.
        """
        with self._naming_what_fails(), self._lock:
            with self._transaction():
                execute = self._connection.execute
                gone = execute("DELETE FROM events WHERE user = ?", (user,)).rowcount
                gone += execute("DELETE FROM users WHERE user = ?", (user,)).rowcount
            with self._reading:  # no reader of this process keeps the log from being emptied
                checkpoint = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                [busy, *_] = checkpoint.fetchone()
        if busy:
            raise StoreError(
                f"the user is deleted, but another process reads {self.path}, so that traces are "
                "left in its write-ahead log; delete the user once more"
            )
        return gone > 0

    def close(self) -> None:
        """Closes the file."""
        with self._naming_what_fails(), self._lock, self._reading:
            self._reader.close()
            self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            # If the disk is full, SQLite itself has ended the transaction.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _naming_what_fails(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "SQLITE_ERROR")  # Python's own have none
            remedy = next((text for start, text in _REMEDIES.items() if name.startswith(start)), "")
            message = f"the store {self.path} cannot be used: {error}"
            raise StoreError(f"{message}; {remedy}" if remedy else message) from error
