"""What is not a finite number changes nothing before it, neither a value nor a gradient.

Rows are often padded with whatever there is, NaN included. A causal operator gives padding after a
row no weight, but no weight times NaN is NaN, in products of matrices and in the gradients of
parameters alike. So public functions and layers compute with zeros in place of such numbers, and
write NaN into every output that the recurrence would have spoilt: from the first such number of a
segment to the end of the segment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tim4rec_jax.ssd.arrays import AnyArray
from tim4rec_jax.ssd.segments import first_positions

_inputs_are_finite = jax.make_user_context(False)


@contextlib.contextmanager
def finite_inputs() -> Iterator[None]:
    """Promises that inputs are finite: within this context nothing is checked or replaced.

    Models of this package compute within it, because their inputs are rows of tables. It acts
    while a program is traced, and works as a decorator too.
    """
    with _inputs_are_finite(True):
        yield


def known() -> bool:
    """Returns whether the inputs are known to be finite, see `finite_inputs`."""
    return _inputs_are_finite.value


def guard(
    rows: Any, segment_ids: Int[AnyArray, "B L"] | None = None, state: Any = None
) -> tuple[Any, Any, Callable[..., jax.Array]]:
    """Takes numbers that are not finite out of the inputs of a causal function.

    Args:
        rows: tree of arrays [B,L,...].
        segment_ids: the segment of each position, see `segments`; None: each row is one.
        state: tree of arrays [B,...] that enter the first position.

    Returns:
        The rows and the state with zeros in place of such numbers, and a function that puts NaN
        into an output [B,L,...] wherever one of them comes before or at the position, in the same
        segment. With `last`, the output is that of the last position alone, [B,1,...].
    """
    rows, state = jax.tree.map(jnp.asarray, (rows, state))
    if known():
        return rows, state, lambda y, last=False: y
    bad: Any = False
    for v in jax.tree.leaves(rows):
        bad |= ~_finite(v, 2)
    for v in jax.tree.leaves(state):
        bad = bad.at[:, 0].set(bad[:, 0] | ~_finite(v, 1))
    after = _from_first(bad, segment_ids)

    def mark(y, last=False):
        wide = jnp.expand_dims(after[:, -1:] if last else after, tuple(range(2, y.ndim)))
        return jnp.where(wide, jnp.asarray(jnp.nan, y.dtype), y)

    return jax.tree.map(zero_unless_finite, rows), jax.tree.map(zero_unless_finite, state), mark


def call_guarded(
    function: Callable[..., jax.Array],
    rows: tuple,
    segment_ids: Int[AnyArray, "B L"] | None = None,
) -> jax.Array:
    """Returns `function(*rows)`, an output [B,L,...] of rows [B,L,...], under `guard`."""
    rows, _, mark = guard(rows, segment_ids)
    with finite_inputs():
        return mark(function(*rows))


def zero_behind(lengths: Int[AnyArray, " B"], rows: Any) -> Any:
    """Returns a tree of arrays [B,L,...] with zeros from position `lengths` on."""
    rows = jax.tree.map(jnp.asarray, rows)
    if known():
        return rows

    def cut(v):
        real = jnp.arange(v.shape[1]) < jnp.asarray(lengths)[:, None]
        return jnp.where(jnp.expand_dims(real, tuple(range(2, v.ndim))), v, jnp.zeros_like(v))

    return jax.tree.map(cut, rows)


def zero_unless_finite(v: AnyArray) -> jax.Array:
    """Returns the array with zeros in place of NaN and infinities."""
    return jnp.where(jnp.isfinite(v), v, jnp.zeros_like(v))


def _finite(v, axes: int):
    """Whether all numbers beyond the first axes are finite."""
    return jnp.all(jnp.isfinite(v), axis=tuple(range(axes, v.ndim)))


def _from_first(bad: Bool[Array, "B L"], segment_ids) -> Bool[Array, "B L"]:
    """Marks what is bad and what comes after it in its segment."""
    position = jnp.arange(bad.shape[1])
    if segment_ids is None:
        first = jnp.min(jnp.where(bad, position, bad.shape[1]), axis=1, keepdims=True)
        return position >= first
    last = jax.lax.cummax(jnp.where(bad, position, -1), axis=1)
    return last >= first_positions(segment_ids)
