"""What the Triton kernels of the block do around the op, as functions of blocks in registers.

`projected` holds z [I], x [I], B [G N], C [G N] and dt [H] along its last axis of E; x, B and C are
the M channels of the convolution. Other letters as in `triton_kernels`.
"""

from typing import no_type_check  # annotations here are for Triton's compiler

import triton
import triton.language as tl


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
def load_convolved(
    mixed, taps, bias, channel, inside, before, M: tl.constexpr, E: tl.constexpr, W: tl.constexpr
):
    """The convolution's result at each position in some channels of (x, B, C): [Q, channels].

    Args:
        mixed: pointers to its input there, at channels as for `taps`.
        taps: pointers to the first tap of channels, `channel` before those that are asked for.
        bias: likewise.
        channel: constant distance to the first channel; so all loads share their addresses.
        inside: whether a position is one of the sequence.
        before: how many positions before it are in its segment.
    """
    total = tl.load(bias + channel).to(tl.float32)[None, :]
    for k in tl.static_range(W):
        seen = inside & (before >= k)
        tap = tl.load(taps + ((W - 1 - k) * M + channel)).to(tl.float32)
        total += tap[None, :] * tl.load(mixed + (channel - k * E), mask=seen[:, None], other=0)
    return total


@triton.jit
@no_type_check
def activate(v, HARDSWISH: tl.constexpr):
    """What follows the convolution: hardswish, or SiLU."""
    if HARDSWISH:
        active = v * tl.minimum(tl.maximum(v + 3, 0), 6) / 6
    else:
        active = v * tl.sigmoid(v)
    return active


@triton.jit
@no_type_check
def activation_slope(v, HARDSWISH: tl.constexpr):
    """Derivative of `activate`."""
    if HARDSWISH:
        slope = tl.where(v < 3, tl.maximum(v + 1.5, -1.5) / 3, 1)
        slope = tl.where(v > -3, slope, 0)
    else:
        s = tl.sigmoid(v)
        slope = s * (1 + v * (1 - s))
    return slope


@triton.jit
@no_type_check
def load_step(dt, factor, bias, at, inside, head, H: tl.constexpr, HAS_FACTOR: tl.constexpr):
    """A head's raw steps, what scales them, and what softplus is taken of: [Q] each.

    `dt` are pointers to the first head's.
    """
    raw = tl.load(dt + head, mask=inside, other=0).to(tl.float32)
    if HAS_FACTOR:
        scale = tl.load(factor + at * H + head, mask=inside, other=0).to(tl.float32)
    else:
        scale = tl.full(raw.shape, 1, tl.float32)
    return raw, scale, raw * scale + tl.load(bias + head).to(tl.float32)


@triton.jit
@no_type_check
def add_share(where, value, earlier):
    """Adds to what this program has left there, if it has been there earlier."""
    tl.store(where, value + tl.load(where, mask=earlier, other=0))
