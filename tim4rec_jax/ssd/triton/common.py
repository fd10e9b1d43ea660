"""What the Triton kernels of the SSD have in common, as functions of blocks in registers.

Letters as in `tim4rec_jax.ssd.ssd`; Q is the length of a chunk, HEADS the number of heads of a
program. Within a chunk, matrices over pairs of positions are [to q, from k], and states are
[N, P]. All sums are float32. Arrays are dense, with the axes that `ssd` documents.
"""

from typing import no_type_check  # annotations here are for Triton's compiler

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
@no_type_check
def softplus(v):
    """log(1 + exp(v)) with all digits for negative v, where most step sizes are made."""
    e = tl.exp(-tl.abs(v))
    # log(1 + e) = 2 atanh(e / (2 + e)), whose argument is at most 1/3.
    z = e / (2 + e)
    s = z * z
    series = 1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15)))
    series = 1 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * series)))
    return tl.maximum(v, 0) + 2 * z * series


@triton.jit
@no_type_check
def load_raw(dt, bias, at, inside, head, H: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The steps [Q] of a head as they came, plus bias."""
    raw = tl.load(dt + at * H + head, mask=inside, other=0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias + head).to(tl.float32)
    return raw


@triton.jit
@no_type_check
def step_sizes(raw, inside, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, LOW, HIGH):
    """Steps ready to use; past the end of the sequence 0, which changes nothing."""
    step = softplus(raw) if SOFTPLUS else raw
    if LIMITED:
        step = tl.minimum(tl.maximum(step, LOW), HIGH)
    return tl.where(inside, step, 0)


@triton.jit
@no_type_check
def step_slopes(raw, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, LOW, HIGH):
    """Derivatives of `step_sizes`."""
    slope = tl.sigmoid(raw) if SOFTPLUS else tl.full(raw.shape, 1, tl.float32)
    if LIMITED:
        step = softplus(raw) if SOFTPLUS else raw
        slope = tl.where((step >= LOW) & (step <= HIGH), slope, 0)
    return slope


@triton.jit
@no_type_check
def load_restarts(segments, at, t, length, HAS_SEGMENTS: tl.constexpr):
    """Whether each position of the chunk forgets the state before it."""
    if HAS_SEGMENTS:
        follows = (t > 0) & (t < length)
        here = tl.load(segments + at, mask=follows, other=0)
        restarts = here != tl.load(segments + at - 1, mask=follows, other=0)
    else:
        restarts = tl.full(t.shape, 0, tl.int1)
    return restarts


@triton.jit
@no_type_check
def total_decays(step, rate, restarts):
    """Sums of the base-2 logarithms of decays up to each position, in two parts.

    Multiples of 1/16 add up without rounding and the rests stay small: a step of 0.01 next to
    steps of 80 keeps its digits, which it would lose in one float32 sum.
    """
    # 2 ** -1400 is 0 in float32. Bounded so, the decays of a chunk add up exactly.
    log_decay = tl.where(restarts, -1400, tl.maximum(step * (rate * LOG2E), -1400))
    coarse = tl.floor(log_decay * 16 + 0.5) / 16
    return tl.cumsum(coarse, 0), tl.cumsum(log_decay - coarse, 0)


@triton.jit
@no_type_check
def decay_between(coarse, fine, q):
    """[to, from]: what is left at a position of what another, not later, one added."""
    difference = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    # Masked before exp2: beyond the diagonal it may overflow.
    return tl.exp2(tl.where(q[:, None] >= q[None, :], difference, -float("inf")))


@triton.jit
@no_type_check
def decay_to_end(coarse, fine, q, Q: tl.constexpr):
    """What is left at the end of the chunk of what each position added, and of the state before."""
    last_coarse = tl.sum(tl.where(q == Q - 1, coarse, 0), 0)
    last_fine = tl.sum(tl.where(q == Q - 1, fine, 0), 0)
    return tl.exp2((last_coarse - coarse) + (last_fine - fine)), tl.exp2(last_coarse + last_fine)


@triton.jit
@no_type_check
def load_rows(array, at, inside, row, column, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Row `row` of ROWS at each position: [Q, WIDTH]."""
    where = (at * ROWS + row)[:, None] * WIDTH + column[None, :]
    return tl.load(array + where, mask=inside[:, None], other=0).to(tl.float32)


@triton.jit
@no_type_check
def state_offsets(row, head, n, p, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """Places of a state [N, P] in an array [row, H, P, N]."""
    return ((row * H + head) * P + p[None, :]) * N + n[:, None]


@triton.jit
@no_type_check
def scratch_offsets(chunk, head, n, p, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """Places of a state [N, P] in an array [chunk, H, N, P]."""
    return ((chunk * H + head) * N + n[:, None]) * P + p[None, :]


@triton.jit
@no_type_check
def attend(mixing, C, step_x, state, coarse, fine, STATEFUL: tl.constexpr, PRECISION):
    """What positions see of each other and, if STATEFUL, of the state before them: [Q, P]."""
    y = tl.dot(mixing, step_x, input_precision=PRECISION)
    if STATEFUL:
        seen = C * tl.exp2(coarse + fine)[:, None]
        y += tl.dot(seen, state, input_precision=PRECISION)
    return y


@triton.jit
@no_type_check
def advance(state, B, step_x, coarse, fine, q, Q: tl.constexpr, PRECISION):
    """The state after the chunk."""
    to_end, kept = decay_to_end(coarse, fine, q, Q)
    added = tl.trans(B * to_end[:, None])
    return kept * state + tl.dot(added, step_x, input_precision=PRECISION)


@triton.jit
@no_type_check
def attend_backward(scores, step_x, dy, coarse, fine, q, PRECISION):
    """Gradients by what positions see of each other: of step_x [Q, P] and scores [Q, Q]."""
    decay = decay_between(coarse, fine, q)
    dstep_x = tl.dot(tl.trans(scores * decay), dy, input_precision=PRECISION)
    return dstep_x, tl.dot(dy, tl.trans(step_x), input_precision=PRECISION) * decay


@triton.jit
@no_type_check
def add_backward(dstate, B, step_x, dstep_x, to_end, PRECISION):
    """Gradients by what the chunk adds to the state: dstep_x [Q, P] with it, and of B [Q, N]."""
    dstep_x += tl.dot(B * to_end[:, None], dstate, input_precision=PRECISION)
    dB = tl.dot(step_x * to_end[:, None], tl.trans(dstate), input_precision=PRECISION)
    return dstep_x, dB
