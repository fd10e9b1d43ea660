"""The items that may be recommended."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from tim4rec_jax.errors import UserError
from tim4rec_jax.serving.ann_index import ApproximateIndex
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.compiled_model import MAX_ROWS, CompiledModel, power_of_two
from tim4rec_jax.serving.history import Events, check_times

# ---- serving.candidates
# The items that may be recommended.


@dataclass(frozen=True)
class Candidates:
    """Items as a table of their own, to be ranked.

    Attributes:
        table: embeddings of the items from row 1 on, then rows that are never recommended.
        items: index of each row in the catalogue, rising; the first is the padding, 0.
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
            # A score that is not a number is never recommended.
            filler = jnp.full((rows - len(items) - 1, table.shape[1]), jnp.nan, table.dtype)
            table = jnp.concatenate([table[np.append(0, items)], filler])
        return cls(table, np.append(np.int32(0), items), popular)

    def places(self, items: Int32[np.ndarray, "B S"]) -> Int32[np.ndarray, "B S"]:
        """The rows of items given by their index in the catalogue, 0 for others."""
        rows = np.minimum(np.searchsorted(self.items, items), len(self.items) - 1)
        return np.where(self.items[rows] == items, rows, 0).astype(np.int32)


# ---- serving.ranker
# The best items for histories, of the whole catalogue or of those allowed.

Times = int | np.integer | Sequence[int] | np.ndarray | None


class Ranker:
    """A model and its catalogue, in indices of the catalogue.

    Attributes:
        index: searched instead of scoring all items, unless `allow` or `deny` is given; None:
            rankings are exact.
    """

    def __init__(
        self, engine: CompiledModel, catalogue: Catalogue, index: ApproximateIndex | None = None
    ):
        self.engine, self.catalogue, self.index = engine, catalogue, index
        # Requests of a service, and the batches of a large job, share few filters.
        build = functools.partial(Candidates.build, catalogue, engine.table)
        self._candidates: Callable = functools.lru_cache(maxsize=4)(build)

    def rank(
        self,
        events: Events,
        k: int = 10,
        *,
        hidden: Float[Array, "R D"] | None = None,
        at: Times = None,
        exclude_seen: bool = True,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] | None = None,
    ) -> tuple[Float[np.ndarray, "B k"], Int[np.ndarray, "B k"]]:
        """Scores and items of each history, best first, with 0 as filler.

        Args:
            events: histories in order of time; empty ones get the most popular items.
            k: columns of the result, fewer where the catalogue has fewer.
            hidden: states after the histories, at most `MAX_ROWS`; None computes them.
            at: when the items will be shown, one time or one per history, for a model trained
                with `model.knows_next_time`.
            exclude_seen: leave out the items of each history.
            allow: rank only these ids; unknown ones are passed over.
            deny: leave out these ids.

        Raises:
            UserError: `k` is below 1, or `at` does not fit the model or the histories.
        """
        rows = len(events.offsets) - 1
        k, moments = self._check(k, at, rows)
        candidates = self._candidates(_ids(allow), _ids(deny))
        scores, items = [np.zeros((0, k), np.float32)], [np.zeros((0, k), np.int32)]
        for first in range(0, rows, MAX_ROWS):
            part = events.rows(first, first + MAX_ROWS)
            states = self.engine.encode(part) if hidden is None else hidden
            then = None if moments is None else moments[first : first + MAX_ROWS]
            states = self.engine.condition_on_time(states, part, then)
            ranked = self._best(part, states, k, candidates, exclude_seen)
            scores.append(ranked[0])
            items.append(ranked[1])
        return np.concatenate(scores), np.concatenate(items)

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

    def _best(self, events: Events, hidden, k: int, candidates: Candidates, exclude_seen: bool):
        offset, had = self.engine.offset, None
        if exclude_seen or offset is not None:
            had = candidates.places(events.padded_items())
        if self.index is not None and len(candidates.items) == len(self.engine.table):
            offset = None if exclude_seen or offset is None else float(offset)
            scores, items = self.index.best(hidden, k, had, offset)
        else:
            scores, rows = self.engine.best(hidden, candidates.table, k, had, exclude_seen)
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
