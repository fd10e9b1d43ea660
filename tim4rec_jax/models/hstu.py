"""HSTU: attention without softmax, gated, aware of time (arXiv 2402.17152)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from tim4rec_jax.layers.attention import causal_mask, segment_positions, take_rows
from tim4rec_jax.layers.basic import Dense, dropout, fold
from tim4rec_jax.models.base import SequenceModel

_NORM_EPS = 1e-6


def time_buckets(gaps: Float[Array, "B L"], last: int) -> Int32[Array, "B L L"]:
    """floor(log(seconds between two events) / 0.301), at most `last`; 0 below two seconds.

    Seconds are added up as whole numbers: in float32 a minute is lost in years of history.
    """
    since = jnp.cumsum(jnp.round(gaps).astype(jnp.int32), axis=1)
    seconds = jnp.maximum(since[:, :, None] - since[:, None, :], 1).astype(jnp.float32)
    return jnp.minimum(jnp.log(seconds) / 0.301, last).astype(jnp.int32)


class HSTULayer(nnx.Module):
    """U, Q, V, K = silu(W1 norm(x)); y = W2 drop(norm(silu(Q K^T + bias) / n V) * U) + x."""

    def __init__(self, config, max_length: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        width = config["hidden_size"]
        kwargs: dict = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.uqvk = Dense(width, 4 * width, use_bias=False, **kwargs)
        glorot = nnx.initializers.glorot_uniform()
        self.out = Dense(width, width, kernel_init=glorot, **kwargs)
        normal = nnx.initializers.normal(0.02)
        buckets = config["time_buckets"] + 1
        self.time_bias = nnx.Param(normal(rngs.params(), (buckets,), param_dtype))
        self.position_bias = nnx.Param(normal(rngs.params(), (max_length,), param_dtype))
        self.width, self.heads, self.max_length = width, config["n_heads"], max_length
        self.dropout_rate = config["hidden_dropout_prob"]

    def __call__(
        self,
        x: Float[Array, "B L D"],
        mask: Bool[Array, "#B 1 L L"],
        buckets: Int32[Array, "B L L"],
        seeds: UInt32[Array, "B"] | None = None,
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
        seeds: UInt32[Array, "B"] | None = None,
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
    """A strong peer that knows time too: scores depend on distances in position and in time.

    As in the paper's experiments on public data, and their settings with 64 for 50 dimensions:
    scores are cosines over a temperature. Two things are not: the loss is that of the
    comparison; and distances in time are measured from the last event instead of from the one
    to be predicted, whose time no recommender knows beforehand.
    """

    causal = True

    def __init__(
        self, config, *, n_items: int, max_length: int, rngs: nnx.Rngs, param_dtype=jnp.float32
    ):
        """Initialises the weights as the authors' code does.

        Args:
          config: hidden_size, n_layers, n_heads, hidden_dropout_prob, time_buckets,
            temperature; dtype of the activations.
          n_items: number of items, without padding.
          max_length: longest history; the n that sums over keys are divided by.
          rngs: stream `params`.
          param_dtype: of the parameters: float32, or float64 for tests.
        """
        width = config["hidden_size"]
        init = nnx.initializers.truncated_normal(0.02)
        kwargs = self.begin(config, width, n_items, max_length, rngs, param_dtype, init)
        self.last_bucket, self.temperature = config["time_buckets"], config["temperature"]
        self.dropout_rate = config["hidden_dropout_prob"]
        init = nnx.initializers.truncated_normal(width**-0.5)
        self.position_embedding = nnx.Embed(max_length, width, embedding_init=init, **kwargs)
        self.layers = nnx.List(
            [HSTULayer(config, max_length, **kwargs) for _ in range(config["n_layers"])]
        )

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, "B"] | None = None,
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
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, "B"] | None = None,
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

    def item_table(self) -> Float[Array, "V D"]:
        """The vector of each item, of length 1."""
        return unit(self.item_embedding.embedding[...])

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
