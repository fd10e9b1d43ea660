"""Stages of the block's backward kernel: norm, gate and op on the way back through a chunk.

Each is a loop of its own over the heads, as registers do not suffice for all of them at once.
They meet in `memory` that only this program uses, small enough to stay in the cache: pointers to
(states, dconvolved, dresult, dsteps), for which see the kernel. Letters, `layer`, `place` and SIZES
as in `triton_block_parts`; `slot` is where the chunk's positions are in `memory`, and `earlier`
whether this program has left shares in gradients of parameters for a chunk before; `chunk` is
numbered through all rows.
"""

from typing import no_type_check  # annotations here are for Triton's compiler

import triton
import triton.language as tl

from tim4rec_jax.ssd.triton_block_parts import (
    active,
    add_share,
    load_steps,
    load_tile,
    store_tile,
)
from tim4rec_jax.ssd.triton_parts import (
    attend,
    attend_backward,
    decay_between,
    decay_to_end,
    scratch_offsets,
    step_slopes,
)


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
