"""Segments of rows: each run of equal ids is one, so an id that comes back begins another one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tim4rec_jax.ssd.arrays import AnyArray


def starts(segment_ids: Int[AnyArray, "B L"]) -> Bool[Array, "B L"]:
    """Returns where a segment follows another one: false at the first position of a row."""
    ids = jnp.asarray(segment_ids)
    return jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))


def first_positions(segment_ids: Int[AnyArray, "B L"]) -> Int[Array, "B L"]:
    """Returns the position where the segment of each position begins.

    Two positions of a row are in one segment exactly where these numbers are equal.
    """
    begins = starts(segment_ids)
    return jax.lax.cummax(jnp.where(begins, jnp.arange(begins.shape[1]), 0), axis=1)
