"""The stages around the SSD in a TPU kernel: a chunk's values before the op and after it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tim4rec_jax.ssd.tpu_launch import FORGET_ALL, Plan, whole
from tim4rec_jax.ssd.tpu_matrices import columns, rows_of

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
