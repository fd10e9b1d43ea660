"""Training objectives."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


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


def prefix_loss(model: Any, batch: dict, seeds: UInt32[Array, " B"] | None) -> jax.Array:
    """Sum over the batch of weight times the loss at each history's end (paper, section 3.5).

    Args:
      model: a model with `encode` and `item_embedding`.
      batch: items [B,L], lengths, gaps [B,T], targets, weights [B].
      seeds: dropout seeds per row; None switches dropout off.
    """
    hidden = model.encode(batch["items"], batch["lengths"], batch["gaps"], dropout_seeds=seeds)
    table = model.item_embedding.embedding[...]
    return jnp.sum(batch["weights"] * cross_entropy(hidden, table, batch["targets"]))
