"""The time stream: from the gaps between events to a factor on every step size.

Section 3.2 of the paper (arXiv 2409.16182). The stream tau has one row per head. It is not
causal: its LayerNorm and its maps see the whole row of `max_length` positions.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt32

from tim4rec_jax.layers.convolution import CausalConv
from tim4rec_jax.layers.dense import Dense
from tim4rec_jax.layers.dropout import dropout, fold


def _layer_norm(length: int, eps: float, dtype, rngs) -> nnx.LayerNorm:
    # The padding spike is 1e9 times the gaps: E[x^2] - E[x]^2 would cancel to nothing.
    return nnx.LayerNorm(length, epsilon=eps, param_dtype=dtype, use_fast_variance=False, rngs=rngs)


def _normalize(norm: nnx.LayerNorm, x: jax.Array, real: jax.Array | None) -> jax.Array:
    """LayerNorm over the row; with `real`, over its real positions, the others zero."""
    if real is None:
        return norm(x)
    return jnp.where(real, norm(x, mask=jnp.broadcast_to(real, x.shape)), 0.0)


class TimeEncoder(nnx.Module):
    """Gaps between events -> the normalised time stream of the first layer."""

    def __init__(self, length: int, *, dropout_rate: float, eps: float, dtype, rngs):
        self.norm = _layer_norm(length, eps, dtype, rngs)
        self.dropout_rate, self.dtype = dropout_rate, dtype

    def __call__(
        self,
        gaps: Float[Array, "B L"],
        real: Bool[Array, "B 1 L"] | None,
        seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B 1 L"]:
        """Normalises the gaps: one row, which every head of the first layer starts from.

        Args:
          gaps: seconds since the event before.
          real: True where an event is; statistics are then taken over real events only
            (`masked`). None keeps the reference's statistics over the padded row (`paper`).
          seeds: dropout seeds per row, or None for no dropout.
        """
        gaps = dropout(gaps.astype(self.dtype), self.dropout_rate, seeds)
        return _normalize(self.norm, gaps[:, None, :], real)


class TimeMixer(nnx.Module):
    """One layer of the time stream (reference facts: DESIGN.md section 4, point 4).

    s = W2 silu(W1 tau);  tau' = act(conv(act(conv(tau * s))));
    next tau = LayerNorm(g tau + (1 - g) tau'),  g = sigmoid(Wg tau + bg).
    """

    def __init__(
        self,
        length: int,
        heads: int,
        *,
        width: int,
        activation,
        dropout_rate: float,
        gate_per_position: bool,
        kaiming: bool,
        eps: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        def linear(features):
            return Dense(length, features, dtype=dtype, param_dtype=dtype, rngs=rngs)

        def conv():
            return CausalConv(
                heads,
                width,
                kaiming=kaiming,
                dtype=dtype,
                param_dtype=dtype,
                rngs=rngs,
                channels_first=True,
            )

        self.scale_in, self.scale_out = linear(length), linear(length)
        self.conv_1, self.conv_2 = conv(), conv()
        self.gate = linear(length if gate_per_position else 1)
        self.norm = _layer_norm(length, eps, dtype, rngs)
        self.activation, self.dropout_rate, self.heads = activation, dropout_rate, heads

    def __call__(
        self,
        tau: Float[Array, "B #H T"],
        seeds: UInt32[Array, "B"] | None = None,
        length: int | None = None,
    ) -> Float[Array, "B H L"]:
        """tau', the factor on this layer's step sizes.

        Args:
          tau: time stream, one row per head or one that all heads share.
          seeds: dropout seeds per row, or None for no dropout.
          length: only the first so many positions (None: all).
        """
        inner = jax.nn.silu(self.scale_in(self._drop(tau, fold(seeds, 0))))
        scale = self.scale_out(inner, slice(length))
        # The convolutions run over positions with the heads as channels.
        x = self._every_head(tau[..., :length] * scale)
        return self.activation(self.conv_2(self.activation(self.conv_1(x))))

    def advance(
        self,
        tau: Float[Array, "B #H L"],
        factor: Float[Array, "B H L"],
        real: Bool[Array, "B 1 L"] | None,
        seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B H L"]:
        """The next layer's time stream, a gated mean of this one and its `factor`."""
        gate = jax.nn.sigmoid(self.gate(self._drop(tau, fold(seeds, 1))))
        return _normalize(self.norm, gate * tau + (1.0 - gate) * factor, real)

    def _drop(self, tau, seeds):
        if seeds is None or not self.dropout_rate:
            return tau  # a row the heads share stays one row
        return dropout(self._every_head(tau), self.dropout_rate, seeds)

    def _every_head(self, tau):
        return jnp.broadcast_to(tau, (tau.shape[0], self.heads, tau.shape[2]))
