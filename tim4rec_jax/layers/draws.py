"""Draws large tables with little memory, in the bits that JAX would draw.

On a CPU, JAX draws an array with temporary arrays of three times its size. Here only the random
bits are held beside the table, and they are made some columns at a time. JAX makes the bits of an
element from nothing but the key and the place of the element, so the parts are equal to the whole.
A part has all rows, so that devices which share the rows draw their own.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import random as extended
from jaxtyping import Array, UInt32

_LARGE = 2**25  # elements; smaller tables are drawn in one piece
_COLUMNS = 4  # that are drawn at once
_config: Any = jax.config


def in_parts(init: nnx.Initializer) -> nnx.Initializer:
    """An initialiser with the values of `init`, which takes less memory for a large table."""

    def drawn(key: Any, shape: Any, dtype: Any = None, out_sharding: Any = None) -> jax.Array:
        large = len(shape) == 2 and math.prod(shape) > _LARGE and shape[1] <= 2**16
        # Only these bits depend on the place alone. Other numbers than float32 take other bits.
        known = _config.jax_threefry_partitionable and dtype == jnp.float32
        if large and known and str(jax.random.key_impl(key)) == "threefry2x32":
            key = jax.random.wrap_key_data(jax.random.key_data(key), impl=_IN_PARTS)
        return init(key, shape, dtype, out_sharding)

    return drawn


def _bits(key: UInt32[Array, " 2"], bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    """32 random bits for each element of a table, as `jax.random.bits` with a threefry key."""
    assert bit_width == 32, bit_width
    rows, columns = shape
    width = min(_COLUMNS, columns)
    row = jax.lax.broadcasted_iota(jnp.uint32, (rows, width), 0)

    def part(i, bits):
        begin = jnp.minimum(i * width, columns - width)  # the last part may overlap
        column = begin.astype(jnp.uint32) + jax.lax.broadcasted_iota(jnp.uint32, (rows, width), 1)
        first, second = extended.threefry2x32_p.bind(*key, *words(row, column, columns))
        drawn = jax.lax.bitcast_convert_type(first ^ second, jnp.float32)
        return jax.lax.dynamic_update_slice(bits, drawn, (0, begin))

    # What is made of the bits is a table of float32. In an array of float32 they can lie in its
    # memory, which XLA does not share among types.
    start = jnp.zeros(shape, jnp.float32)
    bits = jax.lax.fori_loop(0, -(-columns // width), part, start)
    return jax.lax.bitcast_convert_type(bits, jnp.uint32)


def words(row: jax.Array, column: jax.Array, columns: int) -> tuple[jax.Array, jax.Array]:
    """The upper and the lower 32 bits of row * columns + column, of up to 2^16 columns."""
    middle = (row & 0xFFFF) * columns + column  # no sum or product here passes 2^32
    return ((row >> 16) * columns + (middle >> 16)) >> 16, row * columns + column


_threefry: Any = extended.threefry_prng_impl
_IN_PARTS = extended.define_prng_impl(
    key_shape=(2,),
    seed=_threefry.seed,
    split=_threefry.split,
    random_bits=_bits,
    fold_in=_threefry.fold_in,
    name="threefry2x32 of tables, in parts",
)
