"""Users of a store as a model sees them: their known events, and their states."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tim4rec_jax.errors import UserError
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.compiled_model import MAX_ROWS, CompiledModel
from tim4rec_jax.serving.history import Events
from tim4rec_jax.serving.stores import Change, Snapshot, Store

Pending = Mapping[str, list[tuple[int, int]]]  # item indices and times by user


class Users:
    """Brings an engine and a store together."""

    def __init__(self, engine: CompiledModel, catalogue: Catalogue, store: Store):
        self.engine, self.catalogue, self.store = engine, catalogue, store

    def log(self, user: str) -> tuple[Events, int]:
        """All events of a user that the model knows, and how many there are with the others."""
        ids, timestamps = self.store.history(user)
        items = self.catalogue.indices(ids)
        known = items > 0
        times = np.asarray(timestamps, np.int64)[known]
        return Events(items[known], times, np.array([0, len(times)])), len(ids)

    def state(self, user: str) -> bytes:
        """The state of a user with events, of a model that streams.

        One that is missing, or that another model made, is computed from the log and kept.
        """
        [snapshot] = self.store.snapshots([user], self.engine.fingerprint)
        if snapshot.state is not None:
            return snapshot.state
        events, count = self.log(user)
        [state] = self.engine.advance([None], [(events.items, events.timestamps)])
        # Refused if an event has come meanwhile, with a newer state.
        self.store.apply([Change(user, count, [], [], state)], self.engine.fingerprint)
        return state

    def update(self, events: Pending, *, sort: bool) -> None:
        """Adds events, of many users at once.

        Raises:
            UserError: events are out of order, or the store cannot be used. Of the same thousand
                users (`MAX_ROWS`), none is changed then.
        """
        users = list(events)
        for first in range(0, len(users), MAX_ROWS):
            pending = {user: events[user] for user in users[first : first + MAX_ROWS]}
            # Refused are those who got an event meanwhile: of all who compete, one gets on.
            while pending:
                pending = self._try_update(pending, sort)

    def _try_update(self, pending: Pending, sort: bool) -> Pending:
        """Returns the users that must be tried again."""
        snapshots = self.store.snapshots(list(pending), self.engine.fingerprint)
        changes, states, inputs = [], [], []
        for (user, events), snapshot in zip(pending.items(), snapshots, strict=True):
            events = _in_order(user, events, snapshot, sort)
            expected, state, new = self._input(user, events, snapshot)
            states.append(state)
            inputs.append(new)
            ids = [self.catalogue.ids[item - 1] for item, _ in events]
            changes.append(Change(user, expected, ids, [time for _, time in events], None))
        if self.engine.supports_step:
            states = self.engine.advance(states, inputs)
            changes = [
                change._replace(state=state) for change, state in zip(changes, states, strict=True)
            ]
        done = self.store.apply(changes, self.engine.fingerprint)
        return {user: pending[user] for user, ok in zip(pending, done, strict=True) if not ok}

    def _input(self, user: str, events: list[tuple[int, int]], snapshot: Snapshot):
        """How many events the log has, and from which state which events lead to the next."""
        items, times = np.array(events, np.int64).T
        if not self.engine.supports_step or snapshot.last is None:
            return snapshot.events, None, (items, times)
        if snapshot.state is not None and times[0] >= snapshot.last:
            before = np.append(0, items), np.append(snapshot.last, times)
            return snapshot.events, snapshot.state, before
        log, count = self.log(user)
        items, times = np.append(log.items, items), np.append(log.timestamps, times)
        order = np.argsort(times, kind="stable")
        return count, None, (items[order], times[order])


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
