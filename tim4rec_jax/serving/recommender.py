"""Recommends items of a trained run, for a history or for a user with a stored state."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tim4rec_jax.errors import UserError
from tim4rec_jax.serving.ann_index import ApproximateIndex
from tim4rec_jax.serving.catalogue import Catalogue, id_text, load_run
from tim4rec_jax.serving.compiled_model import CompiledModel
from tim4rec_jax.serving.history import Events, check_times, read_histories
from tim4rec_jax.serving.ranker import Query, Ranker, Times
from tim4rec_jax.serving.stores import MemoryStore, Store
from tim4rec_jax.serving.training_users import TrainingUsers, of_run
from tim4rec_jax.serving.user_state import Update, Users

Values = Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class Recommendations:
    """The items recommended to one user, best first.

    Attributes:
        items: the original ids; fewer than asked for where no more items are allowed.
        scores: the scores of the model. For a fallback they are the items' numbers of events.
        unknown: the number of events left out because the model does not know their items.
        fallback: whether no event was known, so that these are the most popular items.
    """

    items: list[str]
    scores: list[float]
    unknown: int = 0
    fallback: bool = False


class Recommender:
    """A model with its catalogue and a store of users; any number of threads may call it.

    Attributes:
        model: the compiled model.
        catalogue: the items.
        ranker: finds the best items.
        store: keeps the users.
        unknown_events: how many events `update` has skipped so far.
    """

    def __init__(
        self,
        model: CompiledModel,
        catalogue: Catalogue,
        store: Store | None = None,
        index: ApproximateIndex | None = None,
        training: TrainingUsers | None = None,
    ):
        """Puts the parts together; `Recommender.load` takes them from a run.

        Args:
            model: the compiled model.
            catalogue: the items of the model.
            store: keeps the users; `None` keeps them in memory.
            index: searched instead of scoring all items; `None` scores all items.
            training: what users did in the training, which comes before what the store holds.
        """
        self.model, self.catalogue = model, catalogue
        self.ranker = Ranker(model, catalogue, index)
        self.store = MemoryStore() if store is None else store
        self.unknown_events = 0
        self._users = Users(model, catalogue, self.store, training)
        self._counting = threading.Lock()

    @classmethod
    def load(
        cls,
        workdir: str | Path,
        store: Store | None = None,
        dataset: str | Path | None = None,
        *,
        approximate: bool = False,
        state_dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> Recommender:
        """Loads the best model of a run.

        Where the dataset of the training is at hand, its users are known by their ids.

        Args:
            workdir: a run directory of train.py.
            store: keeps the users; `None` keeps them in memory.
            dataset: the prepared dataset, if it has moved since the training. Its `items.parquet`
                and `dataset.json` are needed, and the sequences to know the users.
            approximate: whether to search an index (extra `ann`) instead of scoring all items. An
                index is faster for catalogues of some 100,000 items and more, and misses an item
                now and then. It is kept in the run directory.
            state_dtype: of the states that the store keeps. bfloat16 takes half the bytes and
                changes scores a little; see docs/serving.md.

        Raises:
            UserError: the run or the dataset is missing or damaged, they do not belong together,
                the library of the index is not installed, or the model has neighbours or numbers
                for last items, which an index does not know.
        """
        config, model, catalogue = load_run(Path(workdir), Path(dataset) if dataset else None)
        compiled = CompiledModel(config, model, catalogue.ids, state_dtype)
        index = None
        if approximate:
            if compiled.neighbours is not None:
                raise UserError(
                    f"{workdir} adds the neighbours of items to its scores (config.model."
                    "neighbours), which an approximate index does not know; score all items, or "
                    "train with config.model.neighbours=0"
                )
            if compiled.last_bias is not None:
                raise UserError(
                    f"{workdir} adds a number of its own to the score of each last item (config."
                    "model.repeat_last), which an approximate index does not know; score all "
                    "items, or train with config.model.repeat_last=False"
                )
            index = ApproximateIndex(compiled.table, Path(workdir) / "index.faiss")
        training = of_run(Path(workdir), config, Path(dataset) if dataset else None)
        return cls(compiled, catalogue, store, index, training)

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
        """Recommends items for a history, whether or not its user was in the training.

        The model sees the last `max_length` known events.

        Args:
            items: the original ids. Those that the model does not know are left out and counted.
            timestamps: the time of each item, in whole seconds since 1970; times must not fall.
            k: how many items.
            at: when the items will be shown, in whole seconds since 1970, for a model trained with
                `model.knows_next_time`.
            exclude_seen: whether to leave out the items of the history.
            allow: the ids of the only items to recommend; unknown ids are ignored.
            deny: the ids of items never to recommend.
            sort: whether to sort the events by time, ties in the order given.

        Raises:
            UserError: times fall or are no numbers, an id is neither a text nor a whole number, `k`
                is below 1, or `at` does not fit the model.
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
        """Does `recommend` for many histories at once; `at` is one time, or one per history."""
        events, unknown = read_histories(histories, self.catalogue, sort=sort)
        filters: dict[str, Any] = dict(exclude_seen=exclude_seen, allow=allow, deny=deny)
        scores, best = self.ranker.rank(events, k, at=at, **filters)
        fallback = (np.diff(events.offsets) == 0).tolist()
        return [
            self._recommendations(*row) for row in zip(scores, best, unknown, fallback, strict=True)
        ]

    def query(
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
    ) -> Query:
        """Checks what `recommend` is asked; the arguments and errors are the same.

        Many callers' queries, however they differ, are answered at once by `answer`.
        """
        events, [unknown] = read_histories([(items, timestamps)], self.catalogue, sort=sort)
        return self.ranker.query(events, k, at, exclude_seen, allow, deny, unknown)

    def answer(self, queries: Sequence[Query]) -> list[Recommendations]:
        """Answers queries; whoever has made them, none of them can fail."""
        return [
            self._recommendations(scores, items, query.unknown, not query.events.items.size)
            for query, (scores, items) in zip(queries, self.ranker.answer(queries), strict=True)
        ]

    def update(
        self, user: Any, item: Any, timestamp: int | np.integer, *, sort: bool = False
    ) -> bool:
        """Adds an event to a user's log and brings the user's state up to date.

        Args:
            user: the id, a text or a whole number.
            item: the original id. An unknown item is counted in `unknown_events` and skipped.
            timestamp: the time, in whole seconds since 1970.
            sort: whether to put an event that is earlier than the user's last one where it
                belongs, which computes the state anew. Otherwise such an event is refused.

        Returns:
            Whether the model knows the item.

        Raises:
            UserError: the event is earlier than the user's last one, an id is neither a text nor a
                whole number, or the store cannot be used.
        """
        return self.update_batch([(user, item, timestamp)], sort=sort)[0]

    def update_batch(
        self, events: Sequence[tuple[Any, Any, Any]], *, sort: bool = False
    ) -> list[bool]:
        """Does `update` for many (user, item, timestamp), much faster than one after the other.

        If it raises, no event is stored, except those of other users where another process stores
        events of the same users at the same time, or where the store fails midway.
        """
        [result] = self.update_many([(events, sort)])
        if isinstance(result, UserError):
            raise result
        return result

    def update_many(
        self, requests: Sequence[tuple[Sequence[tuple[Any, Any, Any]], bool]]
    ) -> list[list[bool] | UserError]:
        """Does `update_batch` for many callers at once; each has its own (events, sort).

        Returns:
            What `update_batch` returns to each caller, or the error that it raises.

        Raises:
            StoreError: the store cannot be used.
        """
        results: list[list[bool] | UserError] = []
        updates, numbers = [], []
        for number, (events, sort) in enumerate(requests):
            try:
                users = [id_text(user, "a user is") for user, _, _ in events]
                items = [id_text(item, "an item is") for _, item, _ in events]
                times = check_times([time for _, _, time in events])
            except UserError as error:
                results.append(error)
                continue
            indices = self.catalogue.indices(items)
            known: dict[str, list[tuple[int, int]]] = {}
            for user, index, time in zip(users, indices.tolist(), times.tolist(), strict=True):
                if index:
                    known.setdefault(user, []).append((index, time))
            results.append((indices > 0).tolist())
            updates.append(Update(known, sort))
            numbers.append(number)
        for number, error in zip(numbers, self._users.update(updates), strict=True):
            result = results[number]
            if error is not None:
                results[number] = error
            elif isinstance(result, list):
                with self._counting:
                    self.unknown_events += len(result) - sum(result)
        return results

    def delete_user(self, user: Any) -> bool:
        """Forgets a user of the store; see `Store.delete`.

        Returns:
            Whether the store knew the user.
        """
        return self._users.delete(id_text(user, "the user is"))

    def open_training(self) -> str:
        """Opens the dataset of the training now, which otherwise the first user would wait for.

        If it cannot be opened, the recommender goes on without it.

        Returns:
            What there is to say about the users of the training.
        """
        training = self._users.training
        problem = "the dataset of the training is not there or has changed; name it with --dataset"
        if training is not None:
            try:
                training.open()
            except UserError as error:
                problem = str(error)
                self._users = Users(self.model, self.catalogue, self.store)
            else:
                return f"users of the training are known by their ids, from {training.directory}"
        return f"users are known by the events that are posted only: {problem}"

    def stored(self, user: Any) -> tuple[Events, bytes | None]:
        """The known events of a user, and the state after them if it is kept.

        The state is `None` for a model without states, and where it must be computed first
        (`compute_states`).
        """
        # In this order, no item is recommended again whose event the state has taken in.
        user = id_text(user, "the user is")
        state = self._users.kept_state(user) if self.model.supports_step else None
        events, *_ = self._users.log(user)
        return events, state

    def compute_states(self, users: Sequence[Any]) -> list[bytes]:
        """The states of users of the store; they are computed from the log where none is kept."""
        return self._users.states([id_text(user, "a user is") for user in users])

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
        """Recommends items to a user of the training or the store; see `recommend`.

        A model that supports steps uses the user's state, which has taken in all events and is not
        computed again. Other models are given the last `max_length` events.
        """
        events, state = self.stored(user)
        query = self.ranker.query(events, k, at, exclude_seen, allow, deny)
        if self.model.supports_step and events.items.size:
            [state] = self.compute_states([user]) if state is None else [state]
            query = query._replace(hidden=self.model.hidden(state))
        return self.answer([query])[0]

    def _recommendations(self, scores, items, unknown: int, fallback: bool) -> Recommendations:
        items = items[items > 0]  # 0 fills up where no item was left
        ids = [self.catalogue.ids[item - 1] for item in items.tolist()]
        return Recommendations(ids, scores[: len(ids)].tolist(), unknown, fallback)
