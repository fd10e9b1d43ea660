"""The SSD as chunked semiseparable matrix products (Mamba-2, arXiv 2405.21060, section 6)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def default_chunk_size(length: int) -> int:
    """Returns the number of positions handled by one quadratic block."""
    return length if length <= 64 else 64


def ssd_xla(
    x: Float[Array, "B L H P"],
    dt: Float[Array, "B L H"],
    A: Float[Array, " H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    initial_state: Float[Array, "B H P N"],
    restart: Bool[Array, "B L"] | None,
    chunk_size: int | None,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """Computes the SSD chunk by chunk.

    Args:
        x: inputs, in the dtype to accumulate in, as all other arrays.
        dt: step sizes, ready to use (bias, softplus and limits applied).
        A: decay rate of each head.
        B: input projections; head `h` uses group `h // (H / G)`.
        C: output projections, grouped like `B`.
        initial_state: the state before the first position.
        restart: true where the state is emptied before the position is read.
        chunk_size: positions per chunk; None chooses.

    Returns:
        The outputs, without the skip `D x`, and the state after the last position.
    """
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    chunk = min(chunk_size or default_chunk_size(length), length)
    chunks = -(-length // chunk)

    def split(v):
        # dt = 0 at the filler: it neither decays the state nor adds to it.
        v = jnp.pad(v, [(0, 0), (0, chunks * chunk - length)] + [(0, 0)] * (v.ndim - 2))
        v = v.reshape(batch, chunks, chunk, *v.shape[2:])
        return jnp.moveaxis(v, 1, 0)

    def grouped(v, axis):
        return v.reshape(*v.shape[:axis], groups, heads // groups, *v.shape[axis + 1 :])

    per_chunk = (split(grouped(x, 2)), split(grouped(dt, 2)), split(B), split(C))
    segment = None if restart is None else split(restart)
    body = functools.partial(_chunk, grouped(A, 0))
    state, y = jax.lax.scan(body, grouped(initial_state, 1), (*per_chunk, segment))
    y = jnp.moveaxis(y, 0, 1).reshape(batch, chunks * chunk, heads, width)[:, :length]
    return y, state.reshape(batch, heads, width, size)


def _chunk(A, state, inputs):
    """Advances the state [B,G,R,P,N] over one chunk (R heads a group)."""
    x, dt, B, C, restart = inputs
    chunk = x.shape[1]
    log_decay = jnp.moveaxis(dt * A, 1, -1)  # [B,G,R,Q]
    # The sum is split into multiples of 1/16, which add up without rounding, and small rests:
    # differences of two sums in the thousands keep the accuracy of the steps between them.
    coarse = jnp.round(log_decay * 16) / 16
    coarse, fine = jnp.cumsum(coarse, -1), jnp.cumsum(log_decay - coarse, -1)

    def decay(later, earlier, visible):
        # Masked before exp: above the diagonal the difference is positive and may overflow.
        difference = (coarse[later] - coarse[earlier]) + (fine[later] - fine[earlier])
        return jnp.exp(jnp.where(visible, difference, -jnp.inf))

    causal = jnp.tril(jnp.ones((chunk, chunk), bool))
    if restart is None:
        segment = jnp.zeros((1, 1, 1, chunk), int)
    else:
        segment = jnp.cumsum(restart, -1)[:, None, None]
    row, column = (..., slice(None), None), (..., None, slice(None))
    last = (..., slice(-1, None))
    mixing = decay(row, column, causal & (segment[row] == segment[column]))
    from_start = jnp.exp(jnp.where(segment == 0, coarse + fine, -jnp.inf))
    to_end = decay(last, ..., segment[last] == segment)

    dtx = jnp.moveaxis(x * dt[..., None], 1, -2)  # [B,G,R,Q,P]
    scores = einsum("bqgn,bkgn->bgqk", C, B)
    y = einsum("bgrqk,bgrkp->bqgrp", scores[:, :, None] * mixing, dtx)
    y += einsum("bqgn,bgrpn,bgrq->bqgrp", C, state, from_start)
    state = from_start[..., -1:, None] * state
    state += einsum("bkgn,bgrk,bgrkp->bgrpn", B, to_end, dtx)
    return state, y
