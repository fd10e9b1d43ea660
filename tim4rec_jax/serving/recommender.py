"""Recommendations from a trained run, for anyone: by history, or by user with a stored state."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tim4rec_jax.serving.ann_index import ApproximateIndex
from tim4rec_jax.serving.catalogue import Catalogue, load_run
from tim4rec_jax.serving.compiled_model import CompiledModel
from tim4rec_jax.serving.history import check_times, read_histories
from tim4rec_jax.serving.ranker import Ranker, Times
from tim4rec_jax.serving.stores import MemoryStore, Store
from tim4rec_jax.serving.user_state import Users

Values = Sequence[Any] | np.ndarray


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
        ranker: finds the best items.
        store: of users.
        unknown_events: how many `update` has skipped so far.
    """

    def __init__(
        self,
        engine: CompiledModel,
        catalogue: Catalogue,
        store: Store | None = None,
        index: ApproximateIndex | None = None,
    ):
        """Takes a model and its catalogue; users are kept in memory unless a store is given."""
        self.engine, self.catalogue = engine, catalogue
        self.ranker = Ranker(engine, catalogue, index)
        self.store = MemoryStore() if store is None else store
        self.unknown_events = 0
        self._users = Users(engine, catalogue, self.store)
        self._counting = threading.Lock()

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
                catalogues of some 100,000 and more; it misses an item now and then. It is kept
                in the run directory.

        Raises:
            UserError: the run or the dataset is missing or damaged, they do not belong together, or
                the index's library is not installed.
        """
        config, model, catalogue = load_run(Path(workdir), Path(dataset) if dataset else None)
        engine = CompiledModel(config, model, catalogue.ids)
        index = None
        if approximate:
            index = ApproximateIndex(engine.table, Path(workdir) / "index.faiss")
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
        scores, best = self.ranker.rank(events, k, at=at, **filters)
        fallback = (np.diff(events.offsets) == 0).tolist()
        return [
            self._recommendations(*row) for row in zip(scores, best, unknown, fallback, strict=True)
        ]

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
        options: dict[str, Any] = dict(at=at, exclude_seen=exclude_seen, allow=allow, deny=deny)
        if self.engine.supports_step and events.items.size:
            options["hidden"] = self.engine.hidden(self._users.state(str(user)))
        scores, items = self.ranker.rank(events, k, **options)
        return self._recommendations(scores[0], items[0], 0, not events.items.size)

    def _recommendations(self, scores, items, unknown: int, fallback: bool) -> Recommendations:
        items = items[items > 0]
        ids = [self.catalogue.ids[item - 1] for item in items.tolist()]
        return Recommendations(ids, scores[: len(ids)].tolist(), unknown, fallback)
