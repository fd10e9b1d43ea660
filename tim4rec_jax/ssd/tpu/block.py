"""`time_aware_ssd_block` as a Pallas kernel for TPUs: one pass over memory in each direction.

Reads what the input projection wrote and writes the normalised result; convolution, activation,
step sizes, op, gate and norm happen on a chunk in VMEM. The backward pass computes them again
from the same input and from the states between chunks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tim4rec_jax.ssd.convolution import ACTIVATIONS
from tim4rec_jax.ssd.dispatch import row_by_row
from tim4rec_jax.ssd.tpu import block_kernels as kernels
from tim4rec_jax.ssd.tpu.block_kernels import TAIL, Parameters, Rows, Settings, row_bytes
from tim4rec_jax.ssd.tpu.common import MOST_BYTES, Heads, Plan, by_chunk, plan_chunks


def unsupported_reason(v) -> str | None:
    """Returns what keeps the arguments of the block from running here, or None."""
    parameters = (v.conv_kernel, v.conv_bias, v.A, v.D, v.dt_bias, v.norm_scale)
    arrays = (v.projected, v.time_factor, *parameters)
    if any(array is not None and array.dtype == jnp.float64 for array in arrays):
        return "a TPU has no float64"
    if v.state % 8:
        return f"the state must be a multiple of 8 numbers, not {v.state}"
    if v.conv_kernel.shape[0] > TAIL + 1:
        return f"the convolution must have at most {TAIL + 1} taps"
    settings = _settings(v)
    if row_bytes(settings) > MOST_BYTES:
        return "a chunk of one row does not fit VMEM; choose a smaller chunk_size"
    return None


def _settings(v) -> Settings:
    length, number, width = v.projected.shape[1], v.A.size, v.norm_scale.size // v.A.size
    # The norm makes much of small sums: what is computed from bfloat16 numbers keeps 16 bits.
    precision = "3" if v.projected.dtype == jnp.bfloat16 else "float32"
    chunk = plan_chunks(length, v.chunk_size)
    heads = Heads(number, width, v.groups, v.state, precision)
    plan = Plan(heads, length, chunk, stateful=chunk < length, final=False)
    return Settings(plan, v.conv_kernel.shape[0], ACTIVATIONS[v.activation], v.eps)


def block_tpu(v) -> jax.Array:
    """Computes the block; `v` are the arguments of `time_aware_ssd_block`."""
    settings = _settings(v)
    plan, number = settings.plan, v.A.size
    kind = v.projected.dtype
    read = jnp.bfloat16 if kind == jnp.bfloat16 else jnp.float32  # registers know no float16
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
    return y.astype(kind)


def _age(segment_ids):
    """[B,L] -> how many positions before each are in its segment, float32."""
    position = jnp.arange(segment_ids.shape[1])
    restart = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    first = jax.lax.cummax(jnp.where(restart, position, 0), axis=1)
    return (position - first).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(settings: Settings, rows: Rows, parameters: Parameters) -> Any:
    return row_by_row(functools.partial(kernels.forward, settings, False), rows, parameters)[0]


def _block_forward(settings, rows, parameters):
    y, entering = row_by_row(functools.partial(kernels.forward, settings, True), rows, parameters)
    return y, (rows, parameters, entering)


def _block_backward(settings, residuals, dy):
    rows, parameters, entering = residuals
    drows, dparameters = row_by_row(
        functools.partial(kernels.backward, settings), (rows, entering, dy), parameters
    )
    return drows, jax.tree.map(lambda v: jnp.sum(v, axis=0), dparameters)


_block.defvjp(_block_forward, _block_backward)
