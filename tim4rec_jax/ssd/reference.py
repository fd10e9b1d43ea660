"""The SSD recurrence, one position after the other, and its matrix written out.

These forms are slow and plain. All other implementations must equal them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def step(
    state: Float[Array, "B H P N"],
    x: Float[Array, "B H P"],
    dt: Float[Array, "B H"],
    log_decay: Float[Array, "B H"],
    B: Float[Array, "B G N"],
    C: Float[Array, "B G N"],
) -> tuple[Float[Array, "B H P N"], Float[Array, "B H P"]]:
    """Advances the state by one event: `h = exp(log_decay) h + dt x B`, `y = C h`.

    Args:
        state: the state before the event.
        x: the event's input.
        dt: its step size, after bias, softplus and limits.
        log_decay: `dt A`, or -inf to forget the state.
        B: input projection; head `h` uses group `h // (H / G)`.
        C: output projection, grouped like `B`.

    Returns:
        The state after the event, and its output.
    """
    heads_per_group = x.shape[1] // B.shape[1]
    B, C = (jnp.repeat(v, heads_per_group, axis=1) for v in (B, C))
    state = jnp.exp(log_decay)[..., None, None] * state
    state += (dt[..., None] * x)[..., None] * B[:, :, None, :]
    return state, jnp.sum(state * C[:, :, None, :], axis=-1)


def ssd_reference(
    x: Float[Array, "B L H P"],
    dt: Float[Array, "B L H"],
    log_decay: Float[Array, "B L H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    initial_state: Float[Array, "B H P N"] | None,
    chunk_size: int | None,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """Scans the recurrence over the sequence.

    Args:
        x: inputs. All arrays have the dtype of the sums.
        dt: step sizes, after bias, softplus and limits.
        log_decay: `dt A`, or -inf where the state is forgotten before the position is read.
        B: input projections; head `h` uses group `h // (H / G)`.
        C: output projections, grouped like `B`.
        initial_state: the state before the first position, None for zeros.
        chunk_size: not used.

    Returns:
        The outputs, without the skip `D x`, and the state after the last position.
    """
    del chunk_size
    if initial_state is None:
        batch, _, heads, width = x.shape
        initial_state = jnp.zeros((batch, heads, width, B.shape[-1]), x.dtype)
    positions = (jnp.moveaxis(v, 1, 0) for v in (x, dt, log_decay, B, C))
    state, y = jax.lax.scan(lambda s, p: step(s, *p), initial_state, tuple(positions))
    return jnp.moveaxis(y, 0, 1), state


def decay_mask(
    step: Float[Array, "B L H"], log_decay: Float[Array, "B L H"]
) -> Float[Array, "B H L L"]:
    """Returns the weight of each event s in each later event l: exp(decay from s to l) step[s].

    The operator is y[l] = sum over s <= l of mask[l,s] (C[l] . B[s]) x[s] (Mamba-2, arXiv
    2405.21060, section 3). With step sizes that depend on time, this is the time-aware mask of
    arXiv 2409.16182, section 3.3. The fast implementations never write it down, because it is
    quadratic in L.

    Args:
      step: step sizes, after softplus.
      log_decay: the logarithm of each event's decay, 0 or less.

    Returns:
      The weights. Where s is later than l they are 0.
    """
    total = jnp.cumsum(log_decay, axis=1).swapaxes(1, 2)
    past = jnp.tril(jnp.ones((total.shape[-1],) * 2, bool))
    between = jnp.where(past, total[..., :, None] - total[..., None, :], -jnp.inf)
    return jnp.exp(between) * step.swapaxes(1, 2)[..., None, :]
