"""Full ranking on the device: all items are scored block by block, and are never sorted."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from tim4rec_jax.runtime import AXES
from tim4rec_jax.scoring import HistoryItems, add_history, added_to, item_mask

BLOCK_SIZE = 1024  # the fastest, or nearly, of benchmarks/ranking.py at every catalogue size
LARGEST_BLOCK = 2048  # a block's numbers of greater and of equal scores share the bits of a float32
UNRANKED = 2**31 - 1  # the rank of a target whose score is NaN


class Shard(NamedTuple):
    """Which part of the catalogue a device has, in a function of `jax.shard_map`.

    Every device scores its own items for all users. Ranks are sums over devices, and of the best
    items only the k best of each device are exchanged.

    Attributes:
        first: the item of the first row. Devices have consecutive items.
        rows: the number of rows of the whole catalogue, padding included; later ones only fill up.
        targets: the vectors of the targets, for ranks.
    """

    first: Int[Array, ""]
    rows: int
    targets: Float[Array, "B D"] | None = None

    def vectors(self, table, ids, start, of_items):
        """The vectors of a block of items, or, unless it is `of_items`, of targets."""
        assert self.targets is not None
        number = jnp.minimum(start + jnp.arange(len(ids)), len(self.targets) - 1)
        own = table[jnp.maximum(ids - self.first, 0)]
        return jnp.where(of_items, own, self.targets[number].astype(own.dtype))


@partial(jax.jit, static_argnames="block_size")
def ranks_and_ties(
    hidden: Float[Array, "B D"],
    table: Float[Array, "rows D"],
    targets: Int[Array, " B"],
    *,
    block_size: int = BLOCK_SIZE,
    exclude: Int[Array, "B S"] | None = None,
    history: HistoryItems | None = None,
    shard: Shard | None = None,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Rank of every target, and the number of other items that have its very score.

    The rank is 1 + the number of items with a strictly greater score, so it is the best place that
    the target can take among its equals; `rank + ties` is the worst.

    Scores are `hidden @ table.T` in float32 or wider. They are computed for `block_size` items at
    a time, so the memory needed is O(B * block_size) whatever the size of the catalogue. Item 0 is
    padding and never counts. A NaN score counts against the target. A target whose own score is
    NaN has the rank `UNRANKED`, because no list of best items holds it.

    Args:
        hidden: a hidden state per user.
        table: the item embeddings. Row 0 is padding, so `rows` is V + 1.
        targets: the items to rank, 1 to V.
        block_size: the number of items scored at once, at most `LARGEST_BLOCK`; static.
        exclude: the items that do not compete, 0 for none. A target among them is still ranked.
        history: the items of each history, which add to scores; `None`: they add nothing.
        shard: which part of the catalogue `table` is. None: all of it.

    Returns:
        Two int32 arrays: the ranks, 1 to V or `UNRANKED`, and the ties, 0 to V - 1.

    Raises:
        ValueError: `block_size` is too large.
    """
    if block_size > LARGEST_BLOCK:
        raise ValueError(f"block_size is {block_size}; it must be at most {LARGEST_BLOCK}")
    hidden, table = _accumulation_dtype(hidden, table)
    row = jnp.arange(targets.shape[0])
    if exclude is not None:
        exclude = jnp.where(exclude == targets[:, None], 0, exclude)
    own_bias = jnp.zeros(targets.shape, hidden.dtype)
    if history is not None:
        own_bias = added_to(targets, history)

    # Two products of different shapes may add up in different orders. A target would be misplaced
    # if its score differed in the last bit from the score of the same item in a block. Therefore
    # the scan scores the targets first, with the very product that scores the blocks of items.
    def step(carry, block):
        own, greater, equal = carry
        ids, start, competes = block
        if shard is None:
            scores = _scores(hidden, table, ids)
        else:
            vectors = shard.vectors(table, ids, start, competes)
            scores = _scores(hidden, vectors, jnp.arange(block_size))
        column = row - start
        here = ~competes & (column >= 0) & (column < block_size)
        picked = jnp.take_along_axis(scores, column[:, None], 1, mode="clip")[:, 0]
        own = jnp.where(here, picked + own_bias, own)
        scores = add_history(scores, history, start)
        rivals = competes & (ids > 0) & (ids != targets[:, None])
        if exclude is not None:
            rivals &= ~item_mask(exclude, block_size, start)
        # One sum counts both: greater scores in its whole part, and equal ones in units of
        # 1 / (2 * LARGEST_BLOCK). It is exact in float32, and a second sum over the block would
        # take a tenth of the time of everything. XLA adds up floats on a CPU with half the memory
        # that integers take.
        not_less = jnp.where(scores == own[:, None], 0.5 / LARGEST_BLOCK, 1.0)
        weight = jnp.where(rivals & ~(scores < own[:, None]), not_less, 0.0)
        count = weight.sum(axis=1, dtype=jnp.float32)
        whole = jnp.floor(count)
        equals = (count - whole) * (2 * LARGEST_BLOCK)
        return (own, greater + whole.astype(jnp.int32), equal + equals.astype(jnp.int32)), None

    target_ids, target_starts = _blocks(targets, block_size)
    ids, starts = _item_blocks(table, block_size, shard)
    competes = jnp.arange(len(target_starts) + len(starts)) >= len(target_starts)
    blocks = (
        jnp.concatenate([target_ids, ids]),
        jnp.concatenate([target_starts, starts]),
        competes,
    )
    none = jnp.zeros(targets.shape, jnp.int32)
    start = (jnp.zeros(targets.shape, hidden.dtype), none, none)
    (own, greater, equal), _ = lax.scan(step, start, blocks)
    if shard is not None:
        greater, equal = lax.psum((greater, equal), AXES)
    return jnp.where(jnp.isnan(own), UNRANKED, greater + 1), equal


@partial(jax.jit, static_argnames="block_size")
def ranks(
    hidden: Float[Array, "B D"],
    table: Float[Array, "rows D"],
    targets: Int[Array, " B"],
    *,
    block_size: int = BLOCK_SIZE,
    exclude: Int[Array, "B S"] | None = None,
    history: HistoryItems | None = None,
) -> Int[Array, " B"]:
    """The ranks alone of `ranks_and_ties`, whose arguments it takes."""
    options: dict = dict(block_size=block_size, exclude=exclude, history=history)
    return ranks_and_ties(hidden, table, targets, **options)[0]


@partial(jax.jit, static_argnames=("k", "block_size"))
def top_k(
    hidden: Float[Array, "B D"],
    table: Float[Array, "rows D"],
    k: int,
    *,
    block_size: int = BLOCK_SIZE,
    exclude: Int[Array, "B S"] | None = None,
    history: HistoryItems | None = None,
    shard: Shard | None = None,
) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """The `k` best items of every user, best first; of equal scores the lower index comes first.

    An item whose score is NaN is never among them. Where fewer than `k` items are left, because
    the catalogue is small or most of it is excluded, item 0 with score -inf fills up.

    Args:
        hidden: a hidden state per user.
        table: the item embeddings. Row 0 is padding, so `rows` is V + 1.
        k: the number of items; static.
        block_size: the number of items scored at once; static.
        exclude: the items to leave out, 0 for none.
        history: the items of each history, which add to scores; `None`: they add nothing.
        shard: which part of the catalogue `table` is. None: all of it.

    Returns:
        The scores (float32 or wider) and the items (int32).
    """
    hidden, table = _accumulation_dtype(hidden, table)

    def step(best, block):
        ids, start = block
        place = ids if shard is None else jnp.maximum(ids - shard.first, 0)
        scores = add_history(_scores(hidden, table, place), history, start)
        barred = (ids == 0) | jnp.isnan(scores)
        if exclude is not None:
            barred |= item_mask(exclude, block_size, start)
        scores = jnp.where(scores == 0, 0.0, scores)  # lax.top_k puts -0 below 0
        scores = jnp.where(barred, -jnp.inf, scores)
        # lax.top_k keeps the earlier of two equals, and earlier blocks hold the lower indices.
        block_scores, column = lax.top_k(scores, min(k, block_size))
        scores = jnp.concatenate([best[0], block_scores], axis=1)
        items = jnp.concatenate([best[1], ids[column]], axis=1)
        scores, column = lax.top_k(scores, k)
        return (scores, jnp.take_along_axis(items, column, axis=1)), None

    shape = (hidden.shape[0], k)
    nothing = (jnp.full(shape, -jnp.inf, hidden.dtype), jnp.zeros(shape, jnp.int32))
    best = lax.scan(step, nothing, _item_blocks(table, block_size, shard))[0]
    if shard is None:
        return best
    # The k best of every device, in the order of their items.
    scores, items = (lax.all_gather(x, AXES, axis=1, tiled=True) for x in best)
    scores, column = lax.top_k(scores, k)
    return scores, jnp.take_along_axis(items, column, axis=1)


def _accumulation_dtype(*arrays):
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return tuple(array.astype(dtype) for array in arrays)


def _blocks(ids, block_size):
    """The ids padded with 0 and cut into blocks, and the position where each block starts."""
    count = -(-ids.shape[0] // block_size)
    padded = jnp.pad(ids.astype(jnp.int32), (0, count * block_size - ids.shape[0]))
    return padded.reshape(count, block_size), jnp.arange(count, dtype=jnp.int32) * block_size


def _item_blocks(table, block_size, shard):
    """Blocks of the items of a table, by their indices in the whole catalogue."""
    ids = jnp.arange(table.shape[0])
    if shard is None:
        return _blocks(ids, block_size)
    ids = ids + shard.first
    blocks, starts = _blocks(jnp.where(ids < shard.rows, ids, 0), block_size)
    return blocks, starts + shard.first


def _scores(hidden, table, ids):
    # The default precision of GPUs (TF32) and TPUs (bfloat16) would tie and swap close scores.
    return jnp.matmul(hidden, table[ids].T, precision=lax.Precision.HIGHEST)
