"""The backward kernel of `time_aware_ssd_block` in Triton.

A program takes one row of the batch with all heads and goes back through the sequence chunk by
chunk, computing again what the forward computed. Each half of the way is a loop of its own over
the heads, as registers do not suffice for all at once; they meet in memory that only this program
uses, small enough to stay in the cache. Letters as in `triton_kernels` and `triton_block_parts`.
"""

from typing import no_type_check  # annotations here are for Triton's compiler

import triton
import triton.language as tl

from tim4rec_jax.ssd.triton_block_parts import (
    activate,
    activation_slope,
    add_share,
    convolved,
    load_steps,
    load_tile,
    neighbours,
    store_tile,
)
from tim4rec_jax.ssd.triton_parts import (
    advance,
    attend,
    attend_backward,
    decay_between,
    decay_to_end,
    load_restarts,
    scratch_offsets,
    step_slopes,
)


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
    INNER: tl.constexpr = H * P
    M: tl.constexpr = INNER + 2 * G * N
    E: tl.constexpr = INNER + M + H
    TILE: tl.constexpr = min(P, N)
    row = tl.program_id(0).to(tl.int64)
    q = tl.arange(0, Q)
    p = tl.arange(0, P)
    n = tl.arange(0, N)
    chunks = 1 if ONE_CHUNK else tl.cdiv(length, Q)

    if not ONE_CHUNK:
        for head in tl.range(0, H, disable_licm=True):
            state = tl.zeros([N, P], tl.float32)
            tl.store(states + scratch_offsets(row * chunks, head, n, p, H, P, N), state)
            for chunk in tl.range(0, chunks - 1, disable_licm=True):
                t = chunk * Q + q
                inside = t < length
                at = row * length + t
                before = neighbours(segments, at, t, length, W, False, HAS_SEGMENTS)
                restarts = load_restarts(segments, at, t, length, HAS_SEGMENTS)
                _dt, _factor, _raw, step, coarse, fine = load_steps(
                    projected, factor, bias, A, at, inside, restarts, head, H, E, HAS_FACTOR
                )
                b = INNER + head // (H // G) * N + n
                own = head * P + p
                B_ = convolved(projected, taps, conv_bias, at, inside, before, b, INNER, M, E, W)
                x_ = convolved(projected, taps, conv_bias, at, inside, before, own, INNER, M, E, W)
                B_ = activate(B_, HARDSWISH, PRECISION)
                step_x = activate(x_, HARDSWISH, PRECISION) * step[:, None]
                state = advance(state, B_, step_x, coarse, fine, q, Q, PRECISION)
                where = scratch_offsets(row * chunks + chunk + 1, head, n, p, H, P, N)
                tl.store(states + where, state)

    # Not pipelined: what a chunk reads has been left by the one behind it.
    for behind in tl.range(0, chunks, disable_licm=True, num_stages=1):
        # From one loop to the next, other threads of this program read what these wrote.
        tl.debug_barrier()
        earlier = behind > 0
        chunk = chunks - 1 - behind
        t = chunk * Q + q
        inside = t < length
        at = row * length + t
        slot = row * length + t if ONE_CHUNK else row * (2 * Q) + t % (2 * Q)
        before = neighbours(segments, at, t, length, W, False, HAS_SEGMENTS)
        restarts = load_restarts(segments, at, t, length, HAS_SEGMENTS)

        # Through norm and gate.
        rstd_ = tl.load(rstd + at, mask=inside, other=0)
        share = tl.zeros([Q], tl.float32)
        for head in tl.range(0, H, disable_licm=True):
            y_ = load_tile(y, at * INNER, inside, head * P + p)
            share += tl.sum(y_ * load_tile(dy, at * INNER, inside, head * P + p), 1) / INNER
        for group in tl.range(0, G, disable_licm=True):
            b = INNER + group * N + n
            c = b + G * N
            C_ = convolved(projected, taps, conv_bias, at, inside, before, c, INNER, M, E, W)
            C_ = activate(C_, HARDSWISH, PRECISION)
            B_ = convolved(projected, taps, conv_bias, at, inside, before, b, INNER, M, E, W)
            B_ = activate(B_, HARDSWISH, PRECISION)
            scores = tl.dot(C_, tl.trans(B_), input_precision=PRECISION)
            for i in tl.range(0, H // G, disable_licm=True):
                head = group * (H // G) + i
                own = head * P + p
                _dt, _factor, _raw, step, coarse, fine = load_steps(
                    projected, factor, bias, A, at, inside, restarts, head, H, E, HAS_FACTOR
                )
                x_ = convolved(projected, taps, conv_bias, at, inside, before, own, INNER, M, E, W)
                x_ = activate(x_, HARDSWISH, PRECISION)
                state = 0
                if not ONE_CHUNK:
                    here = scratch_offsets(row * chunks + chunk, head, n, p, H, P, N)
                    state = tl.load(states + here)
                mixing = scores * decay_between(coarse, fine, q)
                step_x = x_ * step[:, None]
                out = attend(mixing, C_, step_x, state, coarse, fine, not ONE_CHUNK, PRECISION)
                out += x_ * tl.load(D + head).to(tl.float32)
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

        # Through the states: what the chunk adds to the one after it, and sees of the one before.
        if not ONE_CHUNK:
            for group in tl.range(0, G, disable_licm=True):
                b = INNER + group * N + n
                c = b + G * N
                dB_ = tl.zeros([Q, N], tl.float32)
                dC_ = tl.zeros([Q, N], tl.float32)
                for i in tl.range(0, H // G, disable_licm=True):
                    head = group * (H // G) + i
                    own = head * P + p
                    _dt, _factor, _raw, step, coarse, fine = load_steps(
                        projected, factor, bias, A, at, inside, restarts, head, H, E, HAS_FACTOR
                    )
                    to_end, kept = decay_to_end(coarse, fine, q, Q)
                    entering = tl.exp2(coarse + fine)
                    here = scratch_offsets(row * chunks + chunk, head, n, p, H, P, N)
                    state = tl.load(states + here)
                    dstate = tl.load(states + here + H * P * N, mask=earlier, other=0)
                    tl.debug_barrier()  # all threads have read the state
                    dlog_decay = tl.zeros([Q], tl.float32)
                    dlog_decay += kept * tl.sum(tl.sum(state * dstate, 1), 0)

                    C_ = convolved(
                        projected, taps, conv_bias, at, inside, before, c, INNER, M, E, W
                    )
                    C_ = activate(C_, HARDSWISH, PRECISION)
                    dout = load_tile(dresult, slot * INNER, inside, own) * entering[:, None]
                    dC_head = tl.dot(dout, tl.trans(state), input_precision=PRECISION)
                    dC_ += dC_head
                    dlog_decay += tl.cumsum(tl.sum(dC_head * C_, 1), 0, reverse=True)
                    dentering = tl.dot(tl.trans(C_), dout, input_precision=PRECISION)
                    tl.store(states + here, dentering + kept * dstate)

                    B_ = convolved(
                        projected, taps, conv_bias, at, inside, before, b, INNER, M, E, W
                    )
                    B_ = activate(B_, HARDSWISH, PRECISION)
                    x_ = convolved(
                        projected, taps, conv_bias, at, inside, before, own, INNER, M, E, W
                    )
                    x_ = activate(x_, HARDSWISH, PRECISION)
                    dB_head = tl.dot(
                        x_ * (step * to_end)[:, None], tl.trans(dstate), input_precision=PRECISION
                    )
                    dB_ += dB_head
                    added = tl.sum(dB_head * B_, 1)
                    dlog_decay += tl.cumsum(added, 0) - added
                    dstep_x = tl.dot(B_, dstate, input_precision=PRECISION) * to_end[:, None]
                    store_tile(dconvolved, slot * M, inside, own, dstep_x * step[:, None])
                    dstep = tl.sum(dstep_x * x_, 1) + dlog_decay * tl.load(A + head).to(tl.float32)
                    tl.store(dsteps + (row * H + head) * Q + q, dstep)
                    add_share(dheads + row * (3 * H) + head, tl.sum(dlog_decay * step, 0), earlier)
                store_tile(dconvolved, slot * M, inside, b, dB_)
                store_tile(dconvolved, slot * M, inside, c, dC_)
            tl.debug_barrier()

        # Through what positions of the chunk see of each other.
        for group in tl.range(0, G, disable_licm=True):
            b = INNER + group * N + n
            c = b + G * N
            B_ = convolved(projected, taps, conv_bias, at, inside, before, b, INNER, M, E, W)
            B_ = activate(B_, HARDSWISH, PRECISION)
            C_ = convolved(projected, taps, conv_bias, at, inside, before, c, INNER, M, E, W)
            C_ = activate(C_, HARDSWISH, PRECISION)
            scores = tl.dot(C_, tl.trans(B_), input_precision=PRECISION)
            dscores = tl.zeros([Q, Q], tl.float32)
            for i in tl.range(0, H // G, disable_licm=True):
                head = group * (H // G) + i
                own = head * P + p
                dt_, factor_, raw, step, coarse, fine = load_steps(
                    projected, factor, bias, A, at, inside, restarts, head, H, E, HAS_FACTOR
                )
                x_ = convolved(projected, taps, conv_bias, at, inside, before, own, INNER, M, E, W)
                x_ = activate(x_, HARDSWISH, PRECISION)
                step_x = x_ * step[:, None]
                dout = load_tile(dresult, slot * INNER, inside, own)
                dstep_x, pairs = attend_backward(scores, step_x, dout, coarse, fine, q, PRECISION)
                dscores += pairs
                # As in the op's kernel.
                to_later = tl.cumsum(pairs * scores, 0, reverse=True)
                dlog_decay = tl.sum(tl.where(q[:, None] > q[None, :], to_later, 0), 1)
                dx = dstep_x * step[:, None] + dout * tl.load(D + head).to(tl.float32)
                dstep = tl.sum(dstep_x * x_, 1) + dlog_decay * tl.load(A + head).to(tl.float32)
                shares = dheads + row * (3 * H) + head
                if ONE_CHUNK:
                    tl.store(shares, tl.sum(dlog_decay * step, 0))
                else:
                    dx += load_tile(dconvolved, slot * M, inside, own)
                    dstep += tl.load(dsteps + (row * H + head) * Q + q)
                    tl.store(shares, tl.load(shares) + tl.sum(dlog_decay * step, 0))
                    tl.debug_barrier()
                store_tile(dconvolved, slot * M, inside, own, dx)
                add_share(shares + H, tl.sum(tl.sum(dout * x_, 1), 0), earlier)
                dstep = tl.where(inside, dstep * step_slopes(raw, True, False, 0, 0), 0)
                add_share(shares + 2 * H, tl.sum(dstep, 0), earlier)
                where = dprojected + at * E + (E - H) + head
                tl.store(where, dstep * factor_, mask=inside)
                if HAS_FACTOR:
                    tl.store(dfactor + at * H + head, dstep * dt_, mask=inside)
            dB_ = tl.dot(tl.trans(dscores), C_, input_precision=PRECISION)
            if not ONE_CHUNK:
                dB_ += load_tile(dconvolved, slot * M, inside, b)
            tl.debug_barrier()
            store_tile(dconvolved, slot * M, inside, b, dB_)
            dC_ = tl.dot(dscores, B_, input_precision=PRECISION)
            if not ONE_CHUNK:
                dC_ += load_tile(dconvolved, slot * M, inside, c)
            tl.debug_barrier()
            store_tile(dconvolved, slot * M, inside, c, dC_)
        tl.debug_barrier()

        # Through the activation, then the convolution.
        for tile in tl.range(0, M // TILE, disable_licm=True):
            channel = tile * TILE + tl.arange(0, TILE)
            v = convolved(projected, taps, conv_bias, at, inside, before, channel, INNER, M, E, W)
            d = load_tile(dconvolved, slot * M, inside, channel) * activation_slope(v, HARDSWISH)
            tl.debug_barrier()
            store_tile(dconvolved, slot * M, inside, channel, d)
        tl.debug_barrier()
        after = neighbours(segments, at, t, length, W, True, HAS_SEGMENTS)
        for tile in tl.range(0, M // TILE, disable_licm=True):
            channel = tile * TILE + tl.arange(0, TILE)
            shares = dtaps + row * ((W + 1) * M) + channel
            d = load_tile(dconvolved, slot * M, inside, channel)
            add_share(shares + W * M, tl.sum(d, 0), earlier)
            dmixed = tl.zeros([Q, TILE], tl.float32)
            for k in tl.static_range(W):
                seen = inside & (before >= k)
                mixed = load_tile(projected, (at - k) * E, seen, INNER + channel)
                add_share(shares + (W - 1 - k) * M, tl.sum(d * mixed, 0), earlier)
                later = slot + k if ONE_CHUNK else row * (2 * Q) + (t + k) % (2 * Q)
                tap = tl.load(taps + (W - 1 - k) * M + channel).to(tl.float32)
                seeing = inside & (after >= k)
                dmixed += tap[None, :] * load_tile(dconvolved, later * M, seeing, channel)
            store_tile(dprojected, at * E, inside, INNER + channel, dmixed)
