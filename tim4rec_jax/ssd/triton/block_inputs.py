"""What both Triton kernels of `time_aware_ssd_block` make of its inputs: the op's inputs.

`projected` holds z [I], x [I], B [G N], C [G N] and dt [H] along its last axis of E. The M channels
of the convolution are x, B and C. The other letters are those of `common`, and `S` is a
`block.Specialisation`.
"""

from typing import Any, NamedTuple, no_type_check  # Triton reads the annotations of kernels

import triton
import triton.language as tl

from tim4rec_jax.ssd.triton.common import load_restarts, log_decays, softplus


class Inputs(NamedTuple):
    """Pointers to the inputs of the block. Those whose HAS_ flag is off are never read."""

    projected: Any  # [B, L, E]
    factor: Any  # [B, L, H]
    added: Any  # [B, L, H], `time_step`
    rate: Any  # [B, L, H], `time_rate`
    taps: Any  # [W, M]
    conv_bias: Any  # [M]
    A: Any  # [H]
    D: Any  # [H]
    dt_bias: Any  # [H]
    scale: Any  # [I]
    segments: Any  # [B, L]


class Chunk(NamedTuple):
    """The positions of a chunk, each [Q]."""

    at: Any  # number of the position in its row
    inside: Any  # whether it is a position of the sequence
    before: Any  # how many positions before it are in its segment, at most W - 1 of them counted
    restarts: Any  # whether it forgets the state before it


class Steps(NamedTuple):
    """What makes the step sizes of a head, each [Q]: softplus(dt factor + added + dt_bias)."""

    dt: Any
    factor: Any
    raw: Any  # the argument of softplus
    step: Any  # the step size, 0 past the end of the sequence
    faster: Any  # a factor on the rate of decay
    rate: Any  # the rate of decay


@triton.jit
@no_type_check
def from_row(v, row, length, S: tl.constexpr):
    """The inputs from this row on: offsets within a row are small numbers."""
    at = row * length
    factor, added, rate = v.factor + at * S.H, v.added + at * S.H, v.rate + at * S.H
    projected, segments = v.projected + at * S.E, v.segments + at
    return Inputs(
        projected,
        factor,
        added,
        rate,
        v.taps,
        v.conv_bias,
        v.A,
        v.D,
        v.dt_bias,
        v.scale,
        segments,
    )


@triton.jit
@no_type_check
def count_neighbours(segments, at, length, AHEAD: tl.constexpr, S: tl.constexpr):
    """How many positions before each, or AHEAD of it, are in its segment, W - 1 at most counted."""
    if S.HAS_SEGMENTS:
        count = tl.zeros(at.shape, tl.int32)
        here = tl.load(segments + at, mask=at < length, other=0)
        for k in tl.static_range(1, S.W):
            step = k if AHEAD else -k
            exists = (at + step >= 0) & (tl.maximum(at, at + step) < length)
            same = tl.load(segments + at + step, mask=exists, other=0) == here
            count += (exists & same).to(tl.int32)
    else:
        count = length - 1 - at if AHEAD else at
    return count


@triton.jit
@no_type_check
def locate_chunk(v, chunk, length, S: tl.constexpr):
    """The positions of a chunk."""
    at = chunk * S.Q + tl.arange(0, S.Q)
    before = count_neighbours(v.segments, at, length, False, S)
    return Chunk(at, at < length, before, load_restarts(v.segments, at, at, length, S))


@triton.jit
@no_type_check
def convolve(v, chunk, channel, S: tl.constexpr):
    """The convolution's result at each position in some channels of (x, B, C): [Q, channels]."""
    mixed = (v.projected + chunk.at * S.E + S.I)[:, None] + channel[None, :]
    total = tl.load(v.conv_bias + channel).to(tl.float32)[None, :]
    for k in tl.static_range(S.W):
        seen = (chunk.inside & (chunk.before >= k))[:, None]
        tap = tl.load(v.taps + (S.W - 1 - k) * S.M + channel).to(tl.float32)
        total += tap[None, :] * tl.load(mixed - k * S.E, mask=seen, other=0).to(tl.float32)
    return total


@triton.jit
@no_type_check
def activation(u, S: tl.constexpr):
    """What the op reads of the convolution's result."""
    if S.HARDSWISH:
        u *= tl.minimum(tl.maximum(u + 3, 0), 6) * (1 / 6)
    else:
        u *= tl.sigmoid(u)
    return u


@triton.jit
@no_type_check
def leave_seen(v, chunk, memory, CHANNELS: tl.constexpr, S: tl.constexpr):
    """Leaves what the op reads in the first channels of (x, B, C) in `memory.seen`, [Q, M]."""
    # The largest power of two in their number.
    TILE: tl.constexpr = min(64, CHANNELS & -CHANNELS)
    rows = (tl.arange(0, S.Q) * S.M)[:, None]
    for tile in tl.range(0, CHANNELS // TILE, disable_licm=True):
        channel = tile * TILE + tl.arange(0, TILE)
        seen = activation(convolve(v, chunk, channel, S), S)
        tl.store(memory.seen + rows + channel[None, :], seen)
    tl.debug_barrier()


@triton.jit
@no_type_check
def load_seen(memory, channel, S: tl.constexpr):
    """What the op reads in some channels of (x, B, C): [Q, channels]."""
    return tl.load(memory.seen + (tl.arange(0, S.Q) * S.M)[:, None] + channel[None, :])


@triton.jit
@no_type_check
def state_offsets(chunk, head, S: tl.constexpr):
    """Offsets of a state [P, N] in the memory of a program."""
    p, n = tl.arange(0, S.P), tl.arange(0, S.N)
    return (chunk * S.H + head) * (S.P * S.N) + p[:, None] * S.N + n[None, :]


@triton.jit
@no_type_check
def load_steps(v, chunk, head, S: tl.constexpr):
    """The `Steps` of a head, and its `LogDecays`."""
    dt = tl.load(v.projected + chunk.at * S.E + (S.E - S.H) + head, mask=chunk.inside, other=0)
    dt = dt.to(tl.float32)
    if S.HAS_FACTOR:
        factor = tl.load(v.factor + chunk.at * S.H + head, mask=chunk.inside, other=0)
        factor = factor.to(tl.float32)
    else:
        factor = tl.full(chunk.at.shape, 1, tl.float32)
    raw = dt * factor + tl.load(v.dt_bias + head).to(tl.float32)
    if S.HAS_STEP:
        added = tl.load(v.added + chunk.at * S.H + head, mask=chunk.inside, other=0)
        raw += added.to(tl.float32)
    step = tl.where(chunk.inside, softplus(raw), 0)
    if S.HAS_RATE:
        faster = tl.load(v.rate + chunk.at * S.H + head, mask=chunk.inside, other=0)
        # As `ssd.fused_block.rate_factor`: what is infinite would make gradients of NaN.
        faster = tl.exp(tl.minimum(tl.maximum(faster.to(tl.float32), -40.0), 40.0))
    else:
        faster = tl.full(chunk.at.shape, 1, tl.float32)
    rate = faster * tl.load(v.A + head).to(tl.float32)
    total = log_decays(step, rate, chunk.restarts)
    return Steps(dt, factor, raw, step, faster, rate), total


@triton.jit
@no_type_check
def store_tile(array, rows, inside, column, value):
    """Stores what `load_tile` loads."""
    # In this order, which takes fewer registers here.
    tl.store(array + rows[:, None] + column[None, :], value, mask=inside[:, None])
