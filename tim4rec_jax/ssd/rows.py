"""Kernels under jax.vmap and on several devices: every row of the batch stands for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, PartitionSpec


def row_by_row(kernel: Callable[[Any, Any], Any], rows: Any, parameters: Any) -> Any:
    """Calls a kernel on each device's rows, and under jax.vmap once for all.

    To the compiler a kernel is a black box, which it could not split over devices.

    Args:
        kernel: a function of `rows` and `parameters` for any number of rows, all of whose results
            have a row for each row of the input.
        rows: tree of arrays [B,...] of the same B.
        parameters: tree of arrays that all rows share.

    Returns:
        The results of the kernel.
    """
    mesh, axes = _split_axes(jax.tree.leaves(rows)[0])
    call = widened(kernel)
    if not axes:
        return call(rows, parameters)
    split = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(PartitionSpec(axes), PartitionSpec()),
        out_specs=PartitionSpec(axes),
        check_vma=False,
    )
    return split(rows, parameters)


def _split_axes(v):
    """The mesh of an array, and the axes of it that rows are spread over.

    The compiler lays arrays out over automatic axes later. They are taken to carry the batch, as
    they do wherever only the batch is split; another layout is moved, at a cost, not misread.
    """
    sharding = jax.typeof(v).sharding
    given = jax.tree.leaves(sharding.spec[:1])
    axes, size = [], 1
    for name, kind in zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True):
        parts = size * sharding.mesh.shape[name]
        if name in given or (kind == AxisType.Auto and v.shape[0] % parts == 0):
            axes.append(name)
            size = parts
    return sharding.mesh, tuple(axes)


def widened(kernel):
    """Makes jax.vmap add rows to a call of `kernel`, as for `row_by_row`, not loops around it."""

    @custom_vmap
    def call(rows, parameters):
        return kernel(rows, parameters)

    @call.def_vmap
    def _(size, batched, rows, parameters):
        def every(v, own):
            return v if own else jnp.broadcast_to(v, (size, *v.shape))

        rows = jax.tree.map(every, rows, batched[0])
        if any(jax.tree.leaves(batched[1])):
            parameters = jax.tree.map(every, parameters, batched[1])
            results = jax.lax.map(lambda v: call(*v), (rows, parameters))
        else:
            flat = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), rows)
            results = call(flat, parameters)
            results = jax.tree.map(lambda v: v.reshape(size, -1, *v.shape[1:]), results)
        return results, jax.tree.map(lambda v: True, results)

    return call
