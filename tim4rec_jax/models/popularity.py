"""Popularity: the items with most events in training, for everybody."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.models.base import SequenceModel


class Popularity(SequenceModel):
    """Scores every item by its number of events in training; nothing is learnt.

    Equal counts are equal scores. The ranking counts what scores strictly more than the target,
    so that a target shares the best place among its equals: its figures are an upper bound, as
    close as ties between frequent items are rare.
    """

    causal = supports_step = True

    def __init__(
        self,
        config,
        *,
        n_items: int,
        max_length: int,
        rngs: nnx.Rngs,
        item_counts: np.ndarray | None = None,
        param_dtype=jnp.float32,
    ):
        """Sets the only weights, [V, 1].

        Args:
          config: not used; counts are exact in float32 up to 2^24 and stay in it.
          n_items: number of items, without padding.
          max_length: longest history; nothing depends on it.
          rngs: not used.
          item_counts: int [n_items], events of each item in training; None: zeros, for weights
            that are read later.
          param_dtype: of the counts.
        """
        self.max_length, self.n_items = max_length, n_items
        self.item_embedding = nnx.Embed(
            n_items + 1,
            1,
            embedding_init=nnx.initializers.zeros,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        if item_counts is not None:
            counts = jnp.asarray(item_counts, param_dtype)
            self.item_embedding.embedding[...] = jnp.pad(counts, (1, 0))[:, None]

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B L 1"]:
        """See `SequenceModel`: ones."""
        return self._ones(*items.shape)

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, "B"] | None = None,
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
        self, state: Float[Array, "B 0"], items: Int32[Array, "B"], gaps: Float[Array, "B"]
    ) -> tuple[Float[Array, "B 0"], Float[Array, "B 1"]]:
        """See `SequenceModel`: ones."""
        return state, self._ones(len(items))

    def _ones(self, *shape: int) -> jax.Array:
        return jnp.ones((*shape, 1), self.item_embedding.embedding.dtype)
