"""Small layers and functions that all models are made of."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from tim4rec_jax.ssd.convolution import causal_convolution

# ---- layers.activations
# Activations that `jax.nn` has only in a slower form.


def gelu(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """X times the normal distribution function, by erf: half the time of `jax.nn.gelu` on CPU.

    That one goes by erfc, which keeps the relative precision of values that are almost zero;
    torch has the form used here.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


# ---- layers.initializers
# Initialisers of weights that `flax.nnx.initializers` lacks.


def uniform(bound: float) -> nnx.Initializer:
    """Uniform in [-bound, bound]."""

    def init(key, shape, dtype: Any = None, out_sharding=None) -> jax.Array:
        return jax.random.uniform(key, shape, dtype or float, -bound, bound)

    return init


# ---- layers.dense
# The dense layer.

ALL = slice(None)
NORMAL = nnx.initializers.normal(0.02)


class Dense(nnx.Module):
    """x W + b over the last axis, initialised by default as the reference does: N(0, 0.02^2), 0.

    All other axes are made one for the product. Its gradient in W then contracts one leading
    axis, which XLA:CPU does in place; contracting two, it would first write a transposed copy
    of the incoming gradient, recomputing what led to it (a tenth of a training step).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
        kernel_init=NORMAL,
        bias_init=nnx.initializers.zeros,
        use_bias: bool = True,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (inputs, outputs), param_dtype))
        bias = bias_init(rngs.params(), (outputs,), param_dtype)
        self.bias = nnx.Param(bias) if use_bias else None
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "*batch I"], outputs: slice = ALL
    ) -> Float[Array, "*batch O"]:
        """The layer in its `dtype`, or only some of its `outputs`, for their share of the cost."""
        kernel = self.kernel[:, outputs].astype(self.dtype)
        rows = jnp.dot(x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel)
        if self.bias is not None:
            rows = rows + self.bias[outputs].astype(self.dtype)
        return rows.reshape(*x.shape[:-1], rows.shape[-1])


# ---- layers.dropout
# Dropout from a counter: no random state, no random bits in memory.
#
# Each row of a batch owns a 32-bit seed; the mask is a hash of (seed, position in the row).
# Hence the mask of a sample does not depend on how the batch is split over micro-batches or
# devices, and XLA fuses the hash into its consumer instead of materialising random bits
# (on CPU a counter-based generator of `jax.random` is a fifth of the training step).


def _mix(bits: jax.Array) -> jax.Array:
    """A bijective 32-bit finaliser (two multiplications, three shifts): lowbias32."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def row_seeds(key: jax.Array, rows: int) -> UInt32[Array, "B"]:
    """One seed for each row of a batch, from a `jax.random` key."""
    return jax.random.bits(key, (rows,), jnp.uint32)


def fold(seeds: UInt32[Array, "B"] | None, site: int) -> UInt32[Array, "B"] | None:
    """Seeds for one of several dropout sites; None (no dropout) stays None."""
    return None if seeds is None else _mix(seeds + jnp.uint32(site * 0x9E3779B9 & 0xFFFFFFFF))


def dropout(
    x: Float[Array, "B ..."], rate: float, seeds: UInt32[Array, "B"] | None
) -> Float[Array, "B ..."]:
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate).

    Args:
      x: the input, batch first.
      rate: probability of zeroing, in [0, 1).
      seeds: one seed per row, `fold`ed for this site; None switches dropout off.
    """
    if seeds is None or rate == 0.0:
        return x
    position = jnp.arange(x[0].size, dtype=jnp.uint32).reshape(1, *x.shape[1:])
    seeds = seeds.reshape(-1, *(1,) * (x.ndim - 1))
    bits = _mix(_mix(position ^ seeds) + seeds)
    return jnp.where(bits >= jnp.uint32(rate * 2**32), x / (1.0 - rate), jnp.zeros_like(x))


# ---- layers.convolution
# The layer of causal depthwise convolution.


def conv_initializers(kaiming: bool, channels: int, width: int):
    """Initialisers (kernel, bias) of the reference's depthwise convolutions.

    Args:
      kaiming: Kaiming-normal over the fan-out (`width * channels`, as PyTorch counts it
        for a depthwise kernel) with zero biases; else PyTorch's default, uniform within
        +-1/sqrt(width) for both.
      channels: number of channels.
      width: number of taps.
    """
    if kaiming:
        return nnx.initializers.normal((2.0 / (width * channels)) ** 0.5), nnx.initializers.zeros

    def uniform(key, shape, dtype):
        return nnx.initializers.uniform(2.0 * width**-0.5)(key, shape, dtype) - width**-0.5

    return uniform, uniform


class CausalConv(nnx.Module):
    """The layer of `tim4rec_jax.ssd.fused_block`, over [B,C,L] with `channels_first`."""

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        kaiming: bool,
        dtype,
        param_dtype,
        rngs,
        channels_first: bool = False,
    ):
        kernel_init, bias_init = conv_initializers(kaiming, channels, width)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (width, channels), param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (channels,), param_dtype))
        self.dtype, self.channels_first = dtype, channels_first

    def __call__(
        self, x: Float[Array, "B L C"], segment_ids: Int[Array, "B L"] | None = None
    ) -> Float[Array, "B L C"]:
        """Convolves each channel over the length with its own taps."""
        return causal_convolution(
            x,
            self.kernel[...].astype(self.dtype),
            self.bias[...].astype(self.dtype),
            segment_ids,
            channels_first=self.channels_first,
        )


# ---- layers.correlation
# Convolution along the length, as networks call the cross-correlation, with a fast gradient.


def _plain(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )


@jax.custom_vjp
def correlate(x: Float[Array, "B L D"], kernel: Float[Array, "W D C"]) -> Float[Array, "B P C"]:
    """y[b, p] = sum_w x[b, p + w] kernel[w], for the P = L - W + 1 positions that fit.

    Both gradients are written as convolutions in the same layout: XLA:CPU has a fast one for
    that and takes five times as long for those it derives itself.
    """
    return _plain(x, kernel)


def _forward(x, kernel):
    return _plain(x, kernel), (x, kernel)


def _backward(residuals, d_y):
    x, kernel = residuals
    # Rows are summed over: they take the place of the features.
    d_kernel = _plain(x.transpose(2, 1, 0), d_y.swapaxes(0, 1)).swapaxes(0, 1)
    width, positions = kernel.shape[0], d_y.shape[1]
    # A full convolution; the shorter of the two plays the kernel, so that padding is short.
    if width <= positions:
        d_x = _plain(_surrounded(d_y, width), kernel[::-1].swapaxes(1, 2))
    else:
        signal, taps = kernel.transpose(1, 0, 2), d_y[:, ::-1].transpose(1, 2, 0)
        d_x = _plain(_surrounded(signal, positions), taps).transpose(2, 1, 0)
    return d_x, d_kernel


def _surrounded(x, width: int):
    return jnp.pad(x, ((0, 0), (width - 1, width - 1), (0, 0)))


correlate.defvjp(_forward, _backward)


def take_position(x: Float[Array, "B L ..."], position: Int[Array, "B"]) -> Float[Array, "B ..."]:
    """x[b, position[b]] for every row b."""
    return jax.vmap(lambda row, p: jax.lax.dynamic_index_in_dim(row, p, keepdims=False))(
        x, position
    )


def layer_norm(width: int, eps: float, dtype, param_dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with statistics in at least float32 and a two-pass variance."""
    return nnx.LayerNorm(
        width,
        epsilon=eps,
        dtype=dtype,
        param_dtype=param_dtype,
        use_fast_variance=False,
        rngs=rngs,
    )
