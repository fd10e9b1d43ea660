"""`ssd` on NVIDIA GPUs: its Triton kernels as a differentiable JAX function."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tim4rec_jax.ssd.batching import shard_over_batch
from tim4rec_jax.ssd.triton import launch
from tim4rec_jax.ssd.triton.launch import TileSizes

# The largest states for which products are three of tensor cores. Larger ones spill registers.
WIDEST_STATE = {"forward": 64, "backward": 32}

# Channels of a head that a program takes. A wider head's state as one tile spills registers.
# Channels do not mix, so such a head is several heads of this width with the same dt, A, B and C.
WIDEST = 32


class Rows(NamedTuple):
    """Arrays whose first axis is the batch, or gradients of them."""

    x: Any  # [B,L,H,P]
    dt: Any  # [B,L,H]
    B: Any  # [B,L,G,N]
    C: Any  # [B,L,G,N]
    initial_state: Any = None  # [B,H,P,N]
    segment_ids: Any = None  # [B,L]


class Parameters(NamedTuple):
    """What all rows share, or gradients of it."""

    A: Any  # [H]
    D: Any = None  # [H] or [H,P]
    dt_bias: Any = None  # [H]


class Options(NamedTuple):
    """The other arguments of `ssd`, which are known while a program is traced."""

    dt_softplus: bool
    dt_limit: tuple[float, float]
    return_final_state: bool
    chunk_size: int | None
    precision: str


class Specialisation(NamedTuple):
    """What the kernels are specialised for; in them it is called `S`."""

    H: int
    G: int
    P: int
    N: int
    Q: int  # positions of a chunk
    HEADS: int  # heads of a program
    SEVERAL_CHUNKS: bool
    HAS_D: bool
    D_PER_CHANNEL: bool
    HAS_BIAS: bool
    HAS_INITIAL: bool  # whether there is an initial state
    HAS_FINAL: bool  # whether the final state is asked for
    HAS_ENTERING_STATE: bool  # whether a chunk sees a state from before it
    HAS_LEAVING_STATE: bool  # whether the state after a chunk is needed
    HAS_SEGMENTS: bool
    SOFTPLUS: bool
    LIMITED: bool
    LOW: float
    HIGH: float
    PRECISION: str


def unsupported_reason(v) -> str | None:
    """Says what keeps `ssd_triton` from running on the GPU that is compiled for, or None."""
    arrays = (v.x, v.dt, v.A, v.B, v.C, v.D, v.dt_bias, v.initial_state)
    return launch.unsupported_reason(arrays, v.x.shape[-1], v.B.shape[-1])


def ssd_triton(v):
    """Computes `ssd`.

    Args:
        v: `tim4rec_jax.ssd.api.Arguments` for which there is no `unsupported_reason`.

    Returns:
        The outputs, and the state after the last position or None if it is not asked for.
    """
    precision = v.precision
    if all(a.dtype.itemsize == 2 for a in (v.x, v.B, v.C)):
        precision = "tf32"
    shape = v.x.shape
    if shape[-1] > WIDEST:
        v = _narrowed(v)
    results: Any = _ssd(
        Rows(v.x, v.dt, v.B, v.C, v.initial_state, v.segment_ids),
        Parameters(v.A, v.D, v.dt_bias),
        Options(v.dt_softplus, tuple(v.dt_limit), v.return_final_state, v.chunk_size, precision),
    )
    y, state = results
    if state is not None:
        state = state.reshape(shape[0], *shape[2:], -1)
    return y.reshape(shape), state


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
def _ssd(rows, parameters, options):
    return shard_over_batch(functools.partial(_forward, options), rows, parameters)


def _ssd_forward(rows, parameters, options):
    return _ssd(rows, parameters, options), (rows, parameters)


def _ssd_backward(options, residuals, cotangents):
    rows, parameters = residuals
    drows, dA, dD = shard_over_batch(
        functools.partial(_backward, options), (rows, cotangents), parameters
    )
    dparameters = Parameters(
        A=jnp.sum(dA, axis=(0, 1)),
        D=None if parameters.D is None else jnp.sum(dD, axis=(0, 1)),
        dt_bias=None if parameters.dt_bias is None else jnp.sum(drows.dt, axis=(0, 1)),
    )

    def like(gradient, value):
        return None if gradient is None else gradient.astype(value.dtype)

    return Rows(*map(like, drows, rows)), Parameters(*map(like, dparameters, parameters))


_ssd.defvjp(_ssd_forward, _ssd_backward)


def _forward(options, rows, parameters):
    from tim4rec_jax.ssd.triton.op_kernels import forward

    batch, length, heads, width = rows.x.shape
    S, tiles = _specialise("forward", options, rows, parameters)
    y, state = launch.launch(
        forward,
        (*_inputs(rows, parameters), length),
        (
            jax.ShapeDtypeStruct(rows.x.shape, rows.x.dtype),
            _float32(batch, heads, width, S.N, needed=S.HAS_FINAL),
        ),
        programs=batch * heads // S.HEADS,
        specialisation=S,
        tiles=tiles,
    )
    return y, state if S.HAS_FINAL else None


def _backward(options, rows_and_cotangents, parameters):
    from tim4rec_jax.ssd.triton.op_kernels import backward

    rows, (dy, dstate) = rows_and_cotangents
    batch, length, heads, width = rows.x.shape
    S, tiles = _specialise("backward", options, rows, parameters)
    chunks, parts = -(-length // S.Q), heads // S.HEADS
    # Where one program has all heads of a group, its share is the gradient.
    kinds = (rows.B.dtype, rows.C.dtype) if parts == S.G else (jnp.float32, jnp.float32)
    skip_shape = () if parameters.D is None else parameters.D.shape
    dx, ddt, dA, dB, dC, dD, dinitial, _states = launch.launch(
        backward,
        (*_inputs(rows, parameters), dy, parameters.A if dstate is None else dstate, length),
        (
            jax.ShapeDtypeStruct(rows.x.shape, rows.x.dtype),
            _float32(batch, length, heads),
            _float32(batch, chunks, heads),
            *(jax.ShapeDtypeStruct((batch, length, parts, S.N), kind) for kind in kinds),
            _float32(batch, chunks, *skip_shape, needed=S.HAS_D),
            _float32(batch, heads, width, S.N, needed=S.HAS_INITIAL),
            _float32(batch, chunks + 1, heads, width, S.N, needed=S.SEVERAL_CHUNKS),
        ),
        programs=batch * parts,
        specialisation=S,
        tiles=tiles,
    )

    def of_groups(shares):
        return jnp.sum(shares.reshape(batch, length, S.G, parts // S.G, S.N), axis=3)

    drows = Rows(dx, ddt, of_groups(dB), of_groups(dC), dinitial if S.HAS_INITIAL else None)
    return drows, dA, dD if S.HAS_D else None


def _float32(*shape, needed=True):
    """An array that a kernel writes, of one number if it is not needed."""
    return jax.ShapeDtypeStruct(shape if needed else (1,), jnp.float32)


def _inputs(rows, parameters):
    """The inputs of both kernels; a missing one is replaced by an array that they do not read."""
    optional = (parameters.D, parameters.dt_bias, rows.initial_state, rows.segment_ids)
    filled = (parameters.A if v is None else v for v in optional)
    return (rows.x, rows.dt, parameters.A, rows.B, rows.C, *filled)


def _specialise(kernel, options, rows, parameters) -> tuple[Specialisation, TileSizes]:
    """What a kernel is specialised for, and its tile sizes."""
    length, heads, width = rows.x.shape[1:]
    groups, state = rows.B.shape[2:]
    precision = options.precision
    if precision == "tf32x3" and state > WIDEST_STATE[kernel]:
        precision = "ieee"
    tiles = launch.tile_sizes(
        kernel,
        length=length,
        heads=heads // groups,
        size=max(width, state),
        precision=precision,
        largest_chunk=options.chunk_size,
    )
    several = length > tiles.chunk
    limited = options.dt_limit != (0.0, float("inf"))
    low, high = options.dt_limit if limited else (0.0, 0.0)
    specialisation = Specialisation(
        H=heads,
        G=groups,
        P=width,
        N=state,
        Q=tiles.chunk,
        HEADS=tiles.heads,
        SEVERAL_CHUNKS=several,
        HAS_D=parameters.D is not None,
        D_PER_CHANNEL=parameters.D is not None and parameters.D.ndim == 2,
        HAS_BIAS=parameters.dt_bias is not None,
        HAS_INITIAL=rows.initial_state is not None,
        HAS_FINAL=options.return_final_state,
        HAS_ENTERING_STATE=several or rows.initial_state is not None,
        HAS_LEAVING_STATE=several or options.return_final_state,
        HAS_SEGMENTS=rows.segment_ids is not None,
        SOFTPLUS=options.dt_softplus,
        LIMITED=limited,
        LOW=float(low),
        HIGH=float(high),
        PRECISION=precision,
    )
    return specialisation, tiles
