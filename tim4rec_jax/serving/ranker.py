"""Finds the best items for histories, among the whole catalogue or among the items allowed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int64, UInt8

from tim4rec_jax.errors import UserError
from tim4rec_jax.layers.neighbours import RECENT
from tim4rec_jax.serving.ann_index import ApproximateIndex
from tim4rec_jax.serving.catalogue import Catalogue, id_text
from tim4rec_jax.serving.compiled_model import MAX_ROWS, CompiledModel
from tim4rec_jax.serving.history import Events, check_times
from tim4rec_jax.serving.top_items import BARRED, REPEATED

Times = int | np.integer | Sequence[int] | np.ndarray | None
# In bytes: the marks of many users on a large catalogue could fill the memory, and the scores of
# more than some users and 16,384 items leave the cache.
_MAX_MARKS = 1 << 26


class Query(NamedTuple):
    """What one caller wants to know, checked, so that no query can fail because of its caller.

    Attributes:
        events: the known events of one history.
        k: how many items, at most as many as there are.
        moment: when they are shown, for a model that knows it, in whole seconds since 1970.
        exclude_seen: whether the items of the history are left out.
        barred: whether each index of the catalogue is left out; `None` leaves out none.
        hidden: the hidden state after the history, if it is known (`CompiledModel.hidden`).
        unknown: how many events the history has besides.
    """

    events: Events
    k: int
    moment: int | None
    exclude_seen: bool
    barred: Bool[np.ndarray, " V_and_1"] | None = None
    hidden: Float[np.ndarray, "1 D"] | None = None
    unknown: int = 0


class Ranker:
    """Ranks the items of a catalogue with a model; items are indices of the catalogue.

    Attributes:
        model: the model.
        catalogue: the items.
        index: searched instead of scoring all items, unless `allow` or `deny` is given; `None`
            makes all rankings exact.
    """

    def __init__(
        self, model: CompiledModel, catalogue: Catalogue, index: ApproximateIndex | None = None
    ):
        self.model, self.catalogue, self.index = model, catalogue, index
        self._by_popularity = np.argsort(-catalogue.counts, kind="stable").astype(np.int32) + 1
        # The batches of a large job share one filter.
        # It does not know this object, so that a model that is replaced is gone at once.
        find = functools.partial(_find_barred, catalogue)
        self._barred: Callable[..., Any] = functools.lru_cache(maxsize=4)(find)

    def rank(
        self,
        events: Events,
        k: int = 10,
        *,
        hidden: Float[Array | np.ndarray, "R D"] | None = None,
        at: Times = None,
        exclude_seen: bool = True,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] | None = None,
        width: int | None = None,
    ) -> tuple[Float[np.ndarray, "B k"], Int[np.ndarray, "B k"]]:
        """The scores and the items of each history, best first, with item 0 as filler.

        Args:
            events: the histories in order of time. Empty histories get the most popular items.
            k: the number of items, fewer where the catalogue has fewer.
            hidden: the hidden states of users after these histories (`CompiledModel.hidden`), at
                most `MAX_ROWS`; `None` computes them from the events.
            at: when the items will be shown, one time for all or one per history, in whole seconds
                since 1970; for a model trained with `model.knows_next_time`.
            exclude_seen: whether the items of each history are left out.
            allow: the ids of the only items to rank; unknown ids are ignored.
            deny: the ids of items to leave out.
            width: the length that histories are padded to, see `CompiledModel.encode`.

        Raises:
            UserError: `k` is below 1, `allow` or `deny` is a single text, or `at` does not fit the
                model or the histories.
        """
        count, k = len(events.offsets) - 1, self._number(k)
        moments = self._moments(at, count)
        barred = self._barred(ids_of("allow", allow), ids_of("deny", deny))
        scores, items = [np.zeros((0, k), np.float32)], [np.zeros((0, k), np.int32)]
        most = max(1, min(MAX_ROWS, self.model.max_rows, _MAX_MARKS // len(self.model.table)))
        most = 1 << (most.bit_length() - 1)  # what is not a power of two is padded to one
        for first in range(0, count, most):
            part = events.rows(first, first + most)
            then = None if moments is None else moments[first : first + most]
            if hidden is None:
                states = self.model.encode(part, then, width)
            else:
                states = self.model.condition(hidden, part, then)
            rows = len(part.offsets) - 1
            best = self._best(part, states, k, [barred] * rows, [exclude_seen] * rows)
            scores.append(best[0])
            items.append(best[1])
        return np.concatenate(scores), np.concatenate(items)

    def query(
        self,
        events: Events,
        k: int,
        at: Times,
        exclude_seen: bool,
        allow: Iterable[Any] | None,
        deny: Iterable[Any] | None,
        unknown: int = 0,
    ) -> Query:
        """Checks what one caller asks; the arguments and errors are those of `rank`."""
        moments = self._moments(at, 1)
        moment = None if moments is None else int(moments[0])
        if moment is not None and events.items.size and moment < events.timestamps[-1]:
            raise UserError("`at` is before the last event of a history")
        barred = _find_barred(self.catalogue, ids_of("allow", allow), ids_of("deny", deny))
        return Query(events, self._number(k), moment, exclude_seen, barred=barred, unknown=unknown)

    def answer(
        self, queries: Sequence[Query]
    ) -> list[tuple[Float[np.ndarray, " k"], Int[np.ndarray, " k"]]]:
        """The scores and the items of each query, however they differ; at most `max_rows`."""
        groups: dict[Any, list[int]] = {}
        for number, query in enumerate(queries):
            # An index cannot search under a filter, and treats all seen items alike.
            key = (query.barred is None, query.exclude_seen) if self.index else None
            groups.setdefault(key, []).append(number)
        answers: list = [None] * len(queries)
        for numbers in groups.values():
            group = [queries[number] for number in numbers]
            scores, items = self._best(
                Events.joined([query.events for query in group]),
                self._states(group),
                max(query.k for query in group),
                [query.barred for query in group],
                [query.exclude_seen for query in group],
            )
            for row, number in enumerate(numbers):
                k = queries[number].k
                answers[number] = scores[row, :k], items[row, :k]
        return answers

    def _states(self, queries: Sequence[Query]) -> Float[Array | np.ndarray, "R D"]:
        """The hidden states to score with: of histories, and of users whose state is known."""
        parts, order = [], []
        for known in (False, True):
            numbers = [n for n, query in enumerate(queries) if (query.hidden is not None) == known]
            if not numbers:
                continue
            group = [queries[number] for number in numbers]
            events = Events.joined([query.events for query in group])
            moments = None
            if self.model.knows_next_time:
                moments = np.array([query.moment for query in group], np.int64)
            if known:
                missing = self.model.padded(len(group)) - len(group)
                hidden = np.concatenate([np.asarray(query.hidden) for query in group])
                hidden = np.pad(hidden, ((0, missing), (0, 0)))
                states = self.model.condition(hidden, events, moments)
            else:
                states = self.model.encode(events, moments)
            parts.append(states)
            order.append(numbers)
        if len(parts) == 1:
            return parts[0]
        mixed = np.zeros((self.model.padded(len(queries)), parts[0].shape[1]), parts[0].dtype)
        for numbers, states in zip(order, parts, strict=True):
            mixed[numbers] = np.asarray(states)[: len(numbers)]
        return mixed

    def _number(self, k: Any) -> int:
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise UserError(f"k is {k!r}; it must be a whole number of 1 or more")
        return min(int(k), len(self.catalogue))

    def _moments(self, at: Times, count: int) -> Int64[np.ndarray, " B"] | None:
        """The time of each prediction, if the model knows it."""
        if at is None:
            if self.model.knows_next_time:
                raise UserError(
                    "this model was trained to know when the next event happens; say so with `at`"
                )
            return None
        if not self.model.knows_next_time:
            raise UserError(
                "this model was not trained to know when the next event happens; leave `at` out, "
                "or train with --config.model.knows_next_time=True"
            )
        moments = check_times([at] if np.ndim(at) == 0 else at, "`at`: ")
        if len(moments) not in (1, count):
            raise UserError(f"`at` has {len(moments)} times for {count} histories")
        return np.broadcast_to(moments, count)

    def _best(self, events: Events, hidden, k: int, barred: list, exclude_seen: list[bool]):
        """The best items of histories, each with its own filter and `exclude_seen`."""
        repeat_bias = self.model.repeat_bias
        if self.index is not None and barred[0] is None:
            added = None if exclude_seen[0] or repeat_bias is None else float(repeat_bias)
            seen = exclude_seen[0] or repeat_bias is not None
            scores, items = self.index.best(
                hidden, k, events.padded_items() if seen else None, added
            )
        else:
            marks = self._marks(events, barred, exclude_seen)
            recent = None
            if self.model.neighbours is not None or self.model.last_bias is not None:
                recent = events.last_items(RECENT, len(marks))
            scores, items = self.model.best(hidden, k, marks, recent)
        empty = np.diff(events.offsets) == 0
        scores, items = scores[: len(empty)], items[: len(empty)]
        if empty.any():
            scores, items = scores.copy(), items.copy()
            items[empty], scores[empty] = 0, -np.inf
        for row in np.flatnonzero(empty).tolist():
            popular = self._by_popularity
            if barred[row] is not None:
                popular = popular[~barred[row][popular]]
            popular = popular[:k]
            items[row, : len(popular)] = popular
            scores[row, : len(popular)] = self.catalogue.counts[popular - 1]
        return scores, items

    def _marks(
        self, events: Events, barred: list, exclude_seen: list[bool]
    ) -> UInt8[np.ndarray, "R V_and_1"]:
        marks = self.model.marks(len(barred))
        for row, (start, stop) in enumerate(zip(events.offsets, events.offsets[1:], strict=False)):
            marks[row, events.items[start:stop]] = BARRED if exclude_seen[row] else REPEATED
            if barred[row] is not None:
                marks[row, barred[row]] = BARRED
        return marks


def _find_barred(
    catalogue: Catalogue, allow: frozenset[str] | None, deny: frozenset[str] | None
) -> Bool[np.ndarray, " V_and_1"] | None:
    if allow is None and deny is None:
        return None
    barred = np.full(len(catalogue) + 1, allow is not None)
    if allow is not None:
        barred[catalogue.indices(allow)] = False
    if deny is not None:
        barred[catalogue.indices(deny)] = True
    return barred


def ids_of(name: str, items: Iterable[Any] | None) -> frozenset[str] | None:
    """The ids of a filter, which may be an iterator; None stays.

    Args:
        name: of the filter, for messages.
        items: the ids.

    Raises:
        UserError: it is a single text, a table, or something else than texts and whole numbers.
    """
    if isinstance(items, str | bytes):
        raise UserError(f"{name} is the single text {items!r}; give a list of ids")
    if items is None:
        return None
    # Of a table of pandas and of a dictionary, only the names would be read.
    if isinstance(items, Mapping) or hasattr(items, "columns"):
        kind = type(items).__name__
        raise UserError(f"{name} is a {kind}; give a list or one column of ids")
    if not isinstance(items, Iterable):
        raise UserError(f"{name} is {items!r}; give a list of ids")
    return frozenset(id_text(item, f"{name} holds") for item in items)
