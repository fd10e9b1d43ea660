"""Mamba (arXiv 2312.00752): its selective scan (algorithm 2) and its block (section 3.4).

The scan is the recurrence, with a decay of its own for every number of the state:

    h[t, d, n] = exp(dt[t, d] A[d, n]) h[t-1, d, n] + dt[t, d] B[t, n] u[t, d]
    y[t, d]    = sum_n C[t, n] h[t, d, n] + D[d] u[t, d]

Mamba-2 (`tim4rec_jax.ssd`) computes its recurrence with matrix products, which these decays do not
allow. Here one loop runs over the positions. Of its states [B, D, N] it keeps those at the start of
each chunk of positions, and computes the others again in the backward pass. An associative scan
would hold all of them, several times over.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Int, UInt32

from tim4rec_jax.layers.basic import CausalConv, Dense, take_position
from tim4rec_jax.layers.block import ResidualBlock
from tim4rec_jax.layers.checks import check_segments, check_shape, check_sizes
from tim4rec_jax.ssd import finite, finite_inputs
from tim4rec_jax.ssd.arrays import AnyArray
from tim4rec_jax.ssd.derivatives import custom_gradient
from tim4rec_jax.ssd.segments import starts


def selective_scan(
    u: Float[Array, "B L D"],
    delta: Float[Array, "B L D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    D: Float[Array, " D"] | None = None,
    *,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float[Array, " D"] | None = None,
    delta_softplus: bool = False,
    initial_state: Float[Array, "B D N"] | None = None,
    segment_ids: Int[AnyArray, "B L"] | None = None,
) -> tuple[Float[Array, "B L D"], Float[Array, "B D N"]]:
    """The selective scan over whole rows.

    Inputs must be finite, as those that `Mamba` passes are: NaN would go on into later segments and
    into the gradients of parameters.

    Args:
      u: inputs.
      delta: step sizes.
      A: rates of decay, negative.
      B: input maps.
      C: output maps.
      D: skip weights; None: no skip.
      z: gates; `y` is multiplied by silu(z) last. None: no gates.
      delta_bias: added to `delta` first.
      delta_softplus: whether softplus is applied to `delta` next.
      initial_state: the state before the first position; None: zeros.
      segment_ids: the state starts from zeros where the id differs from the one before, also where
        an id comes back. None: each row is one segment.

    Returns:
      y in the dtype of `u`, and the state after the last position, in at least float32.
    """
    dt = step_size(delta, delta_bias, delta_softplus)
    dtype, (batch, length, width) = dt.dtype, u.shape
    x, B, C = dt * u.astype(dtype), B.astype(dtype), C.astype(dtype)
    start = None
    if segment_ids is not None:
        start = starts(segment_ids).astype(dtype)
    chunk = _chunk_size(length)

    def in_chunks(array):  # a position with dt = 0 behind the last one changes nothing
        fill = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (array.ndim - 2)
        array = jnp.pad(array, fill).swapaxes(0, 1)
        return array.reshape(-(-length // chunk), chunk, *array.shape[1:])

    if initial_state is None:
        h = jnp.zeros((batch, A.shape[1], width), dtype)
    else:
        h = initial_state.astype(dtype).swapaxes(1, 2)
    inputs = jax.tree.map(in_chunks, _Inputs(dt, x, B, C, start))
    y, h = _scan(inputs, A.astype(dtype).T, h)
    y = y.reshape(-(-length // chunk) * chunk, batch, width)[:length].swapaxes(0, 1)
    return skip_and_gate(y, u, D, z), h.swapaxes(1, 2)


def selective_scan_step(
    state: Float[Array, "B D N"],
    u: Float[Array, "B D"],
    dt: Float[Array, "B D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B N"],
    C: Float[Array, "B N"],
) -> tuple[Float[Array, "B D N"], Float[Array, "B D"]]:
    """One more position, without skip and gate.

    Args:
      state: the state before the position.
      u: inputs.
      dt: step sizes, as `step_size` returns them.
      A: rates of decay, negative.
      B: input maps.
      C: output maps.

    Returns:
      The state after the position, and y.
    """
    state = jnp.exp(dt[..., None] * A) * state + (dt * u)[..., None] * B[:, None]
    return state, jnp.einsum("bdn,bn->bd", state, C.astype(state.dtype))


def selective_scan_last(
    u: Float[Array, "B L D"],
    dt: Float[Array, "B L D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B N"],
    lengths: Int[AnyArray, " B"],
) -> Float[Array, "B D"]:
    """The output at position `lengths - 1`, without skip and gate.

    It is computed without a state, as the sum of all positions' inputs, each multiplied by the
    decay from its position to the last one.

    Args:
      u: inputs.
      dt: step sizes, as `step_size` returns them.
      A: rates of decay, negative.
      B: input maps.
      C: output maps of position `lengths - 1`.
      lengths: number of positions of each row that count.
    """
    real = jnp.arange(u.shape[1])[None, :, None] < lengths[:, None, None]
    dt = jnp.where(real, dt, 0.0)
    after = jnp.pad(dt[:, 1:], ((0, 0), (0, 1), (0, 0)))
    # Summed from the end, so that recent events, which count most, have the smallest error.
    after = jax.lax.cumsum(after, axis=1, reverse=True)
    maps = B.astype(dt.dtype) * C[:, None].astype(dt.dtype)
    rates = A.astype(dt.dtype).T

    @jax.checkpoint
    def add(y, xs):
        after, maps, x = xs
        decay = jnp.exp(after[:, None] * rates)
        return y + x * jnp.einsum("bnd,bn->bd", decay, maps), None

    xs = [array.swapaxes(0, 1) for array in (after, maps, dt * u.astype(dt.dtype))]
    return jax.lax.scan(add, jnp.zeros_like(xs[0][0]), xs)[0]


def step_size(
    delta: Float[Array, "*batch D"], bias: Float[Array, " D"] | None, softplus: bool
) -> Float[Array, "*batch D"]:
    """The step sizes that the recurrence uses, in at least float32."""
    dt = delta.astype(jnp.promote_types(delta.dtype, jnp.float32))
    if bias is not None:
        dt = dt + bias
    return jax.nn.softplus(dt) if softplus else dt


def skip_and_gate(
    y: Float[Array, "*batch D"],
    u: Float[Array, "*batch D"],
    D: Float[Array, " D"] | None,
    z: Float[Array, "*batch D"] | None,
) -> Float[Array, "*batch D"]:
    """What follows the recurrence, in the dtype of `u`."""
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * jax.nn.silu(z.astype(y.dtype))
    return y.astype(u.dtype)


class _Inputs(NamedTuple):
    """Of all positions [chunks, chunk, B, ...], of one chunk, or of one position."""

    dt: jax.Array  # [B, D]
    x: jax.Array  # dt u, [B, D]
    B: jax.Array  # [B, N]
    C: jax.Array  # [B, N]
    start: jax.Array | None  # 1 where the state starts from zeros, else 0, [B]


def _chunk_size(length: Any) -> int:
    """About the square root of the length, which keeps few states, with the least padding.

    A symbolic length (`jax.export`) has chunks of 16 positions.
    """
    if is_symbolic_dim(length):
        return 16
    root = math.isqrt(length)
    return min(range(root, 2 * root + 1), key=lambda size: (-length % size, size))


def _decay(inputs: _Inputs, A):
    decay = jnp.exp(inputs.dt[:, None] * A)
    return decay if inputs.start is None else decay * (1.0 - inputs.start[:, None, None])


def _advance(h, inputs: _Inputs, A):
    return _decay(inputs, A) * h + inputs.B[..., None] * inputs.x[:, None]


def _forward(inputs: _Inputs, A, h):
    """All y [chunks, chunk, B, D] and the last state [B, N, D]; A is [N, D] here."""

    def step(h, inputs):
        h = _advance(h, inputs, A)
        return h, (h * inputs.C[..., None]).sum(1)

    def chunk(h, inputs):
        following, y = jax.lax.scan(step, h, inputs)
        return following, (y, h)

    h, (y, starts) = jax.lax.scan(chunk, h, inputs)
    return (y, h), (inputs, A, starts)


def _backward(residuals, gradients):
    inputs, A, starts = residuals
    d_y, d_h = gradients

    def step(carry, xs):
        d_h, d_A = carry
        h, inputs, d_y = xs  # h: the state before this position
        decay = _decay(inputs, A)
        kept = decay * h
        d_h = d_h + inputs.C[..., None] * d_y[:, None]
        d_exponent = d_h * kept
        after = kept + inputs.B[..., None] * inputs.x[:, None]
        d_inputs = _Inputs(
            dt=(d_exponent * A).sum(1),
            x=(d_h * inputs.B[..., None]).sum(1),
            B=jnp.einsum("bnd,bd->bn", d_h, inputs.x),
            C=jnp.einsum("bnd,bd->bn", after, d_y),
            start=None,
        )
        return (d_h * decay, d_A + (d_exponent * inputs.dt[:, None]).sum(0)), d_inputs

    def chunk(carry, xs):
        start, inputs, d_y = xs
        _, before = jax.lax.scan(lambda h, now: (_advance(h, now, A), h), start, inputs)
        return jax.lax.scan(step, carry, (before, inputs, d_y), reverse=True)

    zero = (d_h, jnp.zeros_like(A))
    (d_h, d_A), d_inputs = jax.lax.scan(chunk, zero, (starts, inputs, d_y), reverse=True)
    # `start` is no parameter; its gradient is never used.
    start = None if inputs.start is None else jnp.zeros_like(inputs.start)
    return d_inputs._replace(start=start), d_A, d_h


_scan = custom_gradient(_forward, _backward)


class MambaState(NamedTuple):
    """What a layer keeps of the past."""

    window: Float[Array, "B W-1 I"]  # the last inputs of the convolution
    scan: Float[Array, "B I N"]


class Mamba(nnx.Module):
    """in_proj -> causal convolution, SiLU -> selective scan, gate -> out_proj.

    What stands after a position never changes its output or a gradient, NaN and infinities
    included; nor does what stands in another segment. From the first such number of a segment to
    the segment's end, the outputs are NaN.

    Attributes:
      in_proj: D -> 2 I, that is the scan's input and the gate.
      conv: over the input, followed by SiLU.
      x_proj: I -> R + 2 N, that is the step size in R = D / 16 numbers, B and C.
      dt_proj: R -> I, the step sizes before softplus.
      A_log: log of the rates of decay [I, N].
      D: weight of the skip connection of each channel [I].
      out_proj: I -> D.
    """

    def __init__(
        self,
        width: int,
        *,
        state: int = 32,
        conv_width: int = 4,
        expand: int = 2,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialises the weights as Mamba4Rec does: N(0, 0.02^2) for all projections.

        The projection of the step sizes is one of them, and its bias is 0. All step sizes therefore
        start close to softplus(0) = 0.69. Mamba itself makes them start between 0.001 and 0.1.

        Args:
          width: D, of inputs and outputs.
          state: N, the states of a channel. Mamba4Rec has 32, Mamba 16.
          conv_width: taps of the convolution.
          expand: I / D.
          dtype: of the activations.
          param_dtype: of the parameters, step sizes and decays.
          rngs: a stream `params`.

        Raises:
          ValueError: an argument does not fit; the message names it.
        """
        check_sizes(width=width, state=state, conv_width=conv_width, expand=expand)
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
        self, h: Float[AnyArray, "B L D"], segment_ids: Int[AnyArray, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """Mixes each segment of each row.

        Args:
          h: the input.
          segment_ids: a segment begins where the id differs from the one before. None: each row is
            one segment.

        Raises:
          ValueError: shapes do not fit the layer.
        """
        check_shape("h", h, "B,L", self.in_proj.kernel.shape[0])
        check_segments(segment_ids, h)
        return finite.call_guarded(lambda h: self._mix(h, segment_ids), (h,), segment_ids)

    def _mix(self, h, segment_ids):
        mixed, z = jnp.split(self.in_proj(h), 2, axis=-1)
        u = jax.nn.silu(self.conv(mixed, segment_ids))
        dt, B, C = self._maps(u)
        y, _ = selective_scan(u, dt, self._rates(), B, C, self.D[...], z=z, segment_ids=segment_ids)
        return self.out_proj(y)

    def last(
        self, h: Float[AnyArray, "B L D"], lengths: Int[AnyArray, " B"]
    ) -> Float[Array, "B D"]:
        """`__call__` at position `lengths - 1`, for the cost of the inputs to it."""
        h = finite.zero_behind(lengths, h)
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
        wide = jnp.promote_types(self.D.dtype, jnp.float32)  # as `step` returns it
        return MambaState(window, jnp.zeros((batch, self.inner, self.state), wide))

    def step(
        self, state: MambaState, h: Float[AnyArray, "B D"]
    ) -> tuple[MambaState, Float[Array, "B D"]]:
        """`__call__` for one more position of each row: the next state, and the output there."""
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
    """A Mamba block, followed by what `ResidualBlock` adds. It does not use the gaps."""

    def __init__(self, mamba: Mamba, *args, **kwargs):
        """Takes the layer and the arguments of `ResidualBlock`."""
        super().__init__(*args, **kwargs)
        self.mamba = mamba

    @finite_inputs()
    def __call__(
        self,
        h: Float[Array, "B L D"],
        features: None = None,
        segment_ids: Int[Array, "B L"] | None = None,
        seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """One layer over rows of one or several histories; arguments as `CausalBlock`."""
        return self.finish(self.mamba(h, segment_ids), h, seeds)

    @finite_inputs()
    def last(
        self,
        h: Float[Array, "B L D"],
        features: None,
        lengths: Int[Array, " B"],
        seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """`__call__` at position `lengths - 1` of rows of one history each."""
        return self.finish(self.mamba.last(h, lengths), take_position(h, lengths - 1), seeds)

    def init_state(self, batch: int) -> MambaState:
        """The state before the first event."""
        return self.mamba.init_state(batch)

    def step(
        self, state: MambaState, h: Float[Array, "B D"], features: None = None
    ) -> tuple[MambaState, Float[Array, "B D"]]:
        """`__call__` for one more event of each user."""
        state, y = self.mamba.step(state, h)
        return state, self.finish(y, h, None)
