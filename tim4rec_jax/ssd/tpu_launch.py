"""How the TPU kernels' work is cut into programs, and what they have in common."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tim4rec_jax.ssd.tpu_matrices import Heads

# exp() of it is zero in float32. Bounded so, the decays of a chunk add up exactly.
FORGET_ALL = -1000.0
# What the blocks of a program take of the 16 MiB of VMEM that the compiler grants by default,
# and what they may take where one row needs more. The rest is for values on their way.
_BLOCK_BYTES = 6 * 2**20
MOST_BYTES = 11 * 2**20
_MOST_ROWS = 8


class Plan(NamedTuple):
    """The shape of the work: all of it known when a program is traced."""

    heads: Heads
    length: int
    chunk: int
    stateful: bool  # whether there is a state before or after a chunk
    final: bool  # whether the state after the last is wanted

    @property
    def chunks(self) -> int:
        """How many chunks cover the length; the last may be ragged."""
        return -(-self.length // self.chunk)


def plan_chunks(length: int, chunk_size: int | None) -> int:
    """Returns the positions of a chunk: equal chunks of at most 128, one register's lanes.

    A matrix over fewer pairs fills as many registers as one over 128 x 128. Whole registers of
    bfloat16 hold 16 positions.
    """
    chunk = chunk_size or -(-length // -(-length // 128))
    return -(-min(chunk, length) // 16) * 16


def rows_per_program(batch: int, row_bytes: int) -> int:
    """Returns how many rows a program takes: a divisor of the batch that fits VMEM."""
    most = min(_MOST_ROWS, _BLOCK_BYTES // row_bytes)
    return next(n for n in range(max(1, most), 0, -1) if batch % n == 0)


def padded_bytes(height: int, *widths: int) -> int:
    """Returns the bytes of float32 arrays of a height in VMEM, where lanes come by 128."""
    return sum(-(-width // 128) * 128 * height * 4 for width in widths)


def by_chunk(v: jax.Array, plan: Plan) -> jax.Array:
    """[B,L,H] -> [B,chunks,H,Q], zeros as filler: positions belong in lanes."""
    v = jnp.pad(v, ((0, 0), (0, plan.chunks * plan.chunk - plan.length), (0, 0)))
    return v.reshape(v.shape[0], plan.chunks, plan.chunk, -1).swapaxes(2, 3)


class Blocks:
    """How arrays are cut into what a program sees: by rows of the batch, and by chunks."""

    def __init__(self, plan: Plan, rows: int, reverse: bool = False):
        self.plan, self.rows = plan, rows
        self._at = (lambda c: plan.chunks - 1 - c) if reverse else (lambda c: c)

    def positions(self, width: int) -> pl.BlockSpec:
        """Of [B,L,width]."""
        shape = (self.rows, self.plan.chunk, width)
        return pl.BlockSpec(shape, lambda i, c: (i, self._at(c), 0))

    def chunk(self, *shape: int) -> pl.BlockSpec:
        """Of [B,chunks,*shape]."""
        return pl.BlockSpec((self.rows, 1, *shape), lambda i, c: (i, self._at(c), 0, 0))

    def row(self, *shape: int) -> pl.BlockSpec:
        """Of [B,*shape], the same for all chunks."""
        return pl.BlockSpec((self.rows, *shape), lambda i, c: (i, 0, 0))


def launch(kernel, blocks: Blocks, arguments, in_specs, results, out_specs, scratch):
    """Runs a kernel over blocks of rows and, one after the other, their chunks."""
    batch = jax.tree.leaves(results)[0].shape[0]
    return pl.pallas_call(
        kernel,
        out_shape=results,
        grid=(batch // blocks.rows, blocks.plan.chunks),
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    )(*arguments)


def whole(plan: Plan, chunk, *arrays):
    """Values of a row's chunk in float32, zeros beyond the length of the sequence."""
    arrays = [v.astype(jnp.float32) for v in arrays]
    if plan.length % plan.chunk == 0:
        return arrays
    left = plan.length - chunk * plan.chunk
    return [
        jnp.where(jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < left, v, 0.0) for v in arrays
    ]


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of a float32 result."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)
