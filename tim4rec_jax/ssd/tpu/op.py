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

from tim4rec_jax.ssd.dispatch import row_by_row
from tim4rec_jax.ssd.tpu import kernels as tpu_chunk
from tim4rec_jax.ssd.tpu.common import (
    FORGET_ALL,
    MOST_BYTES,
    Blocks,
    Heads,
    Plan,
    by_chunk,
    float32,
    launch,
    padded_bytes,
    plan_chunks,
    rows_per_program,
    whole,
)


def unsupported_reason(v) -> str | None:
    """Returns what keeps the arguments of `ssd` from running here, or None."""
    arrays = (v.x, v.dt, v.A, v.B, v.C, v.D, v.dt_bias, v.initial_state)
    if any(array is not None and array.dtype == jnp.float64 for array in arrays):
        return "a TPU has no float64"
    heads = Heads(*v.x.shape[2:], *v.B.shape[2:], precision="")
    if _row_bytes(plan_chunks(v.x.shape[1], v.chunk_size), heads) > MOST_BYTES:
        return "a chunk of one row does not fit VMEM; choose a smaller chunk_size"
    return None


def ssd_tpu(dt, log_decay, v):
    """Computes the SSD from step sizes and decays that are ready to use.

    Any shape will do: chunks are rounded up to whole registers, and what a block holds beyond
    the length is masked. The nearest there is to a "tf32" precision is faster than "ieee", too,
    and keeps 16 bits of fraction.

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
    kind, precision = jnp.float32, "float32" if v.precision == "ieee" else "3"
    if jnp.result_type(v.x, v.B, v.C) == jnp.bfloat16:
        kind, precision = jnp.bfloat16, "1"
    filler = -v.B.shape[3] % 8
    size = v.B.shape[3] + filler
    chunk = plan_chunks(length, v.chunk_size)
    stateful = chunk < length or final or v.initial_state is not None
    plan = Plan(Heads(number, width, groups, size, precision), length, chunk, stateful, final)

    state = v.initial_state
    if state is not None:
        state = _fill(state.astype(jnp.float32), filler).reshape(batch, -1, size).swapaxes(1, 2)
    skip = jnp.zeros(number) if v.D is None else v.D.astype(jnp.float32)
    skip = jnp.broadcast_to(skip.reshape(number, -1), (number, width)).reshape(1, -1)
    inputs = Inputs(
        x=v.x.reshape(batch, length, -1).astype(kind),
        maps=jnp.concatenate(
            [_fill(m, filler).reshape(batch, length, -1).astype(kind) for m in (v.B, v.C)], axis=2
        ),
        dt=by_chunk(dt, plan),
        decay=by_chunk(jnp.maximum(log_decay, FORGET_ALL), plan),
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
    maps: Any  # B and C [B,L,2GN]: each alone would leave more of its registers' lanes empty
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


def _row_bytes(chunk: int, heads: Heads) -> int:
    """The VMEM of a row's blocks: x, y and B, C with gradients, in use and under way."""
    features, maps = heads.number * heads.width, 2 * heads.groups * heads.size
    positions = padded_bytes(chunk, *[features] * 3, *[maps] * 2)
    return 2 * (positions + padded_bytes(heads.size, *[features] * 2))


def _input_specs(blocks: Blocks, v: Inputs) -> Inputs:
    """How the inputs or their gradients are cut."""
    steps = blocks.chunk(*v.dt.shape[2:])
    return Inputs(
        x=blocks.positions(v.x.shape[2]),
        maps=blocks.positions(v.maps.shape[2]),
        dt=steps,
        decay=steps,
        state=None if v.state is None else blocks.row(*v.state.shape[1:]),
    )


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
            x, maps = whole(plan, chunk, v.x[i], v.maps[i])
            B, C = jnp.split(maps, 2, axis=1)
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

    blocks = Blocks(plan, rows_per_program(batch, _row_bytes(plan.chunk, plan.heads)))
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
        (_input_specs(blocks, inputs), pl.BlockSpec()),
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
            x, maps, d = whole(plan, chunk, v.x[i], v.maps[i], dy[i])
            B, C = jnp.split(maps, 2, axis=1)
            states = (entering[i, 0], dstate[i]) if plan.stateful else (None, None)
            g = tpu_chunk.backward(plan.heads, x, B, C, v.dt[i, 0], v.decay[i, 0], d, *states)
            dinputs.x[i] = (g.x + skip[...] * d).astype(dinputs.x.dtype)
            dmaps = jnp.concatenate([g.B, g.C], axis=1)
            dinputs.maps[i] = dmaps.astype(dinputs.maps.dtype)
            dinputs.dt[i, 0] = g.dt
            dinputs.decay[i, 0] = g.decay
            dskip[i] += jnp.sum(d * x, axis=0, keepdims=True)
            if plan.stateful:
                dstate[i] = g.state
            if v.state is not None:
                dinputs.state[i] = g.state

        jax.lax.fori_loop(0, blocks.rows, row, None)

    blocks = Blocks(plan, rows_per_program(batch, _row_bytes(plan.chunk, plan.heads)), reverse=True)
    specs = (
        _input_specs(blocks, inputs),
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
        (_input_specs(blocks, inputs), blocks.row(1, features)),
        [pltpu.VMEM((blocks.rows, size, features), jnp.float32)],
    )
