"""Kernels under `jax.vmap` and on several devices: every row of the batch stands for itself.

To the compiler a kernel is a black box, which it could not split over devices or rows by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def row_by_row(kernel: Callable[[Any, Any], Any], rows: Any, parameters: Any) -> Any:
    """Calls a kernel on each device's rows, and under jax.vmap once for all.

    The layout is chosen while the call is traced, as TPUs need it: see `_split_axes`.

    Args:
        kernel: a function of `rows` and `parameters` for any number of rows, all of whose results
            have a row for each row of the input.
        rows: tree of arrays [B,...] of the same B.
        parameters: tree of arrays that all rows share.

    Returns:
        The results of the kernel.
    """
    mesh, axes = _split_axes(jax.tree.leaves(rows)[0])
    call = _vmapped_by_rows(kernel)
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
    they do wherever only the batch is split. Another layout is moved, at a cost, not misread.
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


def shard_over_batch(kernel: Callable[[Any, Any], Any], rows: Any, parameters: Any) -> Any:
    """Does what `row_by_row` does, with the layout that the compiler has chosen for the rows.

    The compiler asks where it lowers for a GPU or a CPU. For a TPU it does not ask.

    Args:
        kernel: as for `row_by_row`.
        rows: as for `row_by_row`.
        parameters: as for `row_by_row`.

    Returns:
        The results of the kernel.
    """
    return _vmapped_by_rows(functools.partial(_partitioned, kernel))(rows, parameters)


def _partitioned(kernel, rows, parameters):
    leaves, tree = jax.tree.flatten((rows, parameters))
    count = len(jax.tree.leaves(rows))
    results = jax.eval_shape(kernel, rows, parameters)

    def of_leaves(*leaves):
        return tuple(jax.tree.leaves(kernel(*jax.tree.unflatten(tree, leaves))))

    def partition(mesh, arguments, results):
        by_row = NamedSharding(mesh, PartitionSpec(*arguments[0].sharding.spec[:1]))
        whole = NamedSharding(mesh, PartitionSpec())
        shardings = tuple(by_row if i < count else whole for i in range(len(arguments)))
        return mesh, of_leaves, tuple(by_row for _ in results), shardings

    def axes(array, name, first):
        """Names of an array's axes: only the axis of the rows is shared with other arrays."""
        return " ".join([first, *(f"{name}x{axis}" for axis in range(1, array.ndim))])

    inputs = [axes(v, f"in{i}", "rows" if i < count else f"whole{i}") for i, v in enumerate(leaves)]
    outputs = [axes(v, f"out{i}", "rows") for i, v in enumerate(jax.tree.leaves(results))]
    call = custom_partitioning(of_leaves)
    call.def_partition(partition, sharding_rule=f"{', '.join(inputs)} -> {', '.join(outputs)}")
    return jax.tree.unflatten(jax.tree.structure(results), call(*leaves))


def _vmapped_by_rows(kernel):
    """Makes jax.vmap add rows to one call of `kernel` instead of a loop around it."""

    @custom_vmap
    def call(rows, parameters):
        return kernel(rows, parameters)

    @call.def_vmap
    def _(size, batched, rows, parameters):
        def every(v, mapped):
            return v if mapped else jnp.broadcast_to(v, (size, *v.shape))

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
