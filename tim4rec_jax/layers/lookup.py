"""Looks up rows of a table, with a gradient that a GPU computes quickly, always in the same bits.

The gradient of a row is the sum over all positions that have looked it up. JAX scatters it, and a
GPU's scatter adds in the order in which its threads come by: the last bits are others in every run.
Where XLA must keep the bits (`tim4rec_jax.runtime.keep_bits`), it sorts all *numbers* of the
gradient by their places in the table. Here the *positions* are sorted, D times fewer, and runs of
equal rows are added up in a fixed order. Other devices scatter in a fixed order, and quickly.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tim4rec_jax.runtime import target


def lookup(table: Float[Array, "V D"], rows: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
    """Looks up rows of a table, as `jnp.take`.

    Args:
      table: the table.
      rows: which rows; they must exist.
    """
    return _lookup(table, rows) if target().platform == "gpu" else jnp.take(table, rows, axis=0)


class Embedding(nnx.Embed):
    """`nnx.Embed` whose gradient is that of `lookup`, summed in the dtype of the parameters."""

    def __call__(
        self, inputs: Int[Array, "*batch"], out_sharding: Any = None
    ) -> Float[Array, "*batch D"]:
        """Looks up rows, and gives them the dtype of the activations."""
        if out_sharding is not None:
            return super().__call__(inputs, out_sharding=out_sharding)
        return lookup(self.embedding[...], inputs).astype(self.dtype)


def without_padding(
    vectors: Float[Array, "*batch D"], rows: Int[Array, "*batch"]
) -> Float[Array, "*batch D"]:
    """Vectors that were looked up, of which row 0 of the table learns nothing.

    It is the `padding_idx` of PyTorch, and matters where padding has a part in the result.

    Args:
      vectors: what was found.
      rows: where.
    """
    return jnp.where((rows == 0)[..., None], jax.lax.stop_gradient(vectors), vectors)


def add_at(
    table: Float[Array, "V D"], rows: Int[Array, " N"], shares: Float[Array, "N D"]
) -> Float[Array, "V D"]:
    """Adds shares to rows of a table, as `table.at[rows].add(shares)`.

    Args:
      table: the table.
      rows: which rows; they must exist, and may repeat.
      shares: what is added to each. It is summed in at least float32.
    """
    if target().platform != "gpu":
        return table.at[rows].add(shares)
    order = jnp.argsort(rows, stable=True)
    wide = jnp.promote_types(shares.dtype, jnp.float32)

    def add(left, right):
        same = (left[0] == right[0])[:, None]
        return right[0], jnp.where(same, left[1] + right[1], right[1])

    rows, sums = jax.lax.associative_scan(add, (rows[order], shares[order].astype(wide)))
    # The sum of a row stands where its run ends. Other methods loop, or compare all with all.
    every = jnp.arange(len(table), dtype=rows.dtype)
    end = jnp.searchsorted(rows, every, side="right", method="scan_unrolled") - 1
    end = jnp.maximum(end, 0)
    total = jnp.where((rows[end] == every)[:, None], sums[end], 0)
    return (table + total).astype(table.dtype)


@jax.custom_vjp
def _lookup(table, rows):
    return jnp.take(table, rows, axis=0)


def _forward(table, rows):
    return _lookup(table, rows), (rows, jnp.zeros((len(table), 0), table.dtype))


def _backward(residuals, gradient):
    rows, like = residuals  # the table's length and dtype
    width = gradient.shape[-1]
    nothing = jnp.zeros((len(like), width), like.dtype)
    return add_at(nothing, rows.reshape(-1), gradient.reshape(-1, width)), None


_lookup.defvjp(_forward, _backward)
