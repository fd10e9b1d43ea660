"""The SSD layers: the causal `CausalSSD`, and `TimeAwareSSD` of the paper.

Both are the block of Mamba-2 (arXiv 2405.21060, section 7) with one group. They differ in what
time does to the step sizes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tim4rec_jax.layers.basic import CausalConv, Dense, take_position
from tim4rec_jax.layers.checks import (
    activation_name,
    check_divides,
    check_eps,
    check_segments,
    check_shape,
    check_sizes,
)
from tim4rec_jax.layers.time import GapModulation
from tim4rec_jax.ssd import ssd, ssd_step, time_aware_ssd_block
from tim4rec_jax.ssd.arrays import AnyArray
from tim4rec_jax.ssd.convolution import ACTIVATIONS
from tim4rec_jax.ssd.finite import call_guarded, zero_behind
from tim4rec_jax.ssd.fused_block import has_kernel, rate_factor
from tim4rec_jax.ssd.reference import decay_mask
from tim4rec_jax.ssd.xla import ssd_last


class LayerState(NamedTuple):
    """What an SSD layer keeps of the past. Its size does not depend on how long that is."""

    window: Float[Array, "B W-1 C"]  # the last inputs of the convolution
    ssd: Float[Array, "B H P N"]


class SSDLayer(nnx.Module):
    """in_proj -> causal convolution -> SSD -> gated RMSNorm -> out_proj.

    This class has the parts, and subclasses put them together. I is the inner width H P.

    What stands after a position never changes its output or a gradient, NaN and infinities
    included; nor does what stands in another segment. From the first such number of a segment to
    the segment's end, the outputs are NaN: leave padding out of a loss with `jnp.where`.

    Attributes:
      in_proj: D -> 2 I + 2 N + H, that is z [I], x [I], B [N], C [N] and raw step sizes [H].
      conv: over (x, B, C), followed by `activation`.
      dt_bias: added to the step sizes before softplus.
      A_log: log of the rate of decay of each head.
      D: weight of the skip connection of each head.
      norm: RMSNorm over all I features, after the gate.
      out_proj: I -> D.
      inner: I, the inner width.
      heads: H, the number of heads.
      head_width: P, the width of a head.
      state: N, the width of the state.
    """

    def __init__(
        self,
        width: int,
        *,
        state: int = 32,
        head_width: int = 32,
        expand: int = 2,
        conv_width: int = 4,
        chunk_size: int | None = None,
        activation: str | Callable[..., Any] | None = None,
        kaiming: bool = True,
        eps: float = 1e-12,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        output_std: float = 0.02,
    ):
        """Initialises the weights as the published code does, whose 64-d models have the defaults.

        Args:
          width: D, of inputs and outputs.
          state: N, the width of the state.
          head_width: P, which must divide I = `expand` * `width`.
          expand: I / D.
          conv_width: taps of the convolution, 1 or more: the position and those before it.
          chunk_size: of the SSD op; None lets the op choose. Results do not depend on it.
          activation: after the convolution, "hardswish" or "silu". None takes what the published
            code takes: "hardswish", or "silu" where H is a multiple of 8.
          kaiming: whether the convolution is initialised by Kaiming's rule, else as in PyTorch.
          eps: of RMSNorm.
          dtype: of the activations.
          param_dtype: of the parameters, step sizes and decays.
          rngs: a stream `params`.
          output_std: standard deviation of the initial weights of `out_proj`.

        Raises:
          ValueError: an argument does not fit; the message names it.
        """
        check_sizes(width=width, state=state, head_width=head_width, expand=expand)
        check_sizes(conv_width=conv_width)
        check_divides("head_width", head_width, "expand * width", expand * width)
        check_eps(eps)
        if chunk_size is not None:
            check_sizes(chunk_size=chunk_size)
        self.inner, self.state, self.head_width = expand * width, state, head_width
        self.heads = self.inner // head_width
        self.activation = activation_name(activation, self.heads)
        self.chunk_size, self.dtype = chunk_size, dtype
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        mixed = self.inner + 2 * state
        self.in_proj = Dense(width, self.inner + mixed + self.heads, **kwargs)
        self.conv = CausalConv(mixed, conv_width, kaiming=kaiming, **kwargs)
        self.dt_bias = nnx.Param(_initial_dt_bias(rngs.params(), self.heads, param_dtype))
        rates = jax.random.uniform(rngs.params(), (self.heads,), param_dtype, 1.0, 16.0)
        self.A_log = nnx.Param(jnp.log(rates))
        self.D = nnx.Param(jnp.ones((self.heads,), param_dtype))
        self.norm = nnx.RMSNorm(
            self.inner, epsilon=eps, param_dtype=param_dtype, use_fast_variance=False, rngs=rngs
        )
        output_init = nnx.initializers.normal(output_std)
        self.out_proj = Dense(self.inner, width, kernel_init=output_init, **kwargs)

    def init_state(self, batch: int) -> LayerState:
        """Returns the state of `batch` rows before their first position."""
        taps, channels = self.conv.kernel.shape
        shape = (batch, self.heads, self.head_width, self.state)
        window = jnp.zeros((batch, taps - 1, channels), self.dtype)
        # As `step` returns it.
        wide = jnp.promote_types(jnp.float32, jnp.promote_types(self.dtype, self.dt_bias.dtype))
        return LayerState(window, jnp.zeros(shape, wide))

    def op_inputs(self, mixed: Float[Array, "*batch C"]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Makes of the convolution's output the op's `x [*batch,H,P]`, B and C `[*batch,1,N]`."""
        mixed = ACTIVATIONS[self.activation](mixed)
        x, B, C = jnp.split(mixed, [self.inner, self.inner + self.state], axis=-1)
        x = x.reshape(*x.shape[:-1], self.heads, self.head_width)
        return x, B[..., None, :], C[..., None, :]

    def decay_rates(self) -> Float[Array, " H"]:
        """The op's A, which is negative."""
        return -jnp.exp(self.A_log[...])

    def block_arguments(
        self,
        projected: Float[Array, "B L E"],
        segment_ids: Int[AnyArray, "B L"] | None = None,
    ) -> dict[str, Any]:
        """Arguments of `time_aware_ssd_block`, all between the projections, but for time's."""
        return dict(
            projected=projected,
            conv_kernel=self.conv.kernel[...],
            conv_bias=self.conv.bias[...],
            A=self.decay_rates(),
            D=self.D[...],
            dt_bias=self.dt_bias[...],
            norm_scale=jnp.asarray(self.norm.scale),
            activation=self.activation,
            state=self.state,
            eps=self.norm.epsilon,
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
        )

    def output(
        self, y: Float[Array, "*batch H P"], z: Float[Array, "*batch I"]
    ) -> Float[Array, "*batch D"]:
        """Multiplies the op's result by silu(z), normalises and projects it."""
        gated = self.norm(y.reshape(z.shape) * jax.nn.silu(z))
        return self.out_proj(gated.astype(self.dtype))

    def _check(self, h, axes, **others):
        """Raises ValueError unless `h` is [*axes,D] and all else is [*axes,size]."""
        check_shape("h", h, axes, self.in_proj.kernel.shape[0])
        for name, (array, size) in others.items():
            if array is not None:
                check_shape(name, array, axes, size, h.shape[:-1])

    def _split(self, projected):
        """z, the convolution's input, and raw step sizes."""
        return jnp.split(projected, [self.inner, 2 * self.inner + 2 * self.state], axis=-1)

    def _slide(self, window, mixed):
        """Moves the window on by one position: the next one, and the op's x, B and C there."""
        window = jnp.concatenate([window, mixed[:, None]], axis=1)
        return window[:, 1:], *self.op_inputs(self.conv(window)[:, -1])


def _initial_dt_bias(key: jax.Array, heads: int, dtype: Any) -> jax.Array:
    """Makes the step sizes softplus(bias) log-uniform in [1e-3, 1e-1]."""
    log_dt = jax.random.uniform(key, (heads,), dtype, jnp.log(1e-3), jnp.log(1e-1))
    dt = jnp.maximum(jnp.exp(log_dt), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))  # the inverse of softplus


class CausalSSD(SSDLayer):
    """Mamba-2's layer, with step sizes and decays that depend on the gap before each event.

    dt = softplus(dt_raw + step + dt_bias) scales the input, and exp(dt e^rate A) is the decay.

    Unlike the paper's time stream (`tim4rec_jax.layers.time`) it has no weight for each position.
    Hence one pass trains every position, rows can hold several histories, and a history can go on
    event by event from a state of fixed size.

        layer = CausalSSD(64, rngs=nnx.Rngs(0))
        modulator = GapModulator(64, layer.heads)
        y = layer(h, modulator(gap_features(gaps)), segment_ids)

    The arguments of the constructor and the attributes are those of `SSDLayer`.
    """

    def __call__(
        self,
        h: Float[AnyArray, "B L D"],
        time: GapModulation | None = None,
        segment_ids: Int[AnyArray, "B L"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Mixes each segment of each row.

        Args:
          h: the input.
          time: what the gaps do at each position, see `GapModulator`. None: nothing, which makes
            this layer that of Mamba-2.
          segment_ids: a segment begins where the id differs from the one before. None: each row is
            one segment.

        Returns:
          The output in `dtype`.

        Raises:
          ValueError: shapes do not fit the layer.
        """
        self._check(h, "B,L", **self._parts(time))
        check_segments(segment_ids, h)
        return call_guarded(lambda h, time: self._mix(h, time, segment_ids), (h, time), segment_ids)

    def _mix(self, h, time, segment_ids):
        projected = self.in_proj(_with_inputs(h, time))
        arguments = self.block_arguments(projected, segment_ids)
        if time is not None:
            arguments |= {"time_step": time.step, "time_rate": time.rate}
        if has_kernel(**arguments):
            return self.out_proj(time_aware_ssd_block(**arguments))
        z, mixed, dt = self._split(projected)
        x, B, C = self.op_inputs(self.conv(mixed, segment_ids))
        inputs, decay = self._for_op(x, dt, time)
        y = ssd(
            inputs,
            decay,
            self.decay_rates(),
            B,
            C,
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
        )
        return self._gated(y, x, z)

    def last(
        self,
        h: Float[AnyArray, "B L D"],
        time: GapModulation | None,
        lengths: Int[AnyArray, " B"],
    ) -> Float[Array, "B D"]:
        """`__call__` at position `lengths - 1` of rows of one history each.

        Only what that position needs is computed, as in `TimeAwareSSD.last`.
        """
        self._check(h, "B,L", **self._parts(time))
        h, time = zero_behind(lengths, (h, time))
        h = _with_inputs(h, time)
        mixed_dt = self.in_proj(h, slice(self.inner, None))
        mixed, dt = jnp.split(mixed_dt, [self.inner + 2 * self.state], axis=-1)
        z = self.in_proj(take_position(h, lengths - 1), slice(self.inner))
        x, B, C = self.op_inputs(self.conv(mixed))
        inputs, decay = self._for_op(x, dt, time)
        C = take_position(C, lengths - 1)
        y = ssd_last(inputs, decay, self.decay_rates(), B, C, None, lengths, dt_softplus=False)
        return self._gated(y, take_position(x, lengths - 1), z)

    def mask(self, h: Float[Array, "B L D"], time: GapModulation | None) -> Float[Array, "B H L L"]:
        """The time-aware mask that `__call__` mixes with, see `tim4rec_jax.ssd.reference`."""
        *_, dt = self._split(self.in_proj(_with_inputs(h, time)))
        dt, rate = self._steps(dt, time)
        decay = dt if rate is None else dt * rate
        return decay_mask(dt, decay * self.decay_rates())

    def step(
        self,
        state: LayerState,
        h: Float[AnyArray, "B D"],
        time: GapModulation | None = None,
    ) -> tuple[LayerState, Float[Array, "B D"]]:
        """`__call__` for one more position of each row.

        Args:
          state: what `init_state` or the last `step` returned.
          h: the input of the position.
          time: what its gaps do, as in `__call__`.

        Returns:
          The next state, and the output of the position.
        """
        self._check(h, "B", **self._parts(time))
        z, mixed, dt = self._split(self.in_proj(_with_inputs(h, time)))
        window, x, B, C = self._slide(state.window, mixed)
        inputs, decay = self._for_op(x, dt, time)
        hidden, y = ssd_step(state.ssd, inputs, decay, self.decay_rates(), B, C)
        return LayerState(window, hidden), self._gated(y, x, z)

    def _parts(self, time):
        """The arrays of `time`, with the size of the last axis that each must have."""
        if time is None:
            return {}
        sizes = (self.in_proj.kernel.shape[0], self.heads, self.heads)
        return {
            f"time.{k}": (v, n) for (k, v), n in zip(time._asdict().items(), sizes, strict=True)
        }

    def _steps(self, dt, time):
        """Step sizes and the factor on the rate of decay, in the parameters' precision."""
        dt = dt.astype(self.dt_bias.dtype) + self.dt_bias[...]
        if time is None:
            return jax.nn.softplus(dt), None
        return jax.nn.softplus(dt + time.step), rate_factor(time.rate)

    def _for_op(self, x, dt, time):
        """The op's input and step sizes.

        The op has one step size for input and decay. The factor on the rate of decay multiplies
        that step size, and the input is divided by it.
        """
        dt, rate = self._steps(dt, time)
        if rate is None:
            return x, dt
        return x / rate[..., None].astype(x.dtype), dt * rate

    def _gated(self, y, x, z):
        y = y + self.D[...].astype(x.dtype)[:, None] * x
        return self.output(y, z)


def _with_inputs(h, time: GapModulation | None):
    return h if time is None else h + time.inputs.astype(h.dtype)


class TimeAwareSSD(SSDLayer):
    """The paper's layer (arXiv 2409.16182, section 3.3).

    dt = softplus(dt_raw * factor + dt_bias). The factor comes from the time stream, and is 1 where
    the model does not use time.

        layer = TimeAwareSSD(64, rngs=nnx.Rngs(0))
        y = layer(h, factor)

    The layer itself is causal, so it takes `segment_ids` and goes on position by position. The
    paper's time stream (`TimeEncoder`, `TimeMixer`) does neither, as it sees the whole row. For
    segments and steps the factor must come from elsewhere.

    The arguments of the constructor and the attributes are those of `SSDLayer`.
    """

    def __call__(
        self,
        h: Float[AnyArray, "B L D"],
        factor: Float[AnyArray, "B L H"] | None = None,
        segment_ids: Int[AnyArray, "B L"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Mixes each segment of each row.

        Args:
          h: the input.
          factor: scales the raw step size of each head; None: 1.
          segment_ids: a segment begins where the id differs from the one before. None: each row is
            one segment.

        Returns:
          The output in `dtype`.

        Raises:
          ValueError: shapes do not fit the layer.
        """
        self._check(h, "B,L", factor=(factor, self.heads))
        check_segments(segment_ids, h)
        return call_guarded(
            lambda h, factor: self._mix(h, factor, segment_ids), (h, factor), segment_ids
        )

    def _mix(self, h, factor, segment_ids):
        projected = self.in_proj(h)
        arguments = self.block_arguments(projected, segment_ids) | {"time_factor": factor}
        if has_kernel(**arguments):
            return self.out_proj(time_aware_ssd_block(**arguments))
        z, mixed_dt = jnp.split(projected, [self.inner], axis=-1)
        x, B, C, dt = self._inputs(mixed_dt, factor, segment_ids)
        y: Any = ssd(
            x,
            dt,
            self.decay_rates(),
            B,
            C,
            self.D[...],
            dt_bias=self.dt_bias[...],
            dt_softplus=True,
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
        )
        return self.output(y, z)

    def last(
        self,
        h: Float[AnyArray, "B L D"],
        factor: Float[AnyArray, "B L H"] | None,
        lengths: Int[AnyArray, " B"],
    ) -> Float[Array, "B D"]:
        """`__call__` at position `lengths - 1` of rows of one history each.

        Only what that position needs is computed: x, B and step sizes everywhere before it, but the
        gate, the output projection and one row of the mask only there.
        """
        self._check(h, "B,L", factor=(factor, self.heads))
        h, factor = zero_behind(lengths, (h, factor))
        mixed_dt = self.in_proj(h, slice(self.inner, None))
        z = self.in_proj(take_position(h, lengths - 1), slice(self.inner))
        x, B, C, dt = self._inputs(mixed_dt, factor)
        C = take_position(C, lengths - 1)
        A, D, bias = self.decay_rates(), self.D[...], self.dt_bias[...]
        return self.output(ssd_last(x, dt, A, B, C, D, lengths, dt_bias=bias), z)

    def mask(
        self, h: Float[Array, "B L D"], factor: Float[Array, "B L H"] | None
    ) -> Float[Array, "B H L L"]:
        """The time-aware mask that `__call__` mixes with, see `tim4rec_jax.ssd.reference`."""
        *_, dt = self._inputs(self.in_proj(h, slice(self.inner, None)), factor)
        step = jax.nn.softplus(dt + self.dt_bias[...])
        return decay_mask(step, step * self.decay_rates())

    def step(
        self,
        state: LayerState,
        h: Float[AnyArray, "B D"],
        factor: Float[AnyArray, "B H"] | None = None,
    ) -> tuple[LayerState, Float[Array, "B D"]]:
        """`__call__` for one more position of each row.

        Args:
          state: what `init_state` or the last `step` returned.
          h: the input of the position.
          factor: scales its raw step sizes; None: 1.

        Returns:
          The next state, and the output of the position.
        """
        self._check(h, "B", factor=(factor, self.heads))
        z, mixed, dt = self._split(self.in_proj(h))
        window, x, B, C = self._slide(state.window, mixed)
        hidden, y = ssd_step(
            state.ssd,
            x,
            self._scaled(dt, factor),
            self.decay_rates(),
            B,
            C,
            self.D[...],
            dt_bias=self.dt_bias[...],
            dt_softplus=True,
        )
        return LayerState(window, hidden), self.output(y, z)

    def _inputs(self, mixed_dt, factor, segment_ids=None):
        """The op's x [B,L,H,P], B and C [B,L,1,N] and raw step sizes [B,L,H]."""
        mixed, dt = jnp.split(mixed_dt, [self.inner + 2 * self.state], axis=-1)
        x, B, C = self.op_inputs(self.conv(mixed, segment_ids))
        return x, B, C, self._scaled(dt, factor)

    def _scaled(self, dt, factor):
        # Step sizes and decays stay in the parameters' precision.
        dt = dt.astype(self.dt_bias.dtype)
        return dt if factor is None else dt * factor
