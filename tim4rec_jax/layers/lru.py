"""The linear recurrent unit (arXiv 2303.06349): a diagonal complex recurrence.

Complex numbers are pairs of real arrays, parameters included. An optimizer then treats them as
torch does: the real and the imaginary part have moments of their own.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from tim4rec_jax.layers.basic import take_position
from tim4rec_jax.layers.block import ResidualBlock
from tim4rec_jax.layers.checks import check_segments, check_shape, check_sizes
from tim4rec_jax.runtime import target
from tim4rec_jax.ssd import finite, segments
from tim4rec_jax.ssd.arrays import AnyArray
from tim4rec_jax.ssd.derivatives import custom_gradient


class Complex(NamedTuple):
    """A complex array as a pair of real arrays."""

    real: Float[Array, "*shape"]
    imag: Float[Array, "*shape"]

    def times(self, other: "Complex") -> "Complex":
        """Returns the product."""
        real = self.real * other.real - self.imag * other.imag
        return Complex(real, self.real * other.imag + self.imag * other.real)

    def plus(self, other: "Complex") -> "Complex":
        """Returns the sum."""
        return Complex(self.real + other.real, self.imag + other.imag)

    def conjugate(self) -> "Complex":
        """Returns the conjugate."""
        return Complex(self.real, -self.imag)

    def scaled(self, factor: jax.Array) -> "Complex":
        """Returns the product with a real array."""
        return Complex(self.real * factor, self.imag * factor)


def linear_recurrence(
    decay: Complex, inputs: Complex, starts: Bool[Array, "L B"] | None, implementation: str
) -> Complex:
    """Computes h[t] = decay h[t-1] + inputs[t] over the first axis, starting from zeros.

    Args:
      decay: the decay of each channel, [S].
      inputs: the inputs, [L, B, S].
      starts: true where the state is set to zero before the input; None: nowhere.
      implementation: "loop" goes over the positions one by one. "associative" is a parallel prefix
        sum, with several times the arithmetic.

    Returns:
      The states after every position, [L, B, S].
    """
    return _differentiable(implementation)(decay, inputs, starts)


def _run(decay, inputs, starts, implementation):
    """Runs the recurrence. Where `starts[t]` is true, nothing passes from t - 1 to t."""
    keep = None if starts is None else (~starts[..., None]).astype(decay.real.dtype)
    if implementation == "loop":

        def step(h, xs):
            x, keep = xs
            h = decay.times(h)
            h = (h if keep is None else h.scaled(keep)).plus(x)
            return h, h

        zero = jax.tree.map(lambda x: jnp.zeros_like(x[0]), inputs)
        return jax.lax.scan(step, zero, (inputs, keep))[1]

    def join(before, after):
        (a, x), (b, y) = before, after
        return b.times(a), b.times(x).plus(y)

    decays = jax.tree.map(lambda d, x: jnp.broadcast_to(d, x.shape), decay, inputs)
    decays = decays if keep is None else decays.scaled(keep)
    return jax.lax.associative_scan(join, (decays, inputs))[1]


@functools.cache
def _differentiable(implementation):
    return custom_gradient(
        functools.partial(_forward, implementation), functools.partial(_backward, implementation)
    )


def _forward(implementation, decay, inputs, starts):
    states = _run(decay, inputs, starts, implementation)
    return states, (decay, states, starts)


def _backward(implementation, residuals, d_states):
    decay, states, starts = residuals
    backwards = functools.partial(jax.tree.map, lambda x: x[::-1])
    ends = None
    if starts is not None:  # nothing passes from t + 1 back to t
        ends = jnp.roll(starts, -1, axis=0)[::-1]
    d_inputs = backwards(_run(decay.conjugate(), backwards(d_states), ends, implementation))
    before = jax.tree.map(lambda h: jnp.pad(h[:-1], ((1, 0), (0, 0), (0, 0))), states)
    if starts is not None:
        before = before.scaled((~starts[..., None]).astype(decay.real.dtype))
    d_decay = jax.tree.map(lambda g: g.sum((0, 1)), before.conjugate().times(d_inputs))
    return d_decay, d_inputs, None


def _ring(key, states: int, smallest: float, largest: float, dtype) -> jax.Array:
    """Draws decays uniformly over a ring; returns logarithms of rate, angle and input scale."""
    magnitude, angle = jax.random.split(key)
    squared = jax.random.uniform(magnitude, (states,), dtype, smallest**2, largest**2)
    angle = jax.random.uniform(angle, (states,), dtype, 1e-6, 2 * jnp.pi)
    rate, scale = jnp.log(-0.5 * jnp.log(squared)), 0.5 * jnp.log1p(-squared)
    return jnp.stack([rate, jnp.log(angle), scale])


class LRU(nnx.Module):
    """Returns Re(W_out h + b_out), where h[t] = decay h[t-1] + scale (W_in x[t] + b_in).

    What stands after a position, or in another segment, never changes its output or a gradient,
    NaN and infinities included. From the first such number of a segment to the segment's end,
    outputs are NaN.

    Attributes:
      params_log: logarithms of the decays' rates and angles, and of the scale [3, S].
      in_kernel: W_in, real and imaginary part [2, D, S].
      in_bias: b_in [2, S].
      out_kernel: W_out [2, S, D].
      out_bias: b_out [2, D], of which the first part counts.
    """

    def __init__(
        self,
        width: int,
        *,
        states: int | None = None,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws decays of magnitude 0.8 to 0.99, and both parts of weights from N(0, 0.02^2).

        Args:
          width: D, of inputs and outputs.
          states: S, the number of complex states; None: 2 D, as in LRURec.
          dtype: of the products with the weights.
          param_dtype: of the parameters and of the states.
          rngs: a stream `params`.

        Raises:
          ValueError: an argument does not fit; the message names it.
        """
        check_sizes(width=width)
        states = 2 * width if states is None else states
        check_sizes(states=states)
        draw = nnx.initializers.normal(0.02)
        self.dtype = dtype
        self.params_log = nnx.Param(_ring(rngs.params(), states, 0.8, 0.99, param_dtype))
        self.in_kernel = nnx.Param(draw(rngs.params(), (2, width, states), param_dtype))
        self.in_bias = nnx.Param(draw(rngs.params(), (2, states), param_dtype))
        self.out_kernel = nnx.Param(draw(rngs.params(), (2, states, width), param_dtype))
        self.out_bias = nnx.Param(draw(rngs.params(), (2, width), param_dtype))

    def __call__(
        self, x: Float[AnyArray, "B L D"], segment_ids: Int[AnyArray, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """Mixes each segment of each row.

        Args:
          x: the input.
          segment_ids: a segment begins where the id differs from the one before. None: each row is
            one segment.

        Raises:
          ValueError: shapes do not fit the layer.
        """
        check_shape("x", x, "B,L", self.in_kernel.shape[1])
        check_segments(segment_ids, x)

        def mix(x):
            return self.output(self.states(x, segment_ids)).swapaxes(0, 1)

        return finite.call_guarded(mix, (x,), segment_ids)

    def states(
        self, x: Float[Array, "B L D"], segment_ids: Int[AnyArray, "B L"] | None = None
    ) -> Complex:
        """Returns the states after every position, [L, B, S]; `x` must be finite."""
        starts = None if segment_ids is None else segments.starts(segment_ids).T
        way = "loop" if target().platform == "cpu" else "associative"
        return linear_recurrence(self._decay(), self._inputs(x.swapaxes(0, 1)), starts, way)

    def init_state(self, batch: int) -> Complex:
        """Returns the state of `batch` rows before their first position."""
        zeros = jnp.zeros((batch, self.params_log.shape[1]), self.params_log.dtype)
        return Complex(zeros, zeros)

    def step(self, state: Complex, x: Float[Array, "B D"]) -> Complex:
        """Returns the states after one more position, [B, S]; `output` makes the output of them."""
        return self._decay().times(state).plus(self._inputs(x))

    def output(self, state: Complex) -> Float[Array, "*batch D"]:
        """Returns the output of the layer for states `[*batch, S]`."""
        kernel = jnp.concatenate([self.out_kernel[0], -self.out_kernel[1]]).astype(self.dtype)
        rows = jnp.concatenate(state, axis=-1).astype(self.dtype)
        y = rows.reshape(-1, rows.shape[-1]) @ kernel + self.out_bias[0].astype(self.dtype)
        return y.reshape(*rows.shape[:-1], -1)

    def _decay(self) -> Complex:
        rate, angle = jnp.exp(self.params_log[0]), jnp.exp(self.params_log[1])
        return Complex(jnp.cos(angle), jnp.sin(angle)).scaled(jnp.exp(-rate))

    def _inputs(self, x) -> Complex:
        kernel = jnp.concatenate(list(self.in_kernel), axis=1).astype(self.dtype)
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel
        rows = rows.astype(self.in_bias.dtype).reshape(*x.shape[:-1], -1)
        both = (rows + self.in_bias.reshape(-1)) * jnp.tile(jnp.exp(self.params_log[2]), 2)
        return Complex(*jnp.split(both, 2, axis=-1))


class LRUBlock(ResidualBlock):
    """A linear recurrent unit, then what `ResidualBlock` adds."""

    def __init__(self, lru: LRU, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lru = lru

    def __call__(
        self,
        h: Float[Array, "B L D"],
        features: None = None,
        segment_ids: Int[Array, "B L"] | None = None,
        seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Applies the layer to rows of one or several histories; it does not use the gaps."""
        with finite.finite_inputs():
            return self.finish(self.lru(h, segment_ids), h, seeds)

    def last(
        self,
        h: Float[Array, "B L D"],
        features: None,
        lengths: Int[Array, " B"],
        seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """Computes `__call__` at position `lengths - 1`, for rows of one history each."""
        states = self.lru.states(h)
        state = jax.tree.map(lambda x: take_position(x.swapaxes(0, 1), lengths - 1), states)
        return self.finish(self.lru.output(state), take_position(h, lengths - 1), seeds)

    def init_state(self, batch: int) -> Complex:
        """Returns the state before the first event."""
        return self.lru.init_state(batch)

    def step(
        self, state: Complex, h: Float[Array, "B D"], features: None = None
    ) -> tuple[Complex, Float[Array, "B D"]]:
        """Computes `__call__` for one more event."""
        state = self.lru.step(state, h)
        return state, self.finish(self.lru.output(state), h, None)
