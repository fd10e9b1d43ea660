"""The best items for many users at once, of whom each has items of its own that may not come."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from tim4rec_jax.layers.neighbours import NeighbourTable
from tim4rec_jax.scoring import add_at_end, last_item

# What a user's mark on an item says. An item without a mark may be recommended.
BARRED = 1  # it is never recommended
REPEATED = 2  # the history holds it, so the model's repeat bias is added to its score

# How many items are scored at once. Larger blocks are faster on a CPU until the scores of a batch
# leave its cache; blocks of a small catalogue are small, so that the last one is nearly full.
_BLOCK, _LARGE_BLOCK = 4096, 16384
_GROUP = 64  # neighbours in a block, of which only the best are looked at one by one


def top_items(
    hidden: Float[Array, "R D"],
    table: Float[Array, "V_and_1 D"],
    marks: UInt8[Array, "R V_and_1"],
    repeat_bias: Float[Array, ""] | None,
    near_items: tuple[NeighbourTable, Int[Array, "R S"]] | None,
    last_items: tuple[Float[Array, " V"], Int[Array, "R 2"]] | None,
    k: int,
) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
    """The `k` best items of every user, best first; of equal scores the lower index comes first.

    Whoever calls it compiles it, so that programs for a catalogue go with its model.

    The rules are those of `evaluation.ranking.top_k`: scores are `hidden @ table.T` in float32 or
    wider, an item with a NaN score is never among the best, and item 0 with score -inf fills up.
    The marks are an argument of one shape, so one program serves users with histories and filters
    of all lengths.

    Args:
        hidden: a hidden state per user.
        table: the item embeddings; row 0 is padding.
        marks: what each user's marks say: 0, `BARRED` or `REPEATED`.
        repeat_bias: what is added to the scores of repeated items; `None`: there are none.
        near_items: the neighbours of items, and the last items of each user; `None` adds nothing.
        last_items: what is added to the score of each item where it comes last, and the last two
            items of each user; `None` adds nothing.
        k: the number of items; static.
    """
    rows = table.shape[0]
    block = min(_BLOCK if rows < 4 * _LARGE_BLOCK else _LARGE_BLOCK, rows)
    dtype = jnp.promote_types(jnp.result_type(hidden, table), jnp.float32)
    near = None
    if near_items is not None:
        neighbours, recent = near_items
        near = neighbours.near(recent)
    at_end = None if last_items is None else last_item(*last_items)

    def step(best, first):
        # The last block begins earlier, so that it is as long as the others. The items that it
        # shares with the block before it do not count a second time.
        start = jnp.minimum(first, rows - block)
        items = start + jnp.arange(block, dtype=jnp.int32)
        embeddings = lax.dynamic_slice_in_dim(table, start, block).astype(dtype)
        mark = lax.dynamic_slice_in_dim(marks, start, block, axis=1)
        # The default precision of GPUs (TF32) and TPUs (bfloat16) would tie and swap close scores.
        scores = lax.dot_general(
            hidden.astype(dtype),
            embeddings,
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST,
        )
        if repeat_bias is not None:
            scores = scores + jnp.where(mark == REPEATED, repeat_bias, 0).astype(dtype)
        if near is not None:
            scores += near.scores(block, start).astype(dtype)
        scores = add_at_end(scores, at_end, start)
        barred = (mark == BARRED) | jnp.isnan(scores) | (items == 0) | (items < first)
        scores = jnp.where(scores == 0, 0.0, scores)  # lax.top_k puts -0 below 0
        scores = jnp.where(barred, -jnp.inf, scores)
        # lax.top_k keeps the earlier of two equals, and earlier blocks hold the lower indices.
        scores, column = _best_of_block(scores, k)
        scores = jnp.concatenate([best[0], scores], axis=1)
        items = jnp.concatenate([best[1], items[column]], axis=1)
        scores, column = lax.top_k(scores, k)
        return (scores, jnp.take_along_axis(items, column, axis=1)), None

    shape = (hidden.shape[0], k)
    nothing = (jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, jnp.int32))
    firsts = jnp.arange(-(-rows // block), dtype=jnp.int32) * block
    return lax.scan(step, nothing, firsts)[0]


def _best_of_block(
    scores: Float[Array, "R B"], k: int
) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
    """What `lax.top_k(scores, min(k, B))` returns; it is faster where `k` is small.

    Each of the `k` best is in one of the `k` groups of neighbours with the highest maxima. For if
    an item is in none of them, then `k` groups hold an item that is higher, or as high and earlier.
    To compare the items of few groups takes less time than to compare all.
    """
    rows, block = scores.shape
    if k * _GROUP > block // 4 or block % _GROUP:
        best, places = lax.top_k(scores, min(k, block))
        return best, places
    grouped = scores.reshape(rows, -1, _GROUP)
    _, groups = lax.top_k(grouped.max(axis=2), k)
    groups = jnp.sort(groups, axis=1)  # so that of two equals the lower index is the earlier
    candidates = jnp.take_along_axis(grouped, groups[:, :, None], axis=1).reshape(rows, -1)
    scores, place = lax.top_k(candidates, k)
    group = jnp.take_along_axis(groups, place // _GROUP, axis=1)
    return scores, group * _GROUP + place % _GROUP
