"""`time_aware_ssd_block` on NVIDIA GPUs: its Triton kernels as a differentiable JAX function."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tim4rec_jax.ssd.batching import shard_over_batch
from tim4rec_jax.ssd.triton import launch
from tim4rec_jax.ssd.triton.launch import TileSizes

SIZES = (16, 32, 64)  # what P and N may be
MOST_FEATURES = 256
MOST_TAPS = 8
# The largest states for which products of float32 are three of tensor cores, on Hopper and later:
# the narrower products of older GPUs want their operands in registers, which spill.
WIDEST_STATE = {"block_forward": 64, "block_backward": 32}


class Rows(NamedTuple):
    """Arrays whose first axis is the batch, or gradients of them."""

    projected: Any  # [B,L,E]
    time_factor: Any = None  # [B,L,H]
    time_step: Any = None  # [B,L,H]
    time_rate: Any = None  # [B,L,H]
    segment_ids: Any = None  # [B,L]


class Parameters(NamedTuple):
    """What all rows share, or gradients of it."""

    conv_kernel: Any  # [W,M]
    conv_bias: Any  # [M]
    A: Any  # [H]
    D: Any  # [H]
    dt_bias: Any  # [H]
    norm_scale: Any  # [I]


class Options(NamedTuple):
    """The other arguments of the block, which are known while a program is traced."""

    activation: str
    state: int
    groups: int
    eps: float
    chunk_size: int | None


class Specialisation(NamedTuple):
    """What the kernels are specialised for; in them it is called `S`."""

    H: int
    G: int
    P: int
    N: int
    W: int  # taps of the convolution
    I: int  # noqa: E741, the features of all heads, H P
    M: int  # channels of the convolution, I + 2 G N
    E: int  # features of `projected`, I + M + H
    Q: int  # positions of a chunk
    SEVERAL_CHUNKS: bool
    HAS_FACTOR: bool
    HAS_STEP: bool  # whether something is added to the raw step sizes
    HAS_RATE: bool  # whether the rate of decay differs between positions
    HAS_SEGMENTS: bool
    HARDSWISH: bool  # else the activation is SiLU
    EPS: float
    PRECISION: str


def unsupported_reason(v) -> str | None:
    """Says what keeps `block_triton` from running on the GPU that is compiled for, or None."""
    parameters = (v.conv_kernel, v.conv_bias, v.A, v.D, v.dt_bias, v.norm_scale)
    inner, taps = v.norm_scale.size, v.conv_kernel.shape[0]
    arrays = (v.projected, v.time_factor, v.time_step, v.time_rate, *parameters)
    if reason := launch.unsupported_reason(arrays, inner // v.A.size, v.state, SIZES):
        return reason
    if inner > MOST_FEATURES:
        return f"a program holds all features of a chunk, at most {MOST_FEATURES}, not {inner}"
    if taps > MOST_TAPS:
        return f"the convolution must have at most {MOST_TAPS} taps, not {taps}"
    return None


def block_triton(v) -> jax.Array:
    """Computes the block.

    Args:
        v: `tim4rec_jax.ssd.fused_block.BlockArguments` without an `unsupported_reason`.
    """
    return _block(
        Rows(v.projected, v.time_factor, v.time_step, v.time_rate, v.segment_ids),
        Parameters(v.conv_kernel, v.conv_bias, v.A, v.D, v.dt_bias, v.norm_scale),
        Options(v.activation, v.state, v.groups, float(v.eps), v.chunk_size),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _block(rows: Rows, parameters: Parameters, options: Options) -> Any:
    return _block_forward(rows, parameters, options)[0]


def _block_forward(rows, parameters, options):
    y, rstd = shard_over_batch(functools.partial(_forward, options), rows, parameters)
    return y, (rows, parameters, y, rstd)


def _block_backward(options, residuals, dy):
    rows, parameters, y, rstd = residuals
    drows, shares = shard_over_batch(
        functools.partial(_backward, options), (rows, y, rstd, dy), parameters
    )
    inner, heads = parameters.norm_scale.size, parameters.A.size
    total = jnp.sum(shares, axis=0)
    dscale, dconvolution, dheads = jnp.split(total, [inner, total.size - 3 * heads])
    dA, dD, dbias = dheads.reshape(3, heads)
    dconvolution = dconvolution.reshape(-1, parameters.conv_bias.size)
    gradients = Parameters(dconvolution[:-1], dconvolution[-1], dA, dD, dbias, dscale)
    return drows, jax.tree.map(lambda d, v: d.astype(v.dtype), gradients, parameters)


_block.defvjp(_block_forward, _block_backward)


def _forward(options, rows, parameters):
    from tim4rec_jax.ssd.triton.block_forward import block_forward

    batch, length, _ = rows.projected.shape
    S, tiles = _specialise("block_forward", options, rows, parameters)
    scratch = _float32(batch, S.Q * S.M + S.H * S.P * S.N) if S.SEVERAL_CHUNKS else _float32(1)
    y, rstd, _ = launch.launch(
        block_forward,
        (*_inputs(rows, parameters), length),
        (
            jax.ShapeDtypeStruct((batch, length, S.I), rows.projected.dtype),
            _float32(batch, length),
            scratch,
        ),
        programs=batch,
        specialisation=S,
        tiles=tiles,
    )
    return y, rstd


def _backward(options, rows_and_results, parameters):
    from tim4rec_jax.ssd.triton.block_backward import block_backward

    rows, y, rstd, dy = rows_and_results
    batch, length, _ = rows.projected.shape
    S, tiles = _specialise("block_backward", options, rows, parameters)
    states = (-(-length // S.Q) + 1) * S.H * S.P * S.N if S.SEVERAL_CHUNKS else 0

    def of_rows(value):
        """Of the gradient of an array; a missing one has a number that nobody reads."""
        if value is None:
            return _float32(1)
        return jax.ShapeDtypeStruct(value.shape, value.dtype)

    modulation = (rows.time_factor, rows.time_step, rows.time_rate)
    dprojected, *dmodulation, shares, _ = launch.launch(
        block_backward,
        (*_inputs(rows, parameters), y, rstd, dy, length),
        (
            jax.ShapeDtypeStruct(rows.projected.shape, rows.projected.dtype),
            *map(of_rows, modulation),
            _float32(batch, S.I + (S.W + 1) * S.M + 3 * S.H),
            _float32(batch, ((3 if S.SEVERAL_CHUNKS else 2) * S.M + S.H + S.Q) * S.Q + states),
        ),
        programs=batch,
        specialisation=S,
        tiles=tiles,
    )
    given = (None if v is None else d for v, d in zip(modulation, dmodulation, strict=True))
    return Rows(dprojected, *given), shares


def _float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _inputs(rows, parameters):
    """The inputs of both kernels; a missing one is replaced by an array that they do not read."""
    factor, step, rate, segments = (parameters.A if v is None else v for v in rows[1:])
    return (rows.projected, factor, step, rate, *parameters, segments)


def _specialise(kernel, options, rows, parameters) -> tuple[Specialisation, TileSizes]:
    """What a kernel is specialised for, and its tile sizes."""
    length, projected = rows.projected.shape[1:]
    heads, inner = parameters.A.size, parameters.norm_scale.size
    taps, channels = parameters.conv_kernel.shape
    size = max(inner // heads, options.state)
    # Products of what is read as bfloat16 need no more digits than tensor cores keep.
    if rows.projected.dtype.itemsize == 2:
        precision = "tf32"
    elif (launch.compute_capability() or 0) >= 90 and size <= WIDEST_STATE.get(kernel, 0):
        precision = "tf32x3"
    else:
        precision = "ieee"
    tiles = launch.tile_sizes(
        kernel,
        length=length,
        heads=1,
        size=size,
        precision=precision,
        largest_chunk=options.chunk_size,
    )._replace(heads=heads)
    specialisation = Specialisation(
        H=heads,
        G=options.groups,
        P=inner // heads,
        N=options.state,
        W=taps,
        I=inner,
        M=channels,
        E=projected,
        Q=tiles.chunk,
        SEVERAL_CHUNKS=length > tiles.chunk,
        HAS_FACTOR=rows.time_factor is not None,
        HAS_STEP=rows.time_step is not None,
        HAS_RATE=rows.time_rate is not None,
        HAS_SEGMENTS=rows.segment_ids is not None,
        HARDSWISH=options.activation == "hardswish",
        EPS=options.eps,
        PRECISION=precision,
    )
    return specialisation, tiles
