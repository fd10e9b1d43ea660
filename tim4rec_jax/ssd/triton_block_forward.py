"""The forward kernel of `time_aware_ssd_block` in Triton.

A program takes one row of the batch with all heads, as the norm is taken over them, and goes
through the sequence chunk by chunk with the states in registers. The convolution reads its W
positions from `projected` where it is needed; they are in the cache. Letters as in
`triton_parts` and `triton_block_parts`.
"""

from typing import no_type_check  # annotations here are for Triton's compiler

import triton
import triton.language as tl

from tim4rec_jax.ssd.triton_block_parts import (
    active,
    load_steps,
    load_tile,
    neighbours,
    store_tile,
)
from tim4rec_jax.ssd.triton_parts import advance, attend, decay_between, load_restarts


@triton.jit
@no_type_check
def rotate(values, last):
    """All values but the first, then `last`."""
    return values[1:] + (last,)  # noqa: RUF005


@triton.jit
@no_type_check
def block_forward(
    projected,
    factor,
    taps,
    conv_bias,
    A,
    D,
    bias,
    scale,
    segments,
    length,
    y,
    rstd,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    Q: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HARDSWISH: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes y, and the inverse root [B, L] of each position's mean square before the norm.

    Arrays whose HAS_ flag is off are never read. The grid is one axis of B programs.
    """
    INNER: tl.constexpr = H * P
    E: tl.constexpr = 2 * INNER + 2 * G * N + H
    SIZES: tl.constexpr = (H, G, P, N, W, HAS_FACTOR, HARDSWISH, PRECISION, HAS_SEGMENTS)
    layer = (projected, factor, taps, conv_bias, A, D, bias)
    row = tl.program_id(0).to(tl.int64)
    q = tl.arange(0, Q)
    p = tl.arange(0, P)
    n = tl.arange(0, N)

    # Registers cannot be numbered by a variable. Where a loop goes through all heads, they move on
    # by one in each turn, and are back in their places after the last.
    states = ()
    results = ()
    for _ in tl.static_range(H):
        states += (tl.zeros([N, P], tl.float32),)
        results += (tl.zeros([Q, P], tl.float32),)

    for chunk in tl.range(0, 1 if ONE_CHUNK else tl.cdiv(length, Q), disable_licm=True):
        t = chunk * Q + q
        inside = t < length
        at = row * length + t
        before = neighbours(segments, at, t, length, W, False, HAS_SEGMENTS)
        place = (at, inside, before, load_restarts(segments, at, t, length, HAS_SEGMENTS))
        squares = tl.zeros([Q], tl.float32)
        for group in tl.range(0, G, disable_licm=True):
            b = INNER + group * N + n
            c = b + G * N
            B_ = active(layer, place, b, SIZES)
            C_ = active(layer, place, c, SIZES)
            scores = tl.dot(C_, tl.trans(B_), input_precision=PRECISION)
            for i in tl.range(0, H // G, disable_licm=True):
                head = group * (H // G) + i
                own = head * P + p
                _dt, _factor, _raw, step, coarse, fine = load_steps(layer, place, head, SIZES)
                x_ = active(layer, place, own, SIZES)
                mixing = scores * decay_between(coarse, fine, q)
                step_x = x_ * step[:, None]
                state = states[0]
                y_ = attend(mixing, C_, step_x, state, coarse, fine, not ONE_CHUNK, PRECISION)
                if not ONE_CHUNK:
                    state = advance(state, B_, step_x, coarse, fine, q, Q, PRECISION)
                    states = rotate(states, state)
                y_ += x_ * tl.load(D + head).to(tl.float32)
                z = load_tile(projected, at * E, inside, own)
                y_ *= z * tl.sigmoid(z)
                squares += tl.sum(y_ * y_, 1)
                results = rotate(results, y_)
        rstd_ = tl.rsqrt(squares / INNER + EPS)
        tl.store(rstd + at, rstd_, mask=inside)
        for h in tl.static_range(H):
            y_ = results[h] * rstd_[:, None] * tl.load(scale + h * P + p).to(tl.float32)[None, :]
            store_tile(y, at * INNER, inside, h * P + p, y_)
