"""The SSD on NVIDIA GPUs: its Triton kernels as a differentiable JAX function."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tim4rec_jax.ssd.triton import launch as triton_launch
from tim4rec_jax.ssd.triton.launch import Blocks, blocks, compute_capability, shard_over_batch

# Channels of a head that a program takes. Channels do not mix, so a wider head is as many heads of
# this width with the same dt, A, B and C; its state as one block spills registers.
WIDEST = 32


class Rows(NamedTuple):
    """Arrays with an axis for the batch, their first."""

    x: Any
    dt: Any
    B: Any
    C: Any
    initial: Any = None
    segments: Any = None


class Shared(NamedTuple):
    """Parameters that all rows share."""

    A: Any
    D: Any = None
    bias: Any = None


class Options(NamedTuple):
    """What is known when a program is traced."""

    softplus: bool
    limit: tuple[float, float]
    final: bool
    chunk_size: int | None
    precision: str


def unsupported_reason(v) -> str | None:
    """Says what keeps `ssd_triton` from running on the GPU that is compiled for."""
    arrays = (v.x, v.dt, v.A, v.B, v.C, v.D, v.dt_bias, v.initial_state)
    return triton_launch.unsupported_reason(arrays, v.x.shape[-1], v.B.shape[-1])


def ssd_triton(v):
    """Computes `ssd` of its arguments.

    Args:
        v: `tim4rec_jax.ssd.api.Arguments` that meet no `unsupported_reason`.

    Returns:
        The outputs, and the state after the last position or None if it is not asked for.
    """
    precision = "tf32" if all(a.dtype.itemsize == 2 for a in (v.x, v.B, v.C)) else v.precision
    shape = v.x.shape
    if shape[-1] > WIDEST:
        v = _narrowed(v)
    results: Any = _ssd(
        Rows(v.x, v.dt, v.B, v.C, v.initial_state, v.segment_ids),
        Shared(v.A, v.D, v.dt_bias),
        Options(v.dt_softplus, tuple(v.dt_limit), v.return_final_state, v.chunk_size, precision),
    )
    y, final = results
    if final is not None:
        final = final.reshape(shape[0], *shape[2:], -1)
    return y.reshape(shape), final


def _narrowed(v):
    """Takes every head for several of WIDEST channels, with the same steps, decays, B and C."""
    batch, length, heads, width = v.x.shape
    parts = width // WIDEST
    narrow = (heads * parts, WIDEST)

    def repeated(values, axis=0):
        # In float32, as the gradients of the parts are added up.
        return None if values is None else jnp.repeat(values.astype(jnp.float32), parts, axis)

    state = v.initial_state
    return v._replace(
        x=v.x.reshape(batch, length, *narrow),
        dt=repeated(v.dt, axis=2),
        A=repeated(v.A),
        D=repeated(v.D) if v.D is None or v.D.ndim == 1 else v.D.reshape(narrow),
        dt_bias=repeated(v.dt_bias),
        initial_state=None if state is None else state.reshape(batch, *narrow, -1),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _ssd(rows, shared, options):
    return shard_over_batch(functools.partial(_forward, options=options))(rows, shared)


def _ssd_forward(rows, shared, options):
    return _ssd(rows, shared, options), (rows, shared)


def _ssd_backward(options, residuals, cotangents):
    rows, shared = residuals
    gradients = shard_over_batch(functools.partial(_backward, options=options))(
        (rows, cotangents), shared
    )
    drows, dA, dD = gradients
    dbias = None if shared.bias is None else jnp.sum(drows.dt, axis=(0, 1))
    dD = None if shared.D is None else jnp.sum(dD, axis=(0, 1))
    dshared = Shared(jnp.sum(dA, axis=(0, 1)), dD, dbias)

    def like(gradient, value):
        return None if gradient is None else gradient.astype(value.dtype)

    return Rows(*map(like, drows, rows)), Shared(*map(like, dshared, shared))


_ssd.defvjp(_ssd_forward, _ssd_backward)


def _forward(rows, shared, options):
    from tim4rec_jax.ssd.triton.op_kernels import forward

    batch, length, heads, width = rows.x.shape
    size, constants = _configuration("forward", rows, shared, options)
    nothing = jax.ShapeDtypeStruct((1,), jnp.float32)
    state = jax.ShapeDtypeStruct((batch, heads, width, rows.B.shape[-1]), jnp.float32)
    y, final = triton_launch.launch(
        forward,
        (*_inputs(rows, shared), length),
        (jax.ShapeDtypeStruct(rows.x.shape, rows.x.dtype), state if options.final else nothing),
        batch * heads // size.heads,
        constants,
        size,
    )
    return y, final if options.final else None


def _backward(rows_and_cotangents, shared, options):
    from tim4rec_jax.ssd.triton.op_kernels import backward

    rows, (dy, dfinal) = rows_and_cotangents
    batch, length, heads, width = rows.x.shape
    groups, state = rows.B.shape[2:]
    size, constants = _configuration("backward", rows, shared, options)
    chunks = 1 if constants["ONE_CHUNK"] else -(-length // size.chunk)
    parts = heads // size.heads

    def array(*shape, dtype=jnp.float32, needed=True):
        return jax.ShapeDtypeStruct(shape if needed else (1,), dtype)

    # Where one program has all heads of a group, its share is the gradient.
    dtypes = [jnp.float32 if parts > groups else v.dtype for v in (rows.B, rows.C)]
    per_head = () if shared.D is None else (batch, chunks, *shared.D.shape)
    outputs = {
        "dx": array(*rows.x.shape, dtype=rows.x.dtype),
        "ddt": array(*rows.dt.shape),
        "dA": array(batch, chunks, heads),
        "dB": array(batch, length, parts, state, dtype=dtypes[0]),
        "dC": array(batch, length, parts, state, dtype=dtypes[1]),
        "dD": array(*per_head, needed=shared.D is not None),
        "dinitial": array(batch, heads, width, state, needed=rows.initial is not None),
        "scratch": array(batch, chunks, heads, state, width, needed=chunks > 1),
    }
    inputs = (*_inputs(rows, shared), dy, shared.A if dfinal is None else dfinal, length)
    results = triton_launch.launch(
        backward, inputs, tuple(outputs.values()), batch * parts, constants, size
    )
    results = dict(zip(outputs, results, strict=True))

    def of_groups(shares):
        return jnp.sum(shares.reshape(batch, length, groups, parts // groups, state), axis=3)

    drows = Rows(
        results["dx"],
        results["ddt"],
        of_groups(results["dB"]),
        of_groups(results["dC"]),
        None if rows.initial is None else results["dinitial"],
    )
    return drows, results["dA"], None if shared.D is None else results["dD"]


def _inputs(rows, shared):
    """The kernels' inputs; what is missing is replaced by something that they will not read."""
    inputs = (rows.x, rows.dt, shared.A, rows.B, rows.C)
    optional = (shared.D, shared.bias, rows.initial, rows.segments)
    return (*inputs, *(shared.A if v is None else v for v in optional))


def _configuration(kernel, rows, shared, options) -> tuple[Blocks, dict]:
    """Returns sizes of blocks, and what kernels are specialised for."""
    length, heads, width = rows.x.shape[1:]
    groups, state = rows.B.shape[2:]
    size = blocks(
        kernel,
        compute_capability(),
        length=length,
        heads=heads // groups,
        size=max(width, state),
        precision=options.precision,
        largest_chunk=options.chunk_size,
    )
    limited = options.limit != (0.0, float("inf"))
    return size, {
        "H": heads,
        "G": groups,
        "P": width,
        "N": state,
        "Q": size.chunk,
        "HEADS": size.heads,
        "ONE_CHUNK": length <= size.chunk,
        "HAS_D": shared.D is not None,
        "D_PER_CHANNEL": shared.D is not None and shared.D.ndim == 2,
        "HAS_BIAS": shared.bias is not None,
        "HAS_INITIAL": rows.initial is not None,
        "HAS_SEGMENTS": rows.segments is not None,
        "HAS_FINAL": options.final,
        "SOFTPLUS": options.softplus,
        "LIMITED": limited,
        "LOW": float(options.limit[0]) if limited else 0.0,
        "HIGH": float(options.limit[1]) if limited else 0.0,
        "PRECISION": options.precision,
    }
