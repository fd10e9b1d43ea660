"""The backward kernel of `time_aware_ssd_block` in Triton.

A program takes rows of the batch with all heads, as the norm is taken over them, and goes through
each from the last chunk to the first. A chunk goes through stages, which are loops over channels or
heads, as registers do not suffice for everything at once. The stages meet in memory of the
program's own. A barrier ends each stage: the next one reads what other threads wrote. Letters are
those of `block_inputs`.
"""

from typing import Any, NamedTuple, no_type_check  # Triton reads the annotations of kernels

import triton
import triton.language as tl

from tim4rec_jax.ssd.triton.block_inputs import (
    Inputs,
    convolve,
    count_neighbours,
    from_row,
    leave_seen,
    load_seen,
    load_steps,
    locate_chunk,
    state_offsets,
    store_tile,
)
from tim4rec_jax.ssd.triton.common import (
    add_product,
    decay_from_start,
    decay_to_end,
    load_tile,
    operand,
    pair_rows,
    paired_decay_between,
    product,
    sum_from,
    unpair_columns,
)


class Results(NamedTuple):
    """Pointers to the results of the forward kernel, and to the gradient of `y`."""

    y: Any  # [B, L, I]
    rstd: Any  # [B, L]
    dy: Any  # [B, L, I]


class Gradients(NamedTuple):
    """Pointers to the gradients that the backward kernel writes.

    Those of the parameters are shares of each row, for the caller to sum.
    """

    projected: Any  # [B, L, E]
    factor: Any  # [B, L, H]
    added: Any  # [B, L, H]
    rate: Any  # [B, L, H]
    scale: Any  # [B, I]
    convolution: Any  # [B, W + 1, M], of the taps and, last, of the bias
    heads: Any  # [B, 3, H], of A, D and dt_bias


class Memory(NamedTuple):
    """Pointers to memory in which the stages meet, a part for each program.

    A program uses its part again for each of its rows, so all of it stays in the cache. Where there
    are several chunks, the gradients of two are kept (R = 2 Q, else R = Q): positions feed those of
    the chunk behind through the convolution.
    """

    seen: Any  # [programs, Q, M], what the op reads
    gradients: Any  # [programs, R, M], of `seen`; in place of x first that of the op's result
    decays: Any  # [programs, H, Q], gradients of their logarithms
    scores: Any  # [programs, Q, Q], gradients of them
    states: Any  # [programs, chunks + 1, H, P, N], before each chunk; last the gradient of one


class Arrays(NamedTuple):
    """All that the kernel reads and writes."""

    inputs: Any
    results: Any
    gradients: Any
    scratch: Any  # `Memory` of all programs


class Here(NamedTuple):
    """A chunk of the program's row, and all arrays from this row on."""

    inputs: Any
    results: Any
    gradients: Any
    memory: Any
    chunk: Any
    slot: Any  # the place of each position among the gradients that are kept
    number: Any  # of the chunk
    chunks: Any  # of the row
    earlier: Any  # whether the program has been at another chunk before
    zero: Any  # which the compiler does not know to be zero


@triton.jit
@no_type_check
def of_row(results, gradients, row, length, S: tl.constexpr):
    """`Results` and `Gradients` from this row on."""
    SHARES: tl.constexpr = S.I + (S.W + 1) * S.M + 3 * S.H
    at = row * length
    found = Results(results.y + at * S.I, results.rstd + at, results.dy + at * S.I)
    of_row = Gradients(
        gradients.projected + at * S.E,
        gradients.factor + at * S.H,
        gradients.added + at * S.H,
        gradients.rate + at * S.H,
        gradients.scale + row * SHARES,
        gradients.convolution + row * SHARES,
        gradients.heads + row * SHARES,
    )
    return found, of_row


@triton.jit
@no_type_check
def of_program(scratch, program, chunks, S: tl.constexpr):
    """`Memory` of a program."""
    KEPT: tl.constexpr = 2 * S.Q if S.SEVERAL_CHUNKS else S.Q
    DECAYS: tl.constexpr = (S.Q + KEPT) * S.M
    SCORES: tl.constexpr = DECAYS + S.H * S.Q
    STATES: tl.constexpr = SCORES + S.Q * S.Q
    scratch += program * (STATES + (chunks + 1) * (S.H * S.P * S.N))
    return Memory(
        scratch,
        scratch + S.Q * S.M,
        scratch + DECAYS,
        scratch + SCORES,
        scratch + STATES,
    )


@triton.jit
@no_type_check
def locate(arrays, c, length, S: tl.constexpr):
    """`Here` at a chunk.

    Each stage computes it anew, as registers do not suffice to keep it. Where there are several
    chunks, the compiler would keep it nevertheless. But it cannot know that a number that is read
    here is zero: the first of the state before the first chunk.
    """
    chunks = tl.cdiv(length, S.Q) if S.SEVERAL_CHUNKS else 1
    row = tl.program_id(0).to(tl.int64)
    memory = of_program(arrays.scratch, row, chunks, S)
    zero = 0
    if S.SEVERAL_CHUNKS:
        zero = tl.load(memory.states).to(tl.int32, bitcast=True)
        row += zero
        c += zero
        memory = of_program(arrays.scratch, row, chunks, S)
    v = from_row(arrays.inputs, row, length, S)
    results, gradients = of_row(arrays.results, arrays.gradients, row, length, S)
    chunk = locate_chunk(v, c, length, S)
    slot = chunk.at % (2 * S.Q) if S.SEVERAL_CHUNKS else chunk.at
    return Here(v, results, gradients, memory, chunk, slot, c, chunks, c < chunks - 1, zero)


@triton.jit
@no_type_check
def add_share(where, value, earlier):
    """Adds to what this program has left there for the row, if it has been there earlier."""
    tl.store(where, value + tl.load(where, mask=earlier, other=0))


@triton.jit
@no_type_check
def leave_seen_here(arrays, c, length, CHANNELS: tl.constexpr, S: tl.constexpr):
    """`leave_seen` at a chunk."""
    here = locate(arrays, c, length, S)
    leave_seen(here.inputs, here.chunk, here.memory, CHANNELS, S)


@triton.jit
@no_type_check
def score(memory, group, FROM_TO: tl.constexpr, S: tl.constexpr):
    """The products of C and B of a group, [to, from] or [from, to], with paired columns."""
    b = S.I + group * S.N + tl.arange(0, S.N)
    c = b + S.G * S.N
    rows = operand(load_seen(memory, b if FROM_TO else c, S), S)
    columns = operand(tl.trans(pair_rows(load_seen(memory, c if FROM_TO else b, S))), S)
    return product(rows, columns, S)


@triton.jit
@no_type_check
def leave_states(arrays, length, S: tl.constexpr):
    """Leaves the state before each chunk, as the forward kernel computed it.

    Behind these comes the gradient of the state after the last chunk, which is zero.
    """
    p, n = tl.arange(0, S.P), tl.arange(0, S.N)
    chunks = tl.cdiv(length, S.Q)
    states = of_program(arrays.scratch, tl.program_id(0).to(tl.int64), chunks, S).states
    nothing = tl.zeros([S.P, S.N], tl.float32)
    for h in tl.static_range(S.H):
        tl.store(states + state_offsets(0, h, S), nothing)
        tl.store(states + state_offsets(chunks, h, S), nothing)
    tl.debug_barrier()
    for c in tl.range(0, chunks - 1, disable_licm=True, num_stages=1):
        leave_seen_here(arrays, c, length, S.I + S.G * S.N, S)
        here = locate(arrays, c, length, S)
        memory = here.memory
        for head in tl.range(0, S.H, disable_licm=True):
            steps, total = load_steps(here.inputs, here.chunk, head, S)
            to_end, kept = decay_to_end(total, S)
            B = load_seen(memory, S.I + head // (S.H // S.G) * S.N + n, S)
            B *= (to_end * steps.step)[:, None]
            x = operand(tl.trans(load_seen(memory, head * S.P + p, S)), S)
            state = tl.load(memory.states + state_offsets(c, head, S))
            state = add_product(kept * state, x, operand(B, S), S)
            tl.store(memory.states + state_offsets(c + 1, head, S), state)
        tl.debug_barrier()


@triton.jit
@no_type_check
def through_norm(arrays, c, length, S: tl.constexpr):
    """Back through norm and gate: leaves the gradients of z, the scale and the op's result."""
    p, n = tl.arange(0, S.P), tl.arange(0, S.N)
    here = locate(arrays, c, length, S)
    v, chunk, memory, inside = here.inputs, here.chunk, here.memory, here.chunk.inside
    # sum(dy y) is all that the norm's gradient needs of the other features.
    share = tl.zeros([S.Q], tl.float32)
    for h in tl.static_range(S.H):
        y = load_tile(here.results.y, chunk.at * S.I, inside, h * S.P + p)
        dy = load_tile(here.results.dy, chunk.at * S.I, inside, h * S.P + p)
        share += tl.sum(y * dy, 1) / S.I
    rstd = tl.load(here.results.rstd + chunk.at, mask=inside, other=0)
    for group in tl.range(0, S.G, disable_licm=True):
        scores = score(memory, group, False, S)
        for i in tl.range(0, S.H // S.G, disable_licm=True):
            head = group * (S.H // S.G) + i
            own = head * S.P + p
            steps, total = load_steps(v, chunk, head, S)
            out = tl.zeros([S.Q, S.P], tl.float32)
            if S.SEVERAL_CHUNKS:
                C = operand(load_seen(memory, S.I + (S.G + group) * S.N + n, S), S)
                state = tl.load(memory.states + state_offsets(here.number, head, S))
                out = product(C, operand(tl.trans(state), S), S) * decay_from_start(total)[:, None]
            mixing = scores * paired_decay_between(total, False, S)
            step_x = load_seen(memory, own, S) * steps.step[:, None]
            out = add_product(out, operand(unpair_columns(mixing), S), operand(step_x, S), S)
            out += load_seen(memory, own, S) * tl.load(v.D + head).to(tl.float32)
            z = load_tile(v.projected, chunk.at * S.E, inside, own)
            gate = tl.sigmoid(z)
            normed = out * z * gate * rstd[:, None]
            dy = load_tile(here.results.dy, chunk.at * S.I, inside, own)
            add_share(here.gradients.scale + own, tl.sum(dy * normed, 0), here.earlier)
            weight = tl.load(v.scale + own).to(tl.float32)[None, :]
            dgated = (dy * weight - normed * share[:, None]) * rstd[:, None]
            dz = dgated * out * gate * (1 + z * (1 - gate))
            store_tile(here.gradients.projected, chunk.at * S.E, inside, own, dz)
            dout = dgated * z * gate
            tl.store(memory.gradients + (here.slot * S.M)[:, None] + own[None, :], dout)
    tl.debug_barrier()


@triton.jit
@no_type_check
def through_pairs(arrays, c, length, S: tl.constexpr):
    """Back through what positions of the chunk see of each other, but for the gradient of x.

    Leaves shares of the gradients of B, C and the logarithms of decays.
    """
    q, p, n = tl.arange(0, S.Q), tl.arange(0, S.P), tl.arange(0, S.N)
    here = locate(arrays, c, length, S)
    v, chunk, memory = here.inputs, here.chunk, here.memory
    rows = (here.slot * S.M)[:, None]
    for group in tl.range(0, S.G, disable_licm=True):
        b = S.I + group * S.N + n
        kept = memory.scores + q[:, None] * S.Q + q[None, :]
        if S.SEVERAL_CHUNKS:
            scores = score(memory, group, True, S)
            dscores = tl.zeros([S.Q, S.Q], tl.float32)
        for i in tl.range(0, S.H // S.G, disable_licm=True):
            head = group * (S.H // S.G) + i
            own = head * S.P + p
            steps, total = load_steps(v, chunk, head, S)
            step_x = operand(load_seen(memory, own, S) * steps.step[:, None], S)
            dout = tl.load(memory.gradients + rows + own[None, :])
            pairs = product(step_x, operand(tl.trans(pair_rows(dout)), S), S)
            tl.debug_barrier()
            pairs *= paired_decay_between(total, True, S)
            if S.SEVERAL_CHUNKS:
                dscores += pairs
                pairs *= scores
            else:
                # A large chunk leaves no registers to keep these.
                tl.store(kept, pairs + tl.load(kept, mask=i > 0, other=0))
                tl.debug_barrier()
                pairs *= score(memory, group, True, S)
                tl.debug_barrier()
            # Position t decays what goes from k < t to q >= t. Sums over these rectangles keep
            # digits that differences of row and column sums would lose.
            PART: tl.constexpr = min(32, S.Q)
            for part in tl.static_range(S.Q // PART):
                t = here.zero + part * PART + tl.arange(0, PART)
                to_later = sum_from(pairs, t, S)
                dlog_decay = tl.sum(tl.where(q[:, None] < t[None, :], to_later, 0), 0)
                tl.store(memory.decays + head * S.Q + t, dlog_decay)
                tl.debug_barrier()
        if S.SEVERAL_CHUNKS:
            tl.store(kept, dscores)
        tl.debug_barrier()
        C = operand(load_seen(memory, b + S.G * S.N, S), S)
        dscores = unpair_columns(tl.load(kept))
        dB = product(operand(dscores, S), C, S)
        tl.store(memory.gradients + rows + b[None, :], dB)
        tl.debug_barrier()
        B = operand(load_seen(memory, b, S), S)
        dscores = unpair_columns(tl.load(kept))
        dC = product(operand(tl.trans(dscores), S), B, S)
        tl.store(memory.gradients + rows + (b + S.G * S.N)[None, :], dC)
        tl.debug_barrier()


@triton.jit
@no_type_check
def through_op(arrays, c, length, S: tl.constexpr):
    """Back through the rest of the op, the states among it, and through the step sizes."""
    q, p, n = tl.arange(0, S.Q), tl.arange(0, S.P), tl.arange(0, S.N)
    here = locate(arrays, c, length, S)
    v, chunk, memory, inside = here.inputs, here.chunk, here.memory, here.chunk.inside
    gradients = here.gradients
    for group in tl.range(0, S.G, disable_licm=True):
        b = S.I + group * S.N + n
        scores = score(memory, group, True, S)
        if S.SEVERAL_CHUNKS:
            dB = tl.zeros([S.Q, S.N], tl.float32)
            dC = tl.zeros([S.Q, S.N], tl.float32)
        for i in tl.range(0, S.H // S.G, disable_licm=True):
            head = group * (S.H // S.G) + i
            own = head * S.P + p
            of_x = memory.gradients + (here.slot * S.M)[:, None] + own[None, :]
            steps, total = load_steps(v, chunk, head, S)
            step = tl.sum(steps.step[:, None], 1)

            # What each part reads is loaded anew, and barriers keep the parts apart. All their
            # operands at once would fill the registers. First the gradient of step * x.
            dx = tl.zeros([S.Q, S.P], tl.float32)
            dlog_decay = tl.zeros([S.Q], tl.float32)
            if S.SEVERAL_CHUNKS:
                to_end, kept = decay_to_end(total, S)
                entering = decay_from_start(total)[:, None]
                before_it = memory.states + state_offsets(here.number, head, S)
                leaving = memory.states + state_offsets(here.chunks, head, S)
                dstate = tl.load(leaving)
                B = operand(load_seen(memory, b, S), S)
                dx = product(B, operand(tl.trans(dstate), S), S) * to_end[:, None]
                tl.debug_barrier()
                dstate = tl.load(leaving)
                x = operand(load_seen(memory, own, S), S)
                dB_head = product(x, operand(dstate, S), S) * (step * to_end)[:, None]
                dB += dB_head
                of_position = tl.sum(dB_head * load_seen(memory, b, S), 1)
                dlog_decay += tl.cumsum(of_position, 0) - of_position
                tl.debug_barrier()
                state = tl.load(before_it)
                dout = operand(tl.load(of_x), S)
                dC_head = product(dout, operand(state, S), S) * entering
                dC += dC_head
                of_query = tl.sum(dC_head * load_seen(memory, b + S.G * S.N, S), 1)
                dlog_decay += tl.cumsum(of_query, 0, reverse=True)
                tl.debug_barrier()
                dstate = tl.load(leaving)
                dlog_decay += kept * tl.sum(tl.load(before_it) * dstate)
                dout = operand(tl.trans(tl.load(of_x)), S)
                C = operand(load_seen(memory, b + S.G * S.N, S) * entering, S)
                dentering = add_product(kept * dstate, dout, C, S)
                tl.debug_barrier()  # all threads have read the gradient of the state after it
                tl.store(leaving, dentering)
            mixing = scores * paired_decay_between(total, True, S)
            dout = operand(tl.load(of_x), S)
            dx = add_product(dx, operand(unpair_columns(mixing), S), dout, S)
            tl.debug_barrier()
            x = load_seen(memory, own, S)
            dout = tl.load(of_x)
            dlog_decay += tl.load(memory.decays + head * S.Q + q)
            dstep = tl.sum(dx * x, 1) + dlog_decay * steps.rate
            dx = dx * step[:, None] + dout * tl.load(v.D + head).to(tl.float32)
            of_head = gradients.heads + head
            add_share(of_head, tl.sum(dlog_decay * step * steps.faster, 0), here.earlier)
            add_share(of_head + S.H, tl.sum(dout * x), here.earlier)
            if S.HAS_RATE:
                drate = gradients.rate + chunk.at * S.H + head
                tl.store(drate, dlog_decay * step * steps.rate, mask=inside)
            tl.debug_barrier()  # all threads have read the gradient of the result
            tl.store(of_x, dx)
            dstep = tl.where(inside, dstep * tl.sigmoid(steps.raw), 0)
            add_share(of_head + 2 * S.H, tl.sum(dstep, 0), here.earlier)
            ddt = gradients.projected + chunk.at * S.E + (S.E - S.H) + head
            tl.store(ddt, dstep * steps.factor, mask=inside)
            if S.HAS_FACTOR:
                tl.store(gradients.factor + chunk.at * S.H + head, dstep * steps.dt, mask=inside)
            if S.HAS_STEP:
                tl.store(gradients.added + chunk.at * S.H + head, dstep, mask=inside)
        if S.SEVERAL_CHUNKS:
            of_B = memory.gradients + (here.slot * S.M)[:, None] + b[None, :]
            dB += tl.load(of_B)
            dC += tl.load(of_B + S.G * S.N)
            tl.debug_barrier()
            tl.store(of_B, dB)
            tl.store(of_B + S.G * S.N, dC)
    tl.debug_barrier()


@triton.jit
@no_type_check
def through_convolution(arrays, c, length, S: tl.constexpr):
    """Back through the activation, then the convolution."""
    TILE: tl.constexpr = min(32, S.M & -S.M)
    here = locate(arrays, c, length, S)
    v, chunk, memory, inside = here.inputs, here.chunk, here.memory, here.chunk.inside
    gradients, earlier = here.gradients, here.earlier
    after = count_neighbours(v.segments, chunk.at, length, True, S)
    for tile in tl.range(0, S.M // TILE, disable_licm=True):
        channel = tile * TILE + tl.arange(0, TILE)
        u = convolve(v, chunk, channel, S)
        if S.HARDSWISH:
            slope = tl.where(u < 3, u * (1 / 3) + 0.5, 1)
            slope = tl.where(u > -3, slope, 0)
        else:
            s = tl.sigmoid(u)
            slope = s * (1 + u * (1 - s))
        of_seen = memory.gradients + (here.slot * S.M)[:, None] + channel[None, :]
        d = tl.load(of_seen) * slope
        tl.debug_barrier()
        tl.store(of_seen, d)
        shares = gradients.convolution + channel
        add_share(shares + S.W * S.M, tl.sum(d, 0), earlier)
        dmixed = tl.load(v.taps + (S.W - 1) * S.M + channel).to(tl.float32)[None, :] * d
        tl.debug_barrier()
        for k in tl.static_range(S.W):
            seen = inside & (chunk.before >= k)
            mixed = load_tile(v.projected, (chunk.at - k) * S.E, seen, S.I + channel)
            add_share(shares + (S.W - 1 - k) * S.M, tl.sum(d * mixed, 0), earlier)
            if k > 0:
                tap = tl.load(v.taps + (S.W - 1 - k) * S.M + channel).to(tl.float32)
                later = (chunk.at + k) % (2 * S.Q) if S.SEVERAL_CHUNKS else chunk.at + k
                seeing = inside & (after >= k)
                dmixed += tap[None, :] * load_tile(memory.gradients, later * S.M, seeing, channel)
        store_tile(gradients.projected, chunk.at * S.E, inside, S.I + channel, dmixed)
    tl.debug_barrier()


@triton.jit
@no_type_check
def block_backward(
    projected,
    factor,
    added,
    rate,
    taps,
    conv_bias,
    A,
    D,
    dt_bias,
    scale,
    segments,
    y,
    rstd,
    dy,
    length,
    dprojected,
    dfactor,
    dadded,
    drate,
    shares,
    scratch,
    S: tl.constexpr,
):
    """Writes the gradients of all inputs from that of y, given y and `rstd`.

    Where there are several chunks, a first pass leaves the state before each of them. The grid is
    that of `block_forward`. `Gradients` and `Memory` tell what the last six arrays hold.
    """
    inputs = Inputs(projected, factor, added, rate, taps, conv_bias, A, D, dt_bias, scale, segments)
    gradients = Gradients(
        dprojected, dfactor, dadded, drate, shares, shares + S.I, shares + S.I + (S.W + 1) * S.M
    )
    arrays = Arrays(inputs, Results(y, rstd, dy), gradients, scratch)
    chunks = tl.cdiv(length, S.Q) if S.SEVERAL_CHUNKS else 1
    if S.SEVERAL_CHUNKS:
        leave_states(arrays, length, S)
    # Not pipelined: what a stage reads has been left by the one before it.
    for behind in tl.range(0, chunks, disable_licm=True, num_stages=1):
        c = chunks - 1 - behind
        leave_seen_here(arrays, c, length, S.M, S)
        through_norm(arrays, c, length, S)
        through_pairs(arrays, c, length, S)
        through_op(arrays, c, length, S)
        through_convolution(arrays, c, length, S)
