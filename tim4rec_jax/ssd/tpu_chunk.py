"""One chunk of the SSD in a TPU kernel: values in vector registers, forward and backward.

Lanes hold the features of all heads, I = H P of them, and the state is [N,I]: so 64-d models
fill one register's 128 lanes. A product for one head leaves the lanes of the others zero instead
of cutting them out, which costs the matrix unit nothing: it always works on 128.

Letters: Q positions of the chunk, H heads, P features of a head, G groups, N state, T lanes of a
tile. What differs by head is a row [H,Q] (positions in lanes) or a column [Q,H].
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_LANES = 128


class Heads(NamedTuple):
    """How heads share lanes and groups.

    Attributes:
        number: H.
        width: P.
        groups: G.
        size: N.
        precision: of matrix products, see `_dot`.
    """

    number: int
    width: int
    groups: int
    size: int
    precision: str

    @property
    def features(self) -> int:
        """I."""
        return self.number * self.width

    def tiles(self) -> list[tuple[slice, range]]:
        """The lanes and heads of the smallest pieces that start and end on whole registers."""
        each = next(
            (n for n in range(1, self.number) if n * self.width % _LANES == 0 == self.number % n),
            self.number,
        )
        return [
            (slice(first * self.width, (first + each) * self.width), range(first, first + each))
            for first in range(0, self.number, each)
        ]

    def group(self, head: int) -> int:
        """The group of a head."""
        return head // (self.number // self.groups)


def forward(heads: Heads, x, B, C, dt, decay, state):
    """Returns the output of a chunk [Q,I], without the skip, and the state after it.

    Args:
        heads: what the arrays mean.
        x: inputs [Q,I].
        B: input projections [Q,GN].
        C: output projections [Q,GN].
        dt: step sizes [H,Q].
        decay: logarithms of the decays [H,Q], finite.
        state: the state before the chunk [N,I]; None: there is none, before or after.
    """
    precision = heads.precision
    sums = _Sums(decay)
    scores = [
        _dot(_of(C, g, heads), _of(B, g, heads), "nt", precision) for g in range(heads.groups)
    ]
    y, left = [], []
    for lanes, members in heads.tiles():
        tile = 0.0
        for h in members:
            mixing = scores[heads.group(h)] * sums.between(h) * dt[h : h + 1]
            tile += _dot(mixing, _only(x[:, lanes], heads, members, [h]), "nn", precision)
        if state is not None:
            old = state[:, lanes]
            seen = _for_groups(heads, members, C, old, "nn", precision)
            tile += _spread(sums.from_start, heads, members) * seen
            kept = _spread(sums.to_end * columns(dt), heads, members) * x[:, lanes]
            new = _for_groups(heads, members, B, kept, "tn", precision)
            left.append(new + _spread(sums.whole, heads, members) * old)
        y.append(tile)
    return _join(y), None if state is None else _join(left)


class Gradients(NamedTuple):
    """Gradients of a chunk, each like what it is the gradient of."""

    x: jax.Array
    B: jax.Array
    C: jax.Array
    dt: jax.Array
    decay: jax.Array
    state: jax.Array | None


def backward(heads: Heads, x, B, C, dt, decay, dy, state, dleft) -> Gradients:
    """Returns the gradients of what `forward` computes, all that is quadratic computed again.

    Matrices over pairs of positions are transposed here, [k,q]: one set does for all.

    Args:
        heads: as for `forward`, like the next six.
        x: inputs.
        B: input projections.
        C: output projections.
        dt: step sizes.
        decay: logarithms of the decays.
        dy: gradient of the output [Q,I].
        state: the state before the chunk, or None.
        dleft: gradient of the state after the chunk [N,I], None if there is none.
    """
    precision = heads.precision
    sums = _Sums(decay)
    size = decay.shape[1]
    reaches, before = _ones(size, "ge"), _ones(size, "lt")
    steps = columns(dt)
    scores = [
        _dot(_of(B, g, heads), _of(C, g, heads), "nt", precision) for g in range(heads.groups)
    ]
    dscores, dB, dC = ([jnp.float32(0)] * heads.groups for _ in range(3))
    dx, dstate, dsteps = [], [], jnp.zeros_like(steps)
    ddt, ddecay = jnp.zeros_like(dt), jnp.zeros_like(decay)
    for lanes, members in heads.tiles():
        step = _spread(steps, heads, members)
        xt, dyt, dfed = x[:, lanes], dy[:, lanes], 0.0
        for h in members:
            g, decays = heads.group(h), sums.between(h, transposed=True)
            own = _only(dyt, heads, members, [h])
            dfed += _dot(scores[g] * decays, own, "nn", precision)
            weight = steps[:, h : h + 1]
            dmixing = _dot(xt, own, "nt", precision) * decays
            dscores[g] += dmixing * weight
            # Position t decays what goes from k < t to q >= t. Sums over these rectangles keep
            # digits that differences of row and column sums would lose.
            later = _dot(dmixing * scores[g], reaches, "nn", "2" if precision == "1" else precision)
            dsteps = jnp.where(_head(dsteps.shape, 1) == h, later[:, :1], dsteps)
            taken = jnp.sum(later * weight * before, axis=0, keepdims=True)
            ddecay += jnp.where(_head(ddecay.shape, 0) == h, taken, 0.0)
        if state is not None:
            old, dnew = state[:, lanes], dleft[:, lanes]
            kept, fed = _spread(sums.to_end, heads, members), xt * step
            arrived = kept * _for_groups(heads, members, B, dnew, "nn", precision)
            dfed += arrived
            ddt += _by_head(heads, members, xt * arrived)
            shown = _spread(sums.from_start, heads, members) * dyt
            seen = shown * _for_groups(heads, members, C, old, "nn", precision)
            lasting = _spread(sums.whole, heads, members) * dnew
            ddecay += _exact_dot(_by_head(heads, members, fed * arrived), before)
            ddecay += _exact_dot(_by_head(heads, members, seen), reaches)
            lost = jnp.sum(lasting * old, axis=0, keepdims=True)
            ddecay += jnp.sum(_indicator(heads, members) * lost, axis=1, keepdims=True)
            for g, own in _groups(heads, members):
                dB[g] += _dot(_only(kept * fed, heads, members, own), dnew, "nt", precision)
                dC[g] += _dot(_only(shown, heads, members, own), old, "nt", precision)
            dstate.append(lasting + _for_groups(heads, members, C, shown, "tn", precision))
        dx.append(step * dfed)
    for g in range(heads.groups):
        dB[g] += _dot(dscores[g], _of(C, g, heads), "nn", precision)
        dC[g] += _dot(dscores[g], _of(B, g, heads), "tn", precision)
    ddt += rows_of(dsteps)
    return Gradients(
        _join(dx), _join(dB), _join(dC), ddt, ddecay, None if state is None else _join(dstate)
    )


class _Sums:
    """Sums of log decays over stretches of the chunk, and their exponentials.

    Multiples of 1/16 add up without rounding and the rests stay small: a step of 0.01 next to
    steps of 80 keeps its digits, which it loses in one float32 sum.
    """

    def __init__(self, decay):
        coarse = jnp.round(decay * 16) / 16
        parts, size = [coarse, decay - coarse], decay.shape[1]
        upto, after = _ones(size, "ge"), _ones(size, "lt")
        self._rows = [_exact_dot(v, upto, "nt") for v in parts]
        self._columns = [_exact_dot(upto, v, "nt") for v in parts]
        self.from_start = jnp.exp(sum(self._columns))
        self.to_end = jnp.exp(sum(_exact_dot(after, v, "nt") for v in parts))
        self.whole = self.from_start[size - 1 :]

    def between(self, h: int, transposed: bool = False):
        """exp(decay[k+1] + ... + decay[q]) for k <= q, else 0: [q,k], or [k,q]."""
        difference = sum(
            column[:, h : h + 1] - row[h : h + 1]
            for row, column in zip(self._rows, self._columns, strict=True)
        )
        difference = -difference if transposed else difference
        visible = _compare(self._rows[0].shape[1], "le" if transposed else "ge")
        # Masked before exp: beyond the diagonal it may overflow.
        return jnp.exp(jnp.where(visible, difference, -jnp.inf))


_CONTRACT = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}


def _dot(a, b, axes: str, precision: str):
    """Product of float32 matrices, "t"ransposed or "n"ot, with sums in float32.

    Precision is "float32", or how many products of bfloat16 numbers make up for it: "1" rounds
    both matrices; "2" keeps 16 bits of `a`, "3" of both.
    """
    left, right = _CONTRACT[axes]
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((left,), (right,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    if precision == "float32":
        return dot(a, b, precision=jax.lax.Precision.HIGHEST)
    (a, a_rest), (b, b_rest) = _halves(a), _halves(b)
    product = dot(a, b)
    if precision != "1":
        product += dot(a_rest, b)
    if precision == "3":
        product += dot(a, b_rest)
    return product


def _halves(v):
    """The upper 8 bits of the fraction and the next 8, as bfloat16."""
    upper = v.astype(jnp.bfloat16)
    return upper, (v - upper.astype(jnp.float32)).astype(jnp.bfloat16)


def _exact_dot(a, b, axes: str = "nn"):
    return _dot(a, b, axes, "float32")


def _compare(size: int, relation: str):
    """[Q,Q], whether the row's position stands in a relation to the column's."""
    row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    return getattr(jax.lax, relation)(row, column)


def _ones(size: int, relation: str):
    return _compare(size, relation).astype(jnp.float32)


def columns(rows):
    """[H,Q] -> [Q,H], by a product with ones and zeros: what the matrix unit is fast at."""
    return _exact_dot(_ones(rows.shape[1], "eq"), rows, "nt")


def rows_of(columns):
    """[Q,H] -> [H,Q]."""
    return _exact_dot(_ones(columns.shape[1], "eq"), columns, "nt")


def _lane(shape, heads: Heads, h: int, members: range):
    """Whether a lane of a tile belongs to a head."""
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    first = (h - members[0]) * heads.width
    return (lane >= first) & (lane < first + heads.width)


def _only(v, heads: Heads, members: range, some):
    """[Q,T] with zeros in the lanes of other heads."""
    if len(some) == len(members):
        return v
    mask = _lane(v.shape, heads, some[0], members)
    for h in some[1:]:
        mask |= _lane(v.shape, heads, h, members)
    return jnp.where(mask, v, 0.0)


def _spread(columns, heads: Heads, members: range):
    """[Q,H] -> [Q,T]: each head's column in all of its lanes."""
    shape = (columns.shape[0], len(members) * heads.width)
    v = jnp.broadcast_to(columns[:, members[0] : members[0] + 1], shape)
    for h in members[1:]:
        v = jnp.where(_lane(shape, heads, h, members), columns[:, h : h + 1], v)
    return v


def _groups(heads: Heads, members: range):
    """Groups of a tile and the heads in it that use them."""
    found = sorted({heads.group(h) for h in members})
    return [(g, [h for h in members if heads.group(h) == g]) for g in found]


def _for_groups(heads: Heads, members: range, v, tile, axes: str, precision):
    """Product of each group's part of `v` [Q,GN] with its heads' lanes of a tile."""
    total = 0.0
    for g, own in _groups(heads, members):
        total += _only(_dot(_of(v, g, heads), tile, axes, precision), heads, members, own)
    return total


def _indicator(heads: Heads, members: range):
    """[H,T], one where a lane belongs to a head."""
    shape = (heads.number, len(members) * heads.width)
    head = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    first = (head - members[0]) * heads.width
    return ((lane >= first) & (lane < first + heads.width)).astype(jnp.float32)


def _by_head(heads: Heads, members: range, v):
    """[Q,T] -> [H,Q], sums over the lanes of each head."""
    return _exact_dot(_indicator(heads, members), v, "nt")


def _head(shape, axis: int):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _of(v, g: int, heads: Heads):
    """What belongs to a group [Q,N] of [Q,GN]."""
    return v[:, g * heads.size : (g + 1) * heads.size]


def _join(tiles):
    return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis=1)
