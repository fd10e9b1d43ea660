"""The kernels of the SSD (arXiv 2405.21060) in Triton, forward and backward.

A program takes one row of the batch and HEADS heads of one group. It goes through the sequence
chunk by chunk, and the heads share the product of C and B. All that is quadratic in the chunk lives
and dies in the program. Letters are those of `common`, and `S` is an `op.Specialisation`.
"""

from typing import Any, NamedTuple, no_type_check  # Triton reads the annotations of kernels

import triton
import triton.language as tl

from tim4rec_jax.ssd.triton.common import (
    add_product,
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
def score(v, chunk, group, S: tl.constexpr):
    """The products of C and B, [to, from] with paired columns."""
    B_ = tl.trans(pair_rows(load_projections(v.B, chunk, group, S)))
    C_ = load_projections(v.C, chunk, group, S)
    return product(operand(C_, S), operand(B_, S), S)


@triton.jit
@no_type_check
def load_channels(array, chunk, head, S: tl.constexpr):
    """X or dy of a head: [Q, P]."""
    return load_tile(array, (chunk.at * S.H + head) * S.P, chunk.inside, tl.arange(0, S.P))


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
        scores = product(C_, operand(tl.trans(pair_rows(B_)), S), S)
        added = pair_columns(B_)
        leaving = ()
        for i in tl.static_range(S.HEADS):
            head = first + i
            _raw, step = load_steps(v, chunk, head, S)
            total = log_decays(step, tl.load(v.A + head).to(tl.float32), chunk.restarts)
            # A sum over one number keeps the compiler from computing the steps anew for each use.
            step = tl.sum(step[:, None], 1)
            x_ = load_channels(v.x, chunk, head, S)
            mixing = scores * paired_decay_between(total, False, S) * pair_columns(step[None, :])
            if S.HAS_D and not S.D_PER_CHANNEL:
                mixing += tl.where(q[:, None] == k[None, :], load_skip(v, head, S), 0)
            state = states[i]
            y_ = tl.zeros([S.Q, S.P], tl.float32)
            if S.HAS_ENTERING_STATE:
                y_ = product(C_, operand(unpair_transposed(state), S), S)
                y_ *= decay_from_start(total)[:, None]
            y_ = add_product(y_, operand(unpair_columns(mixing), S), operand(x_, S), S)
            if S.HAS_LEAVING_STATE:
                to_end, kept = decay_to_end(total, S)
                from_here = operand(added * (to_end * step)[:, None], S)
                state = add_product(kept * state, operand(tl.trans(x_), S), from_here, S)
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
def leave_states(v, dfinal_state, states, row, first, group, length, chunks, S: tl.constexpr):
    """Leaves the state that enters each chunk in `states`, as the forward kernel computed it.

    Behind these comes the gradient of the state after the last chunk.
    """
    own = tl.arange(0, S.P)[:, None] * S.N + tl.arange(0, S.N)[None, :]
    for i in tl.range(0, S.HEADS, disable_licm=True):
        head = first + i
        rate = tl.load(v.A + head).to(tl.float32)
        here = states + (row * (chunks + 1) * S.H + head) * (S.P * S.N)
        state = load_initial_state(v, (row * S.H + head) * (S.P * S.N) + own, S)
        tl.store(here + own, state)
        for c in tl.range(0, chunks - 1, disable_licm=True):
            chunk = locate_chunk(v, c, length, S)
            _raw, step = load_steps(v, chunk, head, S)
            to_end, kept = decay_to_end(log_decays(step, rate, chunk.restarts), S)
            B_ = load_projections(v.B, chunk, group, S) * (to_end * step)[:, None]
            x_ = operand(tl.trans(load_channels(v.x, chunk, head, S)), S)
            state = add_product(kept * state, x_, operand(B_, S), S)
            here += S.H * S.P * S.N
            tl.store(here + own, state)
        if S.HAS_FINAL:
            dstate = tl.load(dfinal_state + (row * S.H + head) * (S.P * S.N) + own)
        else:
            dstate = tl.zeros([S.P, S.N], tl.float32)
        tl.store(here + S.H * S.P * S.N + own, dstate)


@triton.jit
@no_type_check
def load_entering(initial_state, here, S: tl.constexpr):
    """The state before a chunk, which `leave_states` has left if there are several."""
    return tl.load(here if S.SEVERAL_CHUNKS else initial_state).to(tl.float32)


@triton.jit
@no_type_check
def load_dstate(dfinal_state, dleaving, S: tl.constexpr):
    """The gradient of the state after a chunk, which the chunk behind it has left, if any."""
    return tl.load(dleaving if S.SEVERAL_CHUNKS else dfinal_state)


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

    `states` [B, chunks + 1, H, P, N] is the kernel's own memory where there are several chunks. A
    first pass leaves the state that enters each chunk there. The second pass goes from the last
    chunk to the first. The last place holds the gradient of the state between the chunk behind and
    this one. As it is one place for all chunks, it stays in the cache.

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
    q, n, p = tl.arange(0, S.Q), tl.arange(0, S.N), tl.arange(0, S.P)
    before = q[:, None] > paired(q)[None, :]
    own = p[:, None] * S.N + n[None, :]
    chunks = tl.cdiv(length, S.Q) if S.SEVERAL_CHUNKS else 1
    if S.SEVERAL_CHUNKS:
        leave_states(v, dfinal_state, states, row, first, group, length, chunks, S)

    # Not pipelined: a state must not be loaded before the chunk after it has left it.
    for behind in tl.range(0, chunks, disable_licm=True, num_stages=1):
        if S.SEVERAL_CHUNKS:
            # Other threads of this program read what these wrote.
            tl.debug_barrier()
        c = chunks - 1 - behind
        chunk = locate_chunk(v, c, length, S)
        if S.SEVERAL_CHUNKS:
            scores = score(v, chunk, group, S)
        dscores = tl.zeros([S.Q, S.Q], tl.float32)
        dB_ = tl.zeros([S.Q, S.N], tl.float32)
        dC_ = tl.zeros([S.Q, S.N], tl.float32)
        for i in tl.range(0, S.HEADS, disable_licm=True):
            head = first + i
            rate = tl.load(v.A + head).to(tl.float32)
            raw, step = load_steps(v, chunk, head, S)
            total = log_decays(step, rate, chunk.restarts)
            here = states + ((row * (chunks + 1) + c) * S.H + head) * (S.P * S.N) + own
            dleaving = states + ((row * (chunks + 1) + chunks) * S.H + head) * (S.P * S.N) + own
            whole = (row * S.H + head) * (S.P * S.N) + own

            # What each stage reads is loaded anew, and barriers keep the stages apart. All their
            # operands at once would fill the registers. First the gradient of step * x.
            dx_ = tl.zeros([S.Q, S.P], tl.float32)
            dlog_decay = tl.zeros([S.Q], tl.float32)
            of_position = tl.zeros([S.Q], tl.float32)
            if S.HAS_LEAVING_STATE:
                to_end, kept = decay_to_end(total, S)
                dstate = load_dstate(dfinal_state + whole, dleaving, S)
                seeing = operand(load_projections(v.B, chunk, group, S), S)
                dx_ = product(seeing, operand(tl.trans(dstate), S), S) * to_end[:, None]
                tl.debug_barrier()
                dstate = load_dstate(dfinal_state + whole, dleaving, S)
                left = operand(load_channels(v.x, chunk, head, S), S)
                dB_head = product(left, operand(dstate, S), S) * (step * to_end)[:, None]
                dB_ += dB_head
                of_position = tl.sum(dB_head * load_projections(v.B, chunk, group, S), 1)
                tl.debug_barrier()
            if S.HAS_ENTERING_STATE:
                entering = decay_from_start(total)[:, None]
                state = load_entering(initial_state + whole, here, S)
                seen = operand(load_channels(dy, chunk, head, S), S)
                dC_head = product(seen, operand(state, S), S) * entering
                dC_ += dC_head
                of_query = tl.sum(dC_head * load_projections(v.C, chunk, group, S), 1)
                dlog_decay += tl.cumsum(of_query, 0, reverse=True)
                tl.debug_barrier()
                dentering = tl.zeros([S.P, S.N], tl.float32)
                if S.HAS_LEAVING_STATE:
                    dstate = load_dstate(dfinal_state + whole, dleaving, S)
                    state = load_entering(initial_state + whole, here, S)
                    dlog_decay += kept * tl.sum(state * dstate)
                    dentering = kept * dstate
                seen = operand(tl.trans(load_channels(dy, chunk, head, S)), S)
                queries = operand(load_projections(v.C, chunk, group, S) * entering, S)
                dentering = add_product(dentering, seen, queries, S)
                if S.HAS_INITIAL:
                    tl.store(dinitial_state + whole, dentering, mask=c == 0)
                tl.debug_barrier()  # all threads have read the gradient of the state after it
                if S.SEVERAL_CHUNKS:
                    tl.store(dleaving, dentering)

            if not S.SEVERAL_CHUNKS:
                # Computed anew for each head, as a large chunk leaves no registers to keep them.
                scores = score(v, chunk, group, S)
            x_ = load_channels(v.x, chunk, head, S)
            dy_ = load_channels(dy, chunk, head, S)
            decay = paired_decay_between(total, False, S)
            pairs = product(operand(dy_, S), operand(tl.trans(pair_rows(x_)), S), S)
            pairs *= pair_columns(step[None, :])
            dscores += pairs * decay
            mixing = scores * decay
            pairs *= mixing
            tl.debug_barrier()
            dy_ = load_channels(dy, chunk, head, S)
            mixing = tl.trans(unpair_columns(mixing))
            dx_ = add_product(dx_, operand(mixing, S), operand(dy_, S), S)
            tl.debug_barrier()
            # Position t decays what goes from k < t to q >= t. Sums over these rectangles keep
            # digits that differences of row and column sums would lose.
            to_later = tl.cumsum(pairs, 0, reverse=True)
            if S.HAS_LEAVING_STATE:
                to_later += pair_columns(of_position[None, :])
            dlog_decay += tl.sum(tl.where(before, to_later, 0), 1)
            tl.debug_barrier()
            x_ = load_channels(v.x, chunk, head, S)
            dy_ = load_channels(dy, chunk, head, S)
            dstep = tl.sum(dx_ * x_, 1) + dlog_decay * rate
            dx_ *= step[:, None]
            if S.HAS_D:
                share = (row * chunks + c) * S.H + head
                dx_ += dy_ * load_skip(v, head, S)
                if S.D_PER_CHANNEL:
                    tl.store(dD + share * S.P + p, tl.sum(dy_ * x_, 0))
                else:
                    tl.store(dD + share, tl.sum(dy_ * x_))
            store_tile(dx, (chunk.at * S.H + head) * S.P, chunk.inside, p, dx_)
            dstep *= step_slopes(raw, S)
            tl.store(ddt + chunk.at * S.H + head, dstep, mask=chunk.inside)
            tl.store(dA + (row * chunks + c) * S.H + head, tl.sum(dlog_decay * step, 0))
        dscores = unpair_columns(dscores)
        B_ = load_projections(v.B, chunk, group, S)
        C_ = load_projections(v.C, chunk, group, S)
        dB_ = add_product(dB_, operand(tl.trans(dscores), S), operand(C_, S), S)
        dC_ = add_product(dC_, operand(dscores, S), operand(B_, S), S)
        rows = (chunk.at * (S.H // S.HEADS) + part) * S.N
        store_tile(dB, rows, chunk.inside, n, dB_)
        store_tile(dC, rows, chunk.inside, n, dC_)
