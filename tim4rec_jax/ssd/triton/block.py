"""`time_aware_ssd_block` on NVIDIA GPUs: its Triton kernels as a differentiable JAX function."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tim4rec_jax.ssd.triton import launch as triton_launch
from tim4rec_jax.ssd.triton.launch import Blocks, blocks, compute_capability, shard_over_batch

SIZES = (16, 32, 64)
MOST_FEATURES = 256
MOST_TAPS = 8


class Rows(NamedTuple):
    """Arrays with an axis for the batch, their first."""

    projected: Any
    factor: Any = None
    segments: Any = None


class Parameters(NamedTuple):
    """What all rows share."""

    taps: Any  # [W,M]
    conv_bias: Any  # [M]
    A: Any  # [H]
    D: Any  # [H]
    bias: Any  # [H]
    scale: Any  # [I]


class Options(NamedTuple):
    """What is known when a program is traced."""

    activation: str
    state: int
    groups: int
    eps: float
    chunk_size: int | None


def unsupported_reason(v) -> str | None:
    """Says what keeps `block_triton` from running on the GPU that is compiled for."""
    parameters = (v.conv_kernel, v.conv_bias, v.A, v.D, v.dt_bias, v.norm_scale)
    inner, taps = v.norm_scale.size, v.conv_kernel.shape[0]
    arrays = (v.projected, v.time_factor, *parameters)
    if reason := triton_launch.unsupported_reason(arrays, inner // v.A.size, v.state, SIZES):
        return reason
    if inner > MOST_FEATURES:
        return f"a program holds all features of a chunk, at most {MOST_FEATURES}, not {inner}"
    if taps > MOST_TAPS:
        return f"the convolution must have at most {MOST_TAPS} taps, not {taps}"
    return None


def block_triton(v) -> jax.Array:
    """Computes the block; `v` are arguments of `time_aware_ssd_block` that meet no `unsupported_reason`."""
    return _block(
        Rows(v.projected, v.time_factor, v.segment_ids),
        Parameters(v.conv_kernel, v.conv_bias, v.A, v.D, v.dt_bias, v.norm_scale),
        Options(v.activation, v.state, v.groups, float(v.eps), v.chunk_size),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _block(rows: Rows, parameters: Parameters, options: Options) -> Any:
    return _block_forward(rows, parameters, options)[0]


def _block_forward(rows, parameters, options):
    y, rstd = shard_over_batch(functools.partial(_forward, options=options))(rows, parameters)
    return y, (rows, parameters, y, rstd)


def _block_backward(options, residuals, dy):
    rows, parameters, *results = residuals
    drows, dparameters = shard_over_batch(functools.partial(_backward, options=options))(
        (rows, *results, dy), parameters
    )
    dtaps, dheads, dscale = (jnp.sum(shares, axis=0) for shares in dparameters)
    dA, dD, dbias = dheads
    gradients = Parameters(dtaps[:-1], dtaps[-1], dA, dD, dbias, dscale)
    return drows, jax.tree.map(lambda d, v: d.astype(v.dtype), gradients, parameters)


_block.defvjp(_block_forward, _block_backward)


def _forward(rows, parameters, options):
    from tim4rec_jax.ssd.triton.block_kernels import block_forward

    batch, length, _ = rows.projected.shape
    size, constants = _configuration("block_forward", rows, parameters, options)
    inner = parameters.scale.size
    return triton_launch.launch(
        block_forward,
        (*_inputs(rows, parameters), length),
        (
            jax.ShapeDtypeStruct((batch, length, inner), rows.projected.dtype),
            jax.ShapeDtypeStruct((batch, length), jnp.float32),
        ),
        batch,
        constants,
        size,
    )


def _backward(rows_and_results, parameters, options):
    from tim4rec_jax.ssd.triton.block_kernels import block_backward

    rows, y, rstd, dy = rows_and_results
    batch, length, _ = rows.projected.shape
    size, constants = _configuration("block_backward", rows, parameters, options)
    (taps, channels), heads, inner = parameters.taps.shape, parameters.A.size, y.shape[2]
    chunks = 1 if constants["ONE_CHUNK"] else -(-length // size.chunk)
    kept = length if chunks == 1 else 2 * size.chunk
    nothing = jax.ShapeDtypeStruct((1,), jnp.float32)

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    outputs = (
        jax.ShapeDtypeStruct(rows.projected.shape, rows.projected.dtype),
        nothing
        if rows.factor is None
        else jax.ShapeDtypeStruct(rows.factor.shape, rows.factor.dtype),
        array(batch, taps + 1, channels),
        array(batch, 3, heads),
        array(batch, inner),
        nothing if chunks == 1 else array(batch, chunks, heads, options.state, inner // heads),
        array(batch, kept, channels),
        array(batch, kept, inner),
        nothing if chunks == 1 else array(batch, heads, size.chunk),
    )
    dprojected, dfactor, *shares = triton_launch.launch(
        block_backward,
        (*_inputs(rows, parameters), y, rstd, dy, length),
        outputs,
        batch,
        constants,
        size,
    )[:5]
    dfactor = None if rows.factor is None else dfactor
    return Rows(dprojected, dfactor), shares


def _inputs(rows, parameters):
    """The kernels' inputs; what is missing is replaced by something that they will not read."""
    factor, segments = (parameters.A if v is None else v for v in (rows.factor, rows.segments))
    return (rows.projected, factor, *parameters, segments)


def _configuration(kernel, rows, parameters, options) -> tuple[Blocks, dict]:
    """Returns sizes of blocks, and what kernels are specialised for."""
    length = rows.projected.shape[1]
    heads = parameters.A.size
    width = parameters.scale.size // heads
    # Products of what is read as bfloat16 need no more digits than tensor cores keep.
    allowed = "tf32" if rows.projected.dtype.itemsize == 2 else "ieee"
    size = blocks(
        kernel,
        compute_capability(),
        length=length,
        heads=1,
        size=max(width, options.state),
        precision=allowed,
        largest_chunk=options.chunk_size,
    )._replace(heads=heads)
    one_chunk = length <= size.chunk
    return size, {
        "H": heads,
        "G": options.groups,
        "P": width,
        "N": options.state,
        "W": parameters.taps.shape[0],
        "Q": size.chunk,
        "ONE_CHUNK": one_chunk,
        "HAS_FACTOR": rows.factor is not None,
        "HAS_SEGMENTS": rows.segments is not None,
        "HARDSWISH": options.activation == "hardswish",
        "EPS": options.eps,
        # Over chunks of 16 or 32 positions, most of the warps would repeat what others do, and
        # bringing operands into place is more instructions and registers than plain products.
        "PRECISION": allowed if one_chunk else "ieee",
    }
