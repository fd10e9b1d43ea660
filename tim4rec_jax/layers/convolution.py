"""Causal depthwise convolution over the sequence."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


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
    """y[t, c] = bias[c] + sum_k kernel[k, c] x[t - width + 1 + k, c], zeros before the start.

    A sum of `width` shifted products: XLA fuses it with what comes before and after, which
    a call of a general convolution would not allow.
    """

    def __init__(self, channels: int, width: int, *, kaiming: bool, dtype, param_dtype, rngs):
        kernel_init, bias_init = conv_initializers(kaiming, channels, width)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (width, channels), param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (channels,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        """Convolves each channel over the length with its own taps."""
        kernel = self.kernel[...].astype(self.dtype)
        width, length = kernel.shape[0], x.shape[1]
        padded = jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
        taps = (padded[:, k : k + length] * kernel[k] for k in range(width))
        return sum(taps, self.bias[...].astype(self.dtype))
