"""Recommendations from a trained run, for anyone: by history, or by user with a stored state."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tim4rec_jax.errors import UserError
from tim4rec_jax.serving.approximate import ApproximateIndex
from tim4rec_jax.serving.candidates import Candidates
from tim4rec_jax.serving.catalogue import Catalogue, load_run
from tim4rec_jax.serving.engine import MAX_ROWS, Engine
from tim4rec_jax.serving.history import Events, check_times, read_histories
from tim4rec_jax.serving.store import MemoryStore, Store
from tim4rec_jax.serving.users import Users

Values = Sequence[Any] | np.ndarray
Times = int | np.integer | Sequence[int] | np.ndarray | None


@dataclass(frozen=True)
class Recommendations:
    """What is recommended to one user, best first.

    Attributes:
        items: original ids; fewer than asked for where no more are allowed.
        scores: of the model; of a fallback, how often the training had the item.
        unknown: events left out because the model does not know their item.
        fallback: no event was known, so these are the most popular items.
    """

    items: list[str]
    scores: list[float]
    unknown: int = 0
    fallback: bool = False


class Recommender:
    """A model with its catalogue and a store of users; any number of threads may call it.

    Attributes:
        catalogue: the items.
        engine: the model.
        store: of users.
        index: searched instead of scoring all items, unless `allow` or `deny` is given; None:
            rankings are exact.
        unknown_events: how many `update` has skipped so far.
    """

    def __init__(
        self,
        engine: Engine,
        catalogue: Catalogue,
        store: Store | None = None,
        index: ApproximateIndex | None = None,
    ):
        self.engine, self.catalogue, self.index = engine, catalogue, index
        self.store = MemoryStore() if store is None else store
        self.unknown_events = 0
        self._users = Users(engine, catalogue, self.store)
        self._counting = threading.Lock()
        # Requests of a service, and the batches of a large job, share few filters.
        build = functools.partial(Candidates.build, catalogue, engine.table)
        self._candidates: Callable = functools.lru_cache(maxsize=4)(build)

    @classmethod
    def load(
        cls,
        workdir: str | Path,
        store: Store | None = None,
        dataset: str | Path | None = None,
        *,
        approximate: bool = False,
    ) -> Recommender:
        """The best model of a run.

        Args:
            workdir: a run directory of train.py.
            store: of users; by default in memory.
            dataset: the prepared dataset, if it has moved since the training; only its
                `items.parquet` and `dataset.json` are needed.
            approximate: search an index (extra `ann`) instead of scoring all items, for
                catalogues of some 100,000 and more; it misses an item now and then.

        Raises:
            UserError: the run or the dataset is missing or damaged, they do not belong together, or
                the index's library is not installed.
        """
        config, model, catalogue = load_run(Path(workdir), Path(dataset) if dataset else None)
        engine = Engine(config, model, catalogue.ids)
        index = ApproximateIndex(engine.table) if approximate else None
        return cls(engine, catalogue, store, index)

    def recommend(
        self,
        items: Values,
        timestamps: Values,
        k: int = 10,
        *,
        at: Times = None,
        exclude_seen: bool = True,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] | None = None,
        sort: bool = False,
    ) -> Recommendations:
        """The best items for a history, of a user in the training or not.

        The model sees the last `max_length` known events.

        Args:
            items: original ids; those that the model does not know are left out and counted.
            timestamps: whole seconds since 1970, one per item, not falling.
            k: how many items.
            at: when they will be shown, for a model trained with `model.knows_next_time`.
            exclude_seen: leave out the items of the history.
            allow: recommend only these; unknown ones are passed over.
            deny: never recommend these.
            sort: sort the events by time, ties in the order given.

        Raises:
            UserError: times fall or are no numbers, `k` is below 1, or `at` does not fit the model.
        """
        options: dict[str, Any] = dict(exclude_seen=exclude_seen, allow=allow, deny=deny, sort=sort)
        return self.recommend_batch([(items, timestamps)], k, at=at, **options)[0]

    def recommend_batch(
        self,
        histories: Sequence[tuple[Values, Values]],
        k: int = 10,
        *,
        at: Times = None,
        exclude_seen: bool = True,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] | None = None,
        sort: bool = False,
    ) -> list[Recommendations]:
        """`recommend` for many histories at once; `at` may be one time or one per history."""
        events, unknown = read_histories(histories, self.catalogue, sort=sort)
        filters: dict[str, Any] = dict(exclude_seen=exclude_seen, allow=allow, deny=deny)
        scores, best = self.rank(events, k, at=at, **filters)
        fallback = (np.diff(events.offsets) == 0).tolist()
        return [
            self._recommendations(*row) for row in zip(scores, best, unknown, fallback, strict=True)
        ]

    def rank(
        self,
        events: Events,
        k: int = 10,
        *,
        at: Times = None,
        exclude_seen: bool = True,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] | None = None,
    ) -> tuple[Float[np.ndarray, "B k"], Int[np.ndarray, "B k"]]:
        """`recommend_batch` in indices of the catalogue: scores, and items with 0 as filler.

        Args:
            events: histories in order of time; empty ones get the most popular items.
            k: columns of the result.
            at: as in `recommend_batch`.
            exclude_seen: as in `recommend`.
            allow: as in `recommend`.
            deny: as in `recommend`.
        """
        k, moments = self._check(k, at, len(events.offsets) - 1)
        candidates = self._candidates(_ids(allow), _ids(deny))
        scores, items = [np.zeros((0, k), np.float32)], [np.zeros((0, k), np.int32)]
        for first in range(0, len(events.offsets) - 1, MAX_ROWS):
            part = events.rows(first, first + MAX_ROWS)
            waits = None if moments is None else moments[first : first + MAX_ROWS]
            ranked = self._rank(
                part, self.engine.encode(part), k, waits, candidates, seen=exclude_seen
            )
            scores.append(ranked[0])
            items.append(ranked[1])
        return np.concatenate(scores), np.concatenate(items)

    def update(
        self, user: Any, item: Any, timestamp: int | np.integer, *, sort: bool = False
    ) -> bool:
        """Adds an event to a user's log and takes the user's state along.

        Args:
            user: any id.
            item: original id; an unknown one is counted in `unknown_events` and skipped.
            timestamp: whole seconds since 1970.
            sort: put an event before the user's last one where it belongs, at the cost of
                computing the state anew; otherwise it is refused.

        Returns:
            Whether the model knows the item.

        Raises:
            UserError: the event is earlier than the user's last one, or the store cannot be used.
        """
        return self.update_batch([(user, item, timestamp)], sort=sort)[0]

    def update_batch(
        self, events: Sequence[tuple[Any, Any, Any]], *, sort: bool = False
    ) -> list[bool]:
        """`update` for many (user, item, timestamp): much faster than one by one."""
        indices = self.catalogue.indices(item for _, item, _ in events)
        times = check_times([time for _, _, time in events])
        known: dict[str, list[tuple[int, int]]] = {}
        for (user, *_), index, time in zip(events, indices.tolist(), times.tolist(), strict=True):
            if index:
                known.setdefault(str(user), []).append((index, time))
        self._users.update(known, sort=sort)
        with self._counting:
            self.unknown_events += int((indices == 0).sum())
        return (indices > 0).tolist()

    def recommend_user(
        self,
        user: Any,
        k: int = 10,
        *,
        at: Times = None,
        exclude_seen: bool = True,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] | None = None,
    ) -> Recommendations:
        """The best items for a user of the store; arguments as for `recommend`.

        The state of a model that streams has seen all the user's events and is not computed again;
        other models are given the last `max_length` events.
        """
        events, _ = self._users.log(str(user))
        if self.engine.streams and events.items.size:
            hidden = self.engine.hidden(self._users.state(str(user)))
        else:
            hidden = self.engine.encode(events)
        k, moments = self._check(k, at, 1)
        candidates = self._candidates(_ids(allow), _ids(deny))
        scores, items = self._rank(events, hidden, k, moments, candidates, seen=exclude_seen)
        return self._recommendations(scores[0], items[0], 0, not events.items.size)

    def _check(self, k: int, at: Times, rows: int):
        """The number of columns, and the moments of prediction if the model knows them."""
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise UserError(f"k is {k!r}; it must be a whole number of 1 or more")
        k = min(int(k), len(self.catalogue))
        if at is None:
            if self.engine.knows_next_time:
                raise UserError(
                    "this model was trained to know when the next event happens; say so with `at`"
                )
            return k, None
        if not self.engine.knows_next_time:
            raise UserError(
                "this model was not trained to know when the next event happens; leave `at` out, "
                "or train with --config.model.knows_next_time=True"
            )
        moments = check_times([at] if np.ndim(at) == 0 else at, "`at`: ")
        if len(moments) not in (1, rows):
            raise UserError(f"`at` has {len(moments)} times for {rows} histories")
        return k, np.broadcast_to(moments, rows)

    def _rank(self, events: Events, hidden, k: int, moments, candidates: Candidates, *, seen: bool):
        """Ranks for at most `MAX_ROWS` histories whose hidden states are known."""
        empty = np.diff(events.offsets) == 0
        last = events.last_times()
        if moments is not None:
            wait = np.where(empty, 0, moments - last)
            if wait.min() < 0:
                raise UserError("`at` is before the last event of a history")
            hidden = self.engine.at(hidden, wait.astype(np.float32))
        hidden = self.engine.drifted(hidden, last)
        had = None
        if seen:
            had = candidates.places(events.padded_items())
        elif self.engine.offset is not None:
            had = candidates.places(events.last(self.engine.max_length).padded_items())
        if self.index is not None and len(candidates.items) == len(self.engine.table):
            offset = None if seen or self.engine.offset is None else float(self.engine.offset)
            scores, items = self.index.best(hidden, k, had, offset)
        else:
            scores, rows = self.engine.best(hidden, candidates.table, k, had, exclude=seen)
            items = candidates.items[rows]
        scores, items = scores[: len(empty)], items[: len(empty)]
        if empty.any():
            popular = candidates.popular[:k]
            scores, items = scores.copy(), items.copy()
            items[empty], scores[empty] = 0, -np.inf
            items[empty, : len(popular)] = popular
            scores[empty, : len(popular)] = self.catalogue.counts[popular - 1]
        return scores, items

    def _recommendations(self, scores, items, unknown: int, fallback: bool) -> Recommendations:
        items = items[items > 0]
        ids = [self.catalogue.ids[item - 1] for item in items.tolist()]
        return Recommendations(ids, scores[: len(ids)].tolist(), unknown, fallback)


def _ids(items: Iterable[Any] | None) -> frozenset[str] | None:
    return None if items is None else frozenset(map(str, items))
