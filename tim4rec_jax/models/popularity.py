"""Popularity: the items with most events in training, for everybody."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.models.base import DataSizes, ModelSettings, SequenceModel


class Popularity(SequenceModel):
    """Scores every item by its number of events in training; nothing is learnt.

    Items with equal counts have equal scores. The ranking counts the items whose score is strictly
    higher than the target's, so a target takes the best place among its equals. The figures are
    therefore an upper bound, which is close where frequent items seldom have equal counts.
    """

    causal = supports_step = True
    needs_item_counts = True
    item_rows = ()
    default_epochs = 1

    def __init__(
        self,
        settings: ModelSettings,
        sizes: DataSizes,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        """Sets the only weights, the counts [V, 1] in `param_dtype`; float32 is exact up to 2^24.

        Nothing depends on `settings` and `rngs`, which all models take.
        """
        del settings
        self.n_items, self.max_length = sizes.n_items, sizes.max_length
        self.item_embedding = nnx.Embed(
            sizes.n_items + 1,
            1,
            embedding_init=nnx.initializers.zeros,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        if sizes.item_counts is not None:
            counts = jnp.asarray(sizes.item_counts, param_dtype)
            self.item_embedding.embedding[...] = jnp.pad(counts, (1, 0))[:, None]

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L 1"]:
        """See `SequenceModel`: ones."""
        return self._ones(*items.shape)

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B 1"]:
        """See `SequenceModel`: ones."""
        return self._ones(len(items))

    def item_table(self) -> Float[Array, "V 1"]:
        """The counts, which no training changes."""
        return jax.lax.stop_gradient(self.item_embedding.embedding[...])

    def init_state(self, batch: int) -> Float[Array, "B 0"]:
        """See `SequenceModel`: nothing to remember."""
        return jnp.zeros((batch, 0))

    def step(
        self, state: Float[Array, "B 0"], items: Int32[Array, " B"], gaps: Float[Array, " B"]
    ) -> tuple[Float[Array, "B 0"], Float[Array, "B 1"]]:
        """See `SequenceModel`: ones."""
        return state, self._ones(len(items))

    def _ones(self, *shape: int) -> jax.Array:
        return jnp.ones((*shape, 1), self.item_embedding.embedding.dtype)
