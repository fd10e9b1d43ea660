"""The SSD as a Pallas kernel for TPUs (Mosaic): one launch forward, one backward.

A program takes some rows of the batch; chunks follow each other with the state in VMEM, in the
backward pass from the last to the first. What is quadratic in the chunk is never written to
memory and computed again backward; the states between chunks, N / Q of the inputs' size, are
stored where a gradient will want them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tim4rec_jax.ssd import tpu_chunk
from tim4rec_jax.ssd.rows import row_by_row
from tim4rec_jax.ssd.tpu_chunk import Heads

# exp() of it is zero in float32. Bounded so, the decays of a chunk add up exactly.
_FORGET_ALL = -1000.0
# What the blocks of a program take of the 16 MiB of VMEM that the compiler grants by default,
# and what they may take where one row needs more. The rest is for values on their way.
_BLOCK_BYTES = 6 * 2**20
_MOST_BYTES = 11 * 2**20
_MOST_ROWS = 8


class Plan(NamedTuple):
    """The shape of the work: all of it known when a program is traced."""

    heads: Heads
    length: int
    chunk: int
    stateful: bool  # whether there is a state before or after a chunk
    final: bool  # whether the state after the last is wanted

    @property
    def chunks(self) -> int:
        """How many chunks cover the length; the last may be ragged."""
        return -(-self.length // self.chunk)


def plan_chunks(length: int, chunk_size: int | None) -> int:
    """Returns the positions of a chunk: equal chunks of at most 128, one register's lanes.

    A matrix over fewer pairs fills as many registers as one over 128 x 128. Whole registers of
    bfloat16 hold 16 positions.
    """
    chunk = chunk_size or -(-length // -(-length // 128))
    return -(-min(chunk, length) // 16) * 16


def _row_bytes(chunk: int, heads: Heads) -> int:
    """The VMEM of a row's blocks: x, y and B, C with gradients, in use and under way."""
    features, cells, state = (
        height * -(-width // 128) * 128 * 4
        for height, width in (
            (chunk, heads.number * heads.width),
            (chunk, heads.groups * heads.size),
            (heads.size, heads.number * heads.width),
        )
    )
    return 2 * (3 * features + 4 * cells + 2 * state)


def rows_per_program(batch: int, plan: Plan) -> int:
    """Returns how many rows a program takes: a divisor of the batch that fits VMEM."""
    most = min(_MOST_ROWS, _BLOCK_BYTES // _row_bytes(plan.chunk, plan.heads))
    return next(n for n in range(max(1, most), 0, -1) if batch % n == 0)


def by_chunk(v: jax.Array, plan: Plan) -> jax.Array:
    """[B,L,H] -> [B,chunks,H,Q], zeros as filler: positions belong in lanes."""
    v = jnp.pad(v, ((0, 0), (0, plan.chunks * plan.chunk - plan.length), (0, 0)))
    return v.reshape(v.shape[0], plan.chunks, plan.chunk, -1).swapaxes(2, 3)


def obstacle(v) -> str | None:
    """Returns what keeps the arguments of `ssd` from running here, or None."""
    arrays = (v.x, v.dt, v.A, v.B, v.C, v.D, v.dt_bias, v.initial_state)
    if any(array is not None and array.dtype == jnp.float64 for array in arrays):
        return "a TPU has no float64"
    heads = Heads(*v.x.shape[2:], *v.B.shape[2:], dtype=None)
    if _row_bytes(plan_chunks(v.x.shape[1], v.chunk_size), heads) > _MOST_BYTES:
        return "a chunk of one row does not fit VMEM; choose a smaller chunk_size"
    return None


def ssd_tpu(dt, log_decay, v):
    """Computes the SSD from step sizes and decays that are ready to use.

    Any shape will do: chunks are rounded up to whole registers, and what a block holds beyond
    the length is masked.

    Args:
        dt: step sizes [B,L,H], float32.
        log_decay: logarithms of the decays [B,L,H], float32, -inf where a segment starts.
        v: all other arguments of `ssd`.

    Returns:
        The outputs in the dtype of `x` and the final state in float32, or None.
    """
    batch, length, number, width = v.x.shape
    final, groups = v.return_final_state, v.B.shape[2]
    # Registers know no float16, and products over fewer than 8 numbers not everywhere.
    kind = jnp.bfloat16 if jnp.result_type(v.x, v.B, v.C) == jnp.bfloat16 else jnp.float32
    filler = -v.B.shape[3] % 8
    size = v.B.shape[3] + filler
    chunk = plan_chunks(length, v.chunk_size)
    stateful = chunk < length or final or v.initial_state is not None
    plan = Plan(Heads(number, width, groups, size, kind), length, chunk, stateful, final)

    state = v.initial_state
    if state is not None:
        state = _fill(state.astype(jnp.float32), filler).reshape(batch, -1, size).swapaxes(1, 2)
    skip = jnp.zeros(number) if v.D is None else v.D.astype(jnp.float32)
    skip = jnp.broadcast_to(skip.reshape(number, -1), (number, width)).reshape(1, -1)
    inputs = Inputs(
        x=v.x.reshape(batch, length, -1).astype(kind),
        B=_fill(v.B, filler).reshape(batch, length, -1).astype(kind),
        C=_fill(v.C, filler).reshape(batch, length, -1).astype(kind),
        dt=by_chunk(dt, plan),
        decay=by_chunk(jnp.maximum(log_decay, _FORGET_ALL), plan),
        state=state,
    )
    results: Any = _ssd(plan, inputs, skip)
    y, state = results
    if state is not None:
        state = state.swapaxes(1, 2).reshape(batch, number, width, size)[..., : size - filler]
    return y.reshape(v.x.shape).astype(v.x.dtype), state


def _fill(v, filler: int):
    """Adds zeros to the last axis."""
    return jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, filler)])


class Inputs(NamedTuple):
    """What the kernels read of every row, or gradients of it."""

    x: Any  # [B,L,I]
    B: Any  # [B,L,GN]
    C: Any  # [B,L,GN]
    dt: Any  # [B,chunks,H,Q]
    decay: Any  # [B,chunks,H,Q]
    state: Any  # [B,N,I], or None


class _Outputs(NamedTuple):
    y: Any  # [B,L,I]
    state: Any  # [B,N,I], or None if it is not wanted
    entering: Any  # [B,chunks,N,I]: the state before each chunk, where a gradient wants it


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(plan: Plan, inputs: Inputs, skip: jax.Array) -> Any:
    return row_by_row(functools.partial(_forward, plan, False), inputs, skip)[:2]


def _ssd_forward(plan, inputs, skip):
    y, state, entering = row_by_row(functools.partial(_forward, plan, True), inputs, skip)
    return (y, state), (inputs, skip, entering)


def _ssd_backward(plan, residuals, gradients):
    inputs, skip, entering = residuals
    rows = (inputs, entering, *gradients)
    dinputs, dskip = row_by_row(functools.partial(_backward, plan), rows, skip)
    return dinputs, jnp.sum(dskip, axis=0)


_ssd.defvjp(_ssd_forward, _ssd_backward)


class Blocks:
    """How arrays are cut into what a program sees: by rows of the batch, and by chunks."""

    def __init__(self, plan: Plan, rows: int, reverse: bool = False):
        self.plan, self.rows = plan, rows
        self._at = (lambda c: plan.chunks - 1 - c) if reverse else (lambda c: c)

    def positions(self, width: int) -> pl.BlockSpec:
        """Of [B,L,width]."""
        shape = (self.rows, self.plan.chunk, width)
        return pl.BlockSpec(shape, lambda i, c: (i, self._at(c), 0))

    def chunk(self, *shape: int) -> pl.BlockSpec:
        """Of [B,chunks,*shape]."""
        return pl.BlockSpec((self.rows, 1, *shape), lambda i, c: (i, self._at(c), 0, 0))

    def row(self, *shape: int) -> pl.BlockSpec:
        """Of [B,*shape], the same for all chunks."""
        return pl.BlockSpec((self.rows, *shape), lambda i, c: (i, 0, 0))

    def inputs(self, v: Inputs) -> Inputs:
        """Of the inputs or their gradients."""
        steps = self.chunk(*v.dt.shape[2:])
        return Inputs(
            x=self.positions(v.x.shape[2]),
            B=self.positions(v.B.shape[2]),
            C=self.positions(v.C.shape[2]),
            dt=steps,
            decay=steps,
            state=None if v.state is None else self.row(*v.state.shape[1:]),
        )


def launch(kernel, blocks: Blocks, arguments, in_specs, results, out_specs, scratch):
    """Runs a kernel over blocks of rows and, one after the other, their chunks."""
    batch = jax.tree.leaves(results)[0].shape[0]
    return pl.pallas_call(
        kernel,
        out_shape=results,
        grid=(batch // blocks.rows, blocks.plan.chunks),
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    )(*arguments)


def whole(plan: Plan, chunk, *arrays):
    """Values of a row's chunk in float32, zeros beyond the length of the sequence."""
    arrays = [v.astype(jnp.float32) for v in arrays]
    if plan.length % plan.chunk == 0:
        return arrays
    left = plan.length - chunk * plan.chunk
    return [
        jnp.where(jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < left, v, 0.0) for v in arrays
    ]


def _forward(plan: Plan, save: bool, inputs: Inputs, skip) -> _Outputs:
    batch, _, features = inputs.x.shape
    size = plan.heads.size
    save = save and plan.stateful

    def kernel(v: Inputs, skip, out: _Outputs, state):
        chunk = pl.program_id(1)

        @pl.when(chunk == 0)
        def _():
            state[...] = jnp.zeros_like(state) if v.state is None else v.state[...]

        def row(i, _):
            x, B, C = whole(plan, chunk, v.x[i], v.B[i], v.C[i])
            before = state[i] if plan.stateful else None
            y, after = tpu_chunk.forward(plan.heads, x, B, C, v.dt[i, 0], v.decay[i, 0], before)
            out.y[i] = (y + skip[...] * x).astype(out.y.dtype)
            if save:
                out.entering[i, 0] = before
            if plan.stateful:
                state[i] = after
            if plan.final:
                out.state[i] = after

        jax.lax.fori_loop(0, blocks.rows, row, None)

    blocks = Blocks(plan, rows_per_program(batch, plan))
    results = _Outputs(
        jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype),
        float32(batch, size, features) if plan.final else None,
        float32(batch, plan.chunks, size, features) if save else None,
    )
    out_specs = _Outputs(
        blocks.positions(features),
        blocks.row(size, features) if plan.final else None,
        blocks.chunk(size, features) if save else None,
    )
    (outputs,) = launch(
        kernel,
        blocks,
        (inputs, skip),
        (blocks.inputs(inputs), pl.BlockSpec()),
        (results,),
        (out_specs,),
        [pltpu.VMEM((blocks.rows, size, features), jnp.float32)],
    )
    return outputs


def _backward(plan: Plan, rows, skip):
    inputs: Inputs = rows[0]
    batch, _, features = inputs.x.shape
    size = plan.heads.size

    def kernel(rows, skip, dinputs: Inputs, dskip, dstate):
        v, entering, dy, dfinal = rows
        chunk = plan.chunks - 1 - pl.program_id(1)

        @pl.when(pl.program_id(1) == 0)
        def _():
            dstate[...] = jnp.zeros_like(dstate) if dfinal is None else dfinal[...]
            dskip[...] = jnp.zeros_like(dskip)

        def row(i, _):
            x, B, C, d = whole(plan, chunk, v.x[i], v.B[i], v.C[i], dy[i])
            states = (entering[i, 0], dstate[i]) if plan.stateful else (None, None)
            g = tpu_chunk.backward(plan.heads, x, B, C, v.dt[i, 0], v.decay[i, 0], d, *states)
            dinputs.x[i] = (g.x + skip[...] * d).astype(dinputs.x.dtype)
            dinputs.B[i] = g.B.astype(dinputs.B.dtype)
            dinputs.C[i] = g.C.astype(dinputs.C.dtype)
            dinputs.dt[i, 0] = g.dt
            dinputs.decay[i, 0] = g.decay
            dskip[i] += jnp.sum(d * x, axis=0, keepdims=True)
            if plan.stateful:
                dstate[i] = g.state
            if v.state is not None:
                dinputs.state[i] = g.state

        jax.lax.fori_loop(0, blocks.rows, row, None)

    blocks = Blocks(plan, rows_per_program(batch, plan), reverse=True)
    specs = (
        blocks.inputs(inputs),
        blocks.chunk(size, features) if plan.stateful else None,
        blocks.positions(features),
        blocks.row(size, features) if plan.final else None,
    )
    return launch(
        kernel,
        blocks,
        (rows, skip),
        (specs, pl.BlockSpec()),
        (
            jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), inputs),
            float32(batch, 1, features),
        ),
        (blocks.inputs(inputs), blocks.row(1, features)),
        [pltpu.VMEM((blocks.rows, size, features), jnp.float32)],
    )


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of a float32 result."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)
