"""Layers that turn time into numbers: the paper's time stream, functions of gaps, the date bias."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float64, UInt32

from tim4rec_jax.layers.basic import CausalConv, Dense, dropout, fold, layer_norm
from tim4rec_jax.layers.checks import activation_name, check_eps, check_rate, check_sizes
from tim4rec_jax.ssd import finite
from tim4rec_jax.ssd.arrays import AnyArray
from tim4rec_jax.ssd.convolution import ACTIVATIONS

# The time stream of the paper (arXiv 2409.16182, section 3.2) turns gaps into a factor on every
# step size. The stream tau has one row for each head. It is not causal: its norm and its maps see
# the whole row of T = `max_length` positions. Hence it takes no segments, has no step, and a number
# that is not finite spoils its whole row.


class TimeEncoder(nnx.Module):
    """Makes the time stream of the first layer from the gaps between events.

    A row must be one history of at most T events, because the norm is taken over the row.
    """

    def __init__(
        self,
        length: int,
        *,
        dropout_rate: float = 0.2,
        eps: float = 1e-12,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes the norm.

        Args:
          length: T, the number of positions of a row.
          dropout_rate: of the gaps, where there are seeds.
          eps: of the norm.
          dtype: of parameters and activations.
          rngs: not used, as a norm starts from constants.

        Raises:
          ValueError: an argument does not fit; the message names it.
        """
        check_sizes(length=length)
        check_rate("dropout_rate", dropout_rate)
        check_eps(eps)
        self.norm = layer_norm(length, eps, dtype, dtype, rngs)
        self.dropout_rate, self.dtype = dropout_rate, dtype

    def __call__(
        self,
        gaps: Float[Array, "B T"],
        real: Bool[Array, "B 1 T"] | None,
        seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B 1 T"]:
        """Normalises the gaps into one row, from which every head of the first layer starts.

        Args:
          gaps: seconds since the event before.
          real: True where an event is (`masked`). Statistics are then taken over real events only.
            None: over the padded row, as the published code does (`paper`).
          seeds: dropout seeds of the rows; None switches dropout off.
        """
        gaps = dropout(gaps.astype(self.dtype), self.dropout_rate, seeds)
        return _normalize(self.norm, gaps[:, None, :], real)


class TimeMixer(nnx.Module):
    """One layer of the time stream.

    s = W2 silu(W1 tau);  tau' = act(conv(act(conv(tau * s))));
    next tau = LayerNorm(g tau + (1 - g) tau'),  g = sigmoid(Wg tau + bg).
    """

    def __init__(
        self,
        length: int,
        heads: int,
        *,
        width: int = 4,
        activation: str | Callable[..., Any] | None = None,
        dropout_rate: float = 0.2,
        gate_per_position: bool = False,
        kaiming: bool = True,
        eps: float = 1e-12,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialises the weights as the published code does.

        Args:
          length: T, the number of positions of a row.
          heads: H, the number of heads of the layer.
          width: taps of both convolutions.
          activation: after each convolution, "hardswish" or "silu". None takes "hardswish", or
            "silu" where H is a multiple of 8.
          dropout_rate: of the input of the maps, where there are seeds.
          gate_per_position: whether g is a number for each position, or one for the row.
          kaiming: whether convolutions are initialised by Kaiming's rule.
          eps: of the norm.
          dtype: of parameters and activations.
          rngs: a stream `params`.

        Raises:
          ValueError: an argument does not fit; the message names it.
        """
        check_sizes(length=length, heads=heads, width=width)
        check_rate("dropout_rate", dropout_rate)
        check_eps(eps)
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=dtype, rngs=rngs)

        def conv() -> CausalConv:
            return CausalConv(heads, width, kaiming=kaiming, channels_first=True, **kwargs)

        self.scale_in, self.scale_out = (Dense(length, length, **kwargs) for _ in range(2))
        self.conv_1, self.conv_2 = conv(), conv()
        self.gate = Dense(length, length if gate_per_position else 1, **kwargs)
        self.norm = layer_norm(length, eps, dtype, dtype, rngs)
        self.activation = activation_name(activation, heads)
        self.dropout_rate, self.heads = dropout_rate, heads

    def __call__(
        self,
        tau: Float[Array, " B #H T"],
        seeds: UInt32[Array, " B"] | None = None,
        length: int | None = None,
    ) -> Float[Array, "B H L"]:
        """tau', the factor on this layer's step sizes.

        Args:
          tau: the time stream, with one row for each head, or one that all heads share.
          seeds: dropout seeds of the rows; None switches dropout off.
          length: L, to compute only the first L positions; None: all T.
        """
        activation = ACTIVATIONS[self.activation]
        inner = jax.nn.silu(self.scale_in(self._drop(tau, fold(seeds, 0))))
        scale = self.scale_out(inner, slice(length))
        # The convolutions run over the positions, with the heads as channels.
        x = self._every_head(tau[..., :length] * scale)
        return activation(self.conv_2(activation(self.conv_1(x))))

    def advance(
        self,
        tau: Float[Array, " B #H T"],
        factor: Float[Array, "B H T"],
        real: Bool[Array, "B 1 T"] | None,
        seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B H T"]:
        """The next layer's time stream: a gated mean of this one and of its `factor`."""
        gate = jax.nn.sigmoid(self.gate(self._drop(tau, fold(seeds, 1))))
        return _normalize(self.norm, gate * tau + (1.0 - gate) * factor, real)

    def _drop(self, tau, seeds):
        if seeds is None or not self.dropout_rate:
            return tau  # a row that the heads share stays one row
        return dropout(self._every_head(tau), self.dropout_rate, seeds)

    def _every_head(self, tau):
        return jnp.broadcast_to(tau, (tau.shape[0], self.heads, tau.shape[2]))


def _normalize(norm: nnx.LayerNorm, x: jax.Array, real: jax.Array | None) -> jax.Array:
    """LayerNorm over the row; with `real`, over its real positions, with zeros elsewhere."""
    if real is None:
        return norm(x)
    return jnp.where(real, norm(x, mask=jnp.broadcast_to(real, x.shape)), 0.0)


# Functions of single gaps, which look at no other event.

KNOTS = 24
_LONGEST = 10 * 365.25 * 86_400.0  # seconds; longer gaps count as this


def gap_features(gaps: Float[AnyArray, "*batch"]) -> Float[Array, "*batch K"]:
    """K = `KNOTS` hat functions of log(1 + gap), of which two neighbours are > 0 and add up to 1.

    Every piecewise linear function of the logarithm is a linear map of these features. It is exact
    at gap 0 and constant beyond ten years.

    Args:
      gaps: seconds, 0 or more. Negative gaps count as 0. The features of NaN are NaN.
    """
    position = jnp.log1p(jnp.clip(gaps, 0.0, _LONGEST)) * ((KNOTS - 1) / jnp.log1p(_LONGEST))
    return jnp.maximum(1.0 - jnp.abs(position[..., None] - jnp.arange(KNOTS)), 0.0)


class GapModulation(NamedTuple):
    """What the gaps do to a layer."""

    inputs: Float[Array, "*batch D"]  # added to the layer's input
    step: Float[Array, "*batch H"]  # added to the raw step size
    rate: Float[Array, "*batch H"]  # log of a factor on the rate of decay


class GapModulator(nnx.Module):
    """Learns functions of the gap: one for each input channel, two for each head (step and decay).

    All functions start at zero, so an untrained layer does not use time. Each position stands for
    itself, so segments and steps need nothing, and a gap that is NaN spoils no other position and
    no gradient.

    Attributes:
      kernel: the functions' values at the knots [K, D + 2 H].
    """

    def __init__(self, width: int, heads: int, *, param_dtype: Any = jnp.float32):
        """Makes the functions for a `CausalSSD`.

        Args:
          width: D, the width of the layer.
          heads: H, its number of heads, `layer.heads`.
          param_dtype: of the functions' values, and of the result.

        Raises:
          ValueError: an argument does not fit; the message names it.
        """
        check_sizes(width=width, heads=heads)
        self.kernel = nnx.Param(jnp.zeros((KNOTS, width + 2 * heads), param_dtype))
        self.cuts = (width, width + heads)

    def __call__(self, features: Float[AnyArray, "*batch K"]) -> GapModulation:
        """Evaluates the functions at `gap_features`."""
        clean = features if finite.known() else finite.zero_unless_finite(features)
        values = clean @ self.kernel[...]
        if not finite.known():
            good = jnp.isfinite(features).all(-1, keepdims=True)
            values = jnp.where(good, values, jnp.asarray(jnp.nan, values.dtype))
        return GapModulation(*jnp.split(values, self.cuts, axis=-1))


class NextTime(nnx.Module):
    """Conditions a prediction on the time between the last event and the prediction.

    LayerNorm(h + W2 silu(W1 h + K features)).
    """

    def __init__(self, width: int, *, eps: float, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc1, self.fc2 = Dense(width, 4 * width, **kwargs), Dense(4 * width, width, **kwargs)
        self.kernel = nnx.Param(jnp.zeros((KNOTS, 4 * width), param_dtype))
        self.norm = layer_norm(width, eps, dtype, param_dtype, rngs)

    def __call__(
        self, h: Float[Array, "*batch D"], features: Float[Array, "*batch K"]
    ) -> Float[Array, "*batch D"]:
        """Hidden states for predictions; `features` are `gap_features` of the time until then."""
        inner = self.fc1(h) + (features @ self.kernel[...]).astype(h.dtype)
        return self.norm(h + self.fc2(jax.nn.silu(inner)))


# The date bias: taste that changes with the calendar (`model.date_bias_knots`).

_DAY = 86_400.0  # seconds
# Adam moves a weight by about the learning rate in a step. In this unit, the vectors reach a size
# that counts within an epoch or two.
_DATE_BIAS_UNIT = 5.0


class DateBias(nnx.Module):
    """Adds a vector to hidden states that depends on the date alone.

    Its dot product with an item's vector is the change of that item's score on that date. The
    vector is interpolated linearly between knots at equal distances, and is constant before the
    first and after the last knot. All vectors start at zero, so an untrained model has no bias.
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

    def knots(self) -> Float64[np.ndarray, " knots"]:
        """The dates of the knots in days since 1970, rising.

        Raises:
          ValueError: they are not known.
        """
        first, last = self._known_days()
        # All events may have one time.
        return first + max(last - first, 1 / _DAY) * np.linspace(0, 1, self.vectors.shape[0])

    def __call__(
        self, hidden: Float[Array, "*batch E"], dates: Float[Array, "*batch"]
    ) -> Float[Array, "*batch E"]:
        """Hidden states that score items on `dates`, in days since 1970.

        Raises:
          ValueError: the dates of the knots are not known.
        """
        first, last = self._known_days()
        vectors = _DATE_BIAS_UNIT * self.vectors[...]
        share = (dates - first) / max(last - first, 1 / _DAY)  # all events may have one time
        position = jnp.clip(share, 0.0, 1.0) * (len(vectors) - 1)
        near = jnp.maximum(1.0 - jnp.abs(position[..., None] - jnp.arange(len(vectors))), 0.0)
        added = near.astype(vectors.dtype) @ vectors
        # Behind the D numbers, a state can have others, such as the 1 for biases of items.
        more = [(0, 0)] * (added.ndim - 1) + [(0, hidden.shape[-1] - added.shape[-1])]
        return hidden + jnp.pad(added, more).astype(hidden.dtype)

    def _known_days(self) -> tuple[float, float]:
        if self.days is None:
            raise ValueError(
                "a date bias needs the dates of the training events: pass date_range to build"
            )
        return self.days
