"""The backward kernel of `time_aware_ssd_block` in Triton.

A program takes one row of the batch with all heads and goes back through the sequence chunk by
chunk, computing again what the forward computed. Letters as in `triton_parts` and
`triton_block_parts`.
"""

from typing import no_type_check  # annotations here are for Triton's compiler

import triton
import triton.language as tl

from tim4rec_jax.ssd.triton_block_parts import (
    activation_slope,
    active,
    add_share,
    convolved,
    load_steps,
    load_tile,
    neighbours,
    store_tile,
)
from tim4rec_jax.ssd.triton_block_stages import through_norm, through_pairs, through_states
from tim4rec_jax.ssd.triton_parts import advance, load_restarts, scratch_offsets


@triton.jit
@no_type_check
def leave_states(layer, segments, states, row, length, chunks, Q: tl.constexpr, SIZES):
    """Leaves the state that enters each chunk, as the forward computed it."""
    H: tl.constexpr = SIZES[0]
    G: tl.constexpr = SIZES[1]
    P: tl.constexpr = SIZES[2]
    N: tl.constexpr = SIZES[3]
    W: tl.constexpr = SIZES[4]
    PRECISION: tl.constexpr = SIZES[7]
    HAS_SEGMENTS: tl.constexpr = SIZES[8]
    q, p, n = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, N)
    for head in tl.range(0, H, disable_licm=True):
        state = tl.zeros([N, P], tl.float32)
        tl.store(states + scratch_offsets(row * chunks, head, n, p, H, P, N), state)
        for chunk in tl.range(0, chunks - 1, disable_licm=True):
            t = chunk * Q + q
            at = row * length + t
            before = neighbours(segments, at, t, length, W, False, HAS_SEGMENTS)
            restarts = load_restarts(segments, at, t, length, HAS_SEGMENTS)
            place = (at, t < length, before, restarts)
            _dt, _factor, _raw, step, coarse, fine = load_steps(layer, place, head, SIZES)
            B = active(layer, place, H * P + head // (H // G) * N + n, SIZES)
            step_x = active(layer, place, head * P + p, SIZES) * step[:, None]
            state = advance(state, B, step_x, coarse, fine, q, Q, PRECISION)
            where = scratch_offsets(row * chunks + chunk + 1, head, n, p, H, P, N)
            tl.store(states + where, state)


@triton.jit
@no_type_check
def slots(row, t, length, Q: tl.constexpr, ONE_CHUNK: tl.constexpr):
    """Where positions are in memory of two chunks, or of the only one."""
    return row * length + t if ONE_CHUNK else row * (2 * Q) + t % (2 * Q)


@triton.jit
@no_type_check
def through_convolution(
    layer,
    place,
    after,
    gradients,
    dconvolved,
    row,
    t,
    length,
    earlier,
    Q: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    SIZES,
):
    """Back through the activation, then the convolution.

    `after` is how many positions ahead of each are in its segment.
    """
    projected, _factors, taps, _conv_bias, _A, _D, _bias = layer
    at, inside, before, _restarts = place
    dprojected, dtaps = gradients
    P: tl.constexpr = SIZES[2]
    N: tl.constexpr = SIZES[3]
    INNER: tl.constexpr = SIZES[0] * P
    M: tl.constexpr = INNER + 2 * SIZES[1] * N
    E: tl.constexpr = INNER + M + SIZES[0]
    W: tl.constexpr = SIZES[4]
    HARDSWISH: tl.constexpr = SIZES[6]
    TILE: tl.constexpr = min(P, N)
    slot = slots(row, t, length, Q, ONE_CHUNK)
    for tile in tl.range(0, M // TILE, disable_licm=True):
        channel = tile * TILE + tl.arange(0, TILE)
        slope = activation_slope(convolved(layer, place, channel, SIZES), HARDSWISH)
        d = load_tile(dconvolved, slot * M, inside, channel) * slope
        tl.debug_barrier()
        store_tile(dconvolved, slot * M, inside, channel, d)
    tl.debug_barrier()
    for tile in tl.range(0, M // TILE, disable_licm=True):
        channel = tile * TILE + tl.arange(0, TILE)
        shares = dtaps + row * ((W + 1) * M) + channel
        d = load_tile(dconvolved, slot * M, inside, channel)
        add_share(shares + W * M, tl.sum(d, 0), earlier)
        dmixed = tl.zeros(d.shape, tl.float32)
        for k in tl.static_range(W):
            mixed = load_tile(projected, (at - k) * E, inside & (before >= k), INNER + channel)
            add_share(shares + (W - 1 - k) * M, tl.sum(d * mixed, 0), earlier)
            tap = tl.load(taps + (W - 1 - k) * M + channel).to(tl.float32)
            later = slots(row, t + k, length, Q, ONE_CHUNK)
            seeing = inside & (after >= k)
            dmixed += tap[None, :] * load_tile(dconvolved, later * M, seeing, channel)
        store_tile(dprojected, at * E, inside, INNER + channel, dmixed)


@triton.jit
@no_type_check
def block_backward(
    projected,
    factor,
    taps,
    conv_bias,
    A,
    D,
    bias,
    scale,
    segments,
    y,
    rstd,
    dy,
    length,
    dprojected,
    dfactor,
    dtaps,
    dheads,
    dscale,
    states,
    dconvolved,
    dresult,
    dsteps,
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
    """Writes the gradients of all inputs from that of y, given y and `rstd`.

    Each row's shares in those of the parameters leave for the caller to sum: dtaps [B, W+1, M], the
    bias last, dheads [B, 3, H] of A, D and dt_bias, and dscale [B, I].

    The others are memory of this program: `states` [B, chunks, H, N, P] those that enter each
    chunk, from a first pass where there are several, and once read, gradients of them;
    `dconvolved` [B, R, M], `dresult` [B, R, I] and `dsteps` [B, H, Q] the gradients of the
    convolution's and the op's results and of the step sizes, of a chunk and the one behind it
    (R = 2 Q), as positions feed later ones, or of the only one (R = L).
    """
    SIZES: tl.constexpr = (H, G, P, N, W, HAS_FACTOR, HARDSWISH, PRECISION, HAS_SEGMENTS)
    layer = (projected, factor, taps, conv_bias, A, D, bias)
    memory = (states, dconvolved, dresult, dsteps)
    row = tl.program_id(0).to(tl.int64)
    chunks = 1 if ONE_CHUNK else tl.cdiv(length, Q)
    if not ONE_CHUNK:
        leave_states(layer, segments, states, row, length, chunks, Q, SIZES)
    # Not pipelined: what a chunk reads has been left by the one behind it.
    for behind in tl.range(0, chunks, disable_licm=True, num_stages=1):
        # From one stage to the next, other threads of this program read what these wrote.
        tl.debug_barrier()
        chunk = chunks - 1 - behind
        earlier = behind > 0
        t = chunk * Q + tl.arange(0, Q)
        at = row * length + t
        slot = slots(row, t, length, Q, ONE_CHUNK)
        before = neighbours(segments, at, t, length, W, False, HAS_SEGMENTS)
        place = (at, t < length, before, load_restarts(segments, at, t, length, HAS_SEGMENTS))
        results, gradients = (y, rstd, dy, scale), (dprojected, dscale)
        chunk += row * chunks
        through_norm(
            layer,
            place,
            results,
            gradients,
            memory,
            slot,
            row,
            chunk,
            earlier,
            not ONE_CHUNK,
            Q,
            SIZES,
        )
        if not ONE_CHUNK:
            through_states(layer, place, dheads, memory, slot, row, chunk, earlier, Q, SIZES)
        gradients = (dprojected, dfactor, dheads)
        through_pairs(layer, place, gradients, memory, slot, row, earlier, not ONE_CHUNK, Q, SIZES)
        after = neighbours(segments, at, t, length, W, True, HAS_SEGMENTS)
        gradients = (dprojected, dtaps)
        through_convolution(
            layer,
            place,
            after,
            gradients,
            dconvolved,
            row,
            t,
            length,
            earlier,
            Q,
            ONE_CHUNK,
            SIZES,
        )
