"""The layer of causal depthwise convolution."""

from flax import nnx
from jaxtyping import Array, Float, Int

from tim4rec_jax.ssd.convolution import causal_convolution


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
    """The layer of `tim4rec_jax.ssd.convolution`, over [B,C,L] with `channels_first`."""

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
