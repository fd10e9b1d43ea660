"""The time-aware SSD layers: the one of the paper and the causal one."""

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

# ---- layers.time_aware_ssd
# The time-aware SSD layer: Mamba-2's mixer with step sizes scaled by the time stream.


def _inverse_softplus(x: jax.Array) -> jax.Array:
    return x + jnp.log(-jnp.expm1(-x))


def _dt_bias_init(key, shape, dtype):
    """Step sizes log-uniform in [1e-3, 1e-1], at least 1e-4, before softplus."""
    log_dt = jax.random.uniform(key, shape, dtype, jnp.log(1e-3), jnp.log(1e-1))
    return _inverse_softplus(jnp.maximum(jnp.exp(log_dt), 1e-4))


def _a_log_init(key, shape, dtype):
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


class SSDLayer(nnx.Module):
    """in_proj -> causal convolution -> SSD -> gated RMSNorm -> out_proj: the parts of it.

    The block of Mamba-2 (arXiv 2405.21060, section 7) with one group. Subclasses put the
    parts together; they differ in what time does to the step sizes.
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
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
        output_std: float = 0.02,
    ):
        self.inner, self.state, self.head_width = expand * width, state, head_width
        self.heads = self.inner // head_width
        self.chunk_size, self.dtype = chunk_size, dtype
        self.activation = activation
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        mixed = self.inner + 2 * state
        self.in_proj = Dense(width, self.inner + mixed + self.heads, **kwargs)
        self.conv = CausalConv(
            mixed, conv_width, kaiming=kaiming, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.dt_bias = nnx.Param(_dt_bias_init(rngs.params(), (self.heads,), param_dtype))
        self.A_log = nnx.Param(_a_log_init(rngs.params(), (self.heads,), param_dtype))
        self.D = nnx.Param(jnp.ones((self.heads,), param_dtype))
        self.norm = nnx.RMSNorm(
            self.inner, epsilon=eps, param_dtype=param_dtype, use_fast_variance=False, rngs=rngs
        )
        output_init = nnx.initializers.normal(output_std)
        self.out_proj = Dense(self.inner, width, kernel_init=output_init, **kwargs)

    def split(self, mixed: Float[Array, "*batch C"]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What leaves the convolution, as the op's x [*batch,H,P], B and C [*batch,1,N]."""
        x, B, C = jnp.split(mixed, [self.inner, self.inner + self.state], axis=-1)
        x = x.reshape(*x.shape[:-1], self.heads, self.head_width)
        return x, B[..., None, :], C[..., None, :]

    def fuses(self, h: Float[Array, "B L D"], factor: Float[Array, "B L H"] | None) -> bool:
        """Whether there is a kernel for `fused` on the platform that is compiled for."""
        return has_kernel(jax.eval_shape(self.in_proj, h), factor, **self._block_settings())

    def fused(
        self,
        h: Float[Array, "B L D"],
        factor: Float[Array, "B L H"] | None,
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L D"]:
        """The layer with one kernel for all between its projections."""
        projected = self.in_proj(h)
        settings = self._block_settings()
        y = time_aware_ssd_block(projected, factor, segment_ids=segment_ids, **settings)
        return self.out_proj(y)

    def _block_settings(self) -> dict[str, Any]:
        return dict(
            conv_kernel=self.conv.kernel[...],
            conv_bias=self.conv.bias[...],
            A=-jnp.exp(self.A_log[...]),
            D=self.D[...],
            dt_bias=self.dt_bias[...],
            norm_scale=jnp.asarray(self.norm.scale),
            activation=self.activation,
            state=self.state,
            eps=self.norm.epsilon,
            chunk_size=self.chunk_size,
        )

    def output(
        self, y: Float[Array, "*batch H P"], z: Float[Array, "*batch I"]
    ) -> Float[Array, "*batch D"]:
        """Gates the op's result with `z` and projects it."""
        gated = self.norm(y.reshape(z.shape) * jax.nn.silu(z))
        return self.out_proj(gated.astype(self.dtype))


class TimeAwareSSD(SSDLayer):
    """The paper's layer (arXiv 2409.16182, section 3.3).

    dt = softplus(dt_raw * factor + dt_bias), `factor` coming from the time stream, or 1 where
    time is not used.
    """

    def __call__(
        self, h: Float[Array, "B L D"], factor: Float[Array, "B L H"] | None
    ) -> Float[Array, "B L D"]:
        """Mixes the sequence; `factor` scales the raw step sizes (None: 1)."""
        if self.fuses(h, factor):
            return self.fused(h, factor)
        z, mixed_dt = jnp.split(self.in_proj(h), [self.inner], axis=-1)
        x, B, C, dt = self._inputs(mixed_dt, factor)
        y: Any = ssd(
            x,
            dt,
            -jnp.exp(self.A_log[...]),
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
        """`__call__` at position `lengths - 1`, for the cost of the inputs to it.

        The gate, the output projection and the mask row of every other position are
        never computed.
        """
        mixed_dt = self.in_proj(h, slice(self.inner, None))
        z = self.in_proj(take_position(h, lengths - 1), slice(self.inner))
        x, B, C, dt = self._inputs(mixed_dt, factor)
        y = ssd_last(
            x,
            dt,
            -jnp.exp(self.A_log[...]),
            B,
            take_position(C, lengths - 1),
            self.D[...],
            lengths,
            dt_bias=self.dt_bias[...],
        )
        return self.output(y, z)

    def mask(
        self, h: Float[Array, "B L D"], factor: Float[Array, "B L H"] | None
    ) -> Float[Array, "B H L L"]:
        """The time-aware mask that `__call__` mixes with, see `tim4rec_jax.ssd.reference`."""
        *_, dt = self._inputs(self.in_proj(h, slice(self.inner, None)), factor)
        step = jax.nn.softplus(dt + self.dt_bias[...])
        return decay_mask(step, step * -jnp.exp(self.A_log[...]))

    def _inputs(self, mixed_dt, factor):
        """The op's x [B,L,H,P], B and C [B,L,1,N] and raw step sizes [B,L,H]."""
        mixed, dt = jnp.split(mixed_dt, [self.inner + 2 * self.state], axis=-1)
        x, B, C = self.split(ACTIVATIONS[self.activation](self.conv(mixed)))
        # Step sizes and decays stay in the parameters' precision.
        dt = dt.astype(self.dt_bias.dtype)
        return x, B, C, dt if factor is None else dt * factor


# ---- layers.causal
# The causal layer: every event's own gap shapes its step, and nothing looks ahead.
#
# Unlike the paper's time stream (`tim4rec_jax.layers.time`) it has no weight tied to the
# length of the row, so one pass trains every position, rows can hold many histories, and a
# history can go on event by event from a state of fixed size.


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
        x, B, C = self.split(ACTIVATIONS[self.activation](self.conv(mixed, segment_ids)))
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
        x, B, C = self.split(ACTIVATIONS[self.activation](self.conv(mixed)))
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
        """The time-aware mask that `__call__` mixes with, see `tim4rec_jax.ssd.reference`."""
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
        x, B, C = self.split(ACTIVATIONS[self.activation](self.conv(window)[:, -1]))
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
