"""The SSD output at one position: what a next-item objective needs of the last layer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def ssd_last(
    x: Float[Array, "B L H P"],
    dt: Float[Array, "B L H"],
    A: Float[Array, " H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B G N"],
    D: Float[Array, " H"] | None,
    lengths: Int[Array, " B"],
    *,
    dt_bias: Float[Array, " H"] | None = None,
    dt_softplus: bool = True,
) -> Float[Array, "B H P"]:
    """y[lengths - 1] of `ssd` without the other positions.

    One row of the semiseparable matrix per sequence (Mamba-2, arXiv 2405.21060, section 3):
    a weighted sum over the events, linear in L, with no state of N x P numbers.

    Args:
      x: inputs.
      dt: step sizes.
      A: negative decay rates.
      B: input maps; head h uses group h // (H // G).
      C: output maps at position `lengths - 1`.
      D: skip weights; None: no skip.
      lengths: number of real events of each row, >= 1; later positions are ignored.
      dt_bias: added to `dt` first.
      dt_softplus: whether softplus is applied to `dt` next.

    Returns:
      The output at `lengths - 1`, in the dtype of `x`, accumulated in at least float32.
    """
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    length, heads = x.shape[1:3]
    real = jnp.arange(length)[None, :, None] < lengths[:, None, None]
    step = dt.astype(accumulate)
    if dt_bias is not None:
        step = step + dt_bias
    step = jnp.where(real, jax.nn.softplus(step) if dt_softplus else step, 0.0)
    # Decay from event s to the last one: the steps after s, summed from the end so that
    # recent events, which weigh most, are exact.
    after = jnp.pad(step[:, 1:], ((0, 0), (0, 1), (0, 0)))
    decay = jnp.exp(jax.lax.cumsum(after, axis=1, reverse=True) * A.astype(accumulate))
    scores = jnp.einsum("blgn,bgn->blg", B, C, preferred_element_type=accumulate)
    weights = decay * step * jnp.repeat(scores, heads // scores.shape[-1], axis=-1)
    if D is not None:  # the skip joins the sum as weight of the last event
        last = jnp.arange(length)[:, None] == lengths[:, None, None] - 1
        weights = weights + jnp.where(last, D, 0.0)
    y = jnp.einsum("blh,blhp->bhp", weights.astype(x.dtype), x, preferred_element_type=accumulate)
    return y.astype(x.dtype)
