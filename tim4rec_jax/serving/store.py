"""What is kept of users between requests: a log of their events, and the model's state.

The log is the truth and the state a cache of it: a state that another model made is left
aside, and computed anew from the log. No store knows a model. All are safe under concurrent
callers: who adds events says how many there were when the state was computed, and is refused, to
try again, if that is no longer so.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable


class Snapshot(NamedTuple):
    """A user at a moment."""

    events: int  # so many in the log
    last: int | None  # time of the latest
    state: bytes | None  # after all of them, if it was made by the model that asks


class Change(NamedTuple):
    """Events to be added to a user's log, and the state that then holds."""

    user: str
    expected: int  # events in the log when the state was computed
    items: Sequence[str]
    timestamps: Sequence[int]
    state: bytes | None


@runtime_checkable
class Store(Protocol):
    """What a `Recommender` asks of a store."""

    def snapshots(self, users: Sequence[str], model: str) -> list[Snapshot]:
        """The users, in the same order; a new user has no events."""
        ...

    def history(self, user: str) -> tuple[list[str], list[int]]:
        """Items and times of all the user's events in order of time, ties as they came."""
        ...

    def apply(self, changes: Sequence[Change], model: str) -> list[bool]:
        """Makes changes, each whole or not at all; False where there are other events by now."""
        ...

    def close(self) -> None:
        """Ends the use of the store."""
        ...


@dataclass
class _User:
    items: list[str] = field(default_factory=list)
    timestamps: list[int] = field(default_factory=list)
    model: str = ""
    state: bytes | None = None


class MemoryStore:
    """Keeps users in this process's memory."""

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

    def close(self) -> None:
        """See `Store`."""
