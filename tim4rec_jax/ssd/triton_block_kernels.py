"""`time_aware_ssd_block` as two Triton kernels, one for each direction.

A program takes one row of the batch with all heads, as the norm is taken over them, and goes
through the sequence chunk by chunk, forward with the states in registers. The convolution reads
its W positions from `projected` where it is needed; they are in the cache. Letters as in
`triton_kernels` and `triton_block_parts`.
"""

from typing import no_type_check  # annotations here are for Triton's compiler

import triton
import triton.language as tl

from tim4rec_jax.ssd.triton_block_parts import (
    activate,
    activation_slope,
    add_share,
    load_convolved,
    load_step,
    neighbours,
)
from tim4rec_jax.ssd.triton_parts import (
    add_backward,
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


@triton.jit
@no_type_check
def rotate(values, last):
    """All values but the first, then `last`."""
    return values[1:] + (last,)


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
    I: tl.constexpr = H * P
    M: tl.constexpr = I + 2 * G * N
    E: tl.constexpr = I + M + H
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
        here = projected + at * E
        z_at = here[:, None] + p[None, :]
        y_at = (y + at * I)[:, None] + p[None, :]
        n_at = here[:, None] + n[None, :] + I
        before = neighbours(segments, at, t, length, W, False, HAS_SEGMENTS)
        restarts = load_restarts(segments, at, t, length, HAS_SEGMENTS)
        squares = tl.zeros([Q], tl.float32)
        for group in tl.range(0, G, disable_licm=True):
            B_ = load_convolved(
                n_at, taps + n, conv_bias + n, I + group * N, inside, before, M, E, W
            )
            C_ = load_convolved(
                n_at, taps + n, conv_bias + n, I + (G + group) * N, inside, before, M, E, W
            )
            B_ = activate(B_, HARDSWISH)
            C_ = activate(C_, HARDSWISH)
            scores = tl.dot(C_, tl.trans(B_), input_precision=PRECISION)
            for i in tl.range(0, H // G, disable_licm=True):
                head = group * (H // G) + i
                _dt, _scale, raw = load_step(
                    here + (E - H), factor, bias, at, inside, head, H, HAS_FACTOR
                )
                step = step_sizes(raw, inside, True, False, 0, 0)
                coarse, fine = total_decays(step, tl.load(A + head).to(tl.float32), restarts)
                x_ = load_convolved(
                    z_at + I, taps + p, conv_bias + p, head * P, inside, before, M, E, W
                )
                x_ = activate(x_, HARDSWISH)
                mixing = scores * decay_between(coarse, fine, q)
                step_x = x_ * step[:, None]
                state = states[0]
                y_ = attend(mixing, C_, step_x, state, coarse, fine, not ONE_CHUNK, PRECISION)
                if not ONE_CHUNK:
                    state = advance(state, B_, step_x, coarse, fine, q, Q, PRECISION)
                    states = rotate(states, state)
                y_ += x_ * tl.load(D + head).to(tl.float32)
                z = tl.load(z_at + head * P, mask=inside[:, None], other=0).to(tl.float32)
                y_ *= z * tl.sigmoid(z)
                squares += tl.sum(y_ * y_, 1)
                results = rotate(results, y_)
        rstd_ = tl.rsqrt(squares / I + EPS)
        tl.store(rstd + at, rstd_, mask=inside)
        for h in tl.static_range(H):
            y_ = results[h] * rstd_[:, None] * tl.load(scale + h * P + p).to(tl.float32)
            tl.store(y_at + h * P, y_, mask=inside[:, None])


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

    With more than one chunk, a first pass leaves the state that enters each chunk in `states`
    [B, chunks, H, N, P]; the second goes back and, once it has read a state, leaves the gradient
    of it in its place. The gradient of the convolution's result goes by way of `dconvolved`
    [B, 2 Q or L, M], as positions need that of later ones: of this chunk and the one behind it.
    """
    I: tl.constexpr = H * P
    M: tl.constexpr = I + 2 * G * N
    E: tl.constexpr = I + M + H
    TILE: tl.constexpr = min(P, N)
    row = tl.program_id(0).to(tl.int64)
    q = tl.arange(0, Q)
    p = tl.arange(0, P)
    n = tl.arange(0, N)
    chunks = 1 if ONE_CHUNK else tl.cdiv(length, Q)

    if not ONE_CHUNK:
        for head in tl.range(0, H, disable_licm=True):
            rate = tl.load(A + head).to(tl.float32)
            state = tl.zeros([N, P], tl.float32)
            tl.store(states + scratch_offsets(row * chunks, head, n, p, H, P, N), state)
            for chunk in tl.range(0, chunks - 1, disable_licm=True):
                t = chunk * Q + q
                inside = t < length
                at = row * length + t
                here = projected + at * E
                before = neighbours(segments, at, t, length, W, False, HAS_SEGMENTS)
                restarts = load_restarts(segments, at, t, length, HAS_SEGMENTS)
                _dt, _scale, raw = load_step(
                    here + (E - H), factor, bias, at, inside, head, H, HAS_FACTOR
                )
                step = step_sizes(raw, inside, True, False, 0, 0)
                coarse, fine = total_decays(step, rate, restarts)
                of_B = I + head // (H // G) * N
                n_at = here[:, None] + n[None, :] + I
                p_at = here[:, None] + p[None, :] + I
                B_ = load_convolved(n_at, taps + n, conv_bias + n, of_B, inside, before, M, E, W)
                x_ = load_convolved(
                    p_at, taps + p, conv_bias + p, head * P, inside, before, M, E, W
                )
                step_x = activate(x_, HARDSWISH) * step[:, None]
                B_ = activate(B_, HARDSWISH)
                state = advance(state, B_, step_x, coarse, fine, q, Q, PRECISION)
                where = scratch_offsets(row * chunks + chunk + 1, head, n, p, H, P, N)
                tl.store(states + where, state)

    # Not pipelined: what a chunk reads has been left by the one behind it.
    for behind in tl.range(0, chunks, disable_licm=True, num_stages=1):
        if not ONE_CHUNK:
            # Other threads of this program read what these wrote.
            tl.debug_barrier()
        earlier = behind > 0
        chunk = chunks - 1 - behind
        t = chunk * Q + q
        inside = t < length
        at = row * length + t
        before = neighbours(segments, at, t, length, W, False, HAS_SEGMENTS)
        restarts = load_restarts(segments, at, t, length, HAS_SEGMENTS)
        here = projected + at * E
        there = dprojected + at * E
        p_at = here[:, None] + p[None, :]
        n_at = here[:, None] + n[None, :] + I
        if ONE_CHUNK:
            slot = row * length + t
        else:
            slot = row * (2 * Q) + t % (2 * Q)
        convolved_at = dconvolved + slot * M
        y_at = (at * I)[:, None] + p[None, :]

        rstd_ = tl.load(rstd + at, mask=inside, other=0)
        share = tl.zeros([Q], tl.float32)
        for head in tl.range(0, H, disable_licm=True):
            y_ = tl.load(y + y_at + head * P, mask=inside[:, None], other=0).to(tl.float32)
            dy_ = tl.load(dy + y_at + head * P, mask=inside[:, None], other=0).to(tl.float32)
            share += tl.sum(y_ * dy_, 1)
        share /= I

        for group in tl.range(0, G, disable_licm=True):
            of_B = I + group * N
            of_C = of_B + G * N
            B_ = load_convolved(n_at, taps + n, conv_bias + n, of_B, inside, before, M, E, W)
            C_ = load_convolved(n_at, taps + n, conv_bias + n, of_C, inside, before, M, E, W)
            B_ = activate(B_, HARDSWISH)
            C_ = activate(C_, HARDSWISH)
            scores = tl.dot(C_, tl.trans(B_), input_precision=PRECISION)
            dscores = tl.zeros([Q, Q], tl.float32)
            dB_ = tl.zeros([Q, N], tl.float32)
            dC_ = tl.zeros([Q, N], tl.float32)
            for i in tl.range(0, H // G, disable_licm=True):
                head = group * (H // G) + i
                rate = tl.load(A + head).to(tl.float32)
                skip = tl.load(D + head).to(tl.float32)
                dt_, factor_, raw = load_step(
                    here + (E - H), factor, bias, at, inside, head, H, HAS_FACTOR
                )
                step = step_sizes(raw, inside, True, False, 0, 0)
                coarse, fine = total_decays(step, rate, restarts)
                x_ = load_convolved(
                    p_at + I, taps + p, conv_bias + p, head * P, inside, before, M, E, W
                )
                x_ = activate(x_, HARDSWISH)
                step_x = x_ * step[:, None]
                state_at = states + scratch_offsets(row * chunks + chunk, head, n, p, H, P, N)
                if ONE_CHUNK:
                    state = tl.zeros([N, P], tl.float32)
                else:
                    state = tl.load(state_at)

                # The gate and the norm.
                mixing = scores * decay_between(coarse, fine, q)
                out = attend(mixing, C_, step_x, state, coarse, fine, not ONE_CHUNK, PRECISION)
                out += x_ * skip
                z = tl.load(p_at + head * P, mask=inside[:, None], other=0).to(tl.float32)
                gate = tl.sigmoid(z)
                normed = out * z * gate * rstd_[:, None]
                dy_ = tl.load(dy + y_at + head * P, mask=inside[:, None], other=0).to(tl.float32)
                add_share(dscale + row * I + head * P + p, tl.sum(dy_ * normed, 0), earlier)
                weight = tl.load(scale + head * P + p).to(tl.float32)[None, :]
                dgated = (dy_ * weight - normed * share[:, None]) * rstd_[:, None]
                dz = dgated * out * gate * (1 + z * (1 - gate))
                z_at = there[:, None] + p[None, :] + head * P
                tl.store(z_at, dz, mask=inside[:, None])
                dout = dgated * z * gate

                # The op.
                dstep_x, pairs = attend_backward(scores, step_x, dout, coarse, fine, q, PRECISION)
                dscores += pairs
                # As in the op's kernel.
                to_later = tl.cumsum(pairs * scores, 0, reverse=True)
                dlog_decay = tl.zeros([Q], tl.float32)
                if not ONE_CHUNK:
                    dstate = tl.load(state_at + H * P * N, mask=behind > 0, other=0)
                    to_end, kept = decay_to_end(coarse, fine, q, Q)
                    dstep_x, dB_head = add_backward(dstate, B_, step_x, dstep_x, to_end, PRECISION)
                    dB_ += dB_head
                    to_later += tl.sum(dB_head * B_, 1)[None, :]
                    entering = tl.exp2(coarse + fine)[:, None]
                    dC_head = tl.dot(dout * entering, tl.trans(state), input_precision=PRECISION)
                    dC_ += dC_head
                    dlog_decay += tl.cumsum(tl.sum(dC_head * C_, 1), 0, reverse=True)
                    dlog_decay += kept * tl.sum(tl.sum(state * dstate, 1), 0)
                    seen = tl.trans(C_ * entering)
                    dentering = tl.dot(seen, dout, input_precision=PRECISION)
                    dentering += kept * dstate
                    tl.debug_barrier()  # all threads have read the state
                    tl.store(state_at, dentering)
                dlog_decay += tl.sum(tl.where(q[:, None] > q[None, :], to_later, 0), 1)

                dx = dstep_x * step[:, None] + dout * skip
                convolved = load_convolved(
                    p_at + I, taps + p, conv_bias + p, head * P, inside, before, M, E, W
                )
                dx *= activation_slope(convolved, HARDSWISH)
                x_at = convolved_at[:, None] + p[None, :] + head * P
                tl.store(x_at, dx, mask=inside[:, None])
                dstep = tl.sum(dstep_x * x_, 1) + dlog_decay * rate
                dstep *= step_slopes(raw, True, False, 0, 0)
                dstep = tl.where(inside, dstep, 0)
                tl.store(there + (E - H) + head, dstep * factor_, mask=inside)
                if HAS_FACTOR:
                    tl.store(dfactor + at * H + head, dstep * dt_, mask=inside)
                own = dheads + row * (3 * H) + head
                add_share(own, tl.sum(dlog_decay * step, 0), earlier)
                add_share(own + H, tl.sum(tl.sum(dout * x_, 1), 0), earlier)
                add_share(own + 2 * H, tl.sum(dstep, 0), earlier)

            dB_ += tl.dot(tl.trans(dscores), C_, input_precision=PRECISION)
            dC_ += tl.dot(dscores, B_, input_precision=PRECISION)
            convolved = load_convolved(n_at, taps + n, conv_bias + n, of_B, inside, before, M, E, W)
            dB_ *= activation_slope(convolved, HARDSWISH)
            convolved = load_convolved(n_at, taps + n, conv_bias + n, of_C, inside, before, M, E, W)
            dC_ *= activation_slope(convolved, HARDSWISH)
            B_at = convolved_at[:, None] + n[None, :] + of_B
            tl.store(B_at, dB_, mask=inside[:, None])
            tl.store(B_at + G * N, dC_, mask=inside[:, None])

        tl.debug_barrier()  # all of the chunk is there
        after = neighbours(segments, at, t, length, W, True, HAS_SEGMENTS)
        for tile in tl.range(0, M // TILE, disable_licm=True):
            channel = tile * TILE + tl.arange(0, TILE)
            dmixed = tl.zeros([Q, TILE], tl.float32)
            own_taps = dtaps + row * ((W + 1) * M) + channel
            d = tl.load(convolved_at[:, None] + channel[None, :], mask=inside[:, None], other=0)
            add_share(own_taps + W * M, tl.sum(d, 0), earlier)
            for k in tl.static_range(W):
                tap = tl.load(taps + (W - 1 - k) * M + channel).to(tl.float32)
                seen = inside & (before >= k)
                mixed_at = (here + (I - k * E))[:, None] + channel[None, :]
                mixed = tl.load(mixed_at, mask=seen[:, None], other=0).to(tl.float32)
                add_share(own_taps + (W - 1 - k) * M, tl.sum(d * mixed, 0), earlier)
                if ONE_CHUNK:
                    later = row * length + t + k
                else:
                    later = row * (2 * Q) + (t + k) % (2 * Q)
                seeing = inside & (after >= k)
                later_at = (dconvolved + later * M)[:, None] + channel[None, :]
                dmixed += tap[None, :] * tl.load(later_at, mask=seeing[:, None], other=0)
            tl.store((there + I)[:, None] + channel[None, :], dmixed, mask=inside[:, None])
