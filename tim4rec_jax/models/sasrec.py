"""SASRec: causal self-attention over the items (arXiv 1808.09781), as TiM4Rec compared with it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.layers.attention import causal_mask, positions_and_layers
from tim4rec_jax.layers.basic import fold
from tim4rec_jax.models.base import DataSizes, ModelSettings, SequenceModel, count, rate


@dataclasses.dataclass(frozen=True)
class SASRecSettings(ModelSettings):
    """Names are RecBole's; defaults are those of TiM4Rec's comparison.

    Attributes:
      hidden_size: D, the width of the item vectors.
      inner_size: inner width of the feed-forward networks.
      n_layers: number of layers.
      n_heads: number of heads; it must divide `hidden_size`.
      hidden_dropout_prob: of item vectors and of what a layer adds to them.
      attn_dropout_prob: of the weights of attention.
      layer_norm_eps: of all norms.
    """

    hidden_size: int = 64
    inner_size: int = 256
    n_layers: int = count(2)
    n_heads: int = 8
    hidden_dropout_prob: float = rate(0.2)
    attn_dropout_prob: float = rate(0.2)
    layer_norm_eps: float = 1e-12

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % self.n_heads:
            raise ValueError(
                f"n_heads is {self.n_heads}; it must divide hidden_size = {self.hidden_size}"
            )


class SASRec(SequenceModel):
    """Items and learned positions through post-norm transformer layers with a causal mask.

    It departs from its paper as the comparison's code does: GELU instead of ReLU, norms after the
    sums instead of before, a feed-forward network four times as wide, and the full softmax
    cross-entropy instead of one sampled negative.
    """

    Settings = SASRecSettings
    causal = True

    def __init__(
        self,
        settings: SASRecSettings,
        sizes: DataSizes,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        """Initialises tables and maps by N(0, 0.02^2), padding included, and biases by 0.

        Arguments are those of `SequenceModel`.
        """
        width, eps = settings.hidden_size, settings.layer_norm_eps
        super().__init__(settings, sizes, width=width, rngs=rngs, param_dtype=param_dtype)
        self.positions, self.layers = positions_and_layers(
            width,
            sizes.max_length,
            inner=settings.inner_size,
            layers=settings.n_layers,
            heads=settings.n_heads,
            dropout_rate=settings.hidden_dropout_prob,
            attention_dropout_rate=settings.attn_dropout_prob,
            eps=eps,
            dtype=self.dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, " B"] | None = None,
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
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, " B"] | None = None,
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
