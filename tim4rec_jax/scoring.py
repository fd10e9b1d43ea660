"""What an item's score depends on besides the hidden state: the items of the user's history.

A model may learn a *repeat bias*, which is added to the score of every item that the history
holds, and a number for each item, which is added where it is the last one. It may also have the
*neighbours* of each item, which are added when items are ranked. An evaluation or a recommendation
may leave the items of the history out. The loss, the ranking, the service and the exported program
all take this from here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tim4rec_jax.layers.lookup import lookup
from tim4rec_jax.layers.neighbours import Near, NeighbourTable, recent_items
from tim4rec_jax.models import SequenceModel


class HistoryBias(NamedTuple):
    """What a model adds to scores because of the history.

    Attributes:
        repeat_bias: what is added to the score of each item of the history.
        neighbours: of the items of the history; None: they add nothing.
        last_bias: what is added besides to the score of an item that comes last, see `LastItem`;
            None: nothing.
    """

    repeat_bias: Float[Array, ""]
    neighbours: NeighbourTable | None = None
    last_bias: Float[Array, " V"] | None = None

    def of(self, items: Int[Array | np.ndarray, "B S"]) -> HistoryItems:
        """With the items of each history, oldest first, padded with 0 at the end."""
        if self.neighbours is None and self.last_bias is None:
            return HistoryItems(items, self.repeat_bias)
        recent = recent_items(items)
        near = None if self.neighbours is None else self.neighbours.near(recent)
        at_end = None if self.last_bias is None else last_item(self.last_bias, recent)
        return HistoryItems(items, self.repeat_bias, near=near, at_end=at_end)


def history_bias(model: SequenceModel) -> HistoryBias | None:
    """What the items of the history add to the scores of a ranking. None: nothing."""
    if model.offset is None and model.neighbours is None:  # `last_offset` needs `offset`
        return None
    repeat_bias = model.repeat_bias()
    table = None if model.neighbours is None else model.neighbours.table()
    repeat_bias = jnp.zeros(()) if repeat_bias is None else repeat_bias
    return HistoryBias(repeat_bias, table, model.last_bias())


class LastItem(NamedTuple):
    """The last item of the history of each of N rows of scores, and what its score gets besides.

    Attributes:
        item: the item, 0 for none.
        added: what is added to its score. It is 0 where the event before the last one was of this
            item too: it has come twice already.
    """

    item: Int[Array, " N"]
    added: Float[Array, " N"]

    def added_to(self, targets: Int[Array, " N"]) -> Float[Array, " N"]:
        """What is added to the score of one item of each row."""
        return jnp.where(self.item == targets, self.added, 0)


def last_item(last_bias: Float[Array, " V"], recent: Int[Array | np.ndarray, "N R"]) -> LastItem:
    """The last items of histories, and what is added to their scores.

    Args:
        last_bias: what is added to each item, see `SequenceModel.last_bias`.
        recent: the last items of each history, two or more, the last one first, 0 for none.
    """
    recent = jnp.asarray(recent)
    item, before = recent[:, 0], recent[:, 1]
    added = lookup(last_bias[:, None], item)[:, 0]
    return LastItem(item, jnp.where((item > 0) & (item != before), added, 0))


class HistoryItems(NamedTuple):
    """The items that each of N rows of scores has in its history, and what they add to a score.

    Without `first` and `last` there is one history per row (R = N), and all of its items count.
    With them, several rows share a history, as the positions of a training sequence do: for row n
    the items `items[n // (N / R), first[n] : last[n] + 1]` count.

    Attributes:
        items: the item indices of each history, 0 for none.
        repeat_bias: what is added to the score of each of these items, once, however often the
            item occurs.
        first: the position of the first item that counts, per row.
        last: the position of the last item that counts, per row.
        near: the neighbours of the last items, which only the ranking adds; None: they add nothing.
        at_end: what is added besides to the score of the last item of each of the N rows; None:
            nothing.
    """

    items: Int[Array | np.ndarray, "R S"]
    repeat_bias: Float[Array, ""]
    first: Int[Array, " N"] | None = None
    last: Int[Array, " N"] | None = None
    near: Near | None = None
    at_end: LastItem | None = None

    def of_rows(self, rows: Int[Array, " n"]) -> HistoryItems:
        """The histories of the rows with these numbers, one per row."""
        at_end = None if self.at_end is None else LastItem(*(x[rows] for x in self.at_end))
        if self.first is None or self.last is None:
            return self._replace(items=self.items[rows], at_end=at_end)
        items = self.items[rows // (len(self.first) // len(self.items))]
        position = jnp.arange(items.shape[1])
        counts = (position >= self.first[rows, None]) & (position <= self.last[rows, None])
        return HistoryItems(jnp.where(counts, items, 0), self.repeat_bias, at_end=at_end)


def item_mask(
    items: Int[Array | np.ndarray, "B S"], columns: int, start: Int[Array, ""] | int = 0
) -> Bool[Array, "B columns"]:
    """Says which of the items `start`, ..., `start + columns - 1` each row of `items` holds.

    Args:
        items: item indices, 0 for none.
        columns: how many items to ask about.
        start: the first of them.
    """

    def one_row(items):
        column = jnp.where(items > 0, items - start, -1)
        column = jnp.where(column < 0, columns, column)  # a negative index would count from the end
        return jnp.zeros(columns, bool).at[column].set(True, mode="drop")

    return jax.vmap(one_row)(items)


def added_to(targets: Int[Array, " B"], history: HistoryItems) -> Float[Array, " B"]:
    """What the history adds to the score of one item of each row, with one history per row."""
    repeated = (history.items == targets[:, None]).any(axis=1) & (targets > 0)
    added = jnp.where(repeated, history.repeat_bias, 0)
    if history.near is not None:
        added += history.near.scores_of(targets)
    if history.at_end is not None:
        added += history.at_end.added_to(targets)
    return added


def add_history(
    scores: Float[Array, "B columns"],
    history: HistoryItems | None,
    start: Int[Array, ""] | int = 0,
) -> Float[Array, "B columns"]:
    """Adds what the history adds to the scores of the items `start`, `start + 1`, ...

    Args:
        scores: a row per history.
        history: one history per row; `None` changes nothing.
        start: the item of the first column.
    """
    if history is None:
        return scores
    repeated = item_mask(history.items, scores.shape[1], start)
    scores = scores + jnp.where(repeated, history.repeat_bias, 0).astype(scores.dtype)
    if history.near is not None:
        scores = scores + history.near.scores(scores.shape[1], start).astype(scores.dtype)
    return add_at_end(scores, history.at_end, start)


def add_at_end(
    scores: Float[Array, "B columns"], at_end: LastItem | None, start: Int[Array, ""] | int = 0
) -> Float[Array, "B columns"]:
    """Adds to the score of the last item of each row; see `add_history`."""
    if at_end is None:
        return scores
    column = jnp.where(at_end.item >= start, at_end.item - start, scores.shape[1])
    rows = jnp.arange(scores.shape[0])
    return scores.at[rows, column].add(
        at_end.added.astype(scores.dtype), mode="drop", unique_indices=True
    )
