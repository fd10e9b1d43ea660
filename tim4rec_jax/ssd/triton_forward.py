"""The forward kernel of the SSD (arXiv 2405.21060) in Triton.

A program takes one row of the batch and some heads of one group, and goes through the sequence
chunk by chunk with the heads' states in registers. The heads share the product of C and B. All that
is quadratic in the chunk lives and dies in the program. Letters as in `triton_parts`.
"""

from typing import no_type_check  # annotations here are for Triton's compiler

import triton
import triton.language as tl

from tim4rec_jax.ssd.triton_parts import (
    advance,
    attend,
    decay_between,
    load_raw,
    load_restarts,
    load_rows,
    state_offsets,
    step_sizes,
    total_decays,
)


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
