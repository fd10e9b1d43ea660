"""The layer around the SSD operator as one function: convolution, operator, gate and norm."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tim4rec_jax.ssd import finite
from tim4rec_jax.ssd.api import ssd
from tim4rec_jax.ssd.arrays import AnyArray
from tim4rec_jax.ssd.convolution import ACTIVATIONS, causal_convolution
from tim4rec_jax.ssd.dispatch import Implementation, choose
from tim4rec_jax.ssd.segments import first_positions
from tim4rec_jax.ssd.triton import block as triton_block


class BlockArguments(NamedTuple):
    """The arguments of `time_aware_ssd_block`, with shapes that are checked."""

    projected: jax.Array
    time_factor: jax.Array | None
    conv_kernel: jax.Array
    conv_bias: jax.Array
    A: jax.Array
    D: jax.Array
    dt_bias: jax.Array
    norm_scale: jax.Array
    activation: str
    state: int
    groups: int = 1
    eps: float = 1e-5
    segment_ids: jax.Array | None = None
    chunk_size: int | None = None
    time_step: jax.Array | None = None
    time_rate: jax.Array | None = None


def rate_factor(logarithm: Float[AnyArray, "*batch"]) -> Float[Array, "*batch"]:
    """The factor on the rate of decay.

    At e^-40 nothing decays and at e^40 all does, for any step size there is. Beyond e^44, the
    square of the factor would vanish or overflow, and the gradient is divided by it.
    """
    return jnp.exp(jnp.clip(logarithm, -40.0, 40.0))


def _composed(v: BlockArguments, op: str | None) -> jax.Array:
    """Computes the block from its parts, in at least float32 until the result."""
    heads, inner, cells = v.A.shape[0], v.norm_scale.shape[0], v.groups * v.state
    dtype = jnp.promote_types(v.projected.dtype, jnp.float32)
    cuts = [inner, 2 * inner + 2 * cells]
    z, mixed, dt = jnp.split(v.projected.astype(dtype), cuts, axis=-1)
    mixed = causal_convolution(
        mixed, v.conv_kernel.astype(dtype), v.conv_bias.astype(dtype), v.segment_ids
    )
    x, B, C = jnp.split(ACTIVATIONS[v.activation](mixed), [inner, inner + cells], axis=-1)
    x = x.reshape(*x.shape[:2], heads, -1)
    if v.time_factor is not None:
        dt = dt * v.time_factor
    if v.time_step is not None:
        dt = dt + v.time_step
    of_rows = (B.reshape(*B.shape[:2], v.groups, -1), C.reshape(*C.shape[:2], v.groups, -1))
    settings = {"segment_ids": v.segment_ids, "chunk_size": v.chunk_size, "implementation": op}
    y: Any
    if v.time_rate is None:
        y = ssd(x, dt, v.A, *of_rows, v.D, dt_bias=v.dt_bias, dt_softplus=True, **settings)
    else:
        # The op has one step size for input and decay. The factor on the rate of decay multiplies
        # that step size, and the input is divided by it.
        rate = rate_factor(v.time_rate.astype(dtype))
        dt = jax.nn.softplus(dt + v.dt_bias) * rate
        seen: Any = ssd(x / rate[..., None], dt, v.A, *of_rows, **settings)
        y = seen + v.D[:, None] * x
    gated = y.reshape(z.shape) * jax.nn.silu(z)
    variance = jnp.mean(gated * gated, axis=-1, keepdims=True)
    y = gated * jax.lax.rsqrt(variance + v.eps) * v.norm_scale
    return y.astype(v.projected.dtype)


def _tpu_block() -> Any:
    # Late; see `tim4rec_jax.ssd.api`.
    from tim4rec_jax.ssd.tpu import block

    return block


# The choice is made as for `ssd`. "parts" puts the convolution, gate and norm around the best
# implementation of the operator. It runs where no kernel of the whole block can.
BLOCK_IMPLEMENTATIONS = {
    "reference": Implementation(functools.partial(_composed, op="reference")),
    "xla": Implementation(functools.partial(_composed, op="xla")),
    "parts": Implementation(functools.partial(_composed, op=None)),
    "triton": Implementation(triton_block.block_triton, "gpu", triton_block.unsupported_reason),
    "tpu": Implementation(
        lambda v: _tpu_block().block_tpu(v), "tpu", lambda v: _tpu_block().unsupported_reason(v)
    ),
}


def has_kernel(projected: Any, time_factor: Any = None, **settings: Any) -> bool:
    """Returns whether `time_aware_ssd_block` would run a kernel of its own.

    The answer is for the platform that is compiled for, see `compile_for`.

    Args:
        projected: that of the block, or its shape and dtype.
        time_factor: that of the block, or its shape and dtype.
        settings: the other arguments of the block.
    """
    arguments = BlockArguments(projected, time_factor, **settings)
    return _choose(None, arguments).platform is not None


def _choose(name: str | None, arguments: BlockArguments) -> Implementation:
    return choose(BLOCK_IMPLEMENTATIONS, name, arguments, otherwise="parts")


def time_aware_ssd_block(
    projected: Float[AnyArray, "B L E"],
    time_factor: Float[AnyArray, "B L H"] | None = None,
    *,
    time_step: Float[AnyArray, "B L H"] | None = None,
    time_rate: Float[AnyArray, "B L H"] | None = None,
    conv_kernel: Float[AnyArray, "W M"],
    conv_bias: Float[AnyArray, " M"],
    A: Float[AnyArray, " H"],
    D: Float[AnyArray, " H"],
    dt_bias: Float[AnyArray, " H"],
    norm_scale: Float[AnyArray, " I"],
    activation: str,
    state: int,
    groups: int = 1,
    eps: float = 1e-5,
    segment_ids: Int[AnyArray, "B L"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L I"]:
    """What the SSD layers do between their projections, the paper's and the causal one.

    `projected` holds z [I], x [I], B [G N], C [G N] and dt [H] along its last axis, I = H P.
    x, B and C pass a causal depthwise convolution and the activation; then
    `y = RMSNorm(ssd(x, step, A exp(time_rate), B, C, D) silu(z)) norm_scale` with
    `step = softplus(dt time_factor + time_step + dt_bias)`, the block of Mamba-2 (arXiv 2405.21060,
    section 7). The paper's layer (arXiv 2409.16182, section 3.3) has the time factor, the causal
    layer the other two. Computed in float32, or float64 as soon as one input is.

    NaN, infinities, forward mode and symbolic shapes are as for `ssd`.

    Args:
        projected: what the input projection returns, E = 2 I + 2 G N + H.
        time_factor: scales the raw step sizes; None: 1.
        time_step: added to the raw step sizes; None: 0.
        time_rate: log of a factor on the rate of decay at each position; None: 0.
        conv_kernel: taps of each channel of (x, B, C), M = I + 2 G N; the last is the present.
        conv_bias: of each channel.
        A: decay rate of each head, negative in a stable model.
        D: weight of the skip connection.
        dt_bias: added to the step sizes before softplus.
        norm_scale: of RMSNorm.
        activation: after the convolution, "hardswish" or "silu".
        state: N, the width of the state.
        groups: G, the number of groups; head `h` uses group `h // (H / G)` of B and C.
        eps: of RMSNorm, which is taken over all I features.
        segment_ids: convolution and state start afresh where the id differs from the one before,
            also where an id comes back. None: one segment.
        chunk_size: as for `ssd`.
        implementation: a name in `BLOCK_IMPLEMENTATIONS`: "reference", "xla", "triton" and "tpu"
            as of `ssd`, the last two one kernel for each direction; "parts", one operation after
            the other around the best `ssd`. None chooses the best for the platform.

    Returns:
        `y` in the dtype of `projected`.

    Raises:
        ValueError: shapes or settings do not fit, or the implementation cannot run.
    """
    arrays: Any = dict(
        projected=projected,
        time_factor=time_factor,
        time_step=time_step,
        time_rate=time_rate,
        conv_kernel=conv_kernel,
        conv_bias=conv_bias,
        A=A,
        D=D,
        dt_bias=dt_bias,
        norm_scale=norm_scale,
        segment_ids=segment_ids,
    )
    arguments = BlockArguments(
        **jax.tree.map(jnp.asarray, arrays),
        activation=activation,
        state=state,
        groups=groups,
        eps=eps,
        chunk_size=chunk_size,
    )
    _check(arguments)
    chosen = _choose(implementation, arguments)
    if segment_ids is not None:
        # To the convolution of the kernels, an id that comes back would be the same segment.
        arguments = arguments._replace(segment_ids=first_positions(segment_ids))

    def compute(*rows):
        return chosen.compute(arguments._replace(**dict(zip(names, rows, strict=True))))

    names = ("projected", "time_factor", "time_step", "time_rate")
    rows = tuple(getattr(arguments, name) for name in names)
    return finite.call_guarded(compute, rows, arguments.segment_ids)


def _check(v: BlockArguments):
    """Raises ValueError unless all shapes fit the heads of `A` and the features of `norm_scale`."""
    heads, inner = v.A.size, v.norm_scale.size
    if v.activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, got {v.activation!r}"
        )
    if heads % v.groups or inner % heads:
        raise ValueError(
            f"H = {heads} must divide the {inner} features of norm_scale, and G = {v.groups} H"
        )
    mixed = inner + 2 * v.groups * v.state
    width = inner + mixed + heads
    if v.projected.ndim != 3 or 0 in v.projected.shape or v.projected.shape[2] != width:
        raise ValueError(
            f"projected must be [B,L,2I+2GN+H] = [B,L,{width}] and not empty, "
            f"got shape {v.projected.shape}"
        )
    rows = v.projected.shape[:2]
    for name, array, shape in (
        ("time_factor", v.time_factor, (*rows, heads)),
        ("time_step", v.time_step, (*rows, heads)),
        ("time_rate", v.time_rate, (*rows, heads)),
        ("conv_kernel", v.conv_kernel, (v.conv_kernel.shape[0], mixed)),
        ("conv_bias", v.conv_bias, (mixed,)),
        ("A", v.A, (heads,)),
        ("D", v.D, (heads,)),
        ("dt_bias", v.dt_bias, (heads,)),
        ("norm_scale", v.norm_scale, (inner,)),
        ("segment_ids", v.segment_ids, rows),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
