"""eSASRec: SASRec with LiGR layers (arXiv 2508.06450; the layers are those of arXiv 2502.03417)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from tim4rec_jax.layers.attention import Attention, causal_mask, segment_positions, take_rows
from tim4rec_jax.layers.basic import Dense, dropout, fold, layer_norm
from tim4rec_jax.layers.lookup import Embedding
from tim4rec_jax.models.base import DataSizes, ModelSettings, SequenceModel, count, rate
from tim4rec_jax.ssd import finite_inputs

_EPS = 1e-5  # of all norms
_GLOROT = nnx.initializers.glorot_normal()


@dataclasses.dataclass(frozen=True)
class ESASRecSettings(ModelSettings):
    """Defaults are the authors' for ML-1M with leave-one-out.

    Attributes:
      hidden_size: D, the width of the item vectors.
      n_layers: number of layers.
      n_heads: number of heads; it must divide `hidden_size`.
      dropout_prob: of item vectors, the weights of attention, and what a layer adds to them.
      inner_multiplier: inner width of the feed-forward networks, in units of `hidden_size`.
    """

    hidden_size: int = 64
    n_layers: int = count(2)
    n_heads: int = 1
    dropout_prob: float = rate(0.1)
    inner_multiplier: int = count(4)

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % self.n_heads:
            raise ValueError(
                f"n_heads is {self.n_heads}; it must divide hidden_size = {self.hidden_size}"
            )


class LiGRLayer(nnx.Module):
    """x + sigmoid(G1 x) * drop(attention(norm x)), then the same with a SwiGLU network and G2.

    The network is W2 drop(silu(W1 h) * W3 h), without biases. Inputs are taken to be finite, see
    `tim4rec_jax.ssd.finite_inputs`.
    """

    def __init__(self, settings: ESASRecSettings, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        width, inner = settings.hidden_size, settings.inner_multiplier * settings.hidden_size
        self.dropout_rate = settings.dropout_prob
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        norm = (width, _EPS, dtype, param_dtype, rngs)
        self.attention_norm, self.feed_forward_norm = layer_norm(*norm), layer_norm(*norm)
        self.attention = Attention(
            width,
            settings.n_heads,
            dropout_rate=self.dropout_rate,
            # Theirs is one map to queries, keys and values, of width and 3 * width.
            kernel_init=nnx.initializers.normal((2 / (4 * width)) ** 0.5),
            out_init=_GLOROT,
            **kwargs,
        )
        kwargs["kernel_init"] = _GLOROT
        self.attention_gate = Dense(width, width, **kwargs)
        self.feed_forward_gate = Dense(width, width, **kwargs)
        self.fc1, self.fc3 = (Dense(width, inner, use_bias=False, **kwargs) for _ in range(2))
        self.fc2 = Dense(inner, width, use_bias=False, **kwargs)

    @finite_inputs()
    def __call__(
        self,
        x: Float[Array, "B L D"],
        mask: Bool[Array, "#B 1 L L"],
        seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """All positions; the arguments are those of `Attention`."""
        y = self.attention(self.attention_norm(x), mask, fold(seeds, 0), causal=True)
        return self._finish(x, y, seeds)

    @finite_inputs()
    def at(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B Q"],
        mask: Bool[Array, "#B 1 #Q L"],
        seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B Q D"]:
        """`__call__` at some positions, with their rows of the mask."""
        h = self.attention_norm(x)
        y = self.attention.at(h, take_rows(h, positions), mask, fold(seeds, 0))
        return self._finish(take_rows(x, positions), y, seeds)

    def _finish(self, x, y, seeds):
        y = dropout(y, self.dropout_rate, fold(seeds, 1))
        x = x + jax.nn.sigmoid(self.attention_gate(x)) * y
        h = self.feed_forward_norm(x)
        inner = dropout(jax.nn.silu(self.fc1(h)) * self.fc3(h), self.dropout_rate, fold(seeds, 2))
        y = dropout(self.fc2(inner), self.dropout_rate, fold(seeds, 3))
        return x + jax.nn.sigmoid(self.feed_forward_gate(x)) * y


class ESASRec(SequenceModel):
    """Items and learned positions through LiGR layers, trained with the sampled softmax.

    What differs from the authors' program, RecTools 0.19:

    - Positions count from the first event of a history, as in SASRec here, and not from the last
      one. So a row can hold several histories.
    - The items of `train.loss=sampled_softmax` are drawn for a batch and by their frequency, with
      the correction for it. The authors draw uniformly for each position.
    - All biases start at zero. Theirs in the gates start as PyTorch's do, which is near zero.
    """

    Settings = ESASRecSettings
    causal = True
    default_loss, default_negatives = "sampled_softmax", 256

    def __init__(
        self,
        settings: ESASRecSettings,
        sizes: DataSizes,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        """Initialises all tables and maps as Glorot proposed; arguments as `SequenceModel`."""
        width = settings.hidden_size
        super().__init__(
            settings,
            sizes,
            width=width,
            rngs=rngs,
            param_dtype=param_dtype,
            embedding_init=_GLOROT,
        )
        self.dropout_rate = settings.dropout_prob
        kwargs: dict[str, Any] = dict(dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
        self.position_embedding = Embedding(
            sizes.max_length, width, embedding_init=_GLOROT, **kwargs
        )
        self.layers = nnx.List([LiGRLayer(settings, **kwargs) for _ in range(settings.n_layers)])

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
        x = self._embed(items, segment_ids, dropout_seeds)
        mask = causal_mask(items.shape[1], segment_ids)
        for i, layer in enumerate(self.layers, 1):
            x = layer(x, mask, fold(dropout_seeds, i))
        return x

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
        x = self._embed(items, None, dropout_seeds)
        *layers, last = self.layers
        for i, layer in enumerate(layers, 1):
            x = layer(x, causal_mask(items.shape[1]), fold(dropout_seeds, i))
        seen = (jnp.arange(items.shape[1]) < lengths[:, None])[:, None, None]
        return last.at(x, lengths[:, None] - 1, seen, fold(dropout_seeds, len(layers) + 1))[:, 0]

    def _embed(self, items, segment_ids, seeds):
        index = jnp.arange(items.shape[1])
        positions = index if segment_ids is None else segment_positions(segment_ids)
        x = self.item_embedding(items) + self.position_embedding(positions)
        return dropout(x, self.dropout_rate, fold(seeds, 0))
