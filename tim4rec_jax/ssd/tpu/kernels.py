"""One chunk of the SSD in a TPU kernel, forward and backward, on values in vector registers.

Letters: Q positions of the chunk, H heads, P features of a head, I = H P, G groups, N state, T
lanes of a tile. The state is [N,I]. What differs by head is a row [H,Q], with positions in lanes,
or a column [Q,H].

A product for one head does not cut its lanes out. It sets the lanes of the other heads of a tile to
zero. That costs nothing, because the matrix unit always works on 128 lanes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tim4rec_jax.ssd.tpu.common import Heads

_CONTRACT = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}


def dot(a, b, axes: str, precision: str):
    """Multiplies float32 matrices, with sums in float32.

    Args:
        a: the left matrix.
        b: the right matrix.
        axes: for each matrix, "t" if it is transposed first and "n" if not.
        precision: "float32", or the number of products of bfloat16 matrices that replace the
            product: "1" rounds both matrices to 8 bits, "2" keeps 16 bits of `a`, and "3" keeps 16
            bits of both.
    """
    dot = _product(axes)
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
    """Two bfloat16 numbers whose sum has the first 16 bits of a float32 number."""
    upper = v.astype(jnp.bfloat16)
    return upper, (v - upper.astype(jnp.float32)).astype(jnp.bfloat16)


def _product(axes: str):
    """The matrix product with these axes and sums in float32."""
    left, right = _CONTRACT[axes]
    return functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((left,), (right,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def add_up(a, b, axes: str = "nn", bits: int = 24):
    """Multiplies a float32 matrix with one of zeros and ones, which has the dtype bfloat16.

    A number of 24 bits is the sum of three bfloat16 numbers, and a one has no rest. So three
    products are exact, where those of any two float32 matrices are six.

    Args:
        a: the left matrix.
        b: the right matrix.
        axes: see `dot`.
        bits: how many of the numbers count, 8 for each product.
    """
    dot, total = _product(axes), 0.0
    rest = b if a.dtype == jnp.bfloat16 else a
    for _ in range(bits // 8):
        part = rest.astype(jnp.bfloat16)
        rest -= part.astype(jnp.float32)
        total += dot(a, part) if a.dtype == jnp.bfloat16 else dot(part, b)
    return total


def related(size: int, relation: str):
    """A matrix [Q,Q]: whether the number of the row and that of the column stand in a relation.

    Relations are those of `jax.lax`: "ge" is a lower triangle with its diagonal.
    """
    row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    return getattr(jax.lax, relation)(row, column)


def ones(size: int, relation: str):
    """A matrix [Q,Q] for `add_up`: one where `related`, else zero."""
    return related(size, relation).astype(jnp.bfloat16)


def columns(rows):
    """Transposes [H,Q] to [Q,H], by a product with the unit matrix, which is fast on a TPU."""
    return add_up(ones(rows.shape[1], "eq"), rows, "nt")


def rows_of(columns):
    """Transposes [Q,H] to [H,Q]."""
    return add_up(ones(columns.shape[1], "eq"), columns, "nt")


def _lane(shape, heads: Heads, h: int, members: range):
    """Says which lanes of a tile, whose heads are `members`, belong to head `h`."""
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    first = (h - members[0]) * heads.width
    return (lane >= first) & (lane < first + heads.width)


def only(v, heads: Heads, members: range, some):
    """The tile `v` [Q,T] with zeros in the lanes of all heads but `some`."""
    if len(some) == len(members):
        return v
    mask = _lane(v.shape, heads, some[0], members)
    for h in some[1:]:
        mask |= _lane(v.shape, heads, h, members)
    return jnp.where(mask, v, 0.0)


def spread(columns, heads: Heads, members: range):
    """Turns [Q,H] into a tile [Q,T]: the column of each head fills all lanes of the head."""
    shape = (columns.shape[0], len(members) * heads.width)
    v = jnp.broadcast_to(columns[:, members[0] : members[0] + 1], shape)
    for h in members[1:]:
        v = jnp.where(_lane(shape, heads, h, members), columns[:, h : h + 1], v)
    return v


def groups_of(heads: Heads, members: range):
    """The groups of a tile, each with the heads of the tile that use it."""
    found = sorted({heads.group(h) for h in members})
    return [(g, [h for h in members if heads.group(h) == g]) for g in found]


def for_groups(heads: Heads, members: range, v, tile, axes: str, precision):
    """Multiplies the part of `v` [Q,GN] that belongs to each group with the lanes of its heads."""
    total = 0.0
    for g, own in groups_of(heads, members):
        total += only(dot(group_part(v, g, heads), tile, axes, precision), heads, members, own)
    return total


def indicator(heads: Heads, members: range):
    """A matrix [H,T] for `add_up`: one where the lane belongs to the head, else zero."""
    shape = (heads.number, len(members) * heads.width)
    head = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    first = (head - members[0]) * heads.width
    return ((lane >= first) & (lane < first + heads.width)).astype(jnp.bfloat16)


def by_head(heads: Heads, members: range, v):
    """Sums a tile [Q,T] over the lanes of each head: [H,Q]."""
    return add_up(indicator(heads, members), v, "nt")


def head_number(shape, axis: int):
    """The number of the head at each place of an array, whose heads lie along `axis`."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def group_part(v, g: int, heads: Heads):
    """The part [Q,N] of [Q,GN] that belongs to group `g`."""
    return v[:, g * heads.size : (g + 1) * heads.size]


def join(tiles):
    """Puts tiles side by side."""
    return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis=1)


class DecaySums:
    """Decays over stretches of the chunk: exponentials of sums of the log decays.

    Each log decay is split into a multiple of 1/16 and a small rest. The multiples add up without
    rounding and the sums of the rests stay small. In a single float32 sum, a step of 0.01 next to
    steps of 80 would lose its digits.

    Attributes:
        from_start: from before the chunk to each position [Q,H].
        to_end: from each position to the end of the chunk [Q,H].
        whole: over the whole chunk [1,H].
    """

    def __init__(self, decay):
        coarse = jnp.round(decay * 16) / 16  # at most 16,000 times 1/16: 14 bits
        parts, size = [(coarse, 16), (decay - coarse, 24)], decay.shape[1]
        upto = ones(size, "ge")
        self._rows = [add_up(v, upto, "nt", bits) for v, bits in parts]
        self._columns = [add_up(upto, v, "nt", bits) for v, bits in parts]
        self.from_start = jnp.exp(sum(self._columns))
        self.to_end = jnp.exp(sum(v[size - 1 :] - v for v in self._columns))
        self.whole = self.from_start[size - 1 :]

    def between(self, h: int, transposed: bool = False):
        """For head h, exp(decay[k+1] + ... + decay[q]) at [q,k] for k <= q, and 0 elsewhere.

        Args:
            h: the head.
            transposed: whether to return [k,q] instead.
        """
        difference = sum(
            column[:, h : h + 1] - row[h : h + 1]
            for row, column in zip(self._rows, self._columns, strict=True)
        )
        difference = -difference if transposed else difference
        visible = related(self._rows[0].shape[1], "le" if transposed else "ge")
        # The mask comes before exp, which may overflow beyond the diagonal.
        return jnp.exp(jnp.where(visible, difference, -jnp.inf))


def chunk_forward(heads: Heads, x, B, C, dt, decay, state):
    """Returns the output of a chunk [Q,I], without the skip `D x`, and the state after it.

    Args:
        heads: how heads share lanes and groups.
        x: inputs [Q,I].
        B: input projections [Q,GN].
        C: output projections [Q,GN].
        dt: step sizes [H,Q].
        decay: logarithms of the decays [H,Q], finite.
        state: the state before the chunk [N,I]. None if no state enters or leaves the chunk.
    """
    precision = heads.precision
    sums = DecaySums(decay)
    scores = [
        dot(group_part(C, g, heads), group_part(B, g, heads), "nt", precision)
        for g in range(heads.groups)
    ]
    y, left = [], []
    for lanes, members in heads.tiles():
        tile = 0.0
        for h in members:
            mixing = scores[heads.group(h)] * sums.between(h) * dt[h : h + 1]
            tile += dot(mixing, only(x[:, lanes], heads, members, [h]), "nn", precision)
        if state is not None:
            old = state[:, lanes]
            seen = for_groups(heads, members, C, old, "nn", precision)
            tile += spread(sums.from_start, heads, members) * seen
            kept = spread(sums.to_end * columns(dt), heads, members) * x[:, lanes]
            new = for_groups(heads, members, B, kept, "tn", precision)
            left.append(new + spread(sums.whole, heads, members) * old)
        y.append(tile)
    return join(y), None if state is None else join(left)


class Gradients(NamedTuple):
    """Gradients of a chunk. Each has the shape of the array that it is the gradient of."""

    x: jax.Array
    B: jax.Array
    C: jax.Array
    dt: jax.Array
    decay: jax.Array
    state: jax.Array | None


def chunk_backward(heads: Heads, x, B, C, dt, decay, dy, state, dleft) -> Gradients:
    """Returns the gradients of `chunk_forward`. It computes all matrices over positions again.

    These matrices are transposed, [k,q], so that each serves for all gradients.

    Args:
        heads: how heads share lanes and groups.
        x: inputs [Q,I].
        B: input projections [Q,GN].
        C: output projections [Q,GN].
        dt: step sizes [H,Q].
        decay: logarithms of the decays [H,Q], finite.
        dy: gradient of the output [Q,I].
        state: the state before the chunk [N,I], or None.
        dleft: gradient of the state after the chunk [N,I], or None.
    """
    precision = heads.precision
    sums = DecaySums(decay)
    size = decay.shape[1]
    reaches, before = ones(size, "ge"), ones(size, "lt")
    bits = 24 if precision == "float32" else 16
    steps = columns(dt)
    scores = [
        dot(group_part(B, g, heads), group_part(C, g, heads), "nt", precision)
        for g in range(heads.groups)
    ]
    dscores, dB, dC = ([jnp.float32(0)] * heads.groups for _ in range(3))
    dx, dstate, dsteps = [], [], jnp.zeros_like(steps)
    ddt, ddecay = jnp.zeros_like(dt), jnp.zeros_like(decay)
    for lanes, members in heads.tiles():
        step = spread(steps, heads, members)
        xt, dyt, dfed = x[:, lanes], dy[:, lanes], 0.0
        for h in members:
            g, decays = heads.group(h), sums.between(h, transposed=True)
            own = only(dyt, heads, members, [h])
            dfed += dot(scores[g] * decays, own, "nn", precision)
            weight = steps[:, h : h + 1]
            dmixing = dot(xt, own, "nt", precision) * decays
            dscores[g] += dmixing * weight
            # The decay of position t acts on all pairs k < t <= q. Sums over these rectangles keep
            # digits that differences of sums of rows and of columns would lose.
            later = add_up(dmixing * scores[g], reaches, "nn", bits)
            dsteps = jnp.where(head_number(dsteps.shape, 1) == h, later[:, :1], dsteps)
            taken = jnp.where(related(size, "lt"), later * weight, 0.0)
            taken = jnp.sum(taken, axis=0, keepdims=True)
            ddecay += jnp.where(head_number(ddecay.shape, 0) == h, taken, 0.0)
        if state is not None:
            old, dnew = state[:, lanes], dleft[:, lanes]
            kept, fed = spread(sums.to_end, heads, members), xt * step
            arrived = kept * for_groups(heads, members, B, dnew, "nn", precision)
            dfed += arrived
            ddt += by_head(heads, members, xt * arrived)
            shown = spread(sums.from_start, heads, members) * dyt
            seen = shown * for_groups(heads, members, C, old, "nn", precision)
            lasting = spread(sums.whole, heads, members) * dnew
            ddecay += add_up(by_head(heads, members, fed * arrived), before)
            ddecay += add_up(by_head(heads, members, seen), reaches)
            lost = jnp.sum(lasting * old, axis=0, keepdims=True)
            ddecay += jnp.sum(indicator(heads, members) * lost, axis=1, keepdims=True)
            for g, own in groups_of(heads, members):
                dB[g] += dot(only(kept * fed, heads, members, own), dnew, "nt", precision)
                dC[g] += dot(only(shown, heads, members, own), old, "nt", precision)
            dstate.append(lasting + for_groups(heads, members, C, shown, "tn", precision))
        dx.append(step * dfed)
    for g in range(heads.groups):
        dB[g] += dot(dscores[g], group_part(C, g, heads), "nn", precision)
        dC[g] += dot(dscores[g], group_part(B, g, heads), "tn", precision)
    ddt += rows_of(dsteps)
    return Gradients(
        join(dx), join(dB), join(dC), ddt, ddecay, None if state is None else join(dstate)
    )
