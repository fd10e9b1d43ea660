"""What scores have besides the product of state and item: history masks and learned offsets."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Seen(NamedTuple):
    """Items of histories, and what a model adds to their scores.

    Attributes:
        items: of each user, 0 = none.
        offset: added once, however often an item is there.
    """

    items: Int[Array, "B S"]
    offset: Float[Array, ""]


def add_offset(scores, seen, start):
    """Scores of the items from `start` on, offset for those seen; `seen` may be None."""
    if seen is None:
        return scores
    marked = mark(jnp.zeros(scores.shape, bool), seen.items, start)
    return scores + jnp.where(marked, seen.offset, 0).astype(scores.dtype)


def mark(mask, exclude, start):
    """True where a column of the block that starts at item `start` is in the user's `exclude`."""

    def one_row(row, items):
        column = jnp.where(items > 0, items - start, -1)
        column = jnp.where(column < 0, row.shape[0], column)  # negative indices would wrap
        return row.at[column].set(True, mode="drop")

    return jax.vmap(one_row)(jnp.zeros_like(mask), exclude)
