"""The SSD as chunked semiseparable matrix products (Mamba-2, arXiv 2405.21060, section 6).

Within a chunk the output is `M (dt x)` with `M[q, k] = (C[q] B[k]) exp(a[k+1] + ... + a[q])`, one
matrix for each head. Earlier chunks act through the state that they leave. The inner functions
treat groups as rows of the batch, so their letters are b (batch x groups x chunks), q and k
(positions in the chunk), r (heads of a group), p (width of a head), n (state).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Int

from tim4rec_jax.runtime import target
from tim4rec_jax.ssd import finite
from tim4rec_jax.ssd.arrays import AnyArray
from tim4rec_jax.ssd.derivatives import custom_gradient

# Sums of decays need every bit of float32. Float32 results on a GPU or TPU need it as well.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
vecdot = functools.partial(jnp.vecdot, precision=jax.lax.Precision.HIGHEST)

# exp() of this number is zero in float32 and float64. With this bound, the decays of a chunk add up
# without rounding.
_FORGET_ALL = -1000.0

# How many numbers a block of rows has in its matrices and inputs on a CPU, so that caches hold it.
_BLOCK = 2**20


def default_chunk_size(length: Any) -> int:
    """Returns the size of the fewest equal chunks of at most 64 positions (128 on a TPU).

    Equal chunks need almost no filler, and filler can double the time. Larger chunks have more
    work within chunks and less work between them.

    On a CPU with 2 cores (`benchmarks/ssd.py`; P = N = 32, with gradient) one chunk is fastest up
    to 64 positions. Beyond that, chunks of 32 to 64 are within a tenth of each other, and larger
    ones are slower. The bound for a TPU follows its compiler and is not measured: for B = 32, L =
    200, with gradient, it counts 1,420 MB moved in chunks of 25, 790 MB in chunks of 50 and 479 MB
    in chunks of 100. A GPU has the rule of the CPU, which is not measured there.

    A symbolic length (`jax.export`) has chunks of the largest size.
    """
    largest = 128 if target().platform == "tpu" else 64
    if is_symbolic_dim(length):
        return largest
    return -(-length // -(-length // largest))


def ssd_xla(
    x: Float[Array, "B L H P"],
    dt: Float[Array, "B L H"],
    log_decay: Float[Array, "B L H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    initial_state: Float[Array, "B H P N"] | None,
    chunk_size: int | None,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """Computes the SSD chunk by chunk; arguments and results as for `ssd_reference`.

    Args:
        x: inputs.
        dt: step sizes.
        log_decay: logarithm of the factor the state is multiplied with.
        B: input projections.
        C: output projections.
        initial_state: the state before the first position, None for zeros.
        chunk_size: positions per chunk; None chooses by `default_chunk_size`.

    Returns:
        The outputs, without the skip `D x`, and the state after the last position.
    """
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    chunk = chunk_size or default_chunk_size(length)
    if not is_symbolic_dim(length):
        chunk = min(chunk, length)
    chunks = -(-length // chunk)
    per_group = heads // groups

    def rows(v, *shape):
        """[B,L,G*...] -> [b,q,...]; the filler has dt = 0 and decay 1: it changes nothing."""
        v = jnp.pad(v, [(0, 0), (0, chunks * chunk - length)] + [(0, 0)] * (v.ndim - 2))
        v = v.reshape(batch, chunks, chunk, groups, *shape)
        return jnp.moveaxis(v, 3, 1).reshape(batch * groups * chunks, chunk, *shape)

    x, B, C = rows(x, per_group, width), rows(B, size), rows(C, size)
    dt, log_decay = rows(dt, per_group), rows(log_decay, per_group)
    log_decay = jnp.maximum(log_decay, _FORGET_ALL)

    y = _in_blocks(_within_chunk, x, dt, log_decay, B, C)
    if initial_state is not None:
        initial_state = initial_state.reshape(batch * groups, per_group, width, size)
        initial_state = jnp.moveaxis(initial_state, -1, 1)
    entering, state = _states(x, dt, log_decay, B, initial_state, chunks)
    if is_symbolic_dim(chunks) or chunks > 1 or initial_state is not None:
        from_start = jnp.exp(matmul(_ones_up_to(chunk, 0, dt), log_decay))
        y += from_start[..., None] * _per_head(C, entering)

    y = y.reshape(batch, groups, chunks * chunk, per_group, width)[:, :, :length]
    y = jnp.moveaxis(y, 1, 2).reshape(batch, length, heads, width)
    return y, jnp.moveaxis(state, 1, -1).reshape(batch, heads, width, size)


def _states(x, dt, log_decay, B, initial_state, chunks):
    """Returns the states that enter each chunk [b,n,r,p] and the one that leaves the last."""
    chunk = x.shape[1]
    to_end = jnp.exp(matmul(_ones_up_to(chunk, -1, dt).T, log_decay))
    added = _per_head(_transpose(B), (to_end * dt)[..., None] * x)
    kept = jnp.exp(jnp.sum(log_decay, axis=1))[:, None, :, None]

    def by_chunk(v):
        return jnp.moveaxis(v.reshape(-1, chunks, *v.shape[1:]), 1, 0)

    def advance(state, inputs):
        kept, added = inputs
        return kept * state + added, state

    if initial_state is None:
        initial_state = jnp.zeros_like(by_chunk(added)[0])
    # A handful of chunks is quicker as straight code than as a loop.
    unroll = 1 if is_symbolic_dim(chunks) else 8
    state, entering = jax.lax.scan(
        advance, initial_state, (by_chunk(kept), by_chunk(added)), unroll=unroll
    )
    return jnp.moveaxis(entering, 0, 1).reshape(added.shape), state


def _in_blocks(function, *arrays):
    """Applies a function of rows to blocks of rows, one block after the other on a CPU.

    What is quadratic in the chunk then stays in the processor's cache, and so does the memory
    it takes, whatever the batch: twice as fast at 10,000 positions a call. Other platforms
    want all the parallel work at once.
    """
    rows, chunk, heads, width = arrays[0].shape
    if is_symbolic_dim(rows):
        return function(*arrays)
    fewest = max(1, rows * chunk * heads * (chunk + width) // _BLOCK)
    # Blocks of equal size without filler, which would cost more than blocks gain.
    blocks = next((n for n in range(fewest, 4 * fewest) if rows % n == 0), 1)
    if blocks == 1 or target().platform != "cpu":
        return function(*arrays)
    split = [v.reshape(blocks, rows // blocks, *v.shape[1:]) for v in arrays]
    y = jax.lax.map(lambda block: function(*block), split)
    return y.reshape(rows, *y.shape[2:])


def _within_chunk_forward(x, dt, log_decay, B, C):
    """Returns the output of chunks [b,q,r,p] as if nothing came before them, and the inputs."""
    mixing = matmul(C, _transpose(B))[:, None] * _decay(log_decay)
    y = _swap(matmul(mixing, _swap(x * dt[..., None])))
    return y, (x, dt, log_decay, B, C)


def _within_chunk_backward(residuals, dy):
    """Returns the gradients of the inputs.

    It computes the matrices over pairs of positions again instead of storing them, and it consists
    of products and loops that a CPU compiler makes fast.
    """
    # Here all matrices over pairs of positions are transposed, [k, q], so one set is enough.
    x, dt, log_decay, B, C = residuals
    decay = _decay(log_decay, transposed=True)
    scores = matmul(B, _transpose(C))[:, None]
    ddtx = _swap(matmul(scores * decay, _swap(dy)))

    # Gradient of the scores of each head, then summed over the heads that share them.
    dscores = matmul(_swap(x * dt[..., None]), jnp.transpose(dy, (0, 2, 3, 1))) * decay
    # The decay of position t acts on each pair k < t <= q. Sums over these rectangles keep digits
    # that differences of row and column sums would lose.
    to_later = matmul(dscores * scores, _ones_up_to(dt.shape[1], 0, dt))
    dlog_decay = jnp.einsum("brkt,tk->btr", to_later, _ones_up_to(dt.shape[1], -1, dt))
    dscores = jnp.sum(dscores, axis=1)

    dB = matmul(dscores, C)
    dC = _transpose(matmul(_transpose(B), dscores))
    return ddtx * dt[..., None], vecdot(x, ddtx), dlog_decay, dB, dC


_within_chunk = custom_gradient(_within_chunk_forward, _within_chunk_backward)


def _decay(log_decay, transposed=False):
    """Returns exp(log_decay[k+1] + ... + log_decay[q]) for k <= q, else 0: [b,q,r] to [b,r,q,k]."""
    log_decay = _swap(log_decay)
    # Multiples of 1/16 add up without rounding, and the remainders stay small. So a step of 0.01
    # next to steps of 80 keeps its digits, which it would lose in one float32 sum.
    coarse = jnp.round(log_decay * 16) / 16
    # The sums are matrix products, because a compiler may fuse cumsum into the loop over all pairs.
    causal = _ones_up_to(log_decay.shape[-1], 0, log_decay)
    totals = [matmul(v, causal.T) for v in (coarse, log_decay - coarse)]
    # The matrix is built transposed if wanted, because transposing costs as much as building.
    to_row, to_column = (-1, -2) if not transposed else (-2, -1)
    difference = sum(jnp.expand_dims(v, to_row) - jnp.expand_dims(v, to_column) for v in totals)
    visible = (causal.T if transposed else causal) > 0
    # The mask comes before exp, which may overflow beyond the diagonal.
    return jnp.exp(jnp.where(visible, difference, -jnp.inf))


def _ones_up_to(size, offset, like):
    """Returns ones where `column <= row + offset`; multiplying from the left sums up to a row."""
    return jnp.tril(jnp.ones((size, size), like.dtype), offset)


def _per_head(matrix, v):
    """Multiplies [b,i,j] with [b,j,r,p] for every r and p."""
    flat = v.reshape(*v.shape[:2], -1)
    return matmul(matrix, flat).reshape(*matrix.shape[:2], *v.shape[2:])


def _swap(v):
    """Exchanges positions and heads."""
    return jnp.swapaxes(v, 1, 2)


def _transpose(v):
    return jnp.swapaxes(v, -1, -2)


def ssd_last(
    x: Float[Array, "B L H P"],
    dt: Float[Array, "B L H"],
    A: Float[Array, " H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B G N"],
    D: Float[Array, " H"] | None,
    lengths: Int[AnyArray, " B"],
    *,
    dt_bias: Float[Array, " H"] | None = None,
    dt_softplus: bool = True,
) -> Float[Array, "B H P"]:
    """Computes the output of `ssd` at position `lengths - 1` only.

    A next-item objective needs no more of the last layer. The output is one row of the
    semiseparable matrix (Mamba-2, arXiv 2405.21060, section 3): a weighted sum over the events,
    linear in L, without a state of N x P numbers.

    Args:
      x: inputs.
      dt: step sizes.
      A: negative decay rates.
      B: input maps; head h uses group h // (H // G).
      C: output maps at position `lengths - 1`.
      D: skip weights; None: no skip.
      lengths: number of events of each row, 1 or more; later positions are ignored, whatever
        stands there.
      dt_bias: added to `dt` first.
      dt_softplus: whether softplus is applied to `dt` next.

    Returns:
      The output at `lengths - 1` in the dtype of `x`. Sums are at least float32.
    """
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    length, heads = x.shape[1:3]
    real = jnp.arange(length)[None, :, None] < lengths[:, None, None]
    # A weight of zero takes away a number, but not NaN.
    x, dt, B = finite.zero_behind(lengths, (x, dt, B))
    step = dt.astype(accumulate)
    if dt_bias is not None:
        step = step + dt_bias
    step = jnp.where(real, jax.nn.softplus(step) if dt_softplus else step, 0.0)
    # The decay from event s to the last one needs the steps after s. They are summed from the end,
    # so that recent events, which count most, have the smallest error.
    after = jnp.pad(step[:, 1:], ((0, 0), (0, 1), (0, 0)))
    decay = jnp.exp(jax.lax.cumsum(after, axis=1, reverse=True) * A.astype(accumulate))
    scores = jnp.einsum("blgn,bgn->blg", B, C, preferred_element_type=accumulate)
    weights = decay * step * jnp.repeat(scores, heads // scores.shape[-1], axis=-1)
    if D is not None:  # the skip is a weight of the last event
        last = jnp.arange(length)[:, None] == lengths[:, None, None] - 1
        weights = weights + jnp.where(last, D, 0.0)
    y = jnp.einsum("blh,blhp->bhp", weights.astype(x.dtype), x, preferred_element_type=accumulate)
    return y.astype(x.dtype)
