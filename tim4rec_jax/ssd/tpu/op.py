"""The SSD as a Pallas kernel for TPUs (Mosaic), with one launch forward and one backward.

A program takes some rows of the batch, and their chunks one after the other. The state stays in
VMEM between chunks; in the backward pass, which goes from the last chunk to the first, its gradient
does. Matrices over pairs of positions never leave a program, and the backward pass computes them
again. Where a gradient will be wanted, the states between chunks are stored, which take N / Q of
the memory of the inputs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tim4rec_jax.ssd.batching import row_by_row
from tim4rec_jax.ssd.tpu.common import (
    FORGET_ALL,
    MOST_BYTES,
    Blocks,
    Heads,
    Plan,
    by_chunk,
    float32,
    like,
    load,
    padded_bytes,
    plan_chunks,
)
from tim4rec_jax.ssd.tpu.kernels import chunk_backward, chunk_forward


def unsupported_reason(v) -> str | None:
    """Returns why the arguments of `ssd` cannot run here, or None if they can."""
    arrays = (v.x, v.dt, v.A, v.B, v.C, v.D, v.dt_bias, v.initial_state)
    if any(array is not None and array.dtype == jnp.float64 for array in arrays):
        return "a TPU has no float64"
    heads = Heads(*v.x.shape[2:], *v.B.shape[2:], precision="")
    if _row_bytes(plan_chunks(v.x.shape[1], v.chunk_size), heads) > MOST_BYTES:
        return "a chunk of one row does not fit VMEM; choose a smaller chunk_size"
    return None


def ssd_tpu(dt, log_decay, v):
    """Computes the SSD from step sizes and decays that are ready to use.

    The precision "tf32" becomes three products of bfloat16 numbers, which keep 16 bits of the
    fraction instead of 10 and are faster than "ieee".

    Args:
        dt: step sizes [B,L,H], float32.
        log_decay: logarithms of the decays [B,L,H], float32, -inf where a segment starts.
        v: all other arguments of `ssd`.

    Returns:
        The outputs in the dtype of `x`, and the final state in float32, or None if `v` does not
        ask for it.
    """
    batch, length, number, width = v.x.shape
    # A TPU computes with float32 and bfloat16, but not with float16.
    dtype, precision = jnp.float32, "3" if v.precision == "tf32" else "float32"
    if jnp.result_type(v.x, v.B, v.C) == jnp.bfloat16:
        dtype, precision = jnp.bfloat16, "1"
    # Zeros complete the state, because Mosaic does not take all products over fewer than 8 numbers.
    filler = -v.B.shape[3] % 8
    size = v.B.shape[3] + filler
    heads = Heads(number, width, v.B.shape[2], size, precision)
    chunk = plan_chunks(length, v.chunk_size)
    stateful = chunk < length or v.return_final_state or v.initial_state is not None
    plan = Plan(heads, length, chunk, stateful, v.return_final_state)

    state = v.initial_state
    if state is not None:
        state = _fill(state.astype(jnp.float32), filler).reshape(batch, -1, size).swapaxes(1, 2)
    skip = jnp.zeros(number) if v.D is None else v.D.astype(jnp.float32)
    skip = jnp.broadcast_to(skip.reshape(number, -1), (number, width)).reshape(1, -1)
    inputs = Inputs(
        x=v.x.reshape(batch, length, -1).astype(dtype),
        maps=jnp.concatenate(
            [_fill(m, filler).reshape(batch, length, -1).astype(dtype) for m in (v.B, v.C)], axis=2
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
    """What the kernels read of each row, or its gradients.

    Attributes:
        x: inputs [B,L,I].
        maps: B and C side by side [B,L,2GN], because each alone would leave more lanes empty.
        dt: step sizes [B,chunks,H,Q].
        decay: logarithms of the decays [B,chunks,H,Q], finite.
        state: the state before the first position [B,N,I], or None.
    """

    x: Any
    maps: Any
    dt: Any
    decay: Any
    state: Any

    def blocks(self, blocks: Blocks) -> Inputs:
        """The block of each array."""
        steps = blocks.chunk(*self.dt.shape[2:])
        return Inputs(
            x=blocks.positions(self.x.shape[2]),
            maps=blocks.positions(self.maps.shape[2]),
            dt=steps,
            decay=steps,
            state=None if self.state is None else blocks.row(*self.state.shape[1:]),
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(plan: Plan, inputs: Inputs, skip: jax.Array) -> Any:
    """Returns the outputs [B,L,I] and the state after the last position [B,N,I], or None."""
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
    """The bytes of VMEM that the blocks of a row take.

    They hold x, y, B and C with their gradients, once for the running program and once more for
    what is being copied.
    """
    maps = 2 * heads.groups * heads.size
    positions = padded_bytes(chunk, *[heads.features] * 3, *[maps] * 2)
    return 2 * (positions + padded_bytes(heads.size, *[heads.features] * 2))


def _forward(plan: Plan, save: bool, inputs: Inputs, skip):
    """Returns y [B,L,I], the final state [B,N,I] and the state before each chunk.

    The states before the chunks [B,chunks,N,I] are None unless they are to `save`. The final state
    is None unless the plan wants it.
    """
    batch, _, features = inputs.x.shape
    blocks = Blocks(plan, batch, _row_bytes(plan.chunk, plan.heads))
    save = save and plan.stateful

    def kernel(v: Inputs, skip, y, final, entering, state):
        number = blocks.number(pl.program_id(1))

        @pl.when(number == 0)
        def _():
            state[...] = jnp.zeros_like(state) if v.state is None else v.state[...]

        def row(i):
            x, maps = load(plan, number, v.x[i], v.maps[i])
            B, C = jnp.split(maps, 2, axis=1)
            before = state[i] if plan.stateful else None
            out, after = chunk_forward(plan.heads, x, B, C, v.dt[i, 0], v.decay[i, 0], before)
            y[i] = (out + skip[...] * x).astype(y.dtype)
            if save:
                entering[i, 0] = before
            if plan.stateful:
                state[i] = after
            if plan.final:
                final[i] = after

        blocks.for_rows(row)

    shape = plan.state_shape
    nothing = (None, None)
    return blocks.launch(
        kernel,
        inputs=[(inputs, inputs.blocks(blocks)), (skip, pl.BlockSpec())],
        outputs=[
            (like(inputs.x), blocks.positions(features)),
            (float32(batch, *shape), blocks.row(*shape)) if plan.final else nothing,
            (float32(batch, plan.chunks, *shape), blocks.chunk(*shape)) if save else nothing,
        ],
        scratch=[shape],
    )


def _backward(plan: Plan, rows, skip):
    """Returns the gradients of the inputs and, for each row, of the skip [B,1,I].

    Args:
        plan: the shape of the work.
        rows: the inputs, the state before each chunk, and the gradients of the outputs and of the
            final state; None for what there is not.
        skip: weights of the skip connection [1,I].
    """
    inputs, entering, dy, dfinal = rows
    batch, _, features = inputs.x.shape
    blocks = Blocks(plan, batch, _row_bytes(plan.chunk, plan.heads), reverse=True)

    def kernel(v: Inputs, entering, dy, dfinal, skip, dinputs: Inputs, dskip, dstate):
        number = blocks.number(pl.program_id(1))

        @pl.when(number == plan.chunks - 1)
        def _():
            dstate[...] = jnp.zeros_like(dstate) if dfinal is None else dfinal[...]
            dskip[...] = jnp.zeros_like(dskip)

        def row(i):
            x, maps, dout = load(plan, number, v.x[i], v.maps[i], dy[i])
            B, C = jnp.split(maps, 2, axis=1)
            states = (entering[i, 0], dstate[i]) if plan.stateful else (None, None)
            g = chunk_backward(plan.heads, x, B, C, v.dt[i, 0], v.decay[i, 0], dout, *states)
            dmaps = jnp.concatenate([g.B, g.C], axis=1)
            dinputs.x[i] = (g.x + skip[...] * dout).astype(dinputs.x.dtype)
            dinputs.maps[i] = dmaps.astype(dinputs.maps.dtype)
            dinputs.dt[i, 0] = g.dt
            dinputs.decay[i, 0] = g.decay
            dskip[i] += jnp.sum(dout * x, axis=0, keepdims=True)
            if plan.stateful:
                dstate[i] = g.state
            if v.state is not None:
                dinputs.state[i] = g.state

        blocks.for_rows(row)

    shape = plan.state_shape
    return blocks.launch(
        kernel,
        inputs=[
            (inputs, inputs.blocks(blocks)),
            (entering, blocks.chunk(*shape) if plan.stateful else None),
            (dy, blocks.positions(features)),
            (dfinal, blocks.row(*shape) if plan.final else None),
            (skip, pl.BlockSpec()),
        ],
        outputs=[
            (like(inputs), inputs.blocks(blocks)),
            (float32(batch, 1, features), blocks.row(1, features)),
        ],
        scratch=[shape],
    )
