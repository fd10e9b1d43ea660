"""Small layers and functions that all models are made of."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from tim4rec_jax.layers.checks import check_segments, check_shape, check_sizes
from tim4rec_jax.ssd import finite
from tim4rec_jax.ssd.arrays import AnyArray
from tim4rec_jax.ssd.convolution import causal_convolution

ALL = slice(None)
NORMAL = nnx.initializers.normal(0.02)


def uniform(bound: float) -> nnx.Initializer:
    """Initialiser: uniform in [-bound, bound]."""

    def init(key, shape, dtype: Any = None, out_sharding=None) -> jax.Array:
        return jax.random.uniform(key, shape, dtype or float, -bound, bound)

    return init


class Dense(nnx.Module):
    """x W + b over the last axis, initialised by default as the reference does: N(0, 0.02^2), 0.

    All other axes are made one for the product. The gradient with respect to W then contracts one
    leading axis, which XLA:CPU does in place. To contract two axes, it would first write a
    transposed copy of the incoming gradient and compute again what led to it, which costs a tenth
    of a training step.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
        kernel_init: nnx.Initializer = NORMAL,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
        use_bias: bool = True,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (inputs, outputs), param_dtype))
        bias = bias_init(rngs.params(), (outputs,), param_dtype)
        self.bias = nnx.Param(bias) if use_bias else None
        self.dtype = dtype

    def __call__(
        self, x: Float[AnyArray, "*batch I"], outputs: slice = ALL
    ) -> Float[Array, "*batch O"]:
        """Computes in `dtype` all outputs, or only `outputs` for their share of the cost."""
        kernel = self.kernel[:, outputs].astype(self.dtype)
        rows = jnp.dot(x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel)
        if self.bias is not None:
            rows = rows + self.bias[outputs].astype(self.dtype)
        return rows.reshape(*x.shape[:-1], rows.shape[-1])


class CausalConv(nnx.Module):
    """Causal depthwise convolution over [B,L,C], or over [B,C,L] with `channels_first`.

    The published code initialises it in one of two ways. With `kaiming`: Kaiming-normal over the
    fan-out, which PyTorch counts as `width * channels` for a depthwise kernel, and zero biases.
    Without: PyTorch's default, uniform within +-1/sqrt(width) for kernel and bias.

    What stands after a position, or in another segment, never changes its output or a gradient,
    NaN and infinities included. A channel is NaN where its taps reach such a number.

    Attributes:
      kernel: the taps [W,C], of which the last is for the position itself.
      bias: of each channel [C].
    """

    def __init__(
        self,
        channels: int,
        width: int = 4,
        *,
        kaiming: bool = True,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        channels_first: bool = False,
    ):
        """Makes `width` taps and a bias for each channel.

        Args:
          channels: C, of inputs and outputs.
          width: W, how many positions a channel sees: its own and those before it.
          kaiming: how the weights are initialised, see above.
          dtype: of the activations.
          param_dtype: of the parameters.
          rngs: a stream `params`.
          channels_first: whether inputs are [B,C,L], which is faster where there are few channels.
            Segments are not supported then.

        Raises:
          ValueError: an argument does not fit; the message names it.
        """
        check_sizes(channels=channels, width=width)
        bound = width**-0.5

        def torch_default(key, shape, dtype):
            # Not `uniform(bound)`, which would round differently.
            return nnx.initializers.uniform(2.0 * bound)(key, shape, dtype) - bound

        kernel_init, bias_init = torch_default, torch_default
        if kaiming:
            kernel_init = nnx.initializers.normal((2.0 / (width * channels)) ** 0.5)
            bias_init = nnx.initializers.zeros
        self.kernel = nnx.Param(kernel_init(rngs.params(), (width, channels), param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (channels,), param_dtype))
        self.dtype, self.channels_first = dtype, channels_first

    def __call__(
        self, x: Float[AnyArray, "B L C"], segment_ids: Int[AnyArray, "B L"] | None = None
    ) -> Float[Array, "B L C"]:
        """Convolves each channel with its own taps, within each segment of each row.

        Args:
          x: the input, or [B,C,L] with `channels_first`.
          segment_ids: a segment begins where the id differs from the one before. None: each row is
            one segment.

        Raises:
          ValueError: shapes do not fit, or there are segments with `channels_first`.
        """
        if self.channels_first:
            if segment_ids is not None:
                raise ValueError("segment_ids must be None for a convolution with channels_first")
        else:
            check_shape("x", x, "B,L", self.kernel.shape[1])
            check_segments(segment_ids, x)
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)

        def convolve(x, kernel, bias):
            return causal_convolution(
                x, kernel, bias, segment_ids, channels_first=self.channels_first
            )

        if finite.known():
            return convolve(x, kernel, bias)
        bad = (~jnp.isfinite(x)).astype(self.dtype)
        seen = convolve(bad, jnp.ones_like(kernel), jnp.zeros_like(bias))
        y = convolve(finite.zero_unless_finite(x), kernel, bias)
        return jnp.where(seen > 0, jnp.asarray(jnp.nan, y.dtype), y)


def layer_norm(width: int, eps: float, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
    """`nnx.LayerNorm` with statistics in at least float32 and a two-pass variance.

    The variance E[x^2] - E[x]^2 in one pass would cancel to nothing where padded gaps, which are
    1e9 times larger than others, are in the row.
    """
    return nnx.LayerNorm(
        width,
        epsilon=eps,
        dtype=dtype,
        param_dtype=param_dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


def gelu(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """X times the normal distribution function, computed with erf as torch does.

    `jax.nn.gelu` uses erfc, which keeps the relative precision of values near zero but takes twice
    the time on CPU.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


# Dropout from a counter, without a random state and without random bits in memory.
#
# Each row of a batch has a 32-bit seed. The mask is a hash of the seed and the position in the row.
# Hence the mask of a row does not depend on how the batch is split over micro-batches or devices,
# and XLA fuses the hash into the computation that uses it. On CPU, a generator of `jax.random`
# would take a fifth of the training step.


def row_seeds(key: jax.Array, rows: int) -> UInt32[Array, " B"]:
    """One seed for each row of a batch, from a `jax.random` key."""
    return jax.random.bits(key, (rows,), jnp.uint32)


def fold(seeds: UInt32[Array, " B"] | None, site: int) -> UInt32[Array, " B"] | None:
    """Seeds for dropout site number `site`; None (no dropout) stays None."""
    return None if seeds is None else _mix(seeds + jnp.uint32(site * 0x9E3779B9 & 0xFFFFFFFF))


def dropout(
    x: Float[Array, "B ..."], rate: float, seeds: UInt32[Array, " B"] | None
) -> Float[Array, "B ..."]:
    """Zeroes each element with probability `rate` and scales the others by 1 / (1 - rate).

    Args:
      x: the input, batch first.
      rate: probability of zeroing, in [0, 1).
      seeds: one seed for each row, made for this site by `fold`; None switches dropout off.
    """
    if seeds is None or rate == 0.0:
        return x
    position = jnp.arange(x[0].size, dtype=jnp.uint32).reshape(1, *x.shape[1:])
    seeds = seeds.reshape(-1, *(1,) * (x.ndim - 1))
    bits = _mix(_mix(position ^ seeds) + seeds)
    return jnp.where(bits >= jnp.uint32(rate * 2**32), x / (1.0 - rate), jnp.zeros_like(x))


def _mix(bits: jax.Array) -> jax.Array:
    """A bijective 32-bit hash of two multiplications and three shifts, known as lowbias32."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def take_position(
    x: Float[AnyArray, "B L ..."], position: Int[AnyArray, " B"]
) -> Float[Array, "B ..."]:
    """x[b, position[b]] for every row b."""
    return jax.vmap(lambda row, p: jax.lax.dynamic_index_in_dim(row, p, keepdims=False))(
        x, position
    )
