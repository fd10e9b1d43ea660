"""The kernels of `tpu_block`: what happens to a chunk of a row, forward and backward."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tim4rec_jax.ssd import tpu_chunk
from tim4rec_jax.ssd.tpu_launch import (
    Blocks,
    float32,
    launch,
    padded_bytes,
    rows_per_program,
    whole,
)
from tim4rec_jax.ssd.tpu_matrices import columns
from tim4rec_jax.ssd.tpu_stages import (
    TAIL,
    Parameters,
    Settings,
    convolution_backward,
    finish,
    prepare,
    steps_backward,
)

# Blocks of bfloat16 hold positions by 16.
_BEFORE = 16


class Rows(NamedTuple):
    """What the kernels read of every row, or gradients of it."""

    projected: Any  # [B,L,E]
    factor: Any  # [B,chunks,H,Q]
    age: Any  # [B,chunks,1,Q]: positions since the segment's first, or None


def row_bytes(s: Settings) -> int:
    """The VMEM of a row's blocks: projection and result with gradients, in use and under way."""
    positions = padded_bytes(s.plan.chunk, *[s.mixed.stop + s.plan.heads.number] * 2, s.inner)
    return 2 * (positions + padded_bytes(s.plan.heads.size, *[s.inner] * 2))


def _specs(s: Settings, blocks: Blocks, rows: Rows) -> Rows:
    """How what is read of rows, or gradients of it, is cut."""
    return Rows(
        blocks.positions(rows.projected.shape[2]),
        blocks.chunk(*rows.factor.shape[2:]),
        None if rows.age is None else blocks.chunk(1, s.plan.chunk),
    )


def forward(s: Settings, save: bool, rows: Rows, parameters: Parameters):
    """Results [B,L,I] and, to `save` for the backward, the states that enter each chunk."""
    plan, batch = s.plan, rows.projected.shape[0]
    state_shape = (plan.heads.size, s.inner)
    save = save and plan.stateful

    def kernel(v: Rows, parameters, y, entering, state, tails):
        parameters = jax.tree.map(lambda p: p[...], parameters)
        chunk = pl.program_id(1)

        @pl.when(chunk == 0)
        def _():
            state[...] = jnp.zeros_like(state)
            tails[...] = jnp.zeros_like(tails)

        def row(i, _):
            age = None if v.age is None else v.age[i, 0]
            c = prepare(s, chunk, v.projected[i], tails[i], v.factor[i, 0], age, parameters)
            old = state[i] if plan.stateful else None
            out, new = tpu_chunk.forward(plan.heads, c.x, c.B, c.C, c.dt, c.decay, old)
            skip, scale = parameters.features[:1], parameters.features[1:]
            y[i] = finish(s, out + skip * c.x, c.z, scale).astype(y.dtype)
            if save:
                entering[i, 0] = old
            if plan.stateful:
                state[i] = new
                tails[i] = c.mixed[0][plan.chunk - TAIL :]

        jax.lax.fori_loop(0, blocks.rows, row, None)

    blocks = Blocks(plan, rows_per_program(batch, row_bytes(s)))
    return launch(
        kernel,
        blocks,
        (rows, parameters),
        (_specs(s, blocks, rows), jax.tree.map(lambda _: pl.BlockSpec(), parameters)),
        (
            jax.ShapeDtypeStruct((*rows.projected.shape[:2], s.inner), rows.projected.dtype),
            float32(batch, plan.chunks, *state_shape) if save else None,
        ),
        (blocks.positions(s.inner), blocks.chunk(*state_shape) if save else None),
        [
            pltpu.VMEM((blocks.rows, *state_shape), jnp.float32),
            pltpu.VMEM((blocks.rows, TAIL, s.channels), jnp.float32),
        ],
    )


def backward(s: Settings, rows, parameters: Parameters):
    """Gradients of the rows and, row by row, of the parameters.

    `rows` are those of `forward`, the states it saved and the gradient of its results.
    """
    inputs: Rows = rows[0]
    plan, batch = s.plan, inputs.projected.shape[0]
    state_shape = (plan.heads.size, s.inner)

    def kernel(rows, before, parameters, drows: Rows, dparameters, dstate, spilled):
        (v, entering, dy), p = rows, jax.tree.map(lambda p: p[...], parameters)
        skip, scale = p.features[:1], p.features[1:]
        chunk = plan.chunks - 1 - pl.program_id(1)

        @pl.when(pl.program_id(1) == 0)
        def _():
            for gradient in (dstate, spilled, *dparameters):
                gradient[...] = jnp.zeros_like(gradient)

        def row(i, _):
            age = None if v.age is None else v.age[i, 0]
            tail = jnp.zeros((TAIL, s.channels), jnp.float32)
            if before is not None:
                last = before[i].astype(jnp.float32)[_BEFORE - TAIL :, s.mixed]
                tail = jnp.where(chunk > 0, last, 0.0)
            c = prepare(s, chunk, v.projected[i], tail, v.factor[i, 0], age, p)
            op = (plan.heads, c.x, c.B, c.C, c.dt, c.decay)
            states = (entering[i, 0], dstate[i]) if plan.stateful else (None, None)
            out = tpu_chunk.forward(*op, states[0])[0] + skip * c.x
            (dresult,) = whole(plan, chunk, dy[i])
            dout, dz, dscale = jax.vjp(functools.partial(finish, s), out, c.z, scale)[1](dresult)
            g = tpu_chunk.backward(*op, dout, *states)
            dshaped, dheads = steps_backward(c, g.dt, g.decay, p)
            (dactive,) = whole(plan, chunk, jnp.concatenate([g.x + skip * dout, g.B, g.C], axis=1))
            (dconvolved,) = jax.vjp(s.activation, c.convolved)[1](dactive)
            dpadded, dtaps = convolution_backward(s, c, dconvolved, age, p)
            dmixed = dpadded[TAIL:]
            if plan.stateful:
                dstate[i] = g.state
                rest = jnp.zeros((plan.chunk - TAIL, s.channels), jnp.float32)
                dmixed += jnp.concatenate([rest, spilled[i]], axis=0)
                spilled[i] = dpadded[:TAIL]

            kind = drows.projected.dtype
            drows.projected[i, :, : s.inner] = dz.astype(kind)
            drows.projected[i, :, s.mixed] = dmixed.astype(kind)
            drows.projected[i, :, s.mixed.stop :] = columns(dshaped * v.factor[i, 0]).astype(kind)
            drows.factor[i, 0] = dshaped * c.raw
            dskip = jnp.sum(dout * c.x, axis=0, keepdims=True)
            dparameters.taps[i] += dtaps
            dparameters.features[i] += jnp.concatenate([dskip, dscale], axis=0)
            dparameters.heads[i] += dheads

        jax.lax.fori_loop(0, blocks.rows, row, None)

    blocks = Blocks(plan, rows_per_program(batch, row_bytes(s)), reverse=True)
    gradients = inputs._replace(age=None)
    before = None
    if plan.stateful:
        width, step = inputs.projected.shape[2], plan.chunk // _BEFORE
        before = pl.BlockSpec(
            (blocks.rows, _BEFORE, width),
            lambda i, c: (i, jnp.maximum((plan.chunks - 1 - c) * step - 1, 0), 0),
        )
    return launch(
        kernel,
        blocks,
        (rows, inputs.projected if plan.stateful else None, parameters),
        (
            (
                _specs(s, blocks, inputs),
                blocks.chunk(*state_shape) if plan.stateful else None,
                blocks.positions(s.inner),
            ),
            before,
            jax.tree.map(lambda _: pl.BlockSpec(), parameters),
        ),
        (
            jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), gradients),
            jax.tree.map(lambda v: float32(batch, *v.shape), parameters),
        ),
        (
            _specs(s, blocks, gradients),
            jax.tree.map(lambda v: blocks.row(*v.shape), parameters),
        ),
        [
            pltpu.VMEM((blocks.rows, *state_shape), jnp.float32),
            pltpu.VMEM((blocks.rows, TAIL, s.channels), jnp.float32),
        ],
    )
