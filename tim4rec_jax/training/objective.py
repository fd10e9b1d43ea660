"""Training objectives."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from tim4rec_jax.models import SequenceModel, encode_batch


def cross_entropy(
    hidden: Float[Array, "B D"], table: Float[Array, "V D"], targets: Int[Array, " B"]
) -> Float[Array, " B"]:
    """Full softmax cross-entropy over every row of `table`, the padding row 0 included.

    The reference normalises over row 0 too (DESIGN.md section 4, point 7).

    Args:
      hidden: what the next item is predicted from.
      table: item embeddings.
      targets: row of the right item.

    Returns:
      The loss of each row, in nats, computed in at least float32.
    """
    accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
    table = table.astype(hidden.dtype)
    scores = jnp.matmul(hidden, table.T, preferred_element_type=accumulate)
    # Picked out of `scores`, the target would cost a [B, V] scatter in the backward pass.
    at_target = jnp.einsum("bd,bd->b", hidden, table[targets], preferred_element_type=accumulate)
    return jax.nn.logsumexp(scores, axis=1) - at_target


def _block_rows(items: int) -> int:
    """Rows of scores to hold at once: on CPU what stays in cache."""
    elements = 2**20 if jax.default_backend() == "cpu" else 2**26
    return max(8, min(1024, elements // items) // 8 * 8)


def _blocks(rows: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Cuts arrays [N, ...] into [blocks, rows, ...], the last block completed with zeros."""
    count = -(-arrays[0].shape[0] // rows)

    def cut(x):
        padded = jnp.pad(x, [(0, count * rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(count, rows, *x.shape[1:])

    return tuple(map(cut, arrays))


@jax.custom_vjp
def summed_cross_entropy(
    hidden: Float[Array, "N D"],
    table: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
) -> Float[Array, ""]:
    """sum_n weights[n] * cross_entropy(hidden[n], ...), without ever holding scores [N, V].

    The scores of a block of rows at a time, and its part of the gradient with them, so that
    nothing is computed twice. `weights` and `targets` get no gradient.

    Args:
      hidden: what the next items are predicted from.
      table: item embeddings, the padding row 0 included.
      targets: rows of the right items.
      weights: of the losses; 0 for rows that do not count.

    Returns:
      The sum, in nats, in at least float32.
    """
    return _cross_entropy_forward(hidden, table, targets, weights)[0]


def _cross_entropy_forward(hidden, table, targets, weights):
    accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
    matmul = functools.partial(jnp.matmul, preferred_element_type=accumulate)
    narrow = table.astype(hidden.dtype)

    def block(carry, rows):
        loss, d_table = carry
        h, t, w = rows
        scores = matmul(h, narrow.T)
        top = scores.max(axis=1, keepdims=True)
        exp = jnp.exp(scores - top)
        total = exp.sum(axis=1)
        at_target = narrow[t]
        picked = jnp.einsum("nd,nd->n", h, at_target, preferred_element_type=accumulate)
        loss += jnp.sum(w * (jnp.log(total) + top[:, 0] - picked))
        d_scores = (exp * (w / total)[:, None]).astype(h.dtype)
        d_hidden = matmul(d_scores, narrow) - w[:, None] * at_target
        return (loss, d_table + matmul(d_scores.T, h)), d_hidden.astype(h.dtype)

    zero = (jnp.zeros((), accumulate), jnp.zeros(table.shape, accumulate))
    weights = weights.astype(accumulate)
    rows = _blocks(_block_rows(table.shape[0]), hidden, targets, weights)
    (loss, d_table), d_hidden = jax.lax.scan(block, zero, rows)
    d_table = d_table.at[targets].add(-weights[:, None] * hidden.astype(accumulate))
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return loss, (d_hidden, d_table.astype(table.dtype))


def _cross_entropy_backward(gradients, d_loss):
    d_hidden, d_table = (gradient * d_loss.astype(gradient.dtype) for gradient in gradients)
    return d_hidden, d_table, None, None


summed_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def prefix_loss(model: SequenceModel, batch: dict, seeds: UInt32[Array, " B"] | None) -> jax.Array:
    """Sum over the batch of weight times the loss at each history's end (paper, section 3.5).

    Args:
      model: see `tim4rec_jax.models`.
      batch: of `tim4rec_jax.data.TrainBatches`.
      seeds: dropout seeds per row; None switches dropout off.
    """
    hidden = encode_batch(model, batch, seeds)
    losses = cross_entropy(hidden, model.item_table(), batch["targets"])
    return jnp.sum(batch["weights"] * (losses + model.penalty()))


def every_position_loss(
    model: SequenceModel, batch: dict, seeds: UInt32[Array, " R"] | None
) -> jax.Array:
    """Sum over all positions of packed rows of weight times the loss there.

    Args:
      model: a causal one.
      batch: as `tim4rec_jax.data.PackedBatches` describes.
      seeds: dropout seeds per row; None switches dropout off.
    """
    items = batch["items"]
    hidden = model(
        items,
        jnp.full(items.shape[0], items.shape[1]),
        batch["gaps"],
        segment_ids=batch["segment_ids"],
        dropout_seeds=seeds,
    )
    if model.knows_next_time:
        hidden = model.at(hidden, batch["waits"])
    return summed_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        model.item_table(),
        batch["targets"].reshape(-1),
        batch["weights"].reshape(-1),
    )


OBJECTIVES = {"prefix": prefix_loss, "every_position": every_position_loss}
