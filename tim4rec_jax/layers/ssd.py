"""The time-aware SSD layers: `TimeAwareSSD` of the paper, and the causal `CausalSSD`.

Both are the block of Mamba-2 (arXiv 2405.21060, section 7) with one group. They differ in what
time does to the step sizes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tim4rec_jax.layers.basic import CausalConv, Dense, take_position
from tim4rec_jax.layers.time import GapModulation
from tim4rec_jax.ssd import ssd, ssd_step, time_aware_ssd_block
from tim4rec_jax.ssd.convolution import ACTIVATIONS
from tim4rec_jax.ssd.fused_block import has_kernel
from tim4rec_jax.ssd.reference import decay_mask
from tim4rec_jax.ssd.xla import ssd_last


class SSDLayer(nnx.Module):
    """in_proj -> causal convolution -> SSD -> gated RMSNorm -> out_proj.

    This class has the parts, and subclasses put them together. I is the inner width H P.

    Attributes:
      in_proj: D -> 2 I + 2 N + H, that is z [I], x [I], B [N], C [N] and raw step sizes [H].
      conv: over (x, B, C), followed by `activation`.
      dt_bias: added to the step sizes before softplus.
      A_log: log of the rate of decay of each head.
      D: weight of the skip connection of each head.
      norm: RMSNorm over all I features, after the gate.
      out_proj: I -> D.
    """

    def __init__(
        self,
        width: int,
        *,
        state: int,
        head_width: int,
        expand: int,
        conv_width: int,
        chunk_size: int | None,
        activation: str,
        kaiming: bool,
        eps: float,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
        output_std: float = 0.02,
    ):
        """Initialises the weights as the published code does.

        Args:
          width: D.
          state: N.
          head_width: P; it must divide I = `expand` * `width`.
          expand: I / D.
          conv_width: taps of the convolution.
          chunk_size: of the SSD op; None lets the op choose.
          activation: after the convolution, "hardswish" or "silu".
          kaiming: whether the convolution is initialised by Kaiming's rule.
          eps: of RMSNorm.
          dtype: of the activations.
          param_dtype: of the parameters, step sizes and decays.
          rngs: a stream `params`.
          output_std: standard deviation of the initial weights of `out_proj`.
        """
        self.inner, self.state, self.head_width = expand * width, state, head_width
        self.heads = self.inner // head_width
        self.chunk_size, self.activation, self.dtype = chunk_size, activation, dtype
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

    def op_inputs(self, mixed: Float[Array, "*batch C"]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Turns what leaves the convolution into the op's x [*batch,H,P], B and C [*batch,1,N]."""
        mixed = ACTIVATIONS[self.activation](mixed)
        x, B, C = jnp.split(mixed, [self.inner, self.inner + self.state], axis=-1)
        x = x.reshape(*x.shape[:-1], self.heads, self.head_width)
        return x, B[..., None, :], C[..., None, :]

    def decay_rates(self) -> Float[Array, "H"]:
        """The op's A, which is negative."""
        return -jnp.exp(self.A_log[...])

    def block_arguments(
        self,
        projected: Float[Array, "B L E"],
        time_factor: Float[Array, "B L H"] | None,
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> dict[str, Any]:
        """Arguments of `time_aware_ssd_block`, which is all between the two projections."""
        return dict(
            projected=projected,
            time_factor=time_factor,
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


def _initial_dt_bias(key: jax.Array, heads: int, dtype: Any) -> jax.Array:
    """Makes the step sizes softplus(bias) log-uniform in [1e-3, 1e-1]."""
    log_dt = jax.random.uniform(key, (heads,), dtype, jnp.log(1e-3), jnp.log(1e-1))
    dt = jnp.maximum(jnp.exp(log_dt), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))  # the inverse of softplus


class TimeAwareSSD(SSDLayer):
    """The paper's layer (arXiv 2409.16182, section 3.3).

    dt = softplus(dt_raw * factor + dt_bias). The factor comes from the time stream, and is 1 where
    the model does not use time.
    """

    def __call__(
        self, h: Float[Array, "B L D"], factor: Float[Array, "B L H"] | None
    ) -> Float[Array, "B L D"]:
        """Mixes rows of one history each; `factor` scales the raw step sizes (None: 1)."""
        projected = self.in_proj(h)
        arguments = self.block_arguments(projected, factor)
        if has_kernel(**arguments):
            return self.out_proj(time_aware_ssd_block(**arguments))
        z, mixed_dt = jnp.split(projected, [self.inner], axis=-1)
        x, B, C, dt = self._inputs(mixed_dt, factor)
        y: Any = ssd(
            x,
            dt,
            self.decay_rates(),
            B,
            C,
            self.D[...],
            dt_bias=self.dt_bias[...],
            dt_softplus=True,
            chunk_size=self.chunk_size,
        )
        return self.output(y, z)

    def last(
        self,
        h: Float[Array, "B L D"],
        factor: Float[Array, "B L H"] | None,
        lengths: Int[Array, "B"],
    ) -> Float[Array, "B D"]:
        """`__call__` at position `lengths - 1`.

        Only what that position needs is computed: x, B and step sizes everywhere before it, but the
        gate, the output projection and one row of the mask only there.
        """
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

    def _inputs(self, mixed_dt, factor):
        """The op's x [B,L,H,P], B and C [B,L,1,N] and raw step sizes [B,L,H]."""
        mixed, dt = jnp.split(mixed_dt, [self.inner + 2 * self.state], axis=-1)
        x, B, C = self.op_inputs(self.conv(mixed))
        # Step sizes and decays stay in the parameters' precision.
        dt = dt.astype(self.dt_bias.dtype)
        return x, B, C, dt if factor is None else dt * factor


class LayerState(NamedTuple):
    """What a `CausalSSD` keeps of the past."""

    window: Float[Array, "B W-1 C"]  # the last inputs of the convolution
    ssd: Float[Array, "B H P N"]


class CausalSSD(SSDLayer):
    """Mamba-2's layer, with step sizes and decays that depend on the gap before each event.

    dt = softplus(dt_raw + step + dt_bias) scales the input, and exp(dt e^rate A) is the decay.

    Unlike the paper's time stream (`tim4rec_jax.layers.time`) it has no weight for each position.
    Hence one pass trains every position, rows can hold several histories, and a history can go on
    event by event from a state of fixed size.
    """

    def __call__(
        self,
        h: Float[Array, "B L D"],
        time: GapModulation | None,
        segment_ids: Int[Array, "B L"] | None,
    ) -> Float[Array, "B L D"]:
        """Mixes each segment of each row; `time` is what the gaps do (None: nothing)."""
        projected = self.in_proj(_with_inputs(h, time))
        if time is None:  # the kernels of the block have one step size for input and decay
            arguments = self.block_arguments(projected, None, segment_ids)
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
        self, h: Float[Array, "B L D"], time: GapModulation | None, lengths: Int[Array, "B"]
    ) -> Float[Array, "B D"]:
        """`__call__` at position `lengths - 1` of rows of one history each.

        Only what that position needs is computed, as in `TimeAwareSSD.last`.
        """
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
        z, mixed, dt = self._split(self.in_proj(_with_inputs(h, time)))
        window = jnp.concatenate([state.window, mixed[:, None]], axis=1)
        x, B, C = self.op_inputs(self.conv(window)[:, -1])
        inputs, decay = self._for_op(x, dt, time)
        hidden, y = ssd_step(state.ssd, inputs, decay, self.decay_rates(), B, C)
        return LayerState(window[:, 1:], hidden), self._gated(y, x, z)

    def _split(self, projected):
        """z, the convolution's input, and raw step sizes."""
        return jnp.split(projected, [self.inner, 2 * self.inner + 2 * self.state], axis=-1)

    def _steps(self, dt, time):
        """Step sizes and the factor on the rate of decay, in the parameters' precision."""
        dt = dt.astype(self.dt_bias.dtype) + self.dt_bias[...]
        if time is None:
            return jax.nn.softplus(dt), None
        return jax.nn.softplus(dt + time.step), jnp.exp(time.rate)

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
