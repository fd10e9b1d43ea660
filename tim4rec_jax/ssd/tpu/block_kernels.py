"""The stages around the SSD in a TPU kernel: a chunk's values before the op and after it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tim4rec_jax.ssd.tpu import kernels as tpu_chunk
from tim4rec_jax.ssd.tpu.common import (
    FORGET_ALL,
    Blocks,
    Plan,
    columns,
    float32,
    launch,
    padded_bytes,
    rows_of,
    rows_per_program,
    whole,
)

# ---- ssd.tpu_stages
# The stages around the SSD in a TPU kernel: a chunk's values before the op and after it.

# Positions before a chunk that the convolution may see: what one register of float32 holds.
TAIL = 8


class Settings(NamedTuple):
    """What is known when a program is traced."""

    plan: Plan
    taps: int  # W
    activation: Any
    eps: float

    @property
    def inner(self) -> int:
        """I."""
        return self.plan.heads.features

    @property
    def mixed(self) -> slice:
        """Where (x, B, C) are in the projection; z comes before and dt after."""
        cells = self.plan.heads.groups * self.plan.heads.size
        return slice(self.inner, 2 * self.inner + 2 * cells)

    @property
    def channels(self) -> int:
        """I + 2 G N."""
        return self.mixed.stop - self.mixed.start


class Parameters(NamedTuple):
    """What all rows share, or each row's part of the gradients."""

    taps: Any  # [W+1,M], the last the bias
    features: Any  # [2,I]: skip and scale
    heads: Any  # [H,2]: A and dt_bias


class Chunk(NamedTuple):
    """A chunk of a row on its way from the projection to the op."""

    z: jax.Array  # [Q,I]
    mixed: list[jax.Array]  # the convolution's input at 0, 1, ... positions before [Q,M]
    convolved: jax.Array  # [Q,M]
    x: jax.Array  # [Q,I]
    B: jax.Array  # [Q,GN]
    C: jax.Array  # [Q,GN]
    raw: jax.Array  # step sizes of the projection [H,Q]
    shaped: jax.Array  # the same, ready for softplus
    dt: jax.Array  # [H,Q]
    decay: jax.Array  # [H,Q]


def prepare(s: Settings, chunk, projected, tail, factor, age, parameters: Parameters) -> Chunk:
    """Everything that precedes the op.

    Args:
        s: settings.
        chunk: number of the chunk.
        projected: [Q,E].
        tail: the convolution's input at the positions before the chunk [TAIL,M].
        factor: of the step sizes [H,Q].
        age: how many positions before each are in its segment [1,Q], or None.
        parameters: of the layer.
    """
    plan, inner, cells = s.plan, s.inner, s.plan.heads.groups * s.plan.heads.size
    (projected,) = whole(plan, chunk, projected)
    padded = jnp.concatenate([tail, projected[:, s.mixed]], axis=0)
    mixed = [padded[TAIL - j : TAIL - j + plan.chunk] for j in range(s.taps)]
    if age is not None:
        mixed = [jnp.where(columns(age) >= j, v, 0.0) for j, v in enumerate(mixed)]
    convolved = parameters.taps[s.taps :] + sum(
        parameters.taps[s.taps - 1 - j : s.taps - j] * v for j, v in enumerate(mixed)
    )
    (active,) = whole(plan, chunk, s.activation(convolved))
    raw = rows_of(projected[:, s.mixed.stop :])
    shaped = raw * factor + parameters.heads[:, 1:]
    dt = jnp.maximum(shaped, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(shaped)))
    position = jax.lax.broadcasted_iota(jnp.int32, dt.shape, 1) + chunk * plan.chunk
    dt = jnp.where(position < plan.length, dt, 0.0)
    decay = jnp.maximum(dt * parameters.heads[:, :1], FORGET_ALL)
    if age is not None:
        decay = jnp.where(age > 0, decay, FORGET_ALL)
    return Chunk(
        z=projected[:, :inner],
        mixed=mixed,
        convolved=convolved,
        x=active[:, :inner],
        B=active[:, inner : inner + cells],
        C=active[:, inner + cells :],
        raw=raw,
        shaped=shaped,
        dt=dt,
        decay=decay,
    )


def finish(s: Settings, y, z, scale):
    """Gate and norm."""
    gated = y * z * jax.nn.sigmoid(z)
    variance = jnp.mean(gated * gated, axis=1, keepdims=True)
    return gated * jax.lax.rsqrt(variance + s.eps) * scale


def steps_backward(c: Chunk, ddt, ddecay, parameters: Parameters):
    """Gradients of the shaped step sizes [H,Q] and of A and dt_bias [H,2]."""
    # A decay that was bounded, or forgets a segment, is a constant.
    ddecay = jnp.where(c.decay == FORGET_ALL, 0.0, ddecay)
    dshaped = (ddt + ddecay * parameters.heads[:, :1]) * jax.nn.sigmoid(c.shaped)
    dshaped = jnp.where(c.dt > 0, dshaped, 0.0)
    dA, dbias = (jnp.sum(v, axis=1, keepdims=True) for v in (ddecay * c.dt, dshaped))
    return dshaped, jnp.concatenate([dA, dbias], axis=1)


def convolution_backward(s: Settings, c: Chunk, dconvolved, age, parameters: Parameters):
    """Gradients of the convolution's input [TAIL+Q,M], the tail included, and taps [W+1,M]."""
    zeros = jnp.zeros((TAIL, s.channels), jnp.float32)
    dpadded, dtaps = jnp.zeros((TAIL + s.plan.chunk, s.channels), jnp.float32), []
    for j, mixed in enumerate(c.mixed):
        own = dconvolved if age is None else jnp.where(columns(age) >= j, dconvolved, 0.0)
        padded = jnp.concatenate([zeros, own, zeros], axis=0)
        tap = parameters.taps[s.taps - 1 - j : s.taps - j]
        dpadded += tap * padded[j : j + TAIL + s.plan.chunk]
        dtaps.append(jnp.sum(dconvolved * mixed, axis=0, keepdims=True))
    bias = jnp.sum(dconvolved, axis=0, keepdims=True)
    return dpadded, jnp.concatenate([*reversed(dtaps), bias], axis=0)


# ---- ssd.tpu_block_kernels
# The kernels of `tpu_block`: what happens to a chunk of a row, forward and backward.

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
