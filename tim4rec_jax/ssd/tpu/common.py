"""What the TPU kernels have in common: how work is cut into programs, and matrices in registers."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# ---- ssd.tpu_matrices
# Matrices in vector registers of a TPU: products, and lanes that several heads share.
#
# Lanes hold the features of all heads, I = H P of them: so 64-d models fill one register's 128
# lanes. A product for one head leaves the lanes of the others zero instead of cutting them out,
# which costs the matrix unit nothing: it always works on 128. Letters as in `tpu_chunk`.

_LANES = 128


class Heads(NamedTuple):
    """How heads share lanes and groups.

    Attributes:
        number: H.
        width: P.
        groups: G.
        size: N.
        precision: of matrix products, see `_dot`.
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
            (n for n in range(1, self.number) if n * self.width % _LANES == 0 == self.number % n),
            self.number,
        )
        return [
            (slice(first * self.width, (first + each) * self.width), range(first, first + each))
            for first in range(0, self.number, each)
        ]

    def group(self, head: int) -> int:
        """The group of a head."""
        return head // (self.number // self.groups)


_CONTRACT = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}


def dot(a, b, axes: str, precision: str):
    """Product of float32 matrices, "t"ransposed or "n"ot, with sums in float32.

    Precision is "float32", or how many products of bfloat16 numbers make up for it: "1" rounds
    both matrices; "2" keeps 16 bits of `a`, "3" of both.
    """
    left, right = _CONTRACT[axes]
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((left,), (right,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    if precision == "float32":
        return dot(a, b, precision=jax.lax.Precision.HIGHEST)
    (a, a_rest), (b, b_rest) = _halves(a), _halves(b)
    product = dot(a, b)
    if precision != "1":
        product += dot(a_rest, b)
    if precision == "3":
        product += dot(a, b_rest)
    return product


def _halves(v):
    """The upper 8 bits of the fraction and the next 8, as bfloat16."""
    upper = v.astype(jnp.bfloat16)
    return upper, (v - upper.astype(jnp.float32)).astype(jnp.bfloat16)


def exact_dot(a, b, axes: str = "nn"):
    """`dot` in full float32."""
    return dot(a, b, axes, "float32")


def related(size: int, relation: str):
    """[Q,Q], whether the row's position stands in a relation to the column's."""
    row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    return getattr(jax.lax, relation)(row, column)


def ones(size: int, relation: str):
    """[Q,Q], one where `related`."""
    return related(size, relation).astype(jnp.float32)


def columns(rows):
    """[H,Q] -> [Q,H], by a product with ones and zeros: what the matrix unit is fast at."""
    return exact_dot(ones(rows.shape[1], "eq"), rows, "nt")


def rows_of(columns):
    """[Q,H] -> [H,Q]."""
    return exact_dot(ones(columns.shape[1], "eq"), columns, "nt")


def _lane(shape, heads: Heads, h: int, members: range):
    """Whether a lane of a tile belongs to a head."""
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    first = (h - members[0]) * heads.width
    return (lane >= first) & (lane < first + heads.width)


def only(v, heads: Heads, members: range, some):
    """[Q,T] with zeros in the lanes of other heads."""
    if len(some) == len(members):
        return v
    mask = _lane(v.shape, heads, some[0], members)
    for h in some[1:]:
        mask |= _lane(v.shape, heads, h, members)
    return jnp.where(mask, v, 0.0)


def spread(columns, heads: Heads, members: range):
    """[Q,H] -> [Q,T]: each head's column in all of its lanes."""
    shape = (columns.shape[0], len(members) * heads.width)
    v = jnp.broadcast_to(columns[:, members[0] : members[0] + 1], shape)
    for h in members[1:]:
        v = jnp.where(_lane(shape, heads, h, members), columns[:, h : h + 1], v)
    return v


def groups_of(heads: Heads, members: range):
    """Groups of a tile and the heads in it that use them."""
    found = sorted({heads.group(h) for h in members})
    return [(g, [h for h in members if heads.group(h) == g]) for g in found]


def for_groups(heads: Heads, members: range, v, tile, axes: str, precision):
    """Product of each group's part of `v` [Q,GN] with its heads' lanes of a tile."""
    total = 0.0
    for g, own in groups_of(heads, members):
        total += only(dot(group_part(v, g, heads), tile, axes, precision), heads, members, own)
    return total


def indicator(heads: Heads, members: range):
    """[H,T], one where a lane belongs to a head."""
    shape = (heads.number, len(members) * heads.width)
    head = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    first = (head - members[0]) * heads.width
    return ((lane >= first) & (lane < first + heads.width)).astype(jnp.float32)


def by_head(heads: Heads, members: range, v):
    """[Q,T] -> [H,Q], sums over the lanes of each head."""
    return exact_dot(indicator(heads, members), v, "nt")


def head_number(shape, axis: int):
    """The index along the axis of heads."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def group_part(v, g: int, heads: Heads):
    """What belongs to a group [Q,N] of [Q,GN]."""
    return v[:, g * heads.size : (g + 1) * heads.size]


def join(tiles):
    """Tiles side by side."""
    return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis=1)


# ---- ssd.tpu_launch
# How the TPU kernels' work is cut into programs, and what they have in common.

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
