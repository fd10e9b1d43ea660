"""The kernels of the SSD (arXiv 2405.21060) in Triton, forward and backward."""

from typing import no_type_check  # annotations here are for Triton's compiler

import triton
import triton.language as tl

from tim4rec_jax.ssd.triton.common import (
    add_backward,
    advance,
    attend,
    attend_backward,
    decay_between,
    decay_to_end,
    load_raw,
    load_restarts,
    load_rows,
    scratch_offsets,
    state_offsets,
    step_sizes,
    step_slopes,
    total_decays,
)

# ---- ssd.triton_forward
# The forward kernel of the SSD (arXiv 2405.21060) in Triton.
#
# A program takes one row of the batch and some heads of one group, and goes through the sequence
# chunk by chunk with the heads' states in registers. The heads share the product of C and B. All that
# is quadratic in the chunk lives and dies in the program. Letters as in `triton_parts`.


@triton.jit
@no_type_check
def forward(
    x,
    dt,
    A,
    B,
    C,
    D,
    bias,
    initial,
    segments,
    length,
    y,
    final,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    HEADS: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    HAS_D: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes y and, if HAS_FINAL, the state after the last position.

    Arrays whose HAS_ flag is off are never read. The grid is one axis of B * H / HEADS programs.
    """
    program = tl.program_id(0)
    row = (program // (H // HEADS)).to(tl.int64)
    first = (program % (H // HEADS)) * HEADS
    HAS_STATE: tl.constexpr = HAS_INITIAL or not ONE_CHUNK
    group = first // (H // G)
    q = tl.arange(0, Q)
    p = tl.arange(0, P)
    n = tl.arange(0, N)

    states = ()
    for i in tl.static_range(HEADS):
        if HAS_INITIAL:
            state = tl.load(initial + state_offsets(row, first + i, n, p, H, P, N)).to(tl.float32)
        else:
            state = tl.zeros([N, P], tl.float32)
        states += (state,)

    for chunk in tl.range(0, 1 if ONE_CHUNK else tl.cdiv(length, Q), disable_licm=True):
        t = chunk * Q + q
        inside = t < length
        at = row * length + t
        B_ = load_rows(B, at, inside, group, n, G, N)
        C_ = load_rows(C, at, inside, group, n, G, N)
        scores = tl.dot(C_, tl.trans(B_), input_precision=PRECISION)
        restarts = load_restarts(segments, at, t, length, HAS_SEGMENTS)
        leaving = ()
        for i in tl.static_range(HEADS):
            head = first + i
            raw = load_raw(dt, bias, at, inside, head, H, HAS_BIAS)
            step = step_sizes(raw, inside, SOFTPLUS, LIMITED, LOW, HIGH)
            rate = tl.load(A + head).to(tl.float32)
            coarse, fine = total_decays(step, rate, restarts)
            x_ = load_rows(x, at, inside, head, p, H, P)
            state = states[i]

            mixing = scores * decay_between(coarse, fine, q)
            step_x = x_ * step[:, None]
            y_ = attend(mixing, C_, step_x, state, coarse, fine, HAS_STATE, PRECISION)
            if HAS_FINAL or not ONE_CHUNK:
                state = advance(state, B_, step_x, coarse, fine, q, Q, PRECISION)
            leaving += (state,)
            if HAS_D:
                if D_PER_CHANNEL:
                    y_ += x_ * tl.load(D + head * P + p).to(tl.float32)[None, :]
                else:
                    y_ += x_ * tl.load(D + head).to(tl.float32)
            where = (at * H + head)[:, None] * P + p[None, :]
            tl.store(y + where, y_, mask=inside[:, None])
        states = leaving

    if HAS_FINAL:
        for i in tl.static_range(HEADS):
            tl.store(final + state_offsets(row, first + i, n, p, H, P, N), states[i])


# ---- ssd.triton_backward
# The backward kernel of the SSD (arXiv 2405.21060) in Triton.
#
# A program takes one row of the batch and some heads of one group, as in the forward kernel, and
# computes again what was quadratic in the chunk. Letters as in `triton_parts`.


@triton.jit
@no_type_check
def backward(
    x,
    dt,
    A,
    B,
    C,
    D,
    bias,
    initial,
    segments,
    dy,
    dfinal,
    length,
    dx,
    ddt,
    dA,
    dB,
    dC,
    dD,
    dinitial,
    scratch,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    HEADS: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    HAS_D: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the gradients of all inputs from those of y and, if HAS_FINAL, the final state.

    What several programs or chunks have a share in leaves in shares, to be summed by the caller
    in a fixed order: dA [B, chunks, H] and dD [B, chunks, H(, P)] of the chunks, dB and dC
    [B, L, H / HEADS, N] of the heads. The gradient of the bias is the sum of ddt.

    With more than one chunk, a first pass leaves the state that enters each chunk in `scratch`
    [B, chunks, H, P, N]; the second goes back and, once it has read a state, leaves the gradient
    of it in its place. The heads are a loop, as their registers together would not suffice.
    """
    program = tl.program_id(0)
    row = (program // (H // HEADS)).to(tl.int64)
    part = program % (H // HEADS)
    first = part * HEADS
    group = first // (H // G)
    q = tl.arange(0, Q)
    p = tl.arange(0, P)
    n = tl.arange(0, N)
    chunks = 1 if ONE_CHUNK else tl.cdiv(length, Q)

    if not ONE_CHUNK:
        for i in tl.range(0, HEADS, disable_licm=True):
            head = first + i
            rate = tl.load(A + head).to(tl.float32)
            if HAS_INITIAL:
                state = tl.load(initial + state_offsets(row, head, n, p, H, P, N)).to(tl.float32)
            else:
                state = tl.zeros([N, P], tl.float32)
            tl.store(scratch + scratch_offsets(row * chunks, head, n, p, H, P, N), state)
            for chunk in tl.range(0, chunks - 1, disable_licm=True):
                t = chunk * Q + q
                inside = t < length
                at = row * length + t
                restarts = load_restarts(segments, at, t, length, HAS_SEGMENTS)
                raw = load_raw(dt, bias, at, inside, head, H, HAS_BIAS)
                step = step_sizes(raw, inside, SOFTPLUS, LIMITED, LOW, HIGH)
                coarse, fine = total_decays(step, rate, restarts)
                B_ = load_rows(B, at, inside, group, n, G, N)
                step_x = load_rows(x, at, inside, head, p, H, P) * step[:, None]
                state = advance(state, B_, step_x, coarse, fine, q, Q, PRECISION)
                where = scratch_offsets(row * chunks + chunk + 1, head, n, p, H, P, N)
                tl.store(scratch + where, state)

    # Not pipelined: a state must not be loaded before the chunk after it has left it.
    for behind in tl.range(0, chunks, disable_licm=True, num_stages=1):
        if not ONE_CHUNK:
            # Other threads of this program read what these wrote.
            tl.debug_barrier()
        chunk = chunks - 1 - behind
        t = chunk * Q + q
        inside = t < length
        at = row * length + t
        B_ = load_rows(B, at, inside, group, n, G, N)
        C_ = load_rows(C, at, inside, group, n, G, N)
        scores = tl.dot(C_, tl.trans(B_), input_precision=PRECISION)
        restarts = load_restarts(segments, at, t, length, HAS_SEGMENTS)
        dscores = tl.zeros([Q, Q], tl.float32)
        dB_ = tl.zeros([Q, N], tl.float32)
        dC_ = tl.zeros([Q, N], tl.float32)
        for i in tl.range(0, HEADS, disable_licm=True):
            head = first + i
            rate = tl.load(A + head).to(tl.float32)
            raw = load_raw(dt, bias, at, inside, head, H, HAS_BIAS)
            step = step_sizes(raw, inside, SOFTPLUS, LIMITED, LOW, HIGH)
            coarse, fine = total_decays(step, rate, restarts)
            x_ = load_rows(x, at, inside, head, p, H, P)
            dy_ = load_rows(dy, at, inside, head, p, H, P)

            step_x = x_ * step[:, None]
            dstep_x, pairs = attend_backward(scores, step_x, dy_, coarse, fine, q, PRECISION)
            dscores += pairs
            # Position t decays what goes from k < t to q >= t. Sums over these rectangles keep
            # digits that differences of row and column sums would lose.
            to_later = tl.cumsum(pairs * scores, 0, reverse=True)
            dlog_decay = tl.zeros([Q], tl.float32)

            here = scratch_offsets(row * chunks + chunk, head, n, p, H, P, N)
            own = state_offsets(row, head, n, p, H, P, N)
            if HAS_FINAL or not ONE_CHUNK:
                dstate = tl.zeros([N, P], tl.float32)
                if HAS_FINAL:
                    dstate += tl.load(dfinal + own, mask=behind == 0, other=0)
                if not ONE_CHUNK:
                    dstate += tl.load(scratch + here + H * P * N, mask=behind > 0, other=0)
                to_end, kept = decay_to_end(coarse, fine, q, Q)
                dstep_x, dB_head = add_backward(dstate, B_, step_x, dstep_x, to_end, PRECISION)
                dB_ += dB_head
                to_later += tl.sum(dB_head * B_, 1)[None, :]
            if HAS_INITIAL or not ONE_CHUNK:
                if ONE_CHUNK:
                    state = tl.load(initial + own).to(tl.float32)
                else:
                    state = tl.load(scratch + here)
                entering = tl.exp2(coarse + fine)[:, None]
                dC_head = tl.dot(dy_ * entering, tl.trans(state), input_precision=PRECISION)
                dC_ += dC_head
                dlog_decay += tl.cumsum(tl.sum(dC_head * C_, 1), 0, reverse=True)
                seen = tl.trans(C_ * entering)
                dentering = tl.dot(seen, dy_, input_precision=PRECISION)
                if HAS_FINAL or not ONE_CHUNK:
                    dlog_decay += kept * tl.sum(tl.sum(state * dstate, 1), 0)
                    dentering += kept * dstate
                if HAS_INITIAL:
                    tl.store(dinitial + own, dentering, mask=chunk == 0)
                if not ONE_CHUNK:
                    tl.debug_barrier()  # all threads have read the state
                    tl.store(scratch + here, dentering)
            dlog_decay += tl.sum(tl.where(q[:, None] > q[None, :], to_later, 0), 1)

            dx_ = dstep_x * step[:, None]
            if HAS_D:
                shares = dy_ * x_
                where = (row * chunks + chunk) * H + head
                if D_PER_CHANNEL:
                    dx_ += dy_ * tl.load(D + head * P + p).to(tl.float32)[None, :]
                    tl.store(dD + where * P + p, tl.sum(shares, 0))
                else:
                    dx_ += dy_ * tl.load(D + head).to(tl.float32)
                    tl.store(dD + where, tl.sum(tl.sum(shares, 1), 0))
            where = (at * H + head)[:, None] * P + p[None, :]
            tl.store(dx + where, dx_, mask=inside[:, None])
            dstep = tl.sum(dstep_x * x_, 1) + dlog_decay * rate
            dstep *= step_slopes(raw, SOFTPLUS, LIMITED, LOW, HIGH)
            tl.store(ddt + at * H + head, dstep, mask=inside)
            tl.store(dA + (row * chunks + chunk) * H + head, tl.sum(dlog_decay * step, 0))
        dB_ += tl.dot(tl.trans(dscores), C_, input_precision=PRECISION)
        dC_ += tl.dot(dscores, B_, input_precision=PRECISION)
        where = (at * (H // HEADS) + part)[:, None] * N + n[None, :]
        tl.store(dB + where, dB_, mask=inside[:, None])
        tl.store(dC + where, dC_, mask=inside[:, None])
