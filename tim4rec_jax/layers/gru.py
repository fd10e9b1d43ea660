"""The gated recurrent unit (arXiv 1406.1078) without biases. The first axis is the position.

    r = sigmoid(x W_r + h R_r)    u = sigmoid(x W_u + h R_u)    n = tanh(x W_n + r (h R_n))
    h' = (1 - u) n + u h

A kernel holds the gates side by side in the order of torch: reset r, update u, candidate n.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tim4rec_jax.layers.checks import check_sizes
from tim4rec_jax.ssd import finite
from tim4rec_jax.ssd.arrays import AnyArray
from tim4rec_jax.ssd.derivatives import custom_gradient


class Gates(NamedTuple):
    """The gates of one step."""

    reset: Float[Array, "*batch H"]
    update: Float[Array, "*batch H"]
    candidate: Float[Array, "*batch H"]
    memory: Float[Array, "*batch H"]  # h R_n, which `reset` scales


def _gates(inputs, h, kernel) -> Gates:
    x_r, x_u, x_n = jnp.split(inputs.astype(h.dtype), 3, axis=-1)
    recurrent = jnp.dot(h.astype(kernel.dtype), kernel, preferred_element_type=h.dtype)
    h_r, h_u, memory = jnp.split(recurrent, 3, axis=-1)
    reset = jax.nn.sigmoid(x_r + h_r)
    return Gates(reset, jax.nn.sigmoid(x_u + h_u), jnp.tanh(x_n + reset * memory), memory)


def gru_step(
    inputs: Float[Array, "B G"], h: Float[Array, "B H"], kernel: Float[Array, "H G"]
) -> Float[Array, "B H"]:
    """Returns the state after one more event; `inputs` and `kernel` are those of `gru`."""
    gates = _gates(inputs, h, kernel)
    return gates.candidate + gates.update * (h - gates.candidate)


def gru(
    inputs: Float[Array, "L B G"],
    kernel: Float[Array, "H G"],
    starts: Bool[Array, "L B"] | None,
) -> Float[Array, "L B H"]:
    """Returns the state after every position, starting from zeros.

    The gradient is computed as in cuDNN. A backward loop yields the gradients of the gates. The
    gradient of the kernel is then one product over all positions, instead of one for each position.

    Args:
      inputs: x W for all positions, the gates side by side, G = 3 H.
      kernel: R, the gates side by side.
      starts: true where the state is set to zero before the input; None: nowhere.

    Returns:
      The states, in at least float32.
    """
    return _gru(inputs, kernel, starts)


def _forward(inputs, kernel, starts):
    accumulate = jnp.promote_types(inputs.dtype, jnp.float32)

    def step(h, xs):
        x, start = xs
        if start is not None:
            h = jnp.where(start[:, None], 0.0, h)
        gates = _gates(x, h, kernel)
        following = gates.candidate + gates.update * (h - gates.candidate)
        return following, (following, gates)

    zero = jnp.zeros((inputs.shape[1], kernel.shape[0]), accumulate)
    _, (states, gates) = jax.lax.scan(step, zero, (inputs, starts))
    return states, (states, gates, kernel, starts, inputs[:0])


def _backward(residuals, d_states):
    states, gates, kernel, starts, like = residuals
    before = jnp.pad(states[:-1], ((1, 0), (0, 0), (0, 0)))
    if starts is not None:
        before = jnp.where(starts[..., None], 0.0, before)
    transposed = kernel.T

    def step(d_h, xs):
        d_state, h, (r, u, n, memory), start = xs
        d_h = d_h + d_state
        d_n = d_h * (1 - u) * (1 - n * n)
        d_r = d_n * memory * r * (1 - r)
        d_u = d_h * (h - n) * u * (1 - u)
        d_recurrent = jnp.concatenate([d_r, d_u, d_n * r], axis=-1)
        d_h = d_h * u + jnp.dot(
            d_recurrent.astype(kernel.dtype), transposed, preferred_element_type=d_h.dtype
        )
        if start is not None:
            d_h = jnp.where(start[:, None], 0.0, d_h)
        return d_h, (d_recurrent, d_n)

    xs = (d_states, before, gates, starts)
    _, (d_recurrent, d_n) = jax.lax.scan(step, jnp.zeros_like(states[0]), xs, reverse=True)
    width = kernel.shape[0]
    d_inputs = jnp.concatenate([d_recurrent[..., : 2 * width], d_n], axis=-1).astype(like.dtype)
    d_kernel = jnp.dot(
        before.reshape(-1, width).T.astype(kernel.dtype),
        d_recurrent.reshape(-1, 3 * width).astype(kernel.dtype),
        preferred_element_type=d_n.dtype,
    )
    return d_inputs, d_kernel.astype(kernel.dtype), None


_gru = custom_gradient(_forward, _backward)


class GRU(nnx.Module):
    """One layer of gated recurrent units.

    What stands after a position, or before the last start, never changes its output or a gradient,
    NaN and infinities included. From the first such number to the next start, outputs are NaN.

    Attributes:
      input: W, for the gates side by side [I, 3 H].
      recurrent: R, for the gates side by side [H, 3 H].
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        init: nnx.Initializer | None = None,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws both kernels.

        Args:
          inputs: I, features in.
          width: H, features out, which are the state.
          init: of both kernels; None: Glorot's uniform rule.
          dtype: of the products.
          param_dtype: of the parameters.
          rngs: a stream `params`.

        Raises:
          ValueError: an argument does not fit; the message names it.
        """
        check_sizes(inputs=inputs, width=width)
        init = init or nnx.initializers.glorot_uniform()
        self.input = nnx.Param(init(rngs.params(), (inputs, 3 * width), param_dtype))
        self.recurrent = nnx.Param(init(rngs.params(), (width, 3 * width), param_dtype))
        self.dtype = dtype

    def __call__(
        self, x: Float[AnyArray, "L B I"], starts: Bool[AnyArray, "L B"] | None = None
    ) -> Float[Array, "L B H"]:
        """Returns the states after every position.

        Args:
          x: the input, positions first.
          starts: true where the state is set to zero before the input; None: nowhere. For segment
            ids [B,L] it is `tim4rec_jax.ssd.segments.starts(ids).T`.
        """
        begins = None if starts is None else jnp.asarray(starts)

        def run(x):
            inputs = self._inputs(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], -1)
            return gru(inputs, self.recurrent.astype(self.dtype), begins)

        if finite.known():
            return run(x)
        ids = None if begins is None else jnp.cumsum(begins.T, axis=1)
        rows, _, mark = finite.guard(x.swapaxes(0, 1), ids)
        return mark(run(rows.swapaxes(0, 1)).swapaxes(0, 1)).swapaxes(0, 1)

    def init_state(self, batch: int) -> Float[Array, "B H"]:
        """Returns the state of `batch` rows before their first position."""
        return jnp.zeros((batch, self.recurrent.shape[0]), self.recurrent.dtype)

    def step(self, h: Float[Array, "B H"], x: Float[Array, "B I"]) -> Float[Array, "B H"]:
        """Computes `__call__` for one more position: the state, which is the output too."""
        return gru_step(self._inputs(x), h, self.recurrent.astype(self.dtype))

    def _inputs(self, x):
        return jnp.dot(x.astype(self.dtype), self.input.astype(self.dtype))
