"""Cross-entropy over all items, where each device has the vectors of some.

Scores stay on the device that computes them. What devices exchange is one number for each hidden
state: the largest score, the sum of exponentials, the score of the target; and at the end the sum
of the gradients of the hidden states.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tim4rec_jax.item_rows import AXES, DATA, ITEMS
from tim4rec_jax.scoring import HistoryItems
from tim4rec_jax.training.losses import block_rows, blocks, few_scores


def gathered(table: Float[Array, " V *row"]) -> Float[Array, " G *row"]:
    """The rows of all devices along `data`, which share the scores of no batch.

    The devices of a group along `items` hold all rows together afterwards.
    """
    return jax.lax.all_gather(table, DATA, tiled=True)


def scattered(gradient: Float[Array, " G *row"]) -> Float[Array, " V *row"]:
    """The gradient of this device's rows from those that `gathered` has returned everywhere."""
    return jax.lax.psum_scatter(gradient, DATA, tiled=True)


def columns(ids: Int[Array, "*n"], rows: int) -> Int[Array, "*n"]:
    """Where items stand among the rows that `gathered` returns on this device.

    Args:
      ids: item indices.
      rows: number of rows of a device.

    Returns:
      The columns; one past the last one for items of other devices.
    """
    groups, own = jax.lax.axis_size(ITEMS), jax.lax.axis_index(ITEMS)
    device, place = ids // rows, ids % rows
    count = rows * jax.lax.axis_size(DATA)
    return jnp.where(device % groups == own, device // groups * rows + place, count)


def row_ids(rows: int) -> Int[Array, " G"]:
    """The item indices of the rows that `gathered` returns on this device."""
    groups, own = jax.lax.axis_size(ITEMS), jax.lax.axis_index(ITEMS)
    device = jnp.arange(jax.lax.axis_size(DATA)) * groups + own
    return (device[:, None] * rows + jnp.arange(rows)).reshape(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def sharded_cross_entropy(
    hidden: Float[Array, "N D"],
    table: Float[Array, "G D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    history: HistoryItems | None,
    items: int,
) -> Float[Array, ""]:
    """sum_n weights[n] * cross_entropy(hidden[n], ...) over the items of all devices.

    Many rows go through in blocks, as in `tim4rec_jax.training.losses.summed_cross_entropy`.

    Args:
      hidden: the states that predict the targets, the same on all devices along `items`.
      table: the rows of this device, as `gathered` returns them. Those behind the last item, which
        make the blocks of all devices equal, count for nothing.
      targets: item indices.
      weights: weight of each row, 0 for a row that does not count.
      history: the items whose scores get the repeat bias; `None`: there is no such bias.
      items: number of rows of the whole table that count, padding included.

    Returns:
      The sum of this device's rows of the batch, in nats, in at least float32.
    """
    return _forward(hidden, table, targets, weights, history, items)[0]


def _forward(hidden, table, targets, weights, history, items):
    accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
    matmul = functools.partial(jnp.matmul, preferred_element_type=accumulate)
    narrow, count = table.astype(hidden.dtype), len(table)
    rows = count // jax.lax.axis_size(DATA)
    counts: Bool[Array, " G"] = row_ids(rows) < items

    # Each block costs one more pass over the gradient of the table.
    size = len(hidden) if few_scores(len(hidden), count) else block_rows(count)
    cut = blocks(size, hidden, targets, weights.astype(accumulate), jnp.arange(len(hidden)))

    def block(i, carry):
        loss, d_hidden, d_table, d_bias = carry
        h, t, w, number = (x[i] for x in cut)
        scores = jnp.where(counts, matmul(h, narrow.T), -jnp.inf)
        column = columns(t, rows)
        at_target = jnp.take(narrow, column, axis=0, mode="fill", fill_value=0)
        picked = jnp.einsum("nd,nd->n", h, at_target, preferred_element_type=accumulate)
        mask: Any = None
        seen: Any = None
        if history is not None:
            mask = _mask(history.of_rows(number).items, rows, count)
            seen = jnp.take_along_axis(mask, column[:, None], 1, mode="fill", fill_value=False)
            scores += jnp.where(mask, history.repeat_bias, 0)
            picked += jnp.where(seen[:, 0], history.repeat_bias, 0)
        top = jax.lax.pmax(scores.max(axis=1), ITEMS)
        exp = jnp.exp(scores - top[:, None])
        total, picked = jax.lax.psum((exp.sum(axis=1), picked), ITEMS)
        loss += jnp.sum(w * (jnp.log(total) + top - picked))
        d_scores = exp * (w / total)[:, None]
        if mask is not None:
            d_bias += jnp.sum(jnp.where(mask, d_scores, 0)) - jnp.sum(w * seen[:, 0])
        d_scores = d_scores.astype(h.dtype)
        d_block = matmul(d_scores, narrow) - w[:, None] * at_target
        # This device's part of a sum over all, which is not rounded before it is complete.
        d_hidden = d_hidden.at[i].set(d_block)
        return loss, d_hidden, d_table + matmul(d_scores.T, h), d_bias

    zero = jnp.zeros((), accumulate)
    start = zero, jnp.zeros(cut[0].shape, accumulate), jnp.zeros(table.shape, accumulate), zero
    if len(cut[0]) == 1:
        loss, d_hidden, d_table, d_bias = block(0, start)
    else:
        # All devices take as many turns: each turn has messages.
        end = jnp.max(jnp.where(weights != 0, jnp.arange(1, len(weights) + 1), 0))
        turns = (jax.lax.pmax(end, AXES) + size - 1) // size
        loss, d_hidden, d_table, d_bias = jax.lax.fori_loop(0, turns, block, start)
    moved = -weights.astype(accumulate)[:, None] * hidden.astype(accumulate)
    d_table = d_table.at[columns(targets, rows)].add(moved, mode="drop")
    d_hidden, d_bias = jax.lax.psum((d_hidden, d_bias), ITEMS)
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: len(hidden)].astype(hidden.dtype)
    d_bias = None if history is None else d_bias.astype(history.repeat_bias.dtype)
    return loss, (d_hidden, d_table.astype(table.dtype), d_bias)


def _mask(items, rows, count):
    """Which columns of this device each history holds."""
    column = jnp.where(items > 0, columns(items, rows), count)
    return jax.vmap(lambda row: jnp.zeros(count, bool).at[row].set(True, mode="drop"))(column)


def _backward(items, gradients, d_loss):
    del items
    d_hidden, d_table, d_bias = jax.tree.map(lambda g: g * d_loss.astype(g.dtype), gradients)
    no_gradient: Any = None
    d_history = None if d_bias is None else HistoryItems(no_gradient, d_bias)
    return d_hidden, d_table, None, None, d_history


sharded_cross_entropy.defvjp(_forward, _backward)
