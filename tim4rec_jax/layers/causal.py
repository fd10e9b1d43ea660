"""The causal layer: every event's own gap shapes its step, and nothing looks ahead.

Unlike the paper's time stream (`tim4rec_jax.layers.time_stream`) it has no weight tied to the
length of the row, so one pass trains every position, rows can hold many histories, and a
history can go on event by event from a state of fixed size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from tim4rec_jax.layers.block import ResidualBlock, layer_norm
from tim4rec_jax.layers.dense import Dense
from tim4rec_jax.layers.time_aware_ssd import SSDLayer, take_position
from tim4rec_jax.ssd import ssd, ssd_step
from tim4rec_jax.ssd.last import ssd_last
from tim4rec_jax.ssd.mask import decay_mask

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


class LayerState(NamedTuple):
    """What a layer keeps of the past."""

    window: Float[Array, "B W-1 C"]  # the last inputs of the convolution
    ssd: Float[Array, "B H P N"]


class CausalSSD(SSDLayer):
    """Mamba-2's layer with step sizes and decays shaped by the gaps.

    dt = softplus(dt_raw + step + dt_bias) scales the input, exp(dt e^rate A) is the decay.
    """

    def __call__(
        self,
        h: Float[Array, "B L D"],
        time: GapModulation | None,
        segment_ids: Int[Array, "B L"] | None,
    ) -> Float[Array, "B L D"]:
        """Mixes each segment of each row."""
        if time is None and self.fuses(h, None):
            return self.fused(h, None, segment_ids)
        z, mixed, dt = self._project(h, time)
        x, B, C = self.split(self.activation(self.conv(mixed, segment_ids)))
        inputs, decay = self._for_op(x, dt, time)
        y = ssd(
            inputs,
            decay,
            -jnp.exp(self.A_log[...]),
            B,
            C,
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
        )
        return self._gated(y, x, z)

    def last(
        self, h: Float[Array, "B L D"], time: GapModulation | None, lengths: Int[Array, "B"]
    ) -> Float[Array, "B D"]:
        """`__call__` at position `lengths - 1`, for the cost of the inputs to it."""
        h = _with_inputs(h, time)
        mixed, dt = jnp.split(
            self.in_proj(h, slice(self.inner, None)), [self.inner + 2 * self.state], axis=-1
        )
        z = self.in_proj(take_position(h, lengths - 1), slice(self.inner))
        x, B, C = self.split(self.activation(self.conv(mixed)))
        inputs, decay = self._for_op(x, dt, time)
        y = ssd_last(
            inputs,
            decay,
            -jnp.exp(self.A_log[...]),
            B,
            take_position(C, lengths - 1),
            None,
            lengths,
            dt_softplus=False,
        )
        return self._gated(y, take_position(x, lengths - 1), z)

    def mask(self, h: Float[Array, "B L D"], time: GapModulation | None) -> Float[Array, "B H L L"]:
        """The time-aware mask that `__call__` mixes with, see `tim4rec_jax.ssd.mask`."""
        *_, dt = self._project(h, time)
        dt, rate = self._steps(dt, time)
        decay = dt if rate is None else dt * rate
        return decay_mask(dt, decay * -jnp.exp(self.A_log[...]))

    def init_state(self, batch: int) -> LayerState:
        """The state before the first event."""
        taps, channels = self.conv.kernel.shape
        shape = (batch, self.heads, self.head_width, self.state)
        window = jnp.zeros((batch, taps - 1, channels), self.dtype)
        return LayerState(window, jnp.zeros(shape, self.dt_bias.dtype))

    def step(
        self, state: LayerState, h: Float[Array, "B D"], time: GapModulation | None
    ) -> tuple[LayerState, Float[Array, "B D"]]:
        """`__call__` for one more event."""
        z, mixed, dt = self._project(h, time)
        window = jnp.concatenate([state.window, mixed[:, None]], axis=1)
        x, B, C = self.split(self.activation(self.conv(window)[:, -1]))
        inputs, decay = self._for_op(x, dt, time)
        hidden, y = ssd_step(
            state.ssd,
            inputs,
            decay,
            -jnp.exp(self.A_log[...]),
            B,
            C,
        )
        return LayerState(window[:, 1:], hidden), self._gated(y, x, z)

    def _project(self, h, time):
        h = self.in_proj(_with_inputs(h, time))
        return jnp.split(h, [self.inner, 2 * self.inner + 2 * self.state], axis=-1)

    def _steps(self, dt, time):
        """Step sizes and the factor on the rate of decay, in the parameters' precision."""
        dt = dt.astype(self.dt_bias.dtype) + self.dt_bias[...]
        if time is None:
            return jax.nn.softplus(dt), None
        return jax.nn.softplus(dt + time.step), jnp.exp(time.rate)

    def _for_op(self, x, dt, time):
        """The op has one step size for input and decay: what the decay gets more, x loses."""
        dt, rate = self._steps(dt, time)
        if rate is None:
            return x, dt
        return x / rate[..., None].astype(x.dtype), dt * rate

    def _gated(self, y, x, z):
        y = y + self.D[...].astype(x.dtype)[:, None] * x
        return self.output(y, z)


def _with_inputs(h, time: GapModulation | None):
    return h if time is None else h + time.inputs.astype(h.dtype)


class CausalBlock(ResidualBlock):
    """A layer whose time is the gaps; without a modulator time is not used."""

    def __init__(self, ssd: CausalSSD, modulator: GapModulator | None, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ssd, self.modulator = ssd, modulator

    def __call__(
        self,
        h: Float[Array, "B L D"],
        features: Float[Array, "B L K"] | None,
        segment_ids: Int[Array, "B L"] | None,
        seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """One layer over rows of one or more histories each.

        Args:
          h: item stream.
          features: `gap_features`.
          segment_ids: which history a position belongs to; None: one a row.
          seeds: dropout seeds per row, or None for no dropout.
        """
        return self.finish(self.ssd(h, self._time(features), segment_ids), h, seeds)

    def init_state(self, batch: int) -> LayerState:
        """The state before the first event."""
        return self.ssd.init_state(batch)

    def mask(
        self, h: Float[Array, "B L D"], features: Float[Array, "B L K"] | None
    ) -> Float[Array, "B H L L"]:
        """What each event counts for in each later one, per head, before their content."""
        return self.ssd.mask(h, self._time(features))

    def last(
        self,
        h: Float[Array, "B L D"],
        features: Float[Array, "B L K"] | None,
        lengths: Int[Array, "B"],
        seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B D"]:
        """`__call__` at position `lengths - 1` of rows of one history, for a model's last layer."""
        y = self.ssd.last(h, self._time(features), lengths)
        return self.finish(y, take_position(h, lengths - 1), seeds)

    def step(
        self, state: LayerState, h: Float[Array, "B D"], features: Float[Array, "B K"] | None
    ) -> tuple[LayerState, Float[Array, "B D"]]:
        """`__call__` for one more event."""
        state, y = self.ssd.step(state, h, self._time(features))
        return state, self.finish(y, h, None)

    def _time(self, features):
        return None if self.modulator is None else self.modulator(features)


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
