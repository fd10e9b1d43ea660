"""The kernels of the SSD (arXiv 2405.21060) in Triton, forward and backward.

A program takes one row of the batch and HEADS heads of one group. It goes through the sequence
chunk by chunk, and the heads share the product of C and B. All that is quadratic in the chunk lives
and dies in the program. Letters are those of `common`, and `S` is an `op.Specialisation`.
"""

from typing import Any, NamedTuple, no_type_check  # Triton reads the annotations of kernels

import triton
import triton.language as tl

from tim4rec_jax.ssd.triton.common import (
    advance,
    attend_backward,
    decay_from_start,
    decay_to_end,
    load_restarts,
    load_tile,
    log_decays,
    operand,
    pair_columns,
    pair_rows,
    paired,
    paired_decay_between,
    product,
    scratch_offsets,
    softplus,
    unpair_columns,
    unpair_transposed,
)


class Inputs(NamedTuple):
    """Pointers to the inputs of the op. Those whose HAS_ flag is off are never read."""

    x: Any  # [B, L, H, P]
    dt: Any  # [B, L, H]
    A: Any  # [H]
    B: Any  # [B, L, G, N]
    C: Any  # [B, L, G, N]
    D: Any  # [H], or [H, P] if D_PER_CHANNEL
    dt_bias: Any  # [H]
    initial_state: Any  # [B, H, P, N]
    segments: Any  # [B, L]


class Chunk(NamedTuple):
    """The positions of a chunk, each [Q]."""

    at: Any  # number of the position in its row
    inside: Any  # whether it is a position of the sequence
    restarts: Any  # whether it forgets the state before it


@triton.jit
@no_type_check
def store_tile(array, rows, inside, column, value):
    """Stores what `load_tile` loads."""
    where = rows[:, None] + column[None, :]  # first, which takes fewer registers here
    tl.store(array + where, value, mask=inside[:, None])


@triton.jit
@no_type_check
def locate_program(S: tl.constexpr):
    """The row of the batch, the part of its heads, the first of these heads, and their group."""
    PARTS: tl.constexpr = S.H // S.HEADS
    row, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    first = part * S.HEADS
    return row.to(tl.int64), part, first, first // (S.H // S.G)


@triton.jit
@no_type_check
def from_row(v, row, length, S: tl.constexpr):
    """The inputs from this row on: offsets within a row are small numbers."""
    at = row * length
    B, C = v.B + at * (S.G * S.N), v.C + at * (S.G * S.N)
    x, dt, segments = v.x + at * (S.H * S.P), v.dt + at * S.H, v.segments + at
    return Inputs(x, dt, v.A, B, C, v.D, v.dt_bias, v.initial_state, segments)


@triton.jit
@no_type_check
def locate_chunk(v, chunk, length, S: tl.constexpr):
    """The positions of a chunk."""
    t = chunk * S.Q + tl.arange(0, S.Q)
    return Chunk(t, t < length, load_restarts(v.segments, t, t, length, S))


@triton.jit
@no_type_check
def load_projections(array, chunk, group, S: tl.constexpr):
    """B or C of a group: [Q, N]."""
    return load_tile(array, (chunk.at * S.G + group) * S.N, chunk.inside, tl.arange(0, S.N))


@triton.jit
@no_type_check
def load_channels(array, chunk, head, S: tl.constexpr):
    """X or dy of a head: [Q, P]."""
    return load_tile(array, (chunk.at * S.H + head) * S.P, chunk.inside, tl.arange(0, S.P))


@triton.jit
@no_type_check
def state_offsets(row, head, S: tl.constexpr):
    """Offsets of a state [N, P] in an array [B, H, P, N]."""
    n, p = tl.arange(0, S.N), tl.arange(0, S.P)
    return ((row * S.H + head) * S.P + p[None, :]) * S.N + n[:, None]


@triton.jit
@no_type_check
def paired_state_offsets(row, head, S: tl.constexpr):
    """Offsets of a state [P, N], its columns paired, in an array [B, H, P, N]."""
    n, p = paired(tl.arange(0, S.N)), tl.arange(0, S.P)
    return ((row * S.H + head) * S.P + p[:, None]) * S.N + n[None, :]


@triton.jit
@no_type_check
def load_initial_state(v, where, S: tl.constexpr):
    """The state before the first position."""
    if S.HAS_INITIAL:
        state = tl.load(v.initial_state + where).to(tl.float32)
    else:
        state = tl.zeros(where.shape, tl.float32)
    return state


@triton.jit
@no_type_check
def load_steps(v, chunk, head, S: tl.constexpr):
    """A head's step sizes before softplus and limits, and ready to use: [Q] each.

    Past the end of the sequence they are 0, which changes nothing.
    """
    raw = tl.load(v.dt + chunk.at * S.H + head, mask=chunk.inside, other=0).to(tl.float32)
    if S.HAS_BIAS:
        raw += tl.load(v.dt_bias + head).to(tl.float32)
    step = softplus(raw) if S.SOFTPLUS else raw
    if S.LIMITED:
        step = tl.minimum(tl.maximum(step, S.LOW), S.HIGH)
    return raw, tl.where(chunk.inside, step, 0)


@triton.jit
@no_type_check
def step_slopes(raw, S: tl.constexpr):
    """Derivatives of the step sizes that are ready to use by those before softplus and limits."""
    slope = tl.sigmoid(raw) if S.SOFTPLUS else tl.full(raw.shape, 1, tl.float32)
    if S.LIMITED:
        step = softplus(raw) if S.SOFTPLUS else raw
        slope = tl.where((step >= S.LOW) & (step <= S.HIGH), slope, 0)
    return slope


@triton.jit
@no_type_check
def load_skip(v, head, S: tl.constexpr):
    """D of a head: a number, or [1, P]."""
    if S.D_PER_CHANNEL:
        D = tl.load(v.D + head * S.P + tl.arange(0, S.P)).to(tl.float32)[None, :]
    else:
        D = tl.load(v.D + head).to(tl.float32)
    return D


@triton.jit
@no_type_check
def forward(
    x, dt, A, B, C, D, dt_bias, initial_state, segments, length, y, final_state, S: tl.constexpr
):
    """Writes y [B, L, H, P] and, if HAS_FINAL, the state [B, H, P, N] after the last position.

    The states stay in registers. The grid is one axis of B * H / HEADS programs.
    """
    v = Inputs(x, dt, A, B, C, D, dt_bias, initial_state, segments)
    row, _part, first, group = locate_program(S)
    v = from_row(v, row, length, S)
    y += row * length * (S.H * S.P)
    q, p = tl.arange(0, S.Q), tl.arange(0, S.P)
    k = paired(q)

    states = ()
    for i in tl.static_range(S.HEADS):
        states += (load_initial_state(v, paired_state_offsets(row, first + i, S), S),)

    for c in tl.range(0, tl.cdiv(length, S.Q) if S.SEVERAL_CHUNKS else 1, disable_licm=True):
        chunk = locate_chunk(v, c, length, S)
        B_ = load_projections(v.B, chunk, group, S)
        C_ = operand(load_projections(v.C, chunk, group, S), S)
        none = tl.zeros([S.Q, S.Q], tl.float32)
        scores = product(C_, operand(tl.trans(pair_rows(B_)), S), none, S)
        added = pair_columns(B_)
        leaving = ()
        for i in tl.static_range(S.HEADS):
            head = first + i
            _raw, step = load_steps(v, chunk, head, S)
            total = log_decays(step, tl.load(v.A + head).to(tl.float32), chunk.restarts)
            # A sum over one number keeps the compiler from computing the steps anew for each use.
            step = tl.sum(step[:, None], 1)
            x_ = load_channels(v.x, chunk, head, S)
            mixing = scores * paired_decay_between(total, S) * pair_columns(step[None, :])
            if S.HAS_D and not S.D_PER_CHANNEL:
                mixing += tl.where(q[:, None] == k[None, :], load_skip(v, head, S), 0)
            state = states[i]
            y_ = tl.zeros([S.Q, S.P], tl.float32)
            if S.HAS_ENTERING_STATE:
                y_ = product(C_, operand(unpair_transposed(state), S), y_, S)
                y_ *= decay_from_start(total)[:, None]
            y_ = product(operand(unpair_columns(mixing), S), operand(x_, S), y_, S)
            if S.HAS_LEAVING_STATE:
                to_end, kept = decay_to_end(total, S)
                from_here = operand(added * (to_end * step)[:, None], S)
                state = product(operand(tl.trans(x_), S), from_here, kept * state, S)
            leaving += (state,)
            if S.D_PER_CHANNEL:
                y_ += x_ * load_skip(v, head, S)
            store_tile(y, (chunk.at * S.H + head) * S.P, chunk.inside, p, y_)
        states = leaving

    if S.HAS_FINAL:
        for i in tl.static_range(S.HEADS):
            tl.store(final_state + paired_state_offsets(row, first + i, S), states[i])


@triton.jit
@no_type_check
def leave_states(v, states, row, first, group, length, chunks, S: tl.constexpr):
    """Leaves the state that enters each chunk in `states`, as the forward kernel computed it."""
    for i in tl.range(0, S.HEADS, disable_licm=True):
        head = first + i
        rate = tl.load(v.A + head).to(tl.float32)
        state = load_initial_state(v, state_offsets(row, head, S), S)
        tl.store(states + scratch_offsets(row * chunks, head, S), state)
        for c in tl.range(0, chunks - 1, disable_licm=True):
            chunk = locate_chunk(v, c, length, S)
            _raw, step = load_steps(v, chunk, head, S)
            total = log_decays(step, rate, chunk.restarts)
            B_ = load_projections(v.B, chunk, group, S)
            step_x = load_channels(v.x, chunk, head, S) * step[:, None]
            state = advance(state, B_, step_x, total, S)
            tl.store(states + scratch_offsets(row * chunks + c + 1, head, S), state)


@triton.jit
@no_type_check
def backward(
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    initial_state,
    segments,
    dy,
    dfinal_state,
    length,
    dx,
    ddt,
    dA,
    dB,
    dC,
    dD,
    dinitial_state,
    states,
    S: tl.constexpr,
):
    """Writes the gradients of all inputs from those of y and, if HAS_FINAL, the final state.

    The caller sums what several programs or chunks have a share in, in a fixed order: dA
    [B, chunks, H] and dD [B, chunks, H(, P)] have a share for each chunk, dB and dC
    [B, L, H / HEADS, N] one for each program of a row. The gradient of the bias is the sum of ddt.

    `states` [B, chunks, H, N, P] is the kernel's own memory where there are several chunks. A first
    pass leaves the state that enters each chunk there. The second pass goes from the last chunk to
    the first. Once it has read a state, it leaves the gradient of that state in its place.

    The heads are a loop, as registers do not suffice for all of them at once. The grid is that of
    `forward`.
    """
    v = Inputs(x, dt, A, B, C, D, dt_bias, initial_state, segments)
    row, part, first, group = locate_program(S)
    v = from_row(v, row, length, S)
    at = row * length
    dy += at * (S.H * S.P)
    dx += at * (S.H * S.P)
    ddt += at * S.H
    dB += at * (S.H // S.HEADS * S.N)
    dC += at * (S.H // S.HEADS * S.N)
    q, p = tl.arange(0, S.Q), tl.arange(0, S.P)
    chunks = tl.cdiv(length, S.Q) if S.SEVERAL_CHUNKS else 1
    if S.SEVERAL_CHUNKS:
        leave_states(v, states, row, first, group, length, chunks, S)

    # Not pipelined: a state must not be loaded before the chunk after it has left it.
    for behind in tl.range(0, chunks, disable_licm=True, num_stages=1):
        if S.SEVERAL_CHUNKS:
            # Other threads of this program read what these wrote.
            tl.debug_barrier()
        c = chunks - 1 - behind
        chunk = locate_chunk(v, c, length, S)
        B_ = load_projections(v.B, chunk, group, S)
        C_ = load_projections(v.C, chunk, group, S)
        scores = tl.dot(C_, tl.trans(B_), input_precision=S.PRECISION)
        dscores = tl.zeros([S.Q, S.Q], tl.float32)
        dB_ = tl.zeros([S.Q, S.N], tl.float32)
        dC_ = tl.zeros([S.Q, S.N], tl.float32)
        for i in tl.range(0, S.HEADS, disable_licm=True):
            head = first + i
            rate = tl.load(v.A + head).to(tl.float32)
            raw, step = load_steps(v, chunk, head, S)
            total = log_decays(step, rate, chunk.restarts)
            x_ = load_channels(v.x, chunk, head, S)
            dy_ = load_channels(dy, chunk, head, S)

            step_x = x_ * step[:, None]
            dstep_x, pairs = attend_backward(scores, step_x, dy_, total, S)
            dscores += pairs
            # Position t decays what goes from k < t to q >= t. Sums over these rectangles keep
            # digits that differences of row and column sums would lose.
            to_later = tl.cumsum(pairs * scores, 0, reverse=True)
            dlog_decay = tl.zeros([S.Q], tl.float32)

            here = states + scratch_offsets(row * chunks + c, head, S)
            own = state_offsets(row, head, S)
            if S.HAS_LEAVING_STATE:
                dstate = tl.zeros([S.N, S.P], tl.float32)
                if S.HAS_FINAL:
                    dstate += tl.load(dfinal_state + own, mask=behind == 0, other=0)
                if S.SEVERAL_CHUNKS:
                    dstate += tl.load(here + S.H * S.P * S.N, mask=behind > 0, other=0)
                to_end, kept = decay_to_end(total, S)
                dstep_x += tl.dot(B_ * to_end[:, None], dstate, input_precision=S.PRECISION)
                left = step_x * to_end[:, None]
                dB_head = tl.dot(left, tl.trans(dstate), input_precision=S.PRECISION)
                dB_ += dB_head
                to_later += tl.sum(dB_head * B_, 1)[None, :]
            if S.HAS_ENTERING_STATE:
                if S.SEVERAL_CHUNKS:
                    state = tl.load(here)
                else:
                    state = tl.load(initial_state + own).to(tl.float32)
                entering = decay_from_start(total)[:, None]
                dC_head = tl.dot(dy_ * entering, tl.trans(state), input_precision=S.PRECISION)
                dC_ += dC_head
                dlog_decay += tl.cumsum(tl.sum(dC_head * C_, 1), 0, reverse=True)
                seen = tl.trans(C_ * entering)
                dentering = tl.dot(seen, dy_, input_precision=S.PRECISION)
                if S.HAS_LEAVING_STATE:
                    dlog_decay += kept * tl.sum(tl.sum(state * dstate, 1), 0)
                    dentering += kept * dstate
                if S.HAS_INITIAL:
                    tl.store(dinitial_state + own, dentering, mask=c == 0)
                if S.SEVERAL_CHUNKS:
                    tl.debug_barrier()  # all threads have read the state
                    tl.store(here, dentering)
            dlog_decay += tl.sum(tl.where(q[:, None] > q[None, :], to_later, 0), 1)

            dx_ = dstep_x * step[:, None]
            if S.HAS_D:
                share = (row * chunks + c) * S.H + head
                dx_ += dy_ * load_skip(v, head, S)
                if S.D_PER_CHANNEL:
                    tl.store(dD + share * S.P + p, tl.sum(dy_ * x_, 0))
                else:
                    tl.store(dD + share, tl.sum(tl.sum(dy_ * x_, 1), 0))
            store_tile(dx, (chunk.at * S.H + head) * S.P, chunk.inside, p, dx_)
            dstep = tl.sum(dstep_x * x_, 1) + dlog_decay * rate
            dstep *= step_slopes(raw, S)
            tl.store(ddt + chunk.at * S.H + head, dstep, mask=chunk.inside)
            tl.store(dA + (row * chunks + c) * S.H + head, tl.sum(dlog_decay * step, 0))
        dB_ += tl.dot(tl.trans(dscores), C_, input_precision=S.PRECISION)
        dC_ += tl.dot(dscores, B_, input_precision=S.PRECISION)
        rows = (chunk.at * (S.H // S.HEADS) + part) * S.N
        store_tile(dB, rows, chunk.inside, tl.arange(0, S.N), dB_)
        store_tile(dC, rows, chunk.inside, tl.arange(0, S.N), dC_)
