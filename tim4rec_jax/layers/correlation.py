"""Convolution along the length, as networks call the cross-correlation, with a fast gradient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
