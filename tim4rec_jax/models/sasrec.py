"""SASRec: causal self-attention over the items (arXiv 1808.09781), as the comparison ran it."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.layers.attention import EncoderLayer, Positions, causal_mask
from tim4rec_jax.layers.basic import fold
from tim4rec_jax.models.base import SequenceModel


class SASRec(SequenceModel):
    """Items and learned positions through post-norm transformer layers with a causal mask.

    It departs from its paper as that comparison's code does: GELU for ReLU, norms after the
    sums instead of before, a feed-forward network four times as wide, and full softmax
    cross-entropy for one sampled negative.
    """

    causal = True

    def __init__(
        self, config, *, n_items: int, max_length: int, rngs: nnx.Rngs, param_dtype=jnp.float32
    ):
        """Initialises the weights: N(0, 0.02) for tables and maps, the padding row included.

        Args:
          config: hidden_size, inner_size, n_layers, n_heads, hidden_dropout_prob,
            attn_dropout_prob, layer_norm_eps; dtype of the activations.
          n_items: number of items, without padding.
          max_length: longest history.
          rngs: stream `params`.
          param_dtype: of parameters and norms: float32, or float64 for parity.
        """
        width = config["hidden_size"]
        kwargs = self.begin(config, width, n_items, max_length, rngs, param_dtype)
        self.positions = Positions(config, max_length, **kwargs)
        self.layers = nnx.List([EncoderLayer(config, **kwargs) for _ in range(config["n_layers"])])

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """See `SequenceModel`."""
        del lengths, gaps  # what follows a position changes nothing there
        h = self.positions(self.item_embedding(items), segment_ids, fold(dropout_seeds, 0))
        mask = causal_mask(items.shape[1], segment_ids)
        for i, layer in enumerate(self.layers, 1):
            h = layer(h, mask, fold(dropout_seeds, i), causal=True)
        return h

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B D"]:
        """See `SequenceModel`; the last layer computes nothing but that position."""
        del gaps
        h = self.positions(self.item_embedding(items), None, fold(dropout_seeds, 0))
        mask = causal_mask(items.shape[1])
        *layers, last = self.layers
        for i, layer in enumerate(layers, 1):
            h = layer(h, mask, fold(dropout_seeds, i), causal=True)
        seen = (jnp.arange(items.shape[1]) < lengths[:, None])[:, None, None]
        seeds = fold(dropout_seeds, len(layers) + 1)
        return last.at(h, lengths[:, None] - 1, seen, seeds)[:, 0]
