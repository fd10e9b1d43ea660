"""The vectors of items: a row of their own, and what learned maps make of their features."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from tim4rec_jax.layers.basic import NORMAL
from tim4rec_jax.layers.draws import in_parts
from tim4rec_jax.layers.lookup import Embedding, lookup

# The score of an item that takes no part in the loss. Its exponential is 0 in every dtype.
EXCLUDED = -1e4


class FixedArray(nnx.Variable):
    """An array of a model that no training changes."""


class FeatureArrays(NamedTuple):
    """The features of items as arrays, one row for each item; row 0 is padding.

    Attributes:
      codes: numbers of an item's values among the values of all categorical features, 0 for none.
      weights: weight of each value, 0 for none.
      dense: standardised numbers.
      counts: training events of each item.
      values: number of values of all categorical features, number 0 among them.
    """

    codes: Int32[np.ndarray, "rows S"]
    weights: Float32[np.ndarray, "rows S"]
    dense: Float32[np.ndarray, "rows F"]
    counts: Int[np.ndarray, " rows"]
    values: int


class FeatureMaps(nnx.Module):
    """What the features of an item add to its vector.

    Each value of a categorical feature has a row, and the rows of an item's values are added with
    their weights. The dense features go through a linear map. A bias stands for what all items have
    in common. Rows and map begin with 0, so that a value that no training item has adds nothing.

    Attributes:
      values: the rows [values, D]; None without categorical features.
      kernel: the linear map [F, D]; None without dense features.
      bias: [D].
      codes: see `FeatureArrays`, and so are the next two. None where they have no columns.
      weights: of the codes.
      dense: numbers.
      excluded: what training adds to each item's score: 0, or `EXCLUDED` for an item without
        training events. Such an item is unknown at that time. As one of the wrong answers of
        every sample, it would teach its features that nobody wants it.
      dropout_rate: share of the items whose own rows a training step leaves out.
    """

    def __init__(
        self,
        features: FeatureArrays,
        width: int,
        *,
        dropout_rate: float,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        """Begins with a bias of N(0, 0.02^2) and maps that add nothing."""

        def fixed(array: np.ndarray) -> FixedArray:
            kind = array.dtype if array.dtype == np.int32 else param_dtype
            return FixedArray(jnp.asarray(array, kind))

        # An array without elements cannot be saved.
        some, numbers = features.codes.size > 0, features.dense.size > 0
        shape, kernel = (features.values, width), (features.dense.shape[1], width)
        self.values = nnx.Param(jnp.zeros(shape, param_dtype)) if some else None
        self.codes = fixed(features.codes) if some else None
        self.weights = fixed(features.weights) if some else None
        self.kernel = nnx.Param(jnp.zeros(kernel, param_dtype)) if numbers else None
        self.dense = fixed(features.dense) if numbers else None
        # HSTU divides by the length of a vector, so even one without a row must not be 0.
        self.bias = nnx.Param(NORMAL(rngs.params(), (width,), param_dtype))
        known = jnp.asarray(features.counts) > 0
        self.excluded = FixedArray(jnp.where(known, 0.0, EXCLUDED).astype(param_dtype))
        self.dropout_rate = dropout_rate

    def __call__(self, items: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """What is added to the vectors of these items."""
        added = jnp.broadcast_to(self.bias[...], (*items.shape, *self.bias.shape))
        if self.dense is not None and self.kernel is not None:
            added += self.dense[items] @ self.kernel[...]
        if self.codes is not None and self.weights is not None and self.values is not None:
            added = _add_values(added, self.values[...], self.codes[items], self.weights[items])
        # Padding and other rows that are no items have no features.
        return added * (self.excluded.shape[0] > items)[..., None] * (items > 0)[..., None]


def _add_values(added, values, codes, weights):
    """Adds rows of `values` with their weights, one value of each item at a time.

    All at once would take as many times the memory as an item has values.
    """

    def add(total, value):
        code, weight = value
        return total + weight[..., None] * values[code], None

    slots = jnp.moveaxis(codes, -1, 0), jnp.moveaxis(weights, -1, 0)
    return jax.lax.scan(add, added, slots)[0]


class ItemEmbedding(Embedding):
    """A table with a row for each item, to which features may add.

    Attributes:
      maps: what the features add, or None.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        features: FeatureArrays | None = None,
        dropout_rate: float = 0.0,
        embedding_init: nnx.Initializer,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        """Draws the rows. With features, those of items without training events are 0.

        Args:
          rows: number of rows: padding, the items, and others that are no items.
          width: D, of the vectors.
          features: of padding and items. None: the table is all there is.
          dropout_rate: see `FeatureMaps`.
          embedding_init: initialiser of the rows.
          dtype: of the vectors that `__call__` returns.
          param_dtype: of the parameters.
          rngs: a stream `params`.
        """
        super().__init__(
            rows,
            width,
            embedding_init=in_parts(embedding_init),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.maps: FeatureMaps | None = nnx.data(None)
        if features is not None:
            self.maps = FeatureMaps(
                features, width, dropout_rate=dropout_rate, param_dtype=param_dtype, rngs=rngs
            )
            self.clear_untrained()

    def __call__(
        self, inputs: Int[Array, "*batch"], out_sharding: Any = None
    ) -> Float[Array, "*batch D"]:
        """The vectors of items."""
        if self.maps is not None:
            return (lookup(self.embedding[...], inputs) + self.maps(inputs)).astype(self.dtype)
        return super().__call__(inputs, out_sharding=out_sharding)

    def vectors(self) -> Float[Array, "rows D"]:
        """The vectors of all rows, in the dtype of the parameters."""
        if self.maps is None:
            return self.embedding[...]
        return self.embedding[...] + self.maps(jnp.arange(self.num_embeddings))

    def fold(self) -> None:
        """Writes what the features add into the table, so that nothing is left to compute."""
        if self.maps is not None:
            self.embedding[...] = jax.jit(lambda: self.vectors())()
            self.maps = None

    def drop_rows(self, key: jax.Array) -> None:
        """Leaves out the own rows of some items, so that their features learn to stand alone.

        Args:
          key: a key of `jax.random`.
        """
        assert self.maps is not None
        kept = jax.random.bernoulli(key, 1 - self.maps.dropout_rate, (self.num_embeddings, 1))
        items = jnp.arange(self.num_embeddings)[:, None]
        special = (items == 0) | (items >= len(self.maps.excluded))
        self.embedding[...] *= kept | special

    def clear_untrained(self) -> None:
        """Sets the rows of items without training events to 0.

        No training changes these rows afterwards, as the loss leaves their items out.
        """
        self.embedding[...] *= self.trained()[:, None]

    def trained(self) -> Bool[Array, " rows"]:
        """Whether each row is trained: all but those of items without training events."""
        assert self.maps is not None
        trained = self.maps.excluded[...] == 0
        return jnp.pad(trained, (0, self.num_embeddings - len(trained)), constant_values=True)
