"""What the Triton kernels of the block do around the op, as functions of blocks in registers.

`projected` holds z [I], x [I], B [G N], C [G N] and dt [H] along its last axis of E; x, B and C are
the M channels of the convolution, I = H P. Other letters as in `triton_parts`.

What functions need together comes in tuples: a `layer` of pointers to (projected, factor, taps,
conv_bias, A, D, bias); a `place` of (offsets of positions from the array's first, whether each is
one of the sequence, how many before it are in its segment, whether it forgets the state before it);
SIZES of (H, G, P, N, W, whether there is a factor, whether it is hardswish, precision,
whether there are segments).
"""

from typing import no_type_check  # annotations here are for Triton's compiler

import triton
import triton.language as tl

from tim4rec_jax.ssd.triton_parts import step_sizes, total_decays


@triton.jit
@no_type_check
def neighbours(
    segments,
    at,
    t,
    length,
    W: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
):
    """How many positions before each, or AHEAD of it, are in its segment, W - 1 at most counted."""
    if HAS_SEGMENTS:
        count = tl.zeros(t.shape, tl.int32)
        here = tl.load(segments + at, mask=t < length, other=0)
        for k in tl.static_range(1, W):
            step = k if AHEAD else -k
            exists = (t + step >= 0) & (tl.maximum(t, t + step) < length)
            same = tl.load(segments + at + step, mask=exists, other=0) == here
            count += (exists & same).to(tl.int32)
    else:
        count = length - 1 - t if AHEAD else t
    return count


@triton.jit
@no_type_check
def convolved(layer, place, channel, SIZES):
    """The convolution's result at each position in some channels of (x, B, C): [Q, channels]."""
    projected, _factor, taps, bias, _A, _D, _bias = layer
    at, inside, before, _restarts = place
    H: tl.constexpr = SIZES[0]
    INNER: tl.constexpr = H * SIZES[2]
    M: tl.constexpr = INNER + 2 * SIZES[1] * SIZES[3]
    E: tl.constexpr = INNER + M + H
    W: tl.constexpr = SIZES[4]
    mixed = (projected + at * E + INNER)[:, None] + channel[None, :]
    total = tl.load(bias + channel).to(tl.float32)[None, :]
    for k in tl.static_range(W):
        seen = (inside & (before >= k))[:, None]
        tap = tl.load(taps + (W - 1 - k) * M + channel).to(tl.float32)
        total += tap[None, :] * tl.load(mixed - k * E, mask=seen, other=0).to(tl.float32)
    return total


@triton.jit
@no_type_check
def active(layer, place, channel, SIZES):
    """`convolved` after the activation, hardswish or SiLU: what the op reads."""
    HARDSWISH: tl.constexpr = SIZES[6]
    PRECISION: tl.constexpr = SIZES[7]
    v = convolved(layer, place, channel, SIZES)
    if HARDSWISH:
        v *= tl.minimum(tl.maximum(v + 3, 0), 6) * (1 / 6)
    else:
        v *= tl.sigmoid(v)
    if PRECISION != "ieee":
        # The compiler repeats elementwise operations in the layout of every operand of tensor
        # cores, back to what was loaded: the convolution, many times. It does not repeat a sum.
        v = tl.sum(v[:, :, None], 2)
    return v


@triton.jit
@no_type_check
def activation_slope(v, HARDSWISH: tl.constexpr):
    """Derivative of the activation."""
    if HARDSWISH:
        slope = tl.where(v < 3, tl.maximum(v + 1.5, -1.5) * (1 / 3), 1)
        slope = tl.where(v > -3, slope, 0)
    else:
        s = tl.sigmoid(v)
        slope = s * (1 + v * (1 - s))
    return slope


@triton.jit
@no_type_check
def load_steps(layer, place, head, SIZES):
    """Of a head [Q]: raw steps, what scales them, softplus' argument, steps, decays' sums."""
    projected, factor, _taps, _conv_bias, A, _D, bias = layer
    at, inside, _before, restarts = place
    H: tl.constexpr = SIZES[0]
    HAS_FACTOR: tl.constexpr = SIZES[5]
    E: tl.constexpr = 2 * H * SIZES[2] + 2 * SIZES[1] * SIZES[3] + H
    dt = tl.load(projected + at * E + (E - H) + head, mask=inside, other=0).to(tl.float32)
    if HAS_FACTOR:
        scale = tl.load(factor + at * H + head, mask=inside, other=0).to(tl.float32)
    else:
        scale = tl.full(at.shape, 1, tl.float32)
    raw = dt * scale + tl.load(bias + head).to(tl.float32)
    step = step_sizes(raw, inside, True, False, 0, 0)
    coarse, fine = total_decays(step, tl.load(A + head).to(tl.float32), restarts)
    return dt, scale, raw, step, coarse, fine


@triton.jit
@no_type_check
def load_tile(array, rows, inside, column):
    """Columns of an array at `rows`, offsets of their first elements: [Q, columns]."""
    where = rows[:, None] + column[None, :]
    return tl.load(array + where, mask=inside[:, None], other=0).to(tl.float32)


@triton.jit
@no_type_check
def store_tile(array, rows, inside, column, value):
    """The way back from `load_tile`."""
    tl.store(array + rows[:, None] + column[None, :], value, mask=inside[:, None])


@triton.jit
@no_type_check
def add_share(where, value, earlier):
    """Adds to what this program has left there, if it has been there earlier."""
    tl.store(where, value + tl.load(where, mask=earlier, other=0))
