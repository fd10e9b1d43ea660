"""Dropout from a counter: no random state, no random bits in memory.

Each row of a batch owns a 32-bit seed; the mask is a hash of (seed, position in the row).
Hence the mask of a sample does not depend on how the batch is split over micro-batches or
devices, and XLA fuses the hash into its consumer instead of materialising random bits
(on CPU a counter-based generator of `jax.random` is a fifth of the training step).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32


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
