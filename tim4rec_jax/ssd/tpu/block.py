"""`time_aware_ssd_block` as a Pallas kernel for TPUs, with one pass over memory in each direction.

A program reads what the input projection wrote, and writes the normalised result. Convolution,
activation, step sizes, op, gate and norm happen in VMEM, on one chunk at a time. The backward pass
computes them again from the same input and from the states between chunks.

Letters: W taps, E = I + M + H channels of the projection, M = I + 2 G N channels of the
convolution; others as in `tim4rec_jax.ssd.tpu.kernels`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tim4rec_jax.ssd.batching import row_by_row
from tim4rec_jax.ssd.convolution import ACTIVATIONS
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
from tim4rec_jax.ssd.tpu.kernels import chunk_backward, chunk_forward, columns, rows_of

# How many positions before a chunk the convolution may see: a register of float32 holds 8.
TAIL = 8
# A register of bfloat16 holds 16 positions, so this many are read to see the last 8.
_BEFORE = 16


class Settings(NamedTuple):
    """What is known when a program is traced.

    Attributes:
        plan: the shape of the work of the op.
        taps: W.
        activation: the function after the convolution.
        eps: of the norm.
    """

    plan: Plan
    taps: int
    activation: Any
    eps: float

    @property
    def inner(self) -> int:
        """I."""
        return self.plan.heads.features

    @property
    def cells(self) -> int:
        """G N, the width of B and of C."""
        return self.plan.heads.groups * self.plan.heads.size

    @property
    def mixed(self) -> slice:
        """Where x, B and C are in the projection. The gate z comes before and dt comes after."""
        return slice(self.inner, 2 * self.inner + 2 * self.cells)

    @property
    def channels(self) -> int:
        """M."""
        return self.inner + 2 * self.cells

    @property
    def row_bytes(self) -> int:
        """The bytes of VMEM that the blocks of a row take.

        They hold the projection and the result with their gradients, once for the running program
        and once more for what is being copied.
        """
        plan = self.plan
        positions = padded_bytes(plan.chunk, *[self.mixed.stop + plan.heads.number] * 2, self.inner)
        return 2 * (positions + padded_bytes(plan.heads.size, *[self.inner] * 2))


class Parameters(NamedTuple):
    """What all rows share, or each row's part of the gradients.

    Attributes:
        taps: of the convolution [W+1,M], of which the last is the bias.
        features: weights of the skip connection and of the norm [2,I].
        heads: A and the bias of the step sizes [H,2].
    """

    taps: Any
    features: Any
    heads: Any


class Rows(NamedTuple):
    """What the kernels read of each row, or its gradients.

    Attributes:
        projected: what the input projection wrote [B,L,E].
        factor: of the step sizes [B,chunks,H,Q].
        age: how many positions since the first of the segment [B,chunks,1,Q], or None.
    """

    projected: Any
    factor: Any
    age: Any

    def blocks(self, blocks: Blocks) -> Rows:
        """The block of each array."""
        return Rows(
            blocks.positions(self.projected.shape[2]),
            blocks.chunk(*self.factor.shape[2:]),
            None if self.age is None else blocks.chunk(*self.age.shape[2:]),
        )


def unsupported_reason(v) -> str | None:
    """Returns why the arguments of the block cannot run here, or None if they can."""
    parameters = (v.conv_kernel, v.conv_bias, v.A, v.D, v.dt_bias, v.norm_scale)
    if v.time_step is not None or v.time_rate is not None:
        return "it has no time_step and no time_rate, which the causal layer has"
    arrays = (v.projected, v.time_factor, *parameters)
    if any(array is not None and array.dtype == jnp.float64 for array in arrays):
        return "a TPU has no float64"
    if v.state % 8:
        return f"the state must be a multiple of 8 numbers, not {v.state}"
    if v.conv_kernel.shape[0] > TAIL + 1:
        return f"the convolution must have at most {TAIL + 1} taps"
    if _settings(v).row_bytes > MOST_BYTES:
        return "a chunk of one row does not fit VMEM; choose a smaller chunk_size"
    return None


def _settings(v) -> Settings:
    length, number, width = v.projected.shape[1], v.A.size, v.norm_scale.size // v.A.size
    # The norm may enlarge small sums, so products of bfloat16 numbers keep 16 bits.
    precision = "3" if v.projected.dtype == jnp.bfloat16 else "float32"
    chunk = plan_chunks(length, v.chunk_size)
    heads = Heads(number, width, v.groups, v.state, precision)
    plan = Plan(heads, length, chunk, stateful=chunk < length, final=False)
    return Settings(plan, v.conv_kernel.shape[0], ACTIVATIONS[v.activation], v.eps)


def block_tpu(v) -> jax.Array:
    """Computes the block.

    Args:
        v: the arguments of `time_aware_ssd_block`.

    Returns:
        The result [B,L,I], in the dtype of the projection.
    """
    settings = _settings(v)
    plan, number = settings.plan, v.A.size
    dtype = v.projected.dtype
    # A TPU computes with float32 and bfloat16, but not with float16.
    read = jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
    batch, length, _ = v.projected.shape
    factor = jnp.ones((batch, length, number)) if v.time_factor is None else v.time_factor
    age = None
    if v.segment_ids is not None:
        age = by_chunk(_age(v.segment_ids)[..., None], plan)
    rows = Rows(v.projected.astype(read), by_chunk(factor.astype(jnp.float32), plan), age)
    skip = jnp.repeat(v.D.astype(jnp.float32), settings.inner // number)
    parameters = Parameters(
        jnp.concatenate([v.conv_kernel, v.conv_bias[None]]),
        jnp.stack([skip, v.norm_scale]),
        jnp.stack([v.A, v.dt_bias], axis=1),
    )
    y: Any = _block(settings, rows, jax.tree.map(lambda p: p.astype(jnp.float32), parameters))
    return y.astype(dtype)


def _age(segment_ids):
    """How many positions of its segment are before each position [B,L], float32."""
    position = jnp.arange(segment_ids.shape[1])
    restart = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    first = jax.lax.cummax(jnp.where(restart, position, 0), axis=1)
    return (position - first).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(settings: Settings, rows: Rows, parameters: Parameters) -> Any:
    return row_by_row(functools.partial(_forward, settings, False), rows, parameters)[0]


def _block_forward(settings, rows, parameters):
    y, entering = row_by_row(functools.partial(_forward, settings, True), rows, parameters)
    return y, (rows, parameters, entering)


def _block_backward(settings, residuals, dy):
    rows, parameters, entering = residuals
    drows, dparameters = row_by_row(
        functools.partial(_backward, settings), (rows, entering, dy), parameters
    )
    return drows, jax.tree.map(lambda v: jnp.sum(v, axis=0), dparameters)


_block.defvjp(_block_forward, _block_backward)


class Chunk(NamedTuple):
    """A chunk of a row, from the projection to the arguments of the op.

    Attributes:
        z: the gate [Q,I].
        mixed: the input of the convolution 0, 1, ... positions before each position, W x [Q,M].
        convolved: the output of the convolution [Q,M].
        x: inputs of the op [Q,I].
        B: input projections [Q,GN].
        C: output projections [Q,GN].
        raw: step sizes as projected [H,Q].
        shaped: step sizes times the factor plus the bias [H,Q].
        dt: softplus of these [H,Q].
        decay: logarithms of the decays [H,Q].
    """

    z: jax.Array
    mixed: list[jax.Array]
    convolved: jax.Array
    x: jax.Array
    B: jax.Array
    C: jax.Array
    raw: jax.Array
    shaped: jax.Array
    dt: jax.Array
    decay: jax.Array


def _prepare(s: Settings, number, projected, tail, factor, age, parameters: Parameters) -> Chunk:
    """Computes everything that precedes the op.

    Args:
        s: settings.
        number: of the chunk.
        projected: what the input projection wrote [Q,E].
        tail: the input of the convolution at the positions before the chunk [TAIL,M].
        factor: of the step sizes [H,Q].
        age: how many positions of its segment are before each position [1,Q], or None.
        parameters: of the layer.
    """
    plan, inner, cells = s.plan, s.inner, s.cells
    (projected,) = load(plan, number, projected)
    padded = jnp.concatenate([tail, projected[:, s.mixed]], axis=0)
    mixed = [padded[TAIL - j : TAIL - j + plan.chunk] for j in range(s.taps)]
    if age is not None:
        mixed = [jnp.where(columns(age) >= j, v, 0.0) for j, v in enumerate(mixed)]
    convolved = parameters.taps[s.taps :] + sum(
        parameters.taps[s.taps - 1 - j : s.taps - j] * v for j, v in enumerate(mixed)
    )
    (active,) = load(plan, number, s.activation(convolved))
    raw = rows_of(projected[:, s.mixed.stop :])
    shaped = raw * factor + parameters.heads[:, 1:]
    dt = jnp.maximum(shaped, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(shaped)))
    position = jax.lax.broadcasted_iota(jnp.int32, dt.shape, 1) + number * plan.chunk
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


def _finish(s: Settings, y, z, scale):
    """Applies gate and norm to the result of the op."""
    gated = y * z * jax.nn.sigmoid(z)
    variance = jnp.mean(gated * gated, axis=1, keepdims=True)
    return gated * jax.lax.rsqrt(variance + s.eps) * scale


def _steps_backward(c: Chunk, ddt, ddecay, parameters: Parameters):
    """Gradients of the shaped step sizes [H,Q] and of A and dt_bias [H,2]."""
    # A decay at its bound is a constant, and so is that of a segment's first position.
    ddecay = jnp.where(c.decay == FORGET_ALL, 0.0, ddecay)
    dshaped = (ddt + ddecay * parameters.heads[:, :1]) * jax.nn.sigmoid(c.shaped)
    dshaped = jnp.where(c.dt > 0, dshaped, 0.0)
    dA, dbias = (jnp.sum(v, axis=1, keepdims=True) for v in (ddecay * c.dt, dshaped))
    return dshaped, jnp.concatenate([dA, dbias], axis=1)


def _convolution_backward(s: Settings, c: Chunk, dconvolved, age, parameters: Parameters):
    """Gradients of the input of the convolution with its tail [TAIL+Q,M], and of taps [W+1,M]."""
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


def _forward(s: Settings, save: bool, rows: Rows, parameters: Parameters):
    """Returns the results [B,L,I] and the state before each chunk [B,chunks,N,I].

    The states are None unless they are to `save` for the backward pass.
    """
    plan, batch = s.plan, rows.projected.shape[0]
    blocks = Blocks(plan, batch, s.row_bytes)
    save = save and plan.stateful

    def kernel(v: Rows, parameters, y, entering, state, tails):
        parameters = jax.tree.map(lambda p: p[...], parameters)
        skip, scale = parameters.features[:1], parameters.features[1:]
        number = blocks.number(pl.program_id(1))

        @pl.when(number == 0)
        def _():
            state[...] = jnp.zeros_like(state)
            tails[...] = jnp.zeros_like(tails)

        def row(i):
            age = None if v.age is None else v.age[i, 0]
            c = _prepare(s, number, v.projected[i], tails[i], v.factor[i, 0], age, parameters)
            old = state[i] if plan.stateful else None
            out, new = chunk_forward(plan.heads, c.x, c.B, c.C, c.dt, c.decay, old)
            y[i] = _finish(s, out + skip * c.x, c.z, scale).astype(y.dtype)
            if save:
                entering[i, 0] = old
            if plan.stateful:
                state[i] = new
                tails[i] = c.mixed[0][plan.chunk - TAIL :]

        blocks.for_rows(row)

    shape = plan.state_shape
    result = jax.ShapeDtypeStruct((*rows.projected.shape[:2], s.inner), rows.projected.dtype)
    saved = (float32(batch, plan.chunks, *shape), blocks.chunk(*shape)) if save else (None, None)
    return blocks.launch(
        kernel,
        inputs=[
            (rows, rows.blocks(blocks)),
            (parameters, jax.tree.map(lambda _: pl.BlockSpec(), parameters)),
        ],
        outputs=[(result, blocks.positions(s.inner)), saved],
        scratch=[shape, (TAIL, s.channels)],
    )


def _backward(s: Settings, rows, parameters: Parameters):
    """Returns the gradients of the rows and, for each row, of the parameters.

    Args:
        s: settings.
        rows: those of `_forward`, the states that it saved, and the gradient of its results.
        parameters: those of `_forward`.
    """
    inputs, entering, dy = rows
    plan, batch = s.plan, inputs.projected.shape[0]
    blocks = Blocks(plan, batch, s.row_bytes, reverse=True)

    def kernel(
        v: Rows, entering, dy, before, parameters, drows: Rows, dparameters, dstate, spilled
    ):
        p = jax.tree.map(lambda p: p[...], parameters)
        skip, scale = p.features[:1], p.features[1:]
        number = blocks.number(pl.program_id(1))

        @pl.when(number == plan.chunks - 1)
        def _():
            for gradient in (dstate, spilled, *dparameters):
                gradient[...] = jnp.zeros_like(gradient)

        def row(i):
            age = None if v.age is None else v.age[i, 0]
            tail = jnp.zeros((TAIL, s.channels), jnp.float32)
            if before is not None:
                last = before[i].astype(jnp.float32)[_BEFORE - TAIL :, s.mixed]
                tail = jnp.where(number > 0, last, 0.0)
            c = _prepare(s, number, v.projected[i], tail, v.factor[i, 0], age, p)
            op = (plan.heads, c.x, c.B, c.C, c.dt, c.decay)
            states = (entering[i, 0], dstate[i]) if plan.stateful else (None, None)
            out = chunk_forward(*op, states[0])[0] + skip * c.x
            (dresult,) = load(plan, number, dy[i])
            dout, dz, dscale = jax.vjp(functools.partial(_finish, s), out, c.z, scale)[1](dresult)
            g = chunk_backward(*op, dout, *states)
            dshaped, dheads = _steps_backward(c, g.dt, g.decay, p)
            (dactive,) = load(plan, number, jnp.concatenate([g.x + skip * dout, g.B, g.C], axis=1))
            (dconvolved,) = jax.vjp(s.activation, c.convolved)[1](dactive)
            dpadded, dtaps = _convolution_backward(s, c, dconvolved, age, p)
            dmixed = dpadded[TAIL:]
            if plan.stateful:
                dstate[i] = g.state
                rest = jnp.zeros((plan.chunk - TAIL, s.channels), jnp.float32)
                dmixed += jnp.concatenate([rest, spilled[i]], axis=0)
                spilled[i] = dpadded[:TAIL]

            dtype = drows.projected.dtype
            drows.projected[i, :, : s.inner] = dz.astype(dtype)
            drows.projected[i, :, s.mixed] = dmixed.astype(dtype)
            drows.projected[i, :, s.mixed.stop :] = columns(dshaped * v.factor[i, 0]).astype(dtype)
            drows.factor[i, 0] = dshaped * c.raw
            dskip = jnp.sum(dout * c.x, axis=0, keepdims=True)
            dparameters.taps[i] += dtaps
            dparameters.features[i] += jnp.concatenate([dskip, dscale], axis=0)
            dparameters.heads[i] += dheads

        blocks.for_rows(row)

    shape = plan.state_shape
    before = None
    if plan.stateful:
        step = plan.chunk // _BEFORE
        before = pl.BlockSpec(
            (blocks.rows, _BEFORE, inputs.projected.shape[2]),
            lambda i, c: (i, jnp.maximum(blocks.number(c) * step - 1, 0), 0),
        )
    gradients = inputs._replace(age=None)
    return blocks.launch(
        kernel,
        inputs=[
            (inputs, inputs.blocks(blocks)),
            (entering, blocks.chunk(*shape) if plan.stateful else None),
            (dy, blocks.positions(s.inner)),
            (inputs.projected if plan.stateful else None, before),
            (parameters, jax.tree.map(lambda _: pl.BlockSpec(), parameters)),
        ],
        outputs=[
            (like(gradients), gradients.blocks(blocks)),
            (
                jax.tree.map(lambda v: float32(batch, *v.shape), parameters),
                jax.tree.map(lambda v: blocks.row(*v.shape), parameters),
            ),
        ],
        scratch=[shape, (TAIL, s.channels)],
    )
