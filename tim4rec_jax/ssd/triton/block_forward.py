"""The forward kernel of `time_aware_ssd_block` in Triton.

A program takes one row of the batch with all heads, as the norm is taken over them. It reads the W
positions of the convolution from `projected` wherever it needs the result; these positions are in
the cache. If the row is several chunks, the program goes through them in turn with one warp or few,
whose registers hold neither all states nor every operand. So it leaves the states and, first in
each chunk, the convolution's results in memory of its own, and reads them wherever it needs them.
Letters are those of `block_inputs`.
"""

from typing import Any, NamedTuple, no_type_check  # Triton reads the annotations of kernels

import triton
import triton.language as tl

from tim4rec_jax.ssd.triton.block_inputs import (
    Inputs,
    activation,
    convolve,
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
    pair_columns,
    pair_rows,
    paired,
    paired_decay_between,
    product,
    unpair_columns,
    unpair_transposed,
)


class Memory(NamedTuple):
    """Pointers to memory of a program where there are several chunks, which stays in the cache."""

    seen: Any  # [Q, M], what the op reads
    states: Any  # [H, P, N]


@triton.jit
@no_type_check
def of_program(scratch, program, S: tl.constexpr):
    """`Memory` of a program."""
    scratch += program * (S.Q * S.M + S.H * S.P * S.N)
    return Memory(scratch, scratch + S.Q * S.M)


@triton.jit
@no_type_check
def see(v, chunk, memory, channel, S: tl.constexpr):
    """What the op reads in some channels of (x, B, C): [Q, channels]."""
    if S.SEVERAL_CHUNKS:
        u = load_seen(memory, channel, S)
    else:
        u = activation(convolve(v, chunk, channel, S), S)
        if S.PRECISION == "tf32":
            # The compiler repeats elementwise operations in the layout of every operand of tensor
            # cores, back to what was loaded: the convolution, many times. It does not repeat a sum.
            u = tl.sum(u[:, :, None], 2)
    return u


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
    scratch,
    S: tl.constexpr,
):
    """Writes y [B, L, I], and the inverse root [B, L] of the mean square that the norm divides by.

    The grid is one axis of B programs. `scratch` holds the `Memory` of each.
    """
    v = Inputs(projected, factor, added, rate, taps, conv_bias, A, D, dt_bias, scale, segments)
    row = tl.program_id(0).to(tl.int64)
    v = from_row(v, row, length, S)
    y += row * length * S.I
    rstd += row * length
    q, p, n = tl.arange(0, S.Q), tl.arange(0, S.P), tl.arange(0, S.N)

    memory = of_program(scratch, row, S)
    nothing = tl.zeros([S.P, S.N], tl.float32)
    for h in tl.static_range(S.H if S.SEVERAL_CHUNKS else 0):
        tl.store(memory.states + state_offsets(0, h, S), nothing)

    # Registers cannot be numbered by a variable. Where a loop goes through all heads, they move on
    # by one in each turn, and are back in their places after the last.
    results = ()
    for _ in tl.static_range(0 if S.PRECISION == "tf32x3" else S.H):
        results += (tl.zeros([S.Q, S.P], tl.float32),)

    # Not pipelined: a turn reads what the one before it has left.
    chunks = tl.cdiv(length, S.Q) if S.SEVERAL_CHUNKS else 1
    for c in tl.range(0, chunks, disable_licm=True, num_stages=1):
        chunk = locate_chunk(v, c, length, S)
        if S.SEVERAL_CHUNKS:
            tl.debug_barrier()  # all threads have read the memory
            leave_seen(v, chunk, memory, S.M, S)
        squares = tl.zeros([S.Q], tl.float32)
        for group in tl.range(0, S.G, disable_licm=True):
            b = S.I + group * S.N + n
            B_ = see(v, chunk, memory, b, S)
            C_ = operand(see(v, chunk, memory, b + S.G * S.N, S), S)
            scores = product(C_, operand(tl.trans(pair_rows(B_)), S), S)
            for i in tl.range(0, S.H // S.G, disable_licm=True):
                head = group * (S.H // S.G) + i
                own = head * S.P + p
                steps, total = load_steps(v, chunk, head, S)
                # A sum over one number keeps the compiler from computing the steps for each use.
                step = tl.sum(steps.step[:, None], 1)
                x = see(v, chunk, memory, own, S)
                mixing = (
                    scores * paired_decay_between(total, False, S) * pair_columns(step[None, :])
                )
                skip = tl.load(v.D + head).to(tl.float32)
                mixing += tl.where(q[:, None] == paired(q)[None, :], skip, 0)
                y_ = tl.zeros([S.Q, S.P], tl.float32)
                if S.SEVERAL_CHUNKS:
                    state = tl.load(memory.states + state_offsets(0, head, S))
                    y_ = product(C_, operand(unpair_transposed(state), S), S)
                    y_ *= decay_from_start(total)[:, None]
                y_ = add_product(y_, operand(unpair_columns(mixing), S), operand(x, S), S)
                z = load_tile(v.projected, chunk.at * S.E, chunk.inside, own)
                y_ *= z * tl.sigmoid(z)
                squares += tl.sum(y_ * y_, 1)
                if S.PRECISION == "tf32x3":
                    store_tile(y, chunk.at * S.I, chunk.inside, own, y_)
                else:
                    results = rotate(results, y_)
                if S.SEVERAL_CHUNKS:
                    # Loaded anew, as all operands at once would fill the registers.
                    tl.debug_barrier()
                    to_end, kept = decay_to_end(total, S)
                    of_head = memory.states + state_offsets(0, head, S)
                    B_ = pair_columns(load_seen(memory, b, S)) * (to_end * step)[:, None]
                    x = load_seen(memory, own, S)
                    state = kept * tl.load(of_head)
                    state = add_product(state, operand(tl.trans(x), S), operand(B_, S), S)
                    tl.debug_barrier()  # all threads have read the state before
                    tl.store(of_head, state)
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
