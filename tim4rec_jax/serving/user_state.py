"""Keeps the states of users up to date: what a model makes of the events in a store."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tim4rec_jax.errors import UserError
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.compiled_model import MAX_ROWS, CompiledModel, NewEvents
from tim4rec_jax.serving.history import Events
from tim4rec_jax.serving.stores import Change, Snapshot, Store

Pending = Mapping[str, list[tuple[int, int]]]  # the items (as indices) and times of each user


class Users:
    """The users of a store as a model sees them: their known events and their states."""

    def __init__(self, model: CompiledModel, catalogue: Catalogue, store: Store):
        self.model, self.catalogue, self.store = model, catalogue, store

    def log(self, user: str) -> tuple[Events, int]:
        """All events of a user that the model knows, and the number of all events."""
        ids, timestamps = self.store.history(user)
        items = self.catalogue.indices(ids)
        known = items > 0
        times = np.asarray(timestamps, np.int64)[known]
        return Events(items[known], times, np.array([0, len(times)])), len(ids)

    def state(self, user: str) -> bytes:
        """The state of a user who has events, for a model that supports steps.

        A state that is missing, or that another model made, is computed from the log and kept.
        """
        [snapshot] = self.store.snapshots([user], self.model.fingerprint)
        if snapshot.state is not None:
            return snapshot.state
        events, count = self.log(user)
        [state] = self.model.advance([NewEvents(None, None, events.items, events.timestamps)])
        # The store refuses this state if an event has come meanwhile, with a newer state.
        self.store.apply([Change(user, count, [], [], state)], self.model.fingerprint)
        return state

    def update(self, events: Pending, *, sort: bool) -> None:
        """Adds events of many users at once.

        Raises:
            UserError: events are out of order, or the store cannot be used. Then none of the users
                who were updated at the same time (up to `MAX_ROWS`) is changed.
        """
        users = list(events)
        for first in range(0, len(users), MAX_ROWS):
            pending = {user: events[user] for user in users[first : first + MAX_ROWS]}
            # The store refuses users who got an event from someone else meanwhile. Of all who
            # compete for a user, one succeeds each time, so the loop ends.
            while pending:
                pending = self._try_update(pending, sort)

    def _try_update(self, pending: Pending, sort: bool) -> Pending:
        """Returns the users that must be tried again."""
        snapshots = self.store.snapshots(list(pending), self.model.fingerprint)
        changes, inputs = [], []
        for (user, events), snapshot in zip(pending.items(), snapshots, strict=True):
            events = _in_order(user, events, snapshot, sort)
            expected = snapshot.events
            if self.model.supports_step:
                expected, new = self._new_events(user, events, snapshot)
                inputs.append(new)
            ids = [self.catalogue.ids[item - 1] for item, _ in events]
            changes.append(Change(user, expected, ids, [time for _, time in events], None))
        if self.model.supports_step:
            states = self.model.advance(inputs)
            changes = [
                change._replace(state=state) for change, state in zip(changes, states, strict=True)
            ]
        done = self.store.apply(changes, self.model.fingerprint)
        return {user: pending[user] for user, ok in zip(pending, done, strict=True) if not ok}

    def _new_events(
        self, user: str, events: list[tuple[int, int]], snapshot: Snapshot
    ) -> tuple[int, NewEvents]:
        """The number of events in the user's log, and what leads to the state after `events`."""
        items, times = np.array(events, np.int64).T
        if snapshot.last is None:
            return snapshot.events, NewEvents(None, None, items, times)
        if snapshot.state is not None and times[0] >= snapshot.last:
            return snapshot.events, NewEvents(snapshot.state, snapshot.last, items, times)
        # There is no state to go on from, or an event belongs before its last one.
        log, count = self.log(user)
        items, times = np.append(log.items, items), np.append(log.timestamps, times)
        order = np.argsort(times, kind="stable")
        return count, NewEvents(None, None, items[order], times[order])


def _in_order(user: str, events: list[tuple[int, int]], snapshot: Snapshot, sort: bool):
    if sort:
        return sorted(events, key=lambda event: event[1])
    last = snapshot.last
    for _, time in events:
        if last is not None and time < last:
            raise UserError(
                f"an event of user {user!r} at time {time} is earlier than one at {last} before "
                "it; send events in order of time, or ask for them to be sorted"
            )
        last = time
    return events
