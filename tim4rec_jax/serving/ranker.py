"""Finds the best items for histories, among the whole catalogue or among the items allowed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Int64

from tim4rec_jax.errors import UserError
from tim4rec_jax.serving.ann_index import ApproximateIndex
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.compiled_model import MAX_ROWS, CompiledModel, power_of_two
from tim4rec_jax.serving.history import Events, check_times

Times = int | np.integer | Sequence[int] | np.ndarray | None


@dataclass(frozen=True)
class Candidates:
    """The items that may be recommended, with a table of their own.

    Attributes:
        table: the embeddings of the items from row 1 on, then rows that are never recommended.
        items: the index of each row in the catalogue, rising; the first is the padding, 0.
        popular: the items, most popular first.
    """

    table: Float[Array, "rows D"]
    items: Int32[np.ndarray, " C"]
    popular: Int32[np.ndarray, " P"]

    @classmethod
    def build(
        cls,
        catalogue: Catalogue,
        table: Float[Array, "rows D"],
        allow: frozenset[str] | None,
        deny: frozenset[str] | None,
    ) -> Candidates:
        """All items of the catalogue, or those in `allow`, without those in `deny`."""
        items = np.arange(1, len(catalogue) + 1, dtype=np.int32)
        if allow is not None:
            items = np.intersect1d(items, catalogue.indices(allow))
        if deny is not None:
            items = np.setdiff1d(items, catalogue.indices(deny))
        popular = items[np.argsort(-catalogue.counts[items - 1], kind="stable")]
        if len(items) < len(catalogue):
            rows = min(power_of_two(len(items) + 1, 16), len(table))
            table = _take(table, np.pad(items, (1, rows - len(items) - 1), constant_values=(0, -1)))
        return cls(table, np.append(np.int32(0), items), popular)

    def rows(self, items: Int32[np.ndarray, "B S"]) -> Int32[np.ndarray, "B S"]:
        """The rows of items given by their index in the catalogue, 0 for items not in the table."""
        rows = np.minimum(np.searchsorted(self.items, items), len(self.items) - 1)
        return np.where(self.items[rows] == items, rows, 0).astype(np.int32)


@jax.jit
def _take(table: Float[Array, "V D"], items: Int32[Array, " rows"]) -> Float[Array, "rows D"]:
    """The rows of these items; NaN for item -1, because a NaN score is never recommended."""
    return jnp.where((items >= 0)[:, None], table[items], jnp.nan)


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
        # The requests of a service, and the batches of a large job, share few filters.
        build = functools.partial(Candidates.build, catalogue, model.table)
        self._candidates: Callable[..., Candidates] = functools.lru_cache(maxsize=4)(build)

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
            UserError: `k` is below 1, or `at` does not fit the model or the histories.
        """
        count = len(events.offsets) - 1
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise UserError(f"k is {k!r}; it must be a whole number of 1 or more")
        k = min(int(k), len(self.catalogue))
        moments = self._moments(at, count)
        candidates = self._candidates(_ids(allow), _ids(deny))
        scores, items = [np.zeros((0, k), np.float32)], [np.zeros((0, k), np.int32)]
        for first in range(0, count, MAX_ROWS):
            part = events.rows(first, first + MAX_ROWS)
            then = None if moments is None else moments[first : first + MAX_ROWS]
            if hidden is None:
                states = self.model.encode(part, then, width)
            else:
                states = self.model.condition(hidden, part, then)
            best_scores, best_items = self._best(part, states, k, candidates, exclude_seen)
            scores.append(best_scores)
            items.append(best_items)
        return np.concatenate(scores), np.concatenate(items)

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

    def _best(self, events: Events, hidden, k: int, candidates: Candidates, exclude_seen: bool):
        repeat_bias, history_items = self.model.repeat_bias, None
        if exclude_seen or repeat_bias is not None:
            history_items = candidates.rows(events.padded_items())
        if self.index is not None and len(candidates.items) == len(self.model.table):
            added = None if exclude_seen or repeat_bias is None else float(repeat_bias)
            scores, items = self.index.best(hidden, k, history_items, added)
        else:
            scores, rows = self.model.best(hidden, candidates.table, k, history_items, exclude_seen)
            items = candidates.items[rows]
        empty = np.diff(events.offsets) == 0
        scores, items = scores[: len(empty)], items[: len(empty)]
        if empty.any():
            popular = candidates.popular[:k]
            scores, items = scores.copy(), items.copy()
            items[empty], scores[empty] = 0, -np.inf
            items[empty, : len(popular)] = popular
            scores[empty, : len(popular)] = self.catalogue.counts[popular - 1]
        return scores, items


def _ids(items: Iterable[Any] | None) -> frozenset[str] | None:
    return None if items is None else frozenset(map(str, items))
