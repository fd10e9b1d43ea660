"""HSTU: attention without softmax, gated, aware of time (arXiv 2402.17152)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from tim4rec_jax.layers.attention import causal_mask, segment_positions, take_rows
from tim4rec_jax.layers.basic import Dense, dropout, fold, uniform
from tim4rec_jax.layers.lookup import Embedding
from tim4rec_jax.layers.time import NextTime, gap_features
from tim4rec_jax.models.base import DataSizes, ModelSettings, SequenceModel, count, rate

_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class HSTUSettings(ModelSettings):
    """Defaults are those of the paper for ML-1M, except for the width, which is 50 there.

    TiM4Rec's comparison does not have this model.

    Attributes:
      hidden_size: D, the width of the item vectors.
      n_layers: number of layers.
      n_heads: number of heads; it must divide `hidden_size`.
      hidden_dropout_prob: of item vectors and of the output of each layer.
      time_buckets: the largest bucket of distances in time.
      temperature: cosines are divided by it to get scores.
      knows_next_time: whether predictions depend on the time of the next event. A recommender
        knows that time only if it is asked at that moment.
    """

    hidden_size: int = 64
    n_layers: int = count(2)
    n_heads: int = 1
    hidden_dropout_prob: float = rate(0.2)
    time_buckets: int = 128
    temperature: float = 0.05
    knows_next_time: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % self.n_heads:
            raise ValueError(
                f"n_heads is {self.n_heads}; it must divide hidden_size = {self.hidden_size}"
            )


def time_buckets(gaps: Float[Array, "B L"], last: int) -> Int32[Array, "B L L"]:
    """floor(log(seconds between two events) / 0.301), at most `last`; 0 below two seconds.

    Seconds are added up as whole numbers: in float32 a minute is lost in years of history.
    """
    since = jnp.cumsum(jnp.round(gaps).astype(jnp.int32), axis=1)
    seconds = jnp.maximum(since[:, :, None] - since[:, None, :], 1).astype(jnp.float32)
    return jnp.minimum(jnp.log(seconds) / 0.301, last).astype(jnp.int32)


class HSTULayer(nnx.Module):
    """U, Q, V, K = silu(W1 norm(x)); y = W2 drop(norm(silu(Q K^T + bias) / n V) * U) + x."""

    def __init__(
        self,
        settings: HSTUSettings,
        max_length: int,
        *,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        width, normal = settings.hidden_size, nnx.initializers.normal(0.02)
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.uqvk = Dense(width, 4 * width, use_bias=False, **kwargs)
        glorot = nnx.initializers.glorot_uniform()
        self.out = Dense(
            width,
            width,
            kernel_init=glorot,
            bias_init=uniform(width**-0.5),  # as PyTorch does
            **kwargs,
        )
        buckets = settings.time_buckets + 1
        self.time_bias = nnx.Param(normal(rngs.params(), (buckets,), param_dtype))
        self.position_bias = nnx.Param(normal(rngs.params(), (max_length,), param_dtype))
        self.width, self.heads, self.max_length = width, settings.n_heads, max_length
        self.dropout_rate = settings.hidden_dropout_prob

    def __call__(
        self,
        x: Float[Array, "B L D"],
        mask: Bool[Array, "#B 1 L L"],
        buckets: Int32[Array, "B L L"],
        seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """All positions.

        Args:
          x: the input.
          mask: which keys a query sees.
          buckets: `time_buckets` of each pair.
          seeds: dropout seeds per row, or None for no dropout.
        """
        index = jnp.arange(x.shape[1])
        u, q, v, k = jnp.split(jax.nn.silu(self.uqvk(norm(x))), 4, axis=-1)
        return x + self._mix(u, q, v, k, mask, index[:, None] - index, buckets, seeds)

    def at(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B Q"],
        mask: Bool[Array, "#B 1 #Q L"],
        buckets: Int32[Array, "B Q L"],
        seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B Q D"]:
        """`__call__` at some positions; rows of mask and buckets are theirs."""
        normed, half = norm(x), 2 * self.width
        u, q = jnp.split(
            jax.nn.silu(self.uqvk(take_rows(normed, positions), slice(half))), 2, axis=-1
        )
        v, k = jnp.split(jax.nn.silu(self.uqvk(normed, slice(half, None))), 2, axis=-1)
        apart = positions[..., None] - jnp.arange(x.shape[1])
        return take_rows(x, positions) + self._mix(u, q, v, k, mask, apart, buckets, seeds)

    def _mix(self, u, q, v, k, mask, apart, buckets, seeds):
        """`apart` [#B,Q,L]: positions between query and key."""
        bias = self.time_bias[...][buckets] + self.position_bias[...][jnp.maximum(apart, 0)]
        q, k, v = (
            z.reshape(*z.shape[:2], self.heads, -1).swapaxes(1, 2) for z in (q, k, v)
        )  # [B,H,L,P]
        scores = jnp.einsum("bhqp,bhkp->bhqk", q, k) + bias[:, None].astype(q.dtype)
        weights = jnp.where(mask, jax.nn.silu(scores) / self.max_length, 0)
        y = jnp.einsum("bhqk,bhkp->bhqp", weights, v).swapaxes(1, 2)
        return self.out(dropout(u * norm(y.reshape(u.shape)), self.dropout_rate, seeds))


class HSTU(SequenceModel):
    """A strong peer that uses time: scores depend on distances in position and in time.

    The model and its settings are those of the paper's experiments on public data, with 64 instead
    of 50 dimensions. Scores are cosines divided by a temperature. Two things differ:

    - The loss is that of TiM4Rec's comparison.
    - Distances in time are measured from the last event. The paper measures them from the event to
      be predicted, whose time no recommender knows beforehand. With `knows_next_time`, the time
      until then enters as in TiM4Rec, by a `NextTime` behind the layers.
    """

    Settings = HSTUSettings
    causal = True

    def __init__(
        self,
        settings: HSTUSettings,
        sizes: DataSizes,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        """Initialises the weights as the authors' code does; arguments as `SequenceModel`."""
        width, length = settings.hidden_size, sizes.max_length
        normal = nnx.initializers.truncated_normal
        super().__init__(
            settings,
            sizes,
            width=width,
            rngs=rngs,
            param_dtype=param_dtype,
            embedding_init=normal(0.02),
        )
        self.last_bucket, self.temperature = settings.time_buckets, settings.temperature
        self.dropout_rate = settings.hidden_dropout_prob
        kwargs: dict[str, Any] = dict(dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
        # Their program draws this table a second time, as Glorot proposed.
        init = nnx.initializers.normal((2 / (length + width)) ** 0.5)
        self.position_embedding = Embedding(length, width, embedding_init=init, **kwargs)
        self.layers = nnx.List(
            [HSTULayer(settings, length, **kwargs) for _ in range(settings.n_layers)]
        )
        self.knows_next_time = settings.knows_next_time
        self.next_time = NextTime(width, eps=_NORM_EPS, **kwargs) if self.knows_next_time else None

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """See `SequenceModel`; columns of `gaps` after L are unused."""
        del lengths  # what follows a position changes nothing there
        x, buckets = self._embed(items, gaps, segment_ids, dropout_seeds)
        mask = causal_mask(items.shape[1], segment_ids)
        for i, layer in enumerate(self.layers, 1):
            x = layer(x, mask, buckets, fold(dropout_seeds, i))
        return unit(x) / self.temperature

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """See `SequenceModel`; the last layer computes nothing but that position."""
        length = items.shape[1]
        x, buckets = self._embed(items, gaps, None, dropout_seeds)
        *layers, last = self.layers
        for i, layer in enumerate(layers, 1):
            x = layer(x, causal_mask(length), buckets, fold(dropout_seeds, i))
        end = lengths[:, None] - 1
        buckets = jnp.take_along_axis(buckets, end[..., None], axis=1)
        seen = (jnp.arange(length) <= end)[:, None, None]
        x = last.at(x, end, seen, buckets, fold(dropout_seeds, len(layers) + 1))
        return unit(x[:, 0]) / self.temperature

    def at(self, hidden: Float[Array, "*batch D"], wait: Float[Array, "*batch"]) -> jax.Array:
        """See `SequenceModel`."""
        if self.next_time is None:
            return super().at(hidden, wait)
        h = self.next_time(hidden * self.temperature, gap_features(wait))
        return unit(h) / self.temperature

    def item_table(self) -> Float[Array, "V D"]:
        """The vector of each item, of length 1."""
        return unit(self.item_vectors())

    def _embed(self, items, gaps, segment_ids, seeds):
        length = items.shape[1]
        index = jnp.arange(length)
        positions = index if segment_ids is None else segment_positions(segment_ids)
        x = self.item_embedding(items) * self.item_embedding.features**0.5
        x = dropout(x + self.position_embedding(positions), self.dropout_rate, fold(seeds, 0))
        return x, time_buckets(gaps[:, :length], self.last_bucket)


def norm(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """LayerNorm without weights, statistics in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = wide - wide.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + _NORM_EPS)
    return (wide * scale).astype(x.dtype)


def unit(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Vectors of length 1."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + _NORM_EPS**2)
