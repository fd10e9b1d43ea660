"""The block of Mamba (arXiv 2312.00752, section 3.4), as Mamba4Rec uses it."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from tim4rec_jax.layers.block import ResidualBlock
from tim4rec_jax.layers.convolution import CausalConv
from tim4rec_jax.layers.dense import Dense
from tim4rec_jax.layers.selective_scan import (
    selective_scan,
    selective_scan_last,
    selective_scan_step,
    skip_and_gate,
    step_size,
)
from tim4rec_jax.layers.time_aware_ssd import take_position


class MambaState(NamedTuple):
    """What a layer keeps of the past."""

    window: Float[Array, "B W-1 I"]  # the last inputs of the convolution
    scan: Float[Array, "B I N"]


class Mamba(nnx.Module):
    """in_proj -> causal convolution, SiLU -> selective scan, gate -> out_proj."""

    def __init__(
        self,
        width: int,
        *,
        state: int,
        conv_width: int,
        expand: int,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
    ):
        """Initialises the weights as Mamba4Rec does, with its N(0, 0.02^2) for all projections.

        That includes the one of the step sizes and sets its bias to 0: of Mamba's own choice of
        steps between 0.001 and 0.1 nothing is left, all start close to softplus(0) = 0.69.
        """
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.inner, self.state, self.rank = expand * width, state, math.ceil(width / 16)
        self.dtype = dtype
        self.in_proj = Dense(width, 2 * self.inner, use_bias=False, **kwargs)
        self.conv = CausalConv(self.inner, conv_width, kaiming=False, **kwargs)
        self.x_proj = Dense(self.inner, self.rank + 2 * state, use_bias=False, **kwargs)
        self.dt_proj = Dense(self.rank, self.inner, **kwargs)
        rates = jnp.log(jnp.arange(1, state + 1, dtype=param_dtype))
        self.A_log = nnx.Param(jnp.tile(rates, (self.inner, 1)))
        self.D = nnx.Param(jnp.ones((self.inner,), param_dtype))
        self.out_proj = Dense(self.inner, width, use_bias=False, **kwargs)

    def __call__(
        self, h: Float[Array, "B L D"], segment_ids: Int[Array, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """Mixes each segment of each row."""
        mixed, z = jnp.split(self.in_proj(h), 2, axis=-1)
        u = jax.nn.silu(self.conv(mixed, segment_ids))
        dt, B, C = self._maps(u)
        y, _ = selective_scan(u, dt, self._rates(), B, C, self.D[...], z=z, segment_ids=segment_ids)
        return self.out_proj(y)

    def last(self, h: Float[Array, "B L D"], lengths: Int[Array, "B"]) -> Float[Array, "B D"]:
        """`__call__` at position `lengths - 1`, for the cost of the inputs to it."""
        z = self.in_proj(take_position(h, lengths - 1), slice(self.inner, None))
        u = jax.nn.silu(self.conv(self.in_proj(h, slice(self.inner))))
        dt, B, C = self._maps(u)
        y = selective_scan_last(u, dt, self._rates(), B, take_position(C, lengths - 1), lengths)
        y = skip_and_gate(y, take_position(u, lengths - 1), self.D[...], z)
        return self.out_proj(y)

    def init_state(self, batch: int) -> MambaState:
        """The state before the first event."""
        taps = self.conv.kernel.shape[0]
        window = jnp.zeros((batch, taps - 1, self.inner), self.dtype)
        return MambaState(window, jnp.zeros((batch, self.inner, self.state), self.D.dtype))

    def step(
        self, state: MambaState, h: Float[Array, "B D"]
    ) -> tuple[MambaState, Float[Array, "B D"]]:
        """`__call__` for one more event."""
        mixed, z = jnp.split(self.in_proj(h), 2, axis=-1)
        window = jnp.concatenate([state.window, mixed[:, None]], axis=1)
        u = jax.nn.silu(self.conv(window)[:, -1])
        dt, B, C = self._maps(u)
        scan, y = selective_scan_step(state.scan, u, dt, self._rates(), B, C)
        y = skip_and_gate(y, u, self.D[...], z).astype(self.dtype)
        return MambaState(window[:, 1:], scan), self.out_proj(y)

    def _maps(self, u):
        """Step sizes, in the parameters' precision, and the scan's B and C."""
        low, B, C = jnp.split(self.x_proj(u), [self.rank, self.rank + self.state], axis=-1)
        return step_size(self.dt_proj(low), None, softplus=True), B, C

    def _rates(self):
        return -jnp.exp(self.A_log[...])


class MambaBlock(ResidualBlock):
    """A Mamba block, then what `ResidualBlock` adds."""

    def __init__(self, mamba: Mamba, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mamba = mamba

    def __call__(
        self,
        h: Float[Array, "B L D"],
        features: None = None,
        segment_ids: Int[Array, "B L"] | None = None,
        seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """One layer over rows of one or more histories each, which knows nothing of the gaps."""
        return self.finish(self.mamba(h, segment_ids), h, seeds)

    def last(
        self,
        h: Float[Array, "B L D"],
        features: None,
        lengths: Int[Array, "B"],
        seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B D"]:
        """`__call__` at position `lengths - 1` of rows of one history each."""
        return self.finish(self.mamba.last(h, lengths), take_position(h, lengths - 1), seeds)

    def init_state(self, batch: int) -> MambaState:
        """The state before the first event."""
        return self.mamba.init_state(batch)

    def step(
        self, state: MambaState, h: Float[Array, "B D"], features: None = None
    ) -> tuple[MambaState, Float[Array, "B D"]]:
        """`__call__` for one more event."""
        state, y = self.mamba.step(state, h)
        return state, self.finish(y, h, None)
