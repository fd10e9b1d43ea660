"""What the two TPU kernels share: how their work is cut into programs and into blocks in VMEM."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # numbers side by side in a vector register

# exp() of this number is zero in float32. Because decays have this bound, those of a chunk add up
# without rounding.
FORGET_ALL = -1000.0
# How many bytes of VMEM the blocks of a program take. A single row may take up to `MOST_BYTES`. The
# compiler grants 16 MiB by default; it needs the rest for intermediate values.
_BLOCK_BYTES = 6 * 2**20
MOST_BYTES = 11 * 2**20
_MOST_ROWS = 8
_ROWS_AT_ONCE = 2


class Heads(NamedTuple):
    """How heads share lanes and groups.

    The features of all heads lie side by side in the lanes, I = H P of them, so that the heads of a
    64-d model fill the 128 lanes of one register.

    Attributes:
        number: H.
        width: P.
        groups: G.
        size: N, a multiple of 8.
        precision: of matrix products; see `tim4rec_jax.ssd.tpu.kernels.dot`.
    """

    number: int
    width: int
    groups: int
    size: int
    precision: str

    @property
    def features(self) -> int:
        """I."""
        return self.number * self.width

    def tiles(self) -> list[tuple[slice, range]]:
        """The lanes and heads of the smallest pieces that start and end on whole registers."""
        each = next(
            (n for n in range(1, self.number) if n * self.width % LANES == 0 == self.number % n),
            self.number,
        )
        return [
            (slice(first * self.width, (first + each) * self.width), range(first, first + each))
            for first in range(0, self.number, each)
        ]

    def group(self, head: int) -> int:
        """The group of a head."""
        return head // (self.number // self.groups)


class Plan(NamedTuple):
    """The shape of the work, all of which is known when a program is traced.

    Attributes:
        heads: how heads share lanes and groups.
        length: L.
        chunk: Q, positions of a chunk.
        stateful: whether a state enters or leaves any chunk.
        final: whether the caller wants the state after the last position.
    """

    heads: Heads
    length: int
    chunk: int
    stateful: bool
    final: bool

    @property
    def chunks(self) -> int:
        """How many chunks cover the length. The last one may be shorter."""
        return -(-self.length // self.chunk)

    @property
    def state_shape(self) -> tuple[int, int]:
        """The state of a row, [N,I]."""
        return self.heads.size, self.heads.features


def plan_chunks(length: int, chunk_size: int | None) -> int:
    """Returns Q: by default that of equal chunks of at most 128 positions, the lanes of a register.

    A matrix over fewer pairs of positions fills as many registers as one over 128 x 128. Q is a
    multiple of 16, because a register of bfloat16 holds 16 positions.
    """
    chunk = chunk_size or -(-length // -(-length // LANES))
    return -(-min(chunk, length) // 16) * 16


def padded_bytes(height: int, *widths: int) -> int:
    """Returns the bytes in VMEM of float32 arrays [height,width]; rows fill whole registers."""
    return sum(-(-width // LANES) * LANES * height * 4 for width in widths)


def by_chunk(v: jax.Array, plan: Plan) -> jax.Array:
    """Turns [B,L,H] into [B,chunks,H,Q], with positions in lanes and zeros after the last one."""
    v = jnp.pad(v, ((0, 0), (0, plan.chunks * plan.chunk - plan.length), (0, 0)))
    return v.reshape(v.shape[0], plan.chunks, plan.chunk, -1).swapaxes(2, 3)


class Blocks:
    """Which part of each array a program sees: some rows of the batch, and one chunk of them.

    Attributes:
        rows: how many rows a program takes, a divisor of the batch.
    """

    def __init__(self, plan: Plan, batch: int, row_bytes: int, *, reverse: bool = False):
        """Fits as many rows into VMEM as it holds, at most 8.

        Args:
            plan: the shape of the work.
            batch: B.
            row_bytes: bytes of VMEM that the blocks of one row take.
            reverse: whether the last chunk comes first.
        """
        most = max(1, min(_MOST_ROWS, _BLOCK_BYTES // row_bytes))
        self.rows = next(n for n in range(most, 0, -1) if batch % n == 0)
        self.grid = (batch // self.rows, plan.chunks)
        self._plan, self._reverse = plan, reverse

    def number(self, step):
        """The number of the chunk that a program takes in a step of the second axis of the grid."""
        return self._plan.chunks - 1 - step if self._reverse else step

    def positions(self, width: int) -> pl.BlockSpec:
        """The block of an array [B,L,width]."""
        shape = (self.rows, self._plan.chunk, width)
        return pl.BlockSpec(shape, lambda i, step: (i, self.number(step), 0))

    def chunk(self, *shape: int) -> pl.BlockSpec:
        """The block of an array [B,chunks,*shape]."""
        return pl.BlockSpec((self.rows, 1, *shape), lambda i, step: (i, self.number(step), 0, 0))

    def row(self, *shape: int) -> pl.BlockSpec:
        """The block of an array [B,*shape], which is the same for all chunks."""
        return pl.BlockSpec((self.rows, *shape), lambda i, step: (i, 0, 0))

    def for_rows(self, row) -> None:
        """Calls a function with the number of each row of a program, in a kernel.

        Rows do not depend on each other. Where a turn of the loop does several of them, the
        compiler fills the time in which the results of one are under way with work on the other.
        """
        together = max(n for n in range(1, _ROWS_AT_ONCE + 1) if self.rows % n == 0)

        def some(turn, _):
            for i in range(together):
                row(turn * together + i)

        jax.lax.fori_loop(0, self.rows // together, some, None)

    def launch(self, kernel, inputs, outputs, scratch):
        """Runs a kernel over all blocks; the chunks of a row follow each other.

        Args:
            kernel: a function of references to the inputs, the outputs and the scratch memory.
            inputs: pairs of an array, or a tree of arrays, and its block.
            outputs: pairs of a shape, or a tree of shapes, and its block.
            scratch: shapes of float32 arrays that a row keeps from chunk to chunk.

        Returns:
            The outputs.
        """
        arguments, in_specs = zip(*inputs, strict=True)
        shapes, out_specs = zip(*outputs, strict=True)
        return pl.pallas_call(
            kernel,
            out_shape=shapes,
            grid=self.grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((self.rows, *shape), jnp.float32) for shape in scratch],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        )(*arguments)


def load(plan: Plan, number, *arrays):
    """Values [Q,...] of chunk `number` as float32, with zeros beyond the length of the sequence."""
    arrays = [v.astype(jnp.float32) for v in arrays]
    if plan.length % plan.chunk == 0:
        return arrays
    left = plan.length - number * plan.chunk
    return [
        jnp.where(jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < left, v, 0.0) for v in arrays
    ]


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of a float32 result."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def like(tree):
    """The shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), tree)
