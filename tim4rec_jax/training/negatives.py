"""Draws items by their frequency in training, for the sampled losses.

To draw an item is to draw one of all training events, each as likely as any other, and to take its
item. Numbers of events can pass 2^32, and 64-bit integers are off in JAX. So a number is a pair of
32-bit words here, the upper one first.

The rows of the item table are cut into blocks. The events up to the end of each block are few
numbers, which every device holds; a search among them finds the block of an event. What a block's
rows have is looked up for the blocks that were drawn, wherever the rows lie. So a draw costs the
same whatever the size of the catalogue, but for one more step of the search as it doubles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int64, UInt32

_BLOCK = 64  # rows


class ItemFrequencies(NamedTuple):
    """How often each item is an event of the training, in a form to draw from.

    Attributes:
      ends: the number of events in all blocks up to and including each one.
      within: the number of events in a row's block, up to and including the row. Rows that
        complete the last block have none of their own.
    """

    ends: UInt32[Array | np.ndarray, "blocks 2"]
    within: UInt32[Array | np.ndarray, "rows 2"]


class Drawn(NamedTuple):
    """Items drawn for a batch.

    Attributes:
      items: their rows in the item table. All targets share them.
      log_share: the logarithm of the probability with which each is drawn.
    """

    items: Int[Array, " S"]
    log_share: Float[Array, " S"]


def item_frequencies(counts: Int64[np.ndarray, " V"]) -> ItemFrequencies:
    """Counts events for `draw_by_frequency`.

    Args:
      counts: training events of each item. One is added to each, so that every item can be drawn.

    Returns:
      Arrays of NumPy. Row 0 is padding, which is never drawn.
    """
    rows = len(counts) + 1
    padded = np.zeros(-(-rows // _BLOCK) * _BLOCK, np.uint64)
    padded[1:rows] = counts + 1
    within = np.cumsum(padded.reshape(-1, _BLOCK), axis=1)
    ends = np.cumsum(within[:, -1])
    return ItemFrequencies(_words(ends), _words(within.reshape(-1)))


def _words(numbers: np.ndarray) -> np.ndarray:
    return np.stack([numbers >> np.uint64(32), numbers & np.uint64(2**32 - 1)], -1).astype(
        np.uint32
    )


def draw_by_frequency(
    key: jax.Array,
    count: int,
    frequencies: ItemFrequencies,
    look_up: Callable[[jax.Array], jax.Array] | None = None,
) -> Drawn:
    """Draws items, each with the probability of its share of all events.

    Args:
      key: a key of `jax.random`.
      count: number of items, which are drawn with replacement.
      frequencies: of all items.
      look_up: gives rows of `frequencies.within` by their numbers, int32 [count, block]. None: they
        are all in this array.
    """
    event = _below(jax.random.bits(key, (count, 2), jnp.uint32), frequencies.ends[-1])
    block = _search(frequencies.ends, event)
    before = jnp.where((block > 0)[:, None], frequencies.ends[block - 1], 0)
    event = _subtract(event, before)
    rows = block[:, None] * _BLOCK + jnp.arange(_BLOCK)
    within = frequencies.within[rows] if look_up is None else look_up(rows)
    place = (~_less(event[:, None], within)).sum(axis=1, dtype=jnp.int32)
    upto = jnp.take_along_axis(within, place[:, None, None], axis=1)[:, 0]
    previous = jnp.take_along_axis(within, jnp.maximum(place - 1, 0)[:, None, None], axis=1)[:, 0]
    own = _subtract(upto, jnp.where((place > 0)[:, None], previous, 0))
    log_share = jnp.log(_float(own)) - jnp.log(_float(frequencies.ends[-1]))
    return Drawn(block * _BLOCK + place, log_share)


def draw_uniformly(key: jax.Array, count: int, n_items: int) -> Drawn:
    """Draws items, each with the same probability, with replacement."""
    items = jax.random.randint(key, (count,), 1, n_items + 1)
    return Drawn(items, jnp.full(count, -np.log(n_items), jnp.float32))


def _below(bits: UInt32[Array, "n 2"], total: UInt32[Array, " 2"]) -> UInt32[Array, "n 2"]:
    """Makes numbers below `total` of 64 random bits each.

    They are the upper half of the 128-bit products. A remainder would prefer small numbers, by a
    factor of up to 2. Of these, none is preferred by more than `total` / 2^64.
    """
    (high, low), (total_high, total_low) = (bits[:, 0], bits[:, 1]), total
    carry, _ = _product(low, total_low)
    middle_high, middle = _product(high, total_low)
    middle, over = _add(middle, carry)
    other_high, other = _product(low, total_high)
    _, over_again = _add(middle, other)
    top_high, top = _product(high, total_high)
    for part in (middle_high, other_high, over, over_again):
        top, more = _add(top, part)
        top_high += more
    return jnp.stack([top_high, top], axis=-1)


def _product(a, b):
    """Upper and lower word of the product of two words."""
    half = jnp.uint32(0xFFFF)
    a_high, a_low, b_high, b_low = a >> 16, a & half, b >> 16, b & half
    # No sum below passes 2^32: (2^16 - 1)^2 + 2 (2^16 - 1) < 2^32.
    first = a_low * b_low
    second = a_high * b_low + (first >> 16)
    third = a_low * b_high + (second & half)
    high = a_high * b_high + (second >> 16) + (third >> 16)
    return high, (third << 16) | (first & half)


def _add(a, b):
    """The sum of two words, and what is carried."""
    total = a + b
    return total, (total < a).astype(jnp.uint32)


def _subtract(a, b):
    """The difference of pairs of words, the first of which is not smaller."""
    low = a[..., 1] - b[..., 1]
    borrow = (a[..., 1] < b[..., 1]).astype(jnp.uint32)
    return jnp.stack([a[..., 0] - b[..., 0] - borrow, low], axis=-1)


def _less(a, b):
    """Whether a < b, of pairs of words."""
    return (a[..., 0] < b[..., 0]) | ((a[..., 0] == b[..., 0]) & (a[..., 1] < b[..., 1]))


def _float(pair):
    return pair[..., 0].astype(jnp.float32) * jnp.float32(2**32) + pair[..., 1].astype(jnp.float32)


def _search(ends, events):
    """The first entry of `ends`, which rises, that is greater than each event."""

    def halve(_, between):
        low, high = between
        middle = (low + high) // 2
        after = _less(events, ends[middle])
        return jnp.where(after, low, middle + 1), jnp.where(after, middle, high)

    start = jnp.zeros(len(events), jnp.int32), jnp.full(len(events), len(ends) - 1, jnp.int32)
    return jax.lax.fori_loop(0, len(ends).bit_length(), halve, start)[0]
