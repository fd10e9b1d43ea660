"""Keeps the states of users up to date: what a model makes of the events in a store."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tim4rec_jax.errors import UserError
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.compiled_model import MAX_ROWS, CompiledModel, NewEvents
from tim4rec_jax.serving.history import Events
from tim4rec_jax.serving.stores import Change, Snapshot, Store, StoreError
from tim4rec_jax.serving.training_users import TrainingUsers

NewOnes = list[tuple[int, int]]  # the items (as indices) and times of events of one user


class Update(NamedTuple):
    """New events that one caller sends, in the order in which they are to be stored.

    Attributes:
        events: the events of each user, whose items the model knows.
        sort: whether to put events where they belong that are earlier than a user's last one.
            Otherwise they are refused.
    """

    events: Mapping[str, NewOnes]
    sort: bool


class Users:
    """The users of a store as a model sees them: their known events and their states.

    A state is brought up to date when events arrive in order, because that costs one step of the
    model for each event. It is dropped when an event arrives late, and when another model has made
    it. It is then computed from the whole log when somebody asks for it. So any number of late
    events costs one such computation.

    What a user did in the training comes before the events of the store. It is not copied to the
    store.

    Attributes:
        fingerprint: of what the states of users depend on: the model, and the training's events.
    """

    def __init__(
        self,
        model: CompiledModel,
        catalogue: Catalogue,
        store: Store,
        training: TrainingUsers | None = None,
    ):
        self.model, self.catalogue, self.store = model, catalogue, store
        self.training = training
        past = "" if training is None else f" after {training.content}"
        self.fingerprint = model.fingerprint + past
        self._deletions, self._deleting = 0, threading.Lock()

    def log(self, user: str) -> tuple[Events, int, int | None]:
        """All events of a user that the model knows.

        The number of events in the store, known or not, and the time of the last one follow.
        """
        ids, timestamps = self.store.history(user)
        items = self.catalogue.indices(ids)
        known = items > 0
        times = np.asarray(timestamps, np.int64)[known]
        events = Events(items[known], times, np.array([0, len(times)]))
        if self.training is not None and (past := self._past(user)):
            events = self.training.merge(past, events)
        return events, len(ids), timestamps[-1] if timestamps else None

    def _past(self, user: str) -> Events | None:
        """What a user did in the training, unless there was no such user or it was deleted."""
        past = None if self.training is None else self.training.find(user)
        if past is not None:
            [mark] = self.store.snapshots([_forgotten(user)], _FORGOTTEN)
            if mark.state is not None:
                return None
        return past

    def kept_state(self, user: str) -> bytes | None:
        """The state of a user, unless it must be computed first; see `states`."""
        [snapshot] = self.store.snapshots([user], self.fingerprint)
        return snapshot.state

    def state(self, user: str) -> bytes:
        """The state of a user who has events, for a model that supports steps."""
        return self.states([user])[0]

    def states(self, users: Sequence[str]) -> list[bytes]:
        """The states of users, for a model that supports steps.

        A state that is missing, or that another model made, is computed from the log. It is kept,
        unless the user's last event is one that this model does not know: the gap before the next
        event counts from the last known one, whose time the store does not tell.
        """
        deletions = self._deletions
        snapshots = self.store.snapshots(users, self.fingerprint)
        states = {
            user: self.model.no_events if snapshot.state is None else snapshot.state
            for user, snapshot in zip(users, snapshots, strict=True)
        }
        missing = {
            user: self.log(user)
            for user, snapshot in zip(users, snapshots, strict=True)
            if snapshot.state is None
        }
        logs = {user: log for user, log in missing.items() if log[0].items.size}
        if logs:
            new = [NewEvents(None, None, log.items, log.timestamps) for log, _, _ in logs.values()]
            computed = dict(zip(logs, self.model.advance(new), strict=True))
            states |= computed
            changes = [
                Change(user, count, [], [], computed[user])
                for user, (log, count, last) in logs.items()
                if last is None or log.timestamps[-1] >= last
            ]
            with self._deleting:
                # The store refuses the state of a user who has got an event meanwhile. But it
                # could not tell the log of somebody who was deleted from a new one.
                # Where the store cannot be written to, the state is right all the same.
                if deletions == self._deletions:
                    with contextlib.suppress(StoreError):
                        self.store.apply(changes, self.fingerprint)
        return [states[user] for user in users]

    def delete(self, user: str) -> bool:
        """Forgets a user; see `Store.delete`."""
        with self._deleting:
            self._deletions += 1
            known = self._past(user) is not None
            if known:  # the dataset cannot be changed, so the store notes what it must not be asked
                mark = Change(_forgotten(user), 0, [], [], b"forgotten")
                self.store.apply([mark], _FORGOTTEN)
            return self.store.delete(user) or known

    def update(self, updates: Sequence[Update]) -> list[UserError | None]:
        """Adds events of many callers at once.

        Returns:
            For each update its error, `None` if it is stored. An update whose events are out of
            order is not stored at all, and does not keep the others from being stored.

        Where the store fails, the updates that it has not stored have its error. One of more than
        `MAX_ROWS` users may be stored in part.

        Raises:
            StoreError: the store cannot be read. Nothing is stored.
        """
        errors: list[UserError | None] = [None] * len(updates)
        users = list({user: None for update in updates for user in update.events})
        # All events are checked before any is stored. No model has an empty name, so no states are
        # read.
        lasts = {
            user: snapshot.last
            for user, snapshot in zip(users, self.store.snapshots(users, ""), strict=True)
        }
        # What is stored at once: whole updates, as long as they have no more than `MAX_ROWS` users.
        chunks: list[dict[str, list[tuple[int, NewOnes]]]] = [{}]
        for number, update in enumerate(updates):
            try:
                latest = {
                    user: _check_order(user, events, lasts[user], update.sort)
                    for user, events in update.events.items()
                }
            except UserError as error:
                errors[number] = error
                continue
            lasts |= latest
            if chunks[-1] and len(chunks[-1].keys() | update.events.keys()) > MAX_ROWS:
                chunks.append({})
            for user, events in update.events.items():
                chunks[-1].setdefault(user, []).append((number, events))
        for place, pending in enumerate(chunks):
            try:
                self._store(pending, updates, errors)
            except StoreError as error:
                for lost in chunks[place:]:
                    for number, _ in itertools.chain.from_iterable(lost.values()):
                        errors[number] = errors[number] or error
                break
        return errors

    def _store(
        self,
        pending: dict[str, list[tuple[int, NewOnes]]],
        updates: Sequence[Update],
        errors: list[UserError | None],
    ) -> None:
        """Stores the events of some users; the number of its update stands by each."""
        names = list(pending)
        for first in range(0, len(names), MAX_ROWS):
            part = {name: pending[name] for name in names[first : first + MAX_ROWS]}
            # The store refuses users who got an event from another process meanwhile. Of all who
            # compete for a user, one succeeds each time, so the loop ends.
            while part:
                part = self._try_update(part, updates, errors)

    def _try_update(
        self,
        pending: dict[str, list[tuple[int, NewOnes]]],
        updates: Sequence[Update],
        errors: list[UserError | None],
    ) -> dict[str, list[tuple[int, NewOnes]]]:
        """Returns the users that must be tried again."""
        deletions = self._deletions
        snapshots = self.store.snapshots(list(pending), self.fingerprint)
        changes, inputs = [], {}
        for (user, parts), snapshot in zip(pending.items(), snapshots, strict=True):
            merged: NewOnes = []
            last = snapshot.last
            for number, events in parts:
                try:
                    last = _check_order(user, events, last, updates[number].sort)
                except UserError as error:  # another process has stored a later event just now
                    errors[number] = error
                    continue
                merged += events
            if not merged:
                continue
            merged.sort(key=lambda event: event[1])
            if self.model.supports_step:
                new = _new_events(merged, snapshot, self._past(user))
                if new is not None:
                    inputs[user] = new
            ids = [self.catalogue.ids[item - 1] for item, _ in merged]
            times = [time for _, time in merged]
            changes.append(Change(user, snapshot.events, ids, times, None))
        if sizes := self.model.sizes:
            # A service has others waiting, so it leaves long work until the user comes back.
            inputs = {u: new for u, new in inputs.items() if len(new.items) <= sizes.steps[-1]}
            inputs = inputs if len(inputs) <= self.model.max_rows else {}
        if inputs:
            states = dict(zip(inputs, self.model.advance(list(inputs.values())), strict=True))
            changes = [change._replace(state=states.get(change.user)) for change in changes]
        with self._deleting:
            if deletions != self._deletions:
                return pending
            done = self.store.apply(changes, self.fingerprint)
        again = [change.user for change, ok in zip(changes, done, strict=True) if not ok]
        return {user: pending[user] for user in again}


def _new_events(events: NewOnes, snapshot: Snapshot, past: Events | None) -> NewEvents | None:
    """What leads from a user's state to the one after `events`; `None`: only the whole log does.

    Args:
        events: the new ones, in order of time.
        snapshot: what the store holds of the user.
        past: what the user did in the training.
    """
    items, times = np.array(events, np.int64).T
    last = snapshot.last
    if past is not None and past.items.size:
        end = int(past.timestamps[-1])
        if times[0] <= end:  # it may be one of the training's events, which count once
            return None
        last = end if last is None else max(last, end)
    if last is None:
        return NewEvents(None, None, items, times)
    if snapshot.state is not None and times[0] >= last:
        return NewEvents(snapshot.state, last, items, times)
    return None


_FORGOTTEN = "forgotten"


def _forgotten(user: str) -> str:
    """The user of the store whose state says that another one was deleted.

    It does not tell the name, and is longer than any that a caller of the service may use.
    """
    return "forgotten:" + 2 * hashlib.sha512(user.encode()).hexdigest()


def _check_order(user: str, events: NewOnes, last: int | None, sort: bool) -> int | None:
    """The time of the user's last event after `events`.

    Raises:
        UserError: an event is earlier than one before it, and they are not to be sorted.
    """
    for _, time in events:
        if last is None or time >= last:
            last = time
        elif not sort:
            raise UserError(
                f"an event of user {user!r} at time {time} is earlier than one at {last} before "
                "it; send events in order of time, or ask for them to be sorted"
            )
    return last
