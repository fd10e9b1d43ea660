"""What the Triton kernels of the op and of the block share: functions of values in registers.

Letters are those of `tim4rec_jax.ssd.ssd`; Q is the number of positions of a chunk. Within a chunk,
matrices over pairs of positions are [to, from], and states are [N, P]. All sums are float32. Arrays
are dense, with the axes that `ssd` documents.

`S` is what a kernel is specialised for, a named tuple that the kernel is called with
(`op.Specialisation` or `block.Specialisation`). The functions here read the fields that both have.
"""

from typing import Any, NamedTuple, no_type_check  # Triton reads the annotations of kernels

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


class Operand(NamedTuple):
    """A matrix as operand of a product, see `operand`."""

    high: Any
    low: Any


class LogDecays(NamedTuple):
    """Sums of the base-2 logarithms of decays up to each position [Q], in two parts to be added.

    The coarse parts are multiples of 1/16 and add up without rounding. The fine parts stay small. A
    step of 0.01 next to steps of 80 keeps its digits so, which it would lose in one float32 sum.
    """

    coarse: Any
    fine: Any


@triton.jit
@no_type_check
def operand(v, S: tl.constexpr):
    """Prepares a matrix for `product` and `add_product`.

    Tensor cores read float32 without its last 13 bits. For "tf32x3" these bits are a number of
    their own, of which tensor cores read all but 2^-21 of the whole.
    """
    if S.PRECISION == "tf32x3":
        high = (v.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        low = v - high
    else:
        high = v
        low = v
    return Operand(high, low)


@triton.jit
@no_type_check
def add_product(total, a, b, S: tl.constexpr):
    """`total` and the product of two operands; "tf32x3" leaves out that of the low parts."""
    if S.PRECISION == "tf32x3":
        total = tl.dot(a.low, b.high, total, input_precision="tf32")
        total = tl.dot(a.high, b.low, total, input_precision="tf32")
        total = tl.dot(a.high, b.high, total, input_precision="tf32")
    else:
        total = tl.dot(a.high, b.high, total, input_precision=S.PRECISION)
    return total


@triton.jit
@no_type_check
def product(a, b, S: tl.constexpr):
    """The matrix product of two operands."""
    nothing = tl.zeros([a.high.shape[0], b.high.shape[1]], tl.float32)
    return add_product(nothing, a, b, S)


# Tensor cores leave columns 2t and 2t + 1 of every eight of a result in one thread, and as an
# operand they want columns t and t + 4 there. So that a result need not move between threads before
# the next product, a factor of it takes its rows in another order ("paired"): 0, 4, 1, 5, 2, 6, 3,
# 7. The result is then renamed, which costs nothing.


@triton.jit
@no_type_check
def paired(t):
    """Which row stands at place t of a matrix with paired rows."""
    return t // 8 * 8 + t % 8 // 2 + t % 2 * 4


@triton.jit
@no_type_check
def pair_rows(v):
    """A matrix with its rows in paired order."""
    cut = tl.reshape(v, [v.shape[0] // 8, 2, 4, v.shape[1]])
    return tl.reshape(tl.permute(cut, (0, 2, 1, 3)), [v.shape[0], v.shape[1]])


@triton.jit
@no_type_check
def pair_columns(v):
    """A matrix with its columns in paired order."""
    cut = tl.reshape(v, [v.shape[0], v.shape[1] // 8, 2, 4])
    return tl.reshape(tl.permute(cut, (0, 1, 3, 2)), [v.shape[0], v.shape[1]])


@triton.jit
@no_type_check
def unpair_columns(v):
    """A matrix with paired columns, with its columns in their own order."""
    cut = tl.reshape(v, [v.shape[0], v.shape[1] // 8, 4, 2])
    return tl.reshape(tl.permute(cut, (0, 1, 3, 2)), [v.shape[0], v.shape[1]])


@triton.jit
@no_type_check
def unpair_transposed(v):
    """The transpose of a matrix with paired columns, whose rows are then in their own order."""
    cut = tl.reshape(v, [v.shape[0], v.shape[1] // 8, 4, 2])
    return tl.reshape(tl.permute(cut, (1, 3, 2, 0)), [v.shape[1], v.shape[0]])


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
def load_tile(array, rows, inside, column):
    """Loads [Q, columns]: `rows` are the offsets of each position's first element."""
    where = rows[:, None] + column[None, :]
    return tl.load(array + where, mask=inside[:, None], other=0).to(tl.float32)


@triton.jit
@no_type_check
def scratch_offsets(chunk, head, S: tl.constexpr):
    """Offsets of a state [N, P] in the kernels' own memory [chunk, H, N, P]."""
    n, p = tl.arange(0, S.N), tl.arange(0, S.P)
    return ((chunk * S.H + head) * S.N + n[:, None]) * S.P + p[None, :]


@triton.jit
@no_type_check
def load_restarts(segments, at, t, length, S: tl.constexpr):
    """Whether each position t of the chunk forgets the state before it; `at` is its offset."""
    if S.HAS_SEGMENTS:
        follows = (t > 0) & (t < length)
        here = tl.load(segments + at, mask=follows, other=0)
        restarts = here != tl.load(segments + at - 1, mask=follows, other=0)
    else:
        restarts = tl.full(t.shape, 0, tl.int1)
    return restarts


@triton.jit
@no_type_check
def log_decays(step, rate, restarts):
    """`LogDecays` of a head with step sizes `step` and decay rate `rate`."""
    # 2 ** -1400 is 0 in float32. Bounded so, the decays of a chunk add up exactly.
    each = tl.where(restarts, -1400, tl.maximum(step * (rate * LOG2E), -1400))
    coarse = tl.floor(each * 16 + 0.5) / 16
    return LogDecays(tl.cumsum(coarse, 0), tl.cumsum(each - coarse, 0))


@triton.jit
@no_type_check
def decay_from_start(total):
    """What is left at each position of the state that entered the chunk."""
    return tl.exp2(total.coarse + total.fine)


@triton.jit
@no_type_check
def decay_between(total, S: tl.constexpr):
    """[to, from]: what is left at a position of what an earlier one, or itself, has added."""
    q = tl.arange(0, S.Q)
    coarse, fine = total.coarse, total.fine
    difference = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    # Masked before exp2: beyond the diagonal it may overflow.
    return tl.exp2(tl.where(q[:, None] >= q[None, :], difference, -float("inf")))


@triton.jit
@no_type_check
def paired_decay_between(total, FROM_TO: tl.constexpr, S: tl.constexpr):
    """`decay_between` with paired columns, or if FROM_TO its transpose [from, to] with such."""
    q = tl.arange(0, S.Q)
    coarse, fine = pair_columns(total.coarse[None, :]), pair_columns(total.fine[None, :])
    if FROM_TO:
        difference = (coarse - total.coarse[:, None]) + (fine - total.fine[:, None])
        before = q[:, None] <= paired(q)[None, :]
    else:
        difference = (total.coarse[:, None] - coarse) + (total.fine[:, None] - fine)
        before = q[:, None] >= paired(q)[None, :]
    return tl.exp2(tl.where(before, difference, -float("inf")))


@triton.jit
@no_type_check
def sum_from(v, t, S: tl.constexpr):
    """Sums of columns, which are paired, from each place t on: as many columns as t."""
    v = unpair_columns(v)
    ones = tl.where(tl.arange(0, S.Q)[:, None] >= t[None, :], 1.0, 0.0)
    if S.PRECISION == "ieee":
        total = tl.dot(v, ones, input_precision="ieee")
    else:
        # Two parts of each number give nearly all of its digits.
        high = (v.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        total = tl.dot(v - high, ones, input_precision="tf32")
        total = tl.dot(high, ones, total, input_precision="tf32")
    return total


@triton.jit
@no_type_check
def decay_to_end(total, S: tl.constexpr):
    """What is left at the end of the chunk of what each position added, and of the state before."""
    last = tl.arange(0, S.Q) == S.Q - 1
    coarse = tl.sum(tl.where(last, total.coarse, 0), 0)
    fine = tl.sum(tl.where(last, total.fine, 0), 0)
    return tl.exp2((coarse - total.coarse) + (fine - total.fine)), tl.exp2(coarse + fine)


@triton.jit
@no_type_check
def attend(mixing, C, step_x, state, total, STATEFUL: tl.constexpr, S: tl.constexpr):
    """What positions see of each other and, if STATEFUL, of the state before them: [Q, P]."""
    y = tl.dot(mixing, step_x, input_precision=S.PRECISION)
    if STATEFUL:
        seen = C * decay_from_start(total)[:, None]
        y += tl.dot(seen, state, input_precision=S.PRECISION)
    return y


@triton.jit
@no_type_check
def advance(state, B, step_x, total, S: tl.constexpr):
    """The state after the chunk."""
    to_end, kept = decay_to_end(total, S)
    added = tl.trans(B * to_end[:, None])
    return kept * state + tl.dot(added, step_x, input_precision=S.PRECISION)


@triton.jit
@no_type_check
def attend_backward(scores, step_x, dy, total, S: tl.constexpr):
    """Gradients through what positions see of each other: of step_x [Q, P] and scores [Q, Q]."""
    decay = decay_between(total, S)
    dstep_x = tl.dot(tl.trans(scores * decay), dy, input_precision=S.PRECISION)
    dscores = tl.dot(dy, tl.trans(step_x), input_precision=S.PRECISION) * decay
    return dstep_x, dscores
