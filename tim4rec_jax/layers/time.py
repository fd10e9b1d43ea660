"""Layers that turn time into numbers: the time stream of the paper and the date bias."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt32

from tim4rec_jax.layers.basic import CausalConv, Dense, dropout, fold, layer_norm
from tim4rec_jax.ssd.convolution import ACTIVATIONS

# ---- layers.time_stream
# The time stream: from the gaps between events to a factor on every step size.
#
# Section 3.2 of the paper (arXiv 2409.16182). The stream tau has one row per head. It is not
# causal: its LayerNorm and its maps see the whole row of `max_length` positions.


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
        activation: str,
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
        self.activation = ACTIVATIONS[activation]
        self.dropout_rate, self.heads = dropout_rate, heads

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


# ---- layers.drift
# Taste that changes with the calendar: `model.date_bias_knots`.

_DAY = 86_400.0
# A weight that Adam moves by its learning rate a step has to count within an epoch or two.
_UNIT = 5.0


class Drift(nnx.Module):
    """Adds a vector to hidden states that depends on the date alone.

    Its dot products with the item vectors are what each item's score is worth more or less on
    that date. The vector is linear between knots at equal distances, and beyond the first and
    the last one constant. All start at zero: an untrained model is one without.
    """

    def __init__(self, knots: int, width: int, *, param_dtype: Any):
        """Makes the vectors; `spread_over` must follow before the layer is called.

        Args:
          knots: number of vectors, 2 or more.
          width: of hidden states.
          param_dtype: dtype of the vectors.
        """
        self.days: tuple[float, float] | None = None
        self.vectors = nnx.Param(jnp.zeros((knots, width), param_dtype))

    def spread_over(self, first: int, last: int) -> None:
        """Spreads the knots evenly from `first` to `last`, in seconds since 1970."""
        self.days = first / _DAY, last / _DAY

    def __call__(
        self, hidden: Float[Array, "*batch D"], dates: Float[Array, "*batch"]
    ) -> Float[Array, "*batch D"]:
        """Hidden states to score with on each of `dates`, days since 1970.

        Raises:
          ValueError: the dates of the knots are not known.
        """
        if self.days is None:
            raise ValueError(
                "a date bias needs the dates of the training events: pass date_range to build"
            )
        first, last = self.days
        vectors = _UNIT * self.vectors[...]
        share = (dates - first) / max(last - first, 1 / _DAY)  # all events may have one time
        position = jnp.clip(share, 0.0, 1.0) * (len(vectors) - 1)
        near = jnp.maximum(1.0 - jnp.abs(position[..., None] - jnp.arange(len(vectors))), 0.0)
        return hidden + (near.astype(vectors.dtype) @ vectors).astype(hidden.dtype)


KNOTS = 24


_LONGEST = 10 * 365.25 * 86_400.0  # seconds; longer gaps count as this


def gap_features(gaps: Float[Array, "*batch"]) -> Float[Array, "*batch K"]:
    """Hat functions of log(1 + gap): two neighbours of `KNOTS` are non-zero and add up to 1.

    A linear map of them is any piecewise linear function of the logarithm, exact at gap 0 and
    constant beyond ten years.

    Args:
      gaps: seconds, >= 0 (less counts as 0).
    """
    position = jnp.log1p(jnp.clip(gaps, 0.0, _LONGEST)) * ((KNOTS - 1) / jnp.log1p(_LONGEST))
    return jnp.maximum(1.0 - jnp.abs(position[..., None] - jnp.arange(KNOTS)), 0.0)


class GapModulation(NamedTuple):
    """What the gaps do to a layer."""

    inputs: Float[Array, "*batch D"]  # added to the layer's input
    step: Float[Array, "*batch H"]  # added to the raw step size
    rate: Float[Array, "*batch H"]  # log of a factor on the rate of decay


class GapModulator(nnx.Module):
    """One function of the gap per head for step and decay, one per channel for the input.

    All start at zero: an untrained layer is one without time.
    """

    def __init__(self, width: int, heads: int, *, param_dtype):
        self.kernel = nnx.Param(jnp.zeros((KNOTS, width + 2 * heads), param_dtype))
        self.cuts = (width, width + heads)

    def __call__(self, features: Float[Array, "*batch K"]) -> GapModulation:
        """Evaluates the functions."""
        return GapModulation(*jnp.split(features @ self.kernel[...], self.cuts, axis=-1))


class NextTime(nnx.Module):
    """Conditions a prediction on how long after the last event it is made.

    LayerNorm(h + W2 silu(W1 h + K features)).
    """

    def __init__(self, width: int, *, eps: float, dtype, param_dtype, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc1, self.fc2 = Dense(width, 4 * width, **kwargs), Dense(4 * width, width, **kwargs)
        self.kernel = nnx.Param(jnp.zeros((KNOTS, 4 * width), param_dtype))
        self.norm = layer_norm(width, eps, dtype, param_dtype, rngs)

    def __call__(
        self, h: Float[Array, "*batch D"], features: Float[Array, "*batch K"]
    ) -> Float[Array, "*batch D"]:
        """`features` are those of the time that passes until the prediction."""
        inner = self.fc1(h) + (features @ self.kernel[...]).astype(h.dtype)
        return self.norm(h + self.fc2(jax.nn.silu(inner)))
