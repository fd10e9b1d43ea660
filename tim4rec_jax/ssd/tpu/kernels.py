"""One chunk of the SSD in a TPU kernel: values in vector registers, forward and backward.

Lanes hold the features of all heads, I = H P of them, and the state is [N,I]; see `tpu_matrices`.

Letters: Q positions of the chunk, H heads, P features of a head, G groups, N state, T lanes of a
tile. What differs by head is a row [H,Q] (positions in lanes) or a column [Q,H].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tim4rec_jax.ssd.tpu.common import (
    Heads,
    by_head,
    columns,
    dot,
    exact_dot,
    for_groups,
    group_part,
    groups_of,
    head_number,
    indicator,
    join,
    ones,
    only,
    related,
    rows_of,
    spread,
)


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
    reaches, before = ones(size, "ge"), ones(size, "lt")
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
            # Position t decays what goes from k < t to q >= t. Sums over these rectangles keep
            # digits that differences of row and column sums would lose.
            later = dot(dmixing * scores[g], reaches, "nn", "2" if precision == "1" else precision)
            dsteps = jnp.where(head_number(dsteps.shape, 1) == h, later[:, :1], dsteps)
            taken = jnp.sum(later * weight * before, axis=0, keepdims=True)
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
            ddecay += exact_dot(by_head(heads, members, fed * arrived), before)
            ddecay += exact_dot(by_head(heads, members, seen), reaches)
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


class _Sums:
    """Sums of log decays over stretches of the chunk, and their exponentials.

    Multiples of 1/16 add up without rounding and the rests stay small: a step of 0.01 next to
    steps of 80 keeps its digits, which it loses in one float32 sum.
    """

    def __init__(self, decay):
        coarse = jnp.round(decay * 16) / 16
        parts, size = [coarse, decay - coarse], decay.shape[1]
        upto, after = ones(size, "ge"), ones(size, "lt")
        self._rows = [exact_dot(v, upto, "nt") for v in parts]
        self._columns = [exact_dot(upto, v, "nt") for v in parts]
        self.from_start = jnp.exp(sum(self._columns))
        self.to_end = jnp.exp(sum(exact_dot(after, v, "nt") for v in parts))
        self.whole = self.from_start[size - 1 :]

    def between(self, h: int, transposed: bool = False):
        """exp(decay[k+1] + ... + decay[q]) for k <= q, else 0: [q,k], or [k,q]."""
        difference = sum(
            column[:, h : h + 1] - row[h : h + 1]
            for row, column in zip(self._rows, self._columns, strict=True)
        )
        difference = -difference if transposed else difference
        visible = related(self._rows[0].shape[1], "le" if transposed else "ge")
        # Masked before exp: beyond the diagonal it may overflow.
        return jnp.exp(jnp.where(visible, difference, -jnp.inf))
