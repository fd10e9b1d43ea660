"""The neighbours of the last events: what users have near them, added to the scores of a ranking.

A model of a few dozen dimensions cannot remember every pair of items that go together, and a table
of such pairs can. Its scores are added to the model's, as a language model is joined with what a
datastore remembers (kNN-LM, arXiv 1911.00172), here as a sum of logarithms.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tim4rec_jax.layers.items import FixedArray

RECENT = 16  # how many of the last events bring their neighbours along
# Chosen on the validation of Amazon-Beauty and the KuaiRand slice, see docs/models.md.
_DECAY = 0.85  # what an event counts against the event after it
_SCALE = 10.0  # of the sums of similarities, whose logarithm is taken


class NeighbourTable(NamedTuple):
    """The most similar items of each item, see `tim4rec_jax.data.item_neighbours`.

    Attributes:
        items: the neighbours of each row of the item table, 0 for none.
        similarity: that of each neighbour, 0 for none.
        weight: what the logarithm of a sum of similarities is multiplied by.
    """

    items: Int[Array, "V M"]
    similarity: Float[Array, "V M"]
    weight: Float[Array, ""]

    def near(self, recent: Int[Array, "B R"]) -> Near:
        """The neighbours of the last events of each history.

        Args:
            recent: the last items of each history, the last one first, 0 for none.
        """
        decay = _DECAY ** jnp.arange(recent.shape[1], dtype=self.similarity.dtype)
        similarity = self.similarity[recent] * decay[:, None]
        # The number of rows has no value where a program is exported for any of them.
        shape = recent.shape[0], recent.shape[1] * self.items.shape[1]
        return Near(self.items[recent].reshape(shape), similarity.reshape(shape), self.weight)


class Near(NamedTuple):
    """The neighbours of the last events of each history; an item may be there several times.

    Attributes:
        items: the neighbours, 0 for none.
        similarity: that to the event, which counts less the older the event is; 0 for none.
        weight: see `NeighbourTable`.
    """

    items: Int[Array, "B S"]
    similarity: Float[Array, "B S"]
    weight: Float[Array, ""]

    def scores(self, columns: int, start: Int[Array, ""] | int = 0) -> Float[Array, "B columns"]:
        """What is added to the scores of the items `start`, ..., `start + columns - 1`."""
        column = jnp.where(self.items > 0, self.items - start, -1)
        column = jnp.where(column < 0, columns, column)  # a negative index would count from the end

        def one_row(column, similarity):
            return jnp.zeros(columns, similarity.dtype).at[column].add(similarity, mode="drop")

        return self._scores(jax.vmap(one_row)(column, self.similarity))

    def scores_of(self, targets: Int[Array, " B"]) -> Float[Array, " B"]:
        """What is added to the score of one item of each row."""
        here = self.items == targets[:, None]
        return self._scores(jnp.where(here, self.similarity, 0).sum(axis=1))

    def _scores(self, sums):
        return self.weight * jnp.log1p(_SCALE * sums)


class Neighbours(nnx.Module):
    """The most similar items of each item, see `tim4rec_jax.data.item_neighbours`.

    Attributes:
      items: the neighbours of each item, int32 [rows, M].
      similarity: how similar they are, [rows, M].
      weight: see `NeighbourTable`.
    """

    def __init__(self, items: np.ndarray, similarity: np.ndarray, weight: float):
        """No training changes any of them."""
        self.items = FixedArray(jnp.asarray(items))
        self.similarity = FixedArray(jnp.asarray(similarity))
        self.weight = weight

    def table(self) -> NeighbourTable:
        """The arrays, for scoring."""
        weight = jnp.asarray(self.weight, self.similarity.dtype)
        return NeighbourTable(self.items[...], self.similarity[...], weight)


def recent_items(items: Int[Array | np.ndarray, "B S"]) -> Int[Array, "B R"]:
    """The last `RECENT` items of each history, the last one first, completed with 0."""
    items = jnp.asarray(items)
    place = (items > 0).sum(axis=1, keepdims=True) - 1 - jnp.arange(RECENT)
    return jnp.where(place >= 0, jnp.take_along_axis(items, jnp.maximum(place, 0), axis=1), 0)
