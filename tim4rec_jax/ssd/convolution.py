"""Causal depthwise convolution over the sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tim4rec_jax.ssd.arrays import AnyArray
from tim4rec_jax.ssd.segments import starts

# What may follow the convolution, by the name that settings have for it.
ACTIVATIONS = {"hardswish": jax.nn.hard_swish, "silu": jax.nn.silu}


def causal_convolution(
    x: Float[AnyArray, "B _ _"],
    kernel: Float[Array, "W C"],
    bias: Float[Array, " C"],
    segment_ids: Int[AnyArray, "B L"] | None = None,
    *,
    channels_first: bool = False,
) -> Float[Array, "B _ _"]:
    """y[t, c] = bias[c] + sum_k kernel[k, c] x[t - W + 1 + k, c], zeros before the start.

    It is computed as a sum of W shifted products. XLA fuses such a sum with what comes before and
    after it, which it could not do with a general convolution.

    Args:
        x: the input [B,L,C], or [B,C,L] with `channels_first`.
        kernel: the taps of each channel; the last one is for the position itself.
        bias: of each channel.
        segment_ids: a position sees only those before it in its own segment, which begins where
            the id differs from the one before. None: it sees all. They are not supported with
            `channels_first`.
        channels_first: whether channels come before positions in `x`. This is faster where there
            are few channels.

    Returns:
        The result, in the layout of `x`.
    """
    if channels_first:
        kernel, bias = kernel[..., None], bias[..., None]
    axis = x.ndim - 1 if channels_first else x.ndim - 2
    width, length = kernel.shape[0], x.shape[axis]
    before = [(0, 0)] * x.ndim
    before[axis] = (width - 1, 0)
    padded = jnp.pad(x, before)
    shifted = (jax.lax.slice_in_dim(padded, k, k + length, axis=axis) for k in range(width))
    if segment_ids is not None:
        shifted = _within_segments(shifted, segment_ids, width)
    return sum((tap * x for tap, x in zip(kernel, shifted, strict=True)), bias)


def _within_segments(shifted, segment_ids, width: int):
    """Zeroes what comes from another segment than that of the position it is shifted to."""
    start = starts(segment_ids)
    own = [jnp.ones_like(start)]
    for back in range(width - 1):
        same = jnp.pad(~start, ((0, 0), (back, 0)))[:, : start.shape[1]]
        own.append(own[-1] & same)
    for seen, x in zip(reversed(own), shifted, strict=True):
        yield jnp.where(seen[..., None], x, 0)
