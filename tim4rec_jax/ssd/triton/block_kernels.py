"""The kernels of `time_aware_ssd_block` in Triton, forward and backward."""

from typing import no_type_check  # annotations here are for Triton's compiler

import triton
import triton.language as tl

from tim4rec_jax.ssd.triton.common import (
    advance,
    attend,
    attend_backward,
    decay_between,
    decay_to_end,
    load_restarts,
    scratch_offsets,
    step_sizes,
    step_slopes,
    total_decays,
)

# ---- ssd.triton_block_parts
# What the Triton kernels of the block do around the op, as functions of blocks in registers.
#
# `projected` holds z [I], x [I], B [G N], C [G N] and dt [H] along its last axis of E; x, B and C are
# the M channels of the convolution, I = H P. Other letters as in `triton_parts`.
#
# What functions need together comes in tuples: a `layer` of pointers to (projected, factor, taps,
# conv_bias, A, D, bias); a `place` of (offsets of positions from the array's first, whether each is
# one of the sequence, how many before it are in its segment, whether it forgets the state before it);
# SIZES of (H, G, P, N, W, whether there is a factor, whether it is hardswish, precision,
# whether there are segments).


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


# ---- ssd.triton_block_stages
# Stages of the block's backward kernel: norm, gate and op on the way back through a chunk.
#
# Each is a loop of its own over the heads, as registers do not suffice for all of them at once.
# They meet in `memory` that only this program uses, small enough to stay in the cache: pointers to
# (states, dconvolved, dresult, dsteps), for which see the kernel. Letters, `layer`, `place` and SIZES
# as in `triton_block_parts`; `slot` is where the chunk's positions are in `memory`, and `earlier`
# whether this program has left shares in gradients of parameters for a chunk before; `chunk` is
# numbered through all rows.


@triton.jit
@no_type_check
def through_norm(
    layer,
    place,
    results,
    gradients,
    memory,
    slot,
    row,
    chunk,
    earlier,
    STATEFUL: tl.constexpr,
    Q: tl.constexpr,
    SIZES,
):
    """Back through norm and gate: leaves the gradients of z, the scale and the op's result."""
    projected, _factors, _taps, _conv_bias, _A, D, _bias = layer
    at, inside, _before, _restarts = place
    y, rstd, dy, scale = results
    dprojected, dscale = gradients
    states, _dconvolved, dresult, _dsteps = memory
    H: tl.constexpr = SIZES[0]
    G: tl.constexpr = SIZES[1]
    P: tl.constexpr = SIZES[2]
    N: tl.constexpr = SIZES[3]
    PRECISION: tl.constexpr = SIZES[7]
    INNER: tl.constexpr = H * P
    E: tl.constexpr = 2 * INNER + 2 * G * N + H
    q, p, n = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, N)

    # sum(dy y) is all that the norm's gradient needs of the other features.
    share = tl.zeros([Q], tl.float32)
    for head in tl.range(0, H, disable_licm=True):
        y_ = load_tile(y, at * INNER, inside, head * P + p)
        share += tl.sum(y_ * load_tile(dy, at * INNER, inside, head * P + p), 1) / INNER
    rstd_ = tl.load(rstd + at, mask=inside, other=0)
    for group in tl.range(0, G, disable_licm=True):
        b = INNER + group * N + n
        C = active(layer, place, b + G * N, SIZES)
        B = active(layer, place, b, SIZES)
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        for i in tl.range(0, H // G, disable_licm=True):
            head = group * (H // G) + i
            own = head * P + p
            _dt, _factor, _raw, step, coarse, fine = load_steps(layer, place, head, SIZES)
            x = active(layer, place, own, SIZES)
            state = 0
            if STATEFUL:
                state = tl.load(states + scratch_offsets(chunk, head, n, p, H, P, N))
            mixing = scores * decay_between(coarse, fine, q)
            out = attend(mixing, C, x * step[:, None], state, coarse, fine, STATEFUL, PRECISION)
            out += x * tl.load(D + head).to(tl.float32)
            z = load_tile(projected, at * E, inside, own)
            gate = tl.sigmoid(z)
            normed = out * z * gate * rstd_[:, None]
            dy_ = load_tile(dy, at * INNER, inside, own)
            add_share(dscale + row * INNER + own, tl.sum(dy_ * normed, 0), earlier)
            weight = tl.load(scale + own).to(tl.float32)[None, :]
            dgated = (dy_ * weight - normed * share[:, None]) * rstd_[:, None]
            dz = dgated * out * gate * (1 + z * (1 - gate))
            store_tile(dprojected, at * E, inside, own, dz)
            store_tile(dresult, slot * INNER, inside, own, dgated * z * gate)
    tl.debug_barrier()


@triton.jit
@no_type_check
def through_states(layer, place, dheads, memory, slot, row, chunk, earlier, Q: tl.constexpr, SIZES):
    """Back through what the chunk adds to the state after it and sees of the one before it.

    Leaves, for the next stage to go on with, gradients of the op's inputs and of step sizes.
    """
    _projected, _factors, _taps, _conv_bias, A, _D, _bias = layer
    _at, inside, _before, _restarts = place
    states, dconvolved, dresult, dsteps = memory
    H: tl.constexpr = SIZES[0]
    G: tl.constexpr = SIZES[1]
    P: tl.constexpr = SIZES[2]
    N: tl.constexpr = SIZES[3]
    PRECISION: tl.constexpr = SIZES[7]
    INNER: tl.constexpr = H * P
    M: tl.constexpr = INNER + 2 * G * N
    q, p, n = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, N)
    for group in tl.range(0, G, disable_licm=True):
        b = INNER + group * N + n
        c = b + G * N
        dB = tl.zeros([Q, N], tl.float32)
        dC = tl.zeros([Q, N], tl.float32)
        for i in tl.range(0, H // G, disable_licm=True):
            head = group * (H // G) + i
            own = head * P + p
            _dt, _factor, _raw, step, coarse, fine = load_steps(layer, place, head, SIZES)
            to_end, kept = decay_to_end(coarse, fine, q, Q)
            entering = tl.exp2(coarse + fine)
            here = states + scratch_offsets(chunk, head, n, p, H, P, N)
            state = tl.load(here)
            dstate = tl.load(here + H * P * N, mask=earlier, other=0)
            tl.debug_barrier()  # all threads have read the state
            dlog_decay = tl.zeros([Q], tl.float32)
            dlog_decay += kept * tl.sum(tl.sum(state * dstate, 1), 0)

            C = active(layer, place, c, SIZES)
            dout = load_tile(dresult, slot * INNER, inside, own) * entering[:, None]
            seen = tl.dot(dout, tl.trans(state), input_precision=PRECISION)
            dC += seen
            dlog_decay += tl.cumsum(tl.sum(seen * C, 1), 0, reverse=True)
            dentering = tl.dot(tl.trans(C), dout, input_precision=PRECISION)
            tl.store(here, dentering + kept * dstate)

            B = active(layer, place, b, SIZES)
            x = active(layer, place, own, SIZES)
            left = x * (step * to_end)[:, None]
            added = tl.dot(left, tl.trans(dstate), input_precision=PRECISION)
            dB += added
            of_position = tl.sum(added * B, 1)
            dlog_decay += tl.cumsum(of_position, 0) - of_position
            dstep_x = tl.dot(B, dstate, input_precision=PRECISION) * to_end[:, None]
            store_tile(dconvolved, slot * M, inside, own, dstep_x * step[:, None])
            dstep = tl.sum(dstep_x * x, 1) + dlog_decay * tl.load(A + head).to(tl.float32)
            tl.store(dsteps + (row * H + head) * Q + q, dstep)
            add_share(dheads + row * (3 * H) + head, tl.sum(dlog_decay * step, 0), earlier)
        store_tile(dconvolved, slot * M, inside, b, dB)
        store_tile(dconvolved, slot * M, inside, c, dC)
    tl.debug_barrier()


@triton.jit
@no_type_check
def through_pairs(
    layer,
    place,
    gradients,
    memory,
    slot,
    row,
    earlier,
    STATEFUL: tl.constexpr,
    Q: tl.constexpr,
    SIZES,
):
    """Back through what positions of the chunk see of each other, and through the step sizes."""
    _projected, _factors, _taps, _conv_bias, A, D, _bias = layer
    at, inside, _before, _restarts = place
    dprojected, dfactor, dheads = gradients
    _states, dconvolved, dresult, dsteps = memory
    H: tl.constexpr = SIZES[0]
    G: tl.constexpr = SIZES[1]
    P: tl.constexpr = SIZES[2]
    N: tl.constexpr = SIZES[3]
    HAS_FACTOR: tl.constexpr = SIZES[5]
    PRECISION: tl.constexpr = SIZES[7]
    INNER: tl.constexpr = H * P
    M: tl.constexpr = INNER + 2 * G * N
    E: tl.constexpr = INNER + M + H
    q, p, n = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, N)
    for group in tl.range(0, G, disable_licm=True):
        b = INNER + group * N + n
        c = b + G * N
        B = active(layer, place, b, SIZES)
        C = active(layer, place, c, SIZES)
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        dscores = tl.zeros([Q, Q], tl.float32)
        for i in tl.range(0, H // G, disable_licm=True):
            head = group * (H // G) + i
            own = head * P + p
            dt, factor, raw, step, coarse, fine = load_steps(layer, place, head, SIZES)
            x = active(layer, place, own, SIZES)
            step_x = x * step[:, None]
            dout = load_tile(dresult, slot * INNER, inside, own)
            dstep_x, pairs = attend_backward(scores, step_x, dout, coarse, fine, q, PRECISION)
            dscores += pairs
            # As in the op's kernel.
            to_later = tl.cumsum(pairs * scores, 0, reverse=True)
            dlog_decay = tl.sum(tl.where(q[:, None] > q[None, :], to_later, 0), 1)
            dx = dstep_x * step[:, None] + dout * tl.load(D + head).to(tl.float32)
            dstep = tl.sum(dstep_x * x, 1) + dlog_decay * tl.load(A + head).to(tl.float32)
            shares = dheads + row * (3 * H) + head
            if STATEFUL:
                dx += load_tile(dconvolved, slot * M, inside, own)
                dstep += tl.load(dsteps + (row * H + head) * Q + q)
                tl.store(shares, tl.load(shares) + tl.sum(dlog_decay * step, 0))
                tl.debug_barrier()
            else:
                tl.store(shares, tl.sum(dlog_decay * step, 0))
            store_tile(dconvolved, slot * M, inside, own, dx)
            add_share(shares + H, tl.sum(tl.sum(dout * x, 1), 0), earlier)
            dstep = tl.where(inside, dstep * step_slopes(raw, True, False, 0, 0), 0)
            add_share(shares + 2 * H, tl.sum(dstep, 0), earlier)
            tl.store(dprojected + at * E + (E - H) + head, dstep * factor, mask=inside)
            if HAS_FACTOR:
                tl.store(dfactor + at * H + head, dstep * dt, mask=inside)
        dB = tl.dot(tl.trans(dscores), C, input_precision=PRECISION)
        if STATEFUL:
            dB += load_tile(dconvolved, slot * M, inside, b)
        tl.debug_barrier()
        store_tile(dconvolved, slot * M, inside, b, dB)
        dC = tl.dot(dscores, B, input_precision=PRECISION)
        if STATEFUL:
            dC += load_tile(dconvolved, slot * M, inside, c)
        tl.debug_barrier()
        store_tile(dconvolved, slot * M, inside, c, dC)
    tl.debug_barrier()


# ---- ssd.triton_block_forward
# The forward kernel of `time_aware_ssd_block` in Triton.
#
# A program takes one row of the batch with all heads, as the norm is taken over them, and goes
# through the sequence chunk by chunk with the states in registers. The convolution reads its W
# positions from `projected` where it is needed; they are in the cache. Letters as in
# `triton_parts` and `triton_block_parts`.


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


# ---- ssd.triton_block_backward
# The backward kernel of `time_aware_ssd_block` in Triton.
#
# A program takes one row of the batch with all heads and goes back through the sequence chunk by
# chunk, computing again what the forward computed. Letters as in `triton_parts` and
# `triton_block_parts`.


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
