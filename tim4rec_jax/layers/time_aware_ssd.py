"""The time-aware SSD layer: Mamba-2's mixer with step sizes scaled by the time stream."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tim4rec_jax.layers.convolution import CausalConv
from tim4rec_jax.layers.dense import Dense
from tim4rec_jax.ssd import ssd, time_aware_ssd_block
from tim4rec_jax.ssd.block import has_kernel
from tim4rec_jax.ssd.convolution import ACTIVATIONS
from tim4rec_jax.ssd.last import ssd_last
from tim4rec_jax.ssd.mask import decay_mask


def take_position(x: Float[Array, "B L ..."], position: Int[Array, "B"]) -> Float[Array, "B ..."]:
    """x[b, position[b]] for every row b."""
    return jax.vmap(lambda row, p: jax.lax.dynamic_index_in_dim(row, p, keepdims=False))(
        x, position
    )


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
        activation,
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
        if self.activation not in ACTIVATIONS.values():
            return False
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
            activation=next(name for name, f in ACTIVATIONS.items() if f is self.activation),
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
        """The time-aware mask that `__call__` mixes with, see `tim4rec_jax.ssd.mask`."""
        *_, dt = self._inputs(self.in_proj(h, slice(self.inner, None)), factor)
        step = jax.nn.softplus(dt + self.dt_bias[...])
        return decay_mask(step, step * -jnp.exp(self.A_log[...]))

    def _inputs(self, mixed_dt, factor):
        """The op's x [B,L,H,P], B and C [B,L,1,N] and raw step sizes [B,L,H]."""
        mixed, dt = jnp.split(mixed_dt, [self.inner + 2 * self.state], axis=-1)
        x, B, C = self.split(self.activation(self.conv(mixed)))
        # Step sizes and decays stay in the parameters' precision.
        dt = dt.astype(self.dt_bias.dtype)
        return x, B, C, dt if factor is None else dt * factor
