"""Kernels under jax.vmap and on several devices: every row of the batch stands for itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning


def row_by_row(kernel: Callable[[Any, Any], Any], rows: Any, parameters: Any) -> Any:
    """Calls a kernel so that the compiler may split it, and jax.vmap widen it, along the batch.

    To the compiler a kernel is a black box: it would gather all rows on every device, or refuse.

    Args:
        kernel: a function of `rows` and `parameters` for any number of rows, all of whose results
            have a row for each row of the input.
        rows: tree of arrays [B,...] of the same B.
        parameters: tree of arrays that all rows share.

    Returns:
        The results of the kernel.
    """

    @custom_vmap
    def call(rows, parameters):
        split = custom_partitioning(kernel)
        split.def_partition(
            partition=lambda mesh, arguments, results: (
                mesh,
                kernel,
                _shardings(results),
                _shardings(arguments),
            ),
            sharding_rule=functools.partial(_rule, len(jax.tree.leaves(rows))),
        )
        return split(rows, parameters)

    @call.def_vmap
    def widened(size, batched, rows, parameters):
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

    return call(rows, parameters)


def _shardings(shapes):
    return jax.tree.map(lambda shape: shape.sharding, shapes)


def _rule(rows, mesh, operands, results):
    """The batch may be split; every other axis is needed whole."""
    del mesh
    names, whole = [], []
    for i, kind in enumerate([*operands, *results]):
        axes = [f"v{i}a{axis}" for axis in range(kind.rank)]
        if i < rows or i >= len(operands):
            axes[0] = "b"
        names.append(" ".join(axes))
        whole += [axis for axis in axes if axis != "b"]
    rule = f"{', '.join(names[: len(operands)])} -> {', '.join(names[len(operands) :])}"
    return rule, {"need_replication_factors": tuple(whole)}
