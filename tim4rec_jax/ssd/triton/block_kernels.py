"""The kernels of `time_aware_ssd_block` in Triton, forward and backward.

A program takes one row of the batch with all heads, as the norm is taken over them. The forward
kernel goes through the sequence chunk by chunk with the states in registers. The backward kernel
goes from the last chunk to the first and computes again what the forward kernel computed.

`projected` holds z [I], x [I], B [G N], C [G N] and dt [H] along its last axis of E. The M channels
of the convolution are x, B and C. The kernels read the W positions of the convolution from
`projected` wherever they need its result; these positions are in the cache. The other letters are
those of `common`, and `S` is a `block.Specialisation`.
"""

from typing import Any, NamedTuple, no_type_check  # Triton reads the annotations of kernels

import triton
import triton.language as tl

from tim4rec_jax.ssd.triton.common import (
    add_product,
    advance,
    attend,
    attend_backward,
    decay_between,
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
    """Pointers to the inputs of the block. Those whose HAS_ flag is off are never read."""

    projected: Any  # [B, L, E]
    factor: Any  # [B, L, H]
    added: Any  # [B, L, H], `time_step`
    rate: Any  # [B, L, H], `time_rate`
    taps: Any  # [W, M]
    conv_bias: Any  # [M]
    A: Any  # [H]
    D: Any  # [H]
    dt_bias: Any  # [H]
    scale: Any  # [I]
    segments: Any  # [B, L]


class Chunk(NamedTuple):
    """The positions of a chunk, each [Q]."""

    t: Any  # number of the position in its row
    at: Any  # offset from the first position of the batch
    inside: Any  # whether it is a position of the sequence
    before: Any  # how many positions before it are in its segment, at most W - 1 of them counted
    restarts: Any  # whether it forgets the state before it


class Steps(NamedTuple):
    """What makes the step sizes of a head, each [Q]: softplus(dt factor + added + dt_bias)."""

    dt: Any
    factor: Any
    raw: Any  # the argument of softplus
    step: Any  # the step size, 0 past the end of the sequence
    faster: Any  # a factor on the rate of decay
    rate: Any  # the rate of decay


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
    convolution: Any  # [B, W + 1, M], of the taps and, last, of the bias
    heads: Any  # [B, 3, H], of A, D and dt_bias
    scale: Any  # [B, I]


class Memory(NamedTuple):
    """Pointers to memory in which the stages of the backward kernel meet.

    Each program uses a part of its own, small enough to stay in the cache. R positions are kept
    there: those of a chunk and of the one behind it (R = 2 Q), as positions feed later ones through
    the convolution, or those of the only chunk (R = L).
    """

    states: Any  # [B, chunks, H, N, P]: the state that enters each chunk, later the gradient of it
    convolved: Any  # [B, R, M]: the gradient of the convolution's result
    result: Any  # [B, R, I]: the gradient of the op's result
    steps: Any  # [B, 2, H, Q]: the gradients of the step sizes and of the logarithms of decays


class Turn(NamedTuple):
    """Where the backward kernel is."""

    row: Any  # row of the batch
    chunk: Any  # number of the chunk, counted through all rows
    earlier: Any  # whether this program has been through another chunk before
    slot: Any  # [Q], the place of each position in `Memory`


@triton.jit
@no_type_check
def count_neighbours(segments, at, t, length, AHEAD: tl.constexpr, S: tl.constexpr):
    """How many positions before each, or AHEAD of it, are in its segment, W - 1 at most counted."""
    if S.HAS_SEGMENTS:
        count = tl.zeros(t.shape, tl.int32)
        here = tl.load(segments + at, mask=t < length, other=0)
        for k in tl.static_range(1, S.W):
            step = k if AHEAD else -k
            exists = (t + step >= 0) & (tl.maximum(t, t + step) < length)
            same = tl.load(segments + at + step, mask=exists, other=0) == here
            count += (exists & same).to(tl.int32)
    else:
        count = length - 1 - t if AHEAD else t
    return count


@triton.jit
@no_type_check
def locate_chunk(v, row, chunk, length, S: tl.constexpr):
    """The positions of a chunk."""
    t = chunk * S.Q + tl.arange(0, S.Q)
    at = row * length + t
    before = count_neighbours(v.segments, at, t, length, False, S)
    return Chunk(t, at, t < length, before, load_restarts(v.segments, at, t, length, S))


@triton.jit
@no_type_check
def convolve(v, chunk, channel, S: tl.constexpr):
    """The convolution's result at each position in some channels of (x, B, C): [Q, channels]."""
    mixed = (v.projected + chunk.at * S.E + S.I)[:, None] + channel[None, :]
    total = tl.load(v.conv_bias + channel).to(tl.float32)[None, :]
    for k in tl.static_range(S.W):
        seen = (chunk.inside & (chunk.before >= k))[:, None]
        tap = tl.load(v.taps + (S.W - 1 - k) * S.M + channel).to(tl.float32)
        total += tap[None, :] * tl.load(mixed - k * S.E, mask=seen, other=0).to(tl.float32)
    return total


@triton.jit
@no_type_check
def activate(v, chunk, channel, S: tl.constexpr):
    """`convolve`, then the activation: what the op reads."""
    u = convolve(v, chunk, channel, S)
    if S.HARDSWISH:
        u *= tl.minimum(tl.maximum(u + 3, 0), 6) * (1 / 6)
    else:
        u *= tl.sigmoid(u)
    if S.PRECISION == "tf32":
        # The compiler repeats elementwise operations in the layout of every operand of tensor
        # cores, back to what was loaded: the convolution, many times. It does not repeat a sum.
        u = tl.sum(u[:, :, None], 2)
    return u


@triton.jit
@no_type_check
def activation_slope(u, S: tl.constexpr):
    """Derivative of the activation."""
    if S.HARDSWISH:
        slope = tl.where(u < 3, tl.maximum(u + 1.5, -1.5) * (1 / 3), 1)
        slope = tl.where(u > -3, slope, 0)
    else:
        s = tl.sigmoid(u)
        slope = s * (1 + u * (1 - s))
    return slope


@triton.jit
@no_type_check
def load_steps(v, chunk, head, S: tl.constexpr):
    """The `Steps` of a head, and its `LogDecays`."""
    dt = tl.load(v.projected + chunk.at * S.E + (S.E - S.H) + head, mask=chunk.inside, other=0)
    dt = dt.to(tl.float32)
    if S.HAS_FACTOR:
        factor = tl.load(v.factor + chunk.at * S.H + head, mask=chunk.inside, other=0)
        factor = factor.to(tl.float32)
    else:
        factor = tl.full(chunk.at.shape, 1, tl.float32)
    raw = dt * factor + tl.load(v.dt_bias + head).to(tl.float32)
    if S.HAS_STEP:
        added = tl.load(v.added + chunk.at * S.H + head, mask=chunk.inside, other=0)
        raw += added.to(tl.float32)
    step = tl.where(chunk.inside, softplus(raw), 0)
    if S.HAS_RATE:
        faster = tl.load(v.rate + chunk.at * S.H + head, mask=chunk.inside, other=0)
        faster = tl.exp(faster.to(tl.float32))
    else:
        faster = tl.full(chunk.at.shape, 1, tl.float32)
    rate = faster * tl.load(v.A + head).to(tl.float32)
    total = log_decays(step, rate, chunk.restarts)
    return Steps(dt, factor, raw, step, faster, rate), total


@triton.jit
@no_type_check
def store_tile(array, rows, inside, column, value):
    """Stores what `load_tile` loads."""
    # In this order, which takes fewer registers here.
    tl.store(array + rows[:, None] + column[None, :], value, mask=inside[:, None])


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
    added,
    rate,
    taps,
    conv_bias,
    A,
    D,
    dt_bias,
    scale,
    segments,
    length,
    y,
    rstd,
    S: tl.constexpr,
):
    """Writes y [B, L, I], and the inverse root [B, L] of the mean square that the norm divides by.

    The grid is one axis of B programs.
    """
    v = Inputs(projected, factor, added, rate, taps, conv_bias, A, D, dt_bias, scale, segments)
    row = tl.program_id(0).to(tl.int64)
    q, p, n = tl.arange(0, S.Q), tl.arange(0, S.P), tl.arange(0, S.N)

    # Registers cannot be numbered by a variable. Where a loop goes through all heads, they move on
    # by one in each turn, and are back in their places after the last.
    states = ()
    results = ()
    for _ in tl.static_range(0 if S.PRECISION == "tf32x3" else S.H):
        results += (tl.zeros([S.Q, S.P], tl.float32),)
    for _ in tl.static_range(S.H if S.SEVERAL_CHUNKS else 0):
        states += (tl.zeros([S.P, S.N], tl.float32),)

    for c in tl.range(0, tl.cdiv(length, S.Q) if S.SEVERAL_CHUNKS else 1, disable_licm=True):
        chunk = locate_chunk(v, row, c, length, S)
        squares = tl.zeros([S.Q], tl.float32)
        for group in tl.range(0, S.G, disable_licm=True):
            b = S.I + group * S.N + n
            B_ = activate(v, chunk, b, S)
            C_ = operand(activate(v, chunk, b + S.G * S.N, S), S)
            scores = product(C_, operand(tl.trans(pair_rows(B_)), S), S)
            for i in tl.range(0, S.H // S.G, disable_licm=True):
                head = group * (S.H // S.G) + i
                own = head * S.P + p
                steps, total = load_steps(v, chunk, head, S)
                # A sum over one number keeps the compiler from computing the steps for each use.
                step = tl.sum(steps.step[:, None], 1)
                x = activate(v, chunk, own, S)
                mixing = scores * paired_decay_between(total, S) * pair_columns(step[None, :])
                skip = tl.load(v.D + head).to(tl.float32)
                mixing += tl.where(q[:, None] == paired(q)[None, :], skip, 0)
                y_ = tl.zeros([S.Q, S.P], tl.float32)
                if S.SEVERAL_CHUNKS:
                    state = states[0]
                    y_ = product(C_, operand(unpair_transposed(state), S), S)
                    y_ *= decay_from_start(total)[:, None]
                y_ = add_product(y_, operand(unpair_columns(mixing), S), operand(x, S), S)
                if S.SEVERAL_CHUNKS:
                    to_end, kept = decay_to_end(total, S)
                    from_here = operand(pair_columns(B_) * (to_end * step)[:, None], S)
                    state = add_product(kept * state, operand(tl.trans(x), S), from_here, S)
                    states = rotate(states, state)
                z = load_tile(v.projected, chunk.at * S.E, chunk.inside, own)
                y_ *= z * tl.sigmoid(z)
                squares += tl.sum(y_ * y_, 1)
                if S.PRECISION == "tf32x3":
                    store_tile(y, chunk.at * S.I, chunk.inside, own, y_)
                else:
                    results = rotate(results, y_)
        rstd_ = tl.rsqrt(squares / S.I + S.EPS)
        tl.store(rstd + chunk.at, rstd_, mask=chunk.inside)
        if S.PRECISION == "tf32x3":
            tl.debug_barrier()
            for h in tl.static_range(S.H):
                own = h * S.P + p
                y_ = load_tile(y, chunk.at * S.I, chunk.inside, own)
                y_ *= rstd_[:, None] * tl.load(v.scale + own).to(tl.float32)[None, :]
                store_tile(y, chunk.at * S.I, chunk.inside, own, y_)
        else:
            for h in tl.static_range(S.H):
                own = h * S.P + p
                y_ = results[h] * rstd_[:, None] * tl.load(v.scale + own).to(tl.float32)[None, :]
                store_tile(y, chunk.at * S.I, chunk.inside, own, y_)


# The backward kernel. Each stage is a loop of its own over the heads, as registers do not suffice
# for all stages at once. A barrier ends each stage: the next one reads what other threads wrote.


@triton.jit
@no_type_check
def locate_slots(row, t, length, S: tl.constexpr):
    """The place of each position in `Memory`."""
    return row * (2 * S.Q) + t % (2 * S.Q) if S.SEVERAL_CHUNKS else row * length + t


@triton.jit
@no_type_check
def add_share(where, value, earlier):
    """Adds to what this program has left there, if it has been there earlier."""
    tl.store(where, value + tl.load(where, mask=earlier, other=0))


@triton.jit
@no_type_check
def leave_states(v, memory, row, length, chunks, S: tl.constexpr):
    """Leaves the state that enters each chunk, as the forward kernel computed it."""
    p, n = tl.arange(0, S.P), tl.arange(0, S.N)
    for head in tl.range(0, S.H, disable_licm=True):
        state = tl.zeros([S.N, S.P], tl.float32)
        tl.store(memory.states + scratch_offsets(row * chunks, head, S), state)
        for c in tl.range(0, chunks - 1, disable_licm=True):
            chunk = locate_chunk(v, row, c, length, S)
            steps, total = load_steps(v, chunk, head, S)
            B = activate(v, chunk, S.I + head // (S.H // S.G) * S.N + n, S)
            step_x = activate(v, chunk, head * S.P + p, S) * steps.step[:, None]
            state = advance(state, B, step_x, total, S)
            tl.store(memory.states + scratch_offsets(row * chunks + c + 1, head, S), state)


@triton.jit
@no_type_check
def through_norm(v, chunk, turn, results, gradients, memory, S: tl.constexpr):
    """Back through norm and gate: leaves the gradients of z, the scale and the op's result."""
    p, n = tl.arange(0, S.P), tl.arange(0, S.N)
    inside = chunk.inside
    # sum(dy y) is all that the norm's gradient needs of the other features.
    share = tl.zeros([S.Q], tl.float32)
    for head in tl.range(0, S.H, disable_licm=True):
        own = head * S.P + p
        y = load_tile(results.y, chunk.at * S.I, inside, own)
        share += tl.sum(y * load_tile(results.dy, chunk.at * S.I, inside, own), 1) / S.I
    rstd = tl.load(results.rstd + chunk.at, mask=inside, other=0)
    for group in tl.range(0, S.G, disable_licm=True):
        b = S.I + group * S.N + n
        C = activate(v, chunk, b + S.G * S.N, S)
        B = activate(v, chunk, b, S)
        scores = tl.dot(C, tl.trans(B), input_precision=S.PRECISION)
        for i in tl.range(0, S.H // S.G, disable_licm=True):
            head = group * (S.H // S.G) + i
            own = head * S.P + p
            steps, total = load_steps(v, chunk, head, S)
            x = activate(v, chunk, own, S)
            state = 0
            if S.SEVERAL_CHUNKS:
                state = tl.load(memory.states + scratch_offsets(turn.chunk, head, S))
            mixing = scores * decay_between(total, S)
            step_x = x * steps.step[:, None]
            out = attend(mixing, C, step_x, state, total, S.SEVERAL_CHUNKS, S)
            out += x * tl.load(v.D + head).to(tl.float32)
            z = load_tile(v.projected, chunk.at * S.E, inside, own)
            gate = tl.sigmoid(z)
            normed = out * z * gate * rstd[:, None]
            dy = load_tile(results.dy, chunk.at * S.I, inside, own)
            dscale = tl.sum(dy * normed, 0)
            add_share(gradients.scale + turn.row * S.I + own, dscale, turn.earlier)
            weight = tl.load(v.scale + own).to(tl.float32)[None, :]
            dgated = (dy * weight - normed * share[:, None]) * rstd[:, None]
            dz = dgated * out * gate * (1 + z * (1 - gate))
            store_tile(gradients.projected, chunk.at * S.E, inside, own, dz)
            store_tile(memory.result, turn.slot * S.I, inside, own, dgated * z * gate)
    tl.debug_barrier()


@triton.jit
@no_type_check
def through_states(v, chunk, turn, gradients, memory, S: tl.constexpr):
    """Back through what the chunk adds to the state after it and sees of the one before it.

    Leaves gradients of the op's inputs and of the step sizes, which the next stage goes on with.
    """
    p, n = tl.arange(0, S.P), tl.arange(0, S.N)
    inside = chunk.inside
    for group in tl.range(0, S.G, disable_licm=True):
        b = S.I + group * S.N + n
        c = b + S.G * S.N
        dB = tl.zeros([S.Q, S.N], tl.float32)
        dC = tl.zeros([S.Q, S.N], tl.float32)
        for i in tl.range(0, S.H // S.G, disable_licm=True):
            head = group * (S.H // S.G) + i
            own = head * S.P + p
            steps, total = load_steps(v, chunk, head, S)
            to_end, kept = decay_to_end(total, S)
            here = memory.states + scratch_offsets(turn.chunk, head, S)
            state = tl.load(here)
            dstate = tl.load(here + S.H * S.P * S.N, mask=turn.earlier, other=0)
            tl.debug_barrier()  # all threads have read the state
            dlog_decay = tl.zeros([S.Q], tl.float32)
            dlog_decay += kept * tl.sum(tl.sum(state * dstate, 1), 0)

            C = activate(v, chunk, c, S)
            dout = load_tile(memory.result, turn.slot * S.I, inside, own)
            dout *= decay_from_start(total)[:, None]
            seen = tl.dot(dout, tl.trans(state), input_precision=S.PRECISION)
            dC += seen
            dlog_decay += tl.cumsum(tl.sum(seen * C, 1), 0, reverse=True)
            dentering = tl.dot(tl.trans(C), dout, input_precision=S.PRECISION)
            tl.store(here, dentering + kept * dstate)

            B = activate(v, chunk, b, S)
            x = activate(v, chunk, own, S)
            left = x * (steps.step * to_end)[:, None]
            added = tl.dot(left, tl.trans(dstate), input_precision=S.PRECISION)
            dB += added
            of_position = tl.sum(added * B, 1)
            dlog_decay += tl.cumsum(of_position, 0) - of_position
            dstep_x = tl.dot(B, dstate, input_precision=S.PRECISION) * to_end[:, None]
            dx = dstep_x * steps.step[:, None]
            store_tile(memory.convolved, turn.slot * S.M, inside, own, dx)
            dstep = tl.sum(dstep_x * x, 1) + dlog_decay * steps.rate
            left_here = memory.steps + (turn.row * (2 * S.H) + head) * S.Q + tl.arange(0, S.Q)
            tl.store(left_here, dstep)
            if S.HAS_RATE:
                tl.store(left_here + S.H * S.Q, dlog_decay)
            dA = tl.sum(dlog_decay * steps.step * steps.faster, 0)
            add_share(gradients.heads + turn.row * (3 * S.H) + head, dA, turn.earlier)
        store_tile(memory.convolved, turn.slot * S.M, inside, b, dB)
        store_tile(memory.convolved, turn.slot * S.M, inside, c, dC)
    tl.debug_barrier()


@triton.jit
@no_type_check
def through_pairs(v, chunk, turn, gradients, memory, S: tl.constexpr):
    """Back through what positions of the chunk see of each other, and through the step sizes."""
    q, p, n = tl.arange(0, S.Q), tl.arange(0, S.P), tl.arange(0, S.N)
    inside = chunk.inside
    for group in tl.range(0, S.G, disable_licm=True):
        b = S.I + group * S.N + n
        c = b + S.G * S.N
        B = activate(v, chunk, b, S)
        C = activate(v, chunk, c, S)
        scores = tl.dot(C, tl.trans(B), input_precision=S.PRECISION)
        dscores = tl.zeros([S.Q, S.Q], tl.float32)
        for i in tl.range(0, S.H // S.G, disable_licm=True):
            head = group * (S.H // S.G) + i
            own = head * S.P + p
            steps, total = load_steps(v, chunk, head, S)
            x = activate(v, chunk, own, S)
            step_x = x * steps.step[:, None]
            dout = load_tile(memory.result, turn.slot * S.I, inside, own)
            dstep_x, pairs = attend_backward(scores, step_x, dout, total, S)
            dscores += pairs
            # Sums over rectangles of pairs, as in the op's kernel.
            to_later = tl.cumsum(pairs * scores, 0, reverse=True)
            dlog_decay = tl.sum(tl.where(q[:, None] > q[None, :], to_later, 0), 1)
            dx = dstep_x * steps.step[:, None] + dout * tl.load(v.D + head).to(tl.float32)
            dstep = tl.sum(dstep_x * x, 1) + dlog_decay * steps.rate
            dA = gradients.heads + turn.row * (3 * S.H) + head
            if S.SEVERAL_CHUNKS:
                dx += load_tile(memory.convolved, turn.slot * S.M, inside, own)
                left_here = memory.steps + (turn.row * (2 * S.H) + head) * S.Q + q
                dstep += tl.load(left_here)
                tl.store(dA, tl.load(dA) + tl.sum(dlog_decay * steps.step * steps.faster, 0))
                if S.HAS_RATE:
                    dlog_decay += tl.load(left_here + S.H * S.Q)
                tl.debug_barrier()
            else:
                tl.store(dA, tl.sum(dlog_decay * steps.step * steps.faster, 0))
            if S.HAS_RATE:
                drate = gradients.rate + chunk.at * S.H + head
                tl.store(drate, dlog_decay * steps.step * steps.rate, mask=inside)
            store_tile(memory.convolved, turn.slot * S.M, inside, own, dx)
            add_share(dA + S.H, tl.sum(tl.sum(dout * x, 1), 0), turn.earlier)
            dstep = tl.where(inside, dstep * tl.sigmoid(steps.raw), 0)
            add_share(dA + 2 * S.H, tl.sum(dstep, 0), turn.earlier)
            ddt = gradients.projected + chunk.at * S.E + (S.E - S.H) + head
            tl.store(ddt, dstep * steps.factor, mask=inside)
            if S.HAS_FACTOR:
                tl.store(gradients.factor + chunk.at * S.H + head, dstep * steps.dt, mask=inside)
            if S.HAS_STEP:
                tl.store(gradients.added + chunk.at * S.H + head, dstep, mask=inside)
        dB = tl.dot(tl.trans(dscores), C, input_precision=S.PRECISION)
        if S.SEVERAL_CHUNKS:
            dB += load_tile(memory.convolved, turn.slot * S.M, inside, b)
        tl.debug_barrier()
        store_tile(memory.convolved, turn.slot * S.M, inside, b, dB)
        dC = tl.dot(dscores, B, input_precision=S.PRECISION)
        if S.SEVERAL_CHUNKS:
            dC += load_tile(memory.convolved, turn.slot * S.M, inside, c)
        tl.debug_barrier()
        store_tile(memory.convolved, turn.slot * S.M, inside, c, dC)
    tl.debug_barrier()


@triton.jit
@no_type_check
def through_convolution(v, chunk, turn, gradients, memory, length, S: tl.constexpr):
    """Back through the activation, then the convolution."""
    TILE: tl.constexpr = min(S.P, S.N)
    inside = chunk.inside
    after = count_neighbours(v.segments, chunk.at, chunk.t, length, True, S)
    for tile in tl.range(0, S.M // TILE, disable_licm=True):
        channel = tile * TILE + tl.arange(0, TILE)
        slope = activation_slope(convolve(v, chunk, channel, S), S)
        d = load_tile(memory.convolved, turn.slot * S.M, inside, channel) * slope
        tl.debug_barrier()
        store_tile(memory.convolved, turn.slot * S.M, inside, channel, d)
    tl.debug_barrier()
    for tile in tl.range(0, S.M // TILE, disable_licm=True):
        channel = tile * TILE + tl.arange(0, TILE)
        shares = gradients.convolution + turn.row * ((S.W + 1) * S.M) + channel
        d = load_tile(memory.convolved, turn.slot * S.M, inside, channel)
        add_share(shares + S.W * S.M, tl.sum(d, 0), turn.earlier)
        dmixed = tl.zeros(d.shape, tl.float32)
        for k in tl.static_range(S.W):
            seen = inside & (chunk.before >= k)
            mixed = load_tile(v.projected, (chunk.at - k) * S.E, seen, S.I + channel)
            add_share(shares + (S.W - 1 - k) * S.M, tl.sum(d * mixed, 0), turn.earlier)
            tap = tl.load(v.taps + (S.W - 1 - k) * S.M + channel).to(tl.float32)
            later = locate_slots(turn.row, chunk.t + k, length, S)
            seeing = inside & (after >= k)
            dmixed += tap[None, :] * load_tile(memory.convolved, later * S.M, seeing, channel)
        store_tile(gradients.projected, chunk.at * S.E, inside, S.I + channel, dmixed)


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
    dconvolution,
    dheads,
    dscale,
    states,
    dconvolved,
    dresult,
    dsteps,
    S: tl.constexpr,
):
    """Writes the gradients of all inputs from that of y, given y and `rstd`.

    Where there are several chunks, a first pass leaves the state that enters each of them. The grid
    is that of `block_forward`. `Gradients` and `Memory` tell what the last eleven arrays are.
    """
    v = Inputs(projected, factor, added, rate, taps, conv_bias, A, D, dt_bias, scale, segments)
    results = Results(y, rstd, dy)
    gradients = Gradients(dprojected, dfactor, dadded, drate, dconvolution, dheads, dscale)
    memory = Memory(states, dconvolved, dresult, dsteps)
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(length, S.Q) if S.SEVERAL_CHUNKS else 1
    if S.SEVERAL_CHUNKS:
        leave_states(v, memory, row, length, chunks, S)
    # Not pipelined: what a chunk reads has been left by the one behind it.
    for behind in tl.range(0, chunks, disable_licm=True, num_stages=1):
        tl.debug_barrier()
        c = chunks - 1 - behind
        chunk = locate_chunk(v, row, c, length, S)
        slot = locate_slots(row, chunk.t, length, S)
        turn = Turn(row, row * chunks + c, behind > 0, slot)
        through_norm(v, chunk, turn, results, gradients, memory, S)
        if S.SEVERAL_CHUNKS:
            through_states(v, chunk, turn, gradients, memory, S)
        through_pairs(v, chunk, turn, gradients, memory, S)
        through_convolution(v, chunk, turn, gradients, memory, length, S)
