"""One chunk of the SSD in a TPU kernel, forward and backward, on values in vector registers.

Letters: Q positions of the chunk, H heads, P features of a head, I = H P, G groups, N state, T
lanes of a tile. The state is [N,I]. What differs by head is a row [H,Q], with positions in lanes,
or a column [Q,H].

A product for one head does not cut its lanes out. It sets the lanes of the other heads of a tile to
zero. That costs nothing, because the matrix unit always works on 128 lanes.

Matrices over pairs of positions [Q,Q] of few positions would leave lanes empty. Those of several
heads of a group lie side by side then, [Q,KQ] for a pack of K heads, as many as fill a register.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tim4rec_jax.ssd.tpu.common import LANES, Heads

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


def add_up(a, b, axes: str = "nn", bits: int = 24) -> Any:
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


def _places(shape, size: int):
    """For each lane: which of the squares [Q,Q] side by side it is in, and its number there."""
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    square = sum((lane >= first).astype(jnp.int32) for first in range(size, shape[1], size))
    return square, lane - size * square


def related(size: int, relation: str, count: int = 1):
    """Squares [Q,Q] side by side: whether the numbers of row and column stand in a relation.

    Relations are those of `jax.lax`: "ge" is a lower triangle with its diagonal.
    """
    shape = (size, count * size)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return getattr(jax.lax, relation)(row, _places(shape, size)[1])


def ones(size: int, relation: str, count: int = 1):
    """The same for `add_up`: one where `related`, else zero."""
    return related(size, relation, count).astype(jnp.bfloat16)


def diagonal(size: int, relation: str, count: int):
    """The same squares along the diagonal of a matrix [KQ,KQ], for `add_up`."""
    wide, square = related(size, relation, count), _places((size, count * size), size)[0]
    return stack([(wide & (square == i)).astype(jnp.bfloat16) for i in range(count)])


def side_by_side(heads: list[int], size: int, values):
    """Joins what `values` returns for each head, [1,KQ] or [Q,1], in the lanes of its square."""
    found = [values(h) for h in heads]
    if len(found) == 1:
        return found[0]
    shape = (max(v.shape[0] for v in found), len(found) * size)
    square, joined = _places(shape, size)[0], jnp.broadcast_to(found[0], shape)
    for i, v in enumerate(found[1:], 1):
        joined = jnp.where(square >= i, v, joined)
    return joined


def stack(parts):
    """Puts matrices below each other."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def pack_size(heads: Heads, size: int) -> int:
    """Returns K: as many heads of a tile and group as have their squares [Q,Q] in one register."""
    sets = [len(own) for _, members in heads.tiles() for _, own in groups_of(heads, members)]
    most = max(1, LANES // size)
    return next(k for k in range(most, 0, -1) if all(n % k == 0 for n in sets))


def packs(heads: Heads, members: range, count: int):
    """The packs of a tile: the group of each, and its heads."""
    return [
        (g, own[i : i + count])
        for g, own in groups_of(heads, members)
        for i in range(0, len(own), count)
    ]


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

    def __init__(self, decay, count: int):
        """Adds up log decays [H,Q] for packs of `count` heads."""
        coarse = jnp.round(decay * 16) / 16  # at most 16,000 times 1/16: 14 bits
        parts, self._size = [(coarse, 16), (decay - coarse, 24)], decay.shape[1]
        upto, from_ = ones(self._size, "ge"), ones(self._size, "le", count)
        self._rows = [add_up(v, from_, "nn", bits) for v, bits in parts]  # [H,KQ], K times the same
        self._columns = [add_up(upto, v, "nt", bits) for v, bits in parts]
        self.from_start = jnp.exp(sum(self._columns))
        self.to_end = jnp.exp(sum(v[-1:] - v for v in self._columns))
        self.whole = self.from_start[-1:]

    def between(self, pack: list[int], transposed: bool = False):
        """For each head, exp(decay[k+1] + ... + decay[q]) at [q,k] for k <= q, and 0 elsewhere.

        Args:
            pack: the heads, side by side in the result [Q,KQ].
            transposed: whether to return [k,q] instead.
        """
        difference = 0.0
        for rows, columns in zip(self._rows, self._columns, strict=True):
            own = side_by_side(pack, self._size, lambda h, v=columns: v[:, h : h + 1])
            difference += own - side_by_side(pack, self._size, lambda h, v=rows: v[h : h + 1])
        difference = -difference if transposed else difference
        visible = related(self._size, "le" if transposed else "ge", len(pack))
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
    precision, size = heads.precision, decay.shape[1]
    count = pack_size(heads, size)
    sums = DecaySums(decay, count)
    steps = dt if count == 1 else add_up(dt, ones(size, "eq", count))  # [H,KQ]
    scores = [
        dot(group_part(C, g, heads), stack([group_part(B, g, heads)] * count), "nt", precision)
        for g in range(heads.groups)
    ]
    y, left = [], []
    for lanes, members in heads.tiles():
        tile = 0.0
        for g, pack in packs(heads, members, count):
            mixing = scores[g] * sums.between(pack)
            mixing *= side_by_side(pack, size, lambda h: steps[h : h + 1])
            fed = stack([only(x[:, lanes], heads, members, [h]) for h in pack])
            tile += dot(mixing, fed, "nn", precision)
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
    precision, size = heads.precision, decay.shape[1]
    count = pack_size(heads, size)
    sums = DecaySums(decay, count)
    reaches, before = diagonal(size, "ge", count), ones(size, "lt")
    bits = 24 if precision == "float32" else 16
    steps = columns(dt)
    scores = [
        dot(group_part(B, g, heads), stack([group_part(C, g, heads)] * count), "nt", precision)
        for g in range(heads.groups)
    ]
    dscores, dB, dC = ([jnp.float32(0)] * heads.groups for _ in range(3))
    dx, dstate, dsteps = [], [], jnp.zeros_like(steps)
    ddt, ddecay = jnp.zeros_like(dt), 0.0
    takens = jnp.zeros((heads.number, count * size), jnp.float32)
    for lanes, members in heads.tiles():
        step = spread(steps, heads, members)
        xt, dyt, dfed = x[:, lanes], dy[:, lanes], 0.0
        for g, pack in packs(heads, members, count):
            decays = sums.between(pack, transposed=True)
            own = stack([only(dyt, heads, members, [h]) for h in pack])
            dfed += dot(scores[g] * decays, own, "nn", precision)
            weight = side_by_side(pack, size, lambda h: steps[:, h : h + 1])
            dmixing = dot(xt, own, "nt", precision) * decays
            dscores[g] += dmixing * weight
            # The decay of position t acts on all pairs k < t <= q. Sums over these rectangles keep
            # digits that differences of sums of rows and of columns would lose.
            later = add_up(dmixing * scores[g], reaches, "nn", bits)
            taken = jnp.where(related(size, "lt", count), later * weight, 0.0)
            taken = jnp.sum(taken, axis=0, keepdims=True)
            square = _places(takens.shape, size)[0]
            for i, h in enumerate(pack):
                first = later[:, i * size : i * size + 1]
                dsteps = jnp.where(head_number(dsteps.shape, 1) == h, first, dsteps)
                here = (head_number(takens.shape, 0) == h) & (square == i)
                takens += jnp.where(here, taken, 0.0)
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
            ddecay += add_up(by_head(heads, members, seen), ones(size, "ge"))
            lost = jnp.sum(lasting * old, axis=0, keepdims=True)
            ddecay += jnp.sum(indicator(heads, members) * lost, axis=1, keepdims=True)
            for g, own in groups_of(heads, members):
                dB[g] += dot(only(kept * fed, heads, members, own), dnew, "nt", precision)
                dC[g] += dot(only(shown, heads, members, own), old, "nt", precision)
            dstate.append(lasting + for_groups(heads, members, C, shown, "tn", precision))
        dx.append(step * dfed)
    for g in range(heads.groups):
        dB[g] += dot(dscores[g], stack([group_part(C, g, heads)] * count), "nn", precision)
        dC_ = dot(dscores[g], group_part(B, g, heads), "tn", precision)  # [KQ,N]
        dC[g] += sum(dC_[i * size : (i + 1) * size] for i in range(count))
    ddt += rows_of(dsteps)
    ddecay += takens if count == 1 else add_up(takens, ones(size, "eq", count), "nt")
    return Gradients(
        join(dx), join(dB), join(dC), ddt, ddecay, None if state is None else join(dstate)
    )
