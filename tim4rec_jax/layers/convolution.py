"""Causal depthwise convolution over the sequence."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


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
    a call of a general convolution would not allow. Channels are the last axis, or with
    `channels_first` the last but one: then few channels do not break the vector loops.
    """

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
        self.dtype, self.axis = dtype, -1 if channels_first else -2

    def __call__(
        self, x: Float[Array, "B L C"], segment_ids: Int[Array, "B L"] | None = None
    ) -> Float[Array, "B L C"]:
        """Convolves each channel over the length with its own taps.

        Args:
          x: the input; [B,C,L] with `channels_first`, which knows no segments.
          segment_ids: a position sees only those before it with its own id; None: all.
        """
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        if self.axis == -1:
            kernel, bias = kernel[..., None], bias[..., None]
        width, length = kernel.shape[0], x.shape[self.axis]
        before = [(0, 0)] * x.ndim
        before[self.axis] = (width - 1, 0)
        padded = jnp.pad(x, before)
        shifted = (
            jax.lax.slice_in_dim(padded, k, k + length, axis=self.axis % x.ndim)
            for k in range(width)
        )
        if segment_ids is not None:
            shifted = _within_segments(shifted, segment_ids, width)
        return sum((tap * x for tap, x in zip(kernel, shifted, strict=True)), bias)


def _within_segments(shifted, segment_ids, width: int):
    """Zeroes what comes from another segment than the position it has been shifted to."""
    length = segment_ids.shape[1]
    padded = jnp.pad(segment_ids, ((0, 0), (width - 1, 0)), constant_values=-1)
    for k, x in enumerate(shifted):
        own = padded[:, k : k + length] == segment_ids
        yield jnp.where(own[..., None], x, 0)
