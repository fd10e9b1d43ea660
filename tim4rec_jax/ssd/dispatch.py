"""Choice of an implementation: by name, or the best for the platform that is compiled for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, PartitionSpec

from tim4rec_jax.runtime import target

# ---- ssd.dispatch
# Choice of an implementation: by name, or the best for the platform that is compiled for.


class Implementation(NamedTuple):
    """One way to compute an operator.

    Attributes:
        compute: the operator as a function of its arguments, one tuple.
        platform: the only platform it runs on, where it is preferred; None: all.
        unsupported_reason: says of the same arguments, arrays or their shapes, what keeps it from
            running on its platform; None: nothing.
    """

    compute: Callable[[Any], Any]
    platform: str | None = None
    unsupported_reason: Callable[[Any], str | None] = lambda arguments: None


def choose(
    implementations: Mapping[str, Implementation],
    name: str | None,
    arguments: Any,
    otherwise: str = "xla",
) -> Implementation:
    """Returns the implementation of a name, or for None the best that can run.

    Args:
        implementations: by name.
        name: which, or None.
        arguments: of the operator.
        otherwise: the name of what runs anywhere, where none of the platform's own can.

    Raises:
        ValueError: there is none of that name, or it cannot run.
    """
    platform = target().platform
    if name is None:
        for implementation in implementations.values():
            if implementation.platform == platform and not implementation.unsupported_reason(
                arguments
            ):
                return implementation
        return implementations[otherwise]
    if name not in implementations:
        raise ValueError(
            f"there is no implementation {name!r}; "
            f"choose one of {', '.join(implementations)}, or None for the best"
        )
    implementation = implementations[name]
    if implementation.platform not in (None, platform):
        raise ValueError(
            f"implementation {name!r} runs on the platform {implementation.platform!r}, "
            f"and this is {platform!r}"
        )
    if reason := implementation.unsupported_reason(arguments):
        raise ValueError(f"implementation {name!r} cannot run: {reason}")
    return implementation


# ---- ssd.rows
# Kernels under jax.vmap and on several devices: every row of the batch stands for itself.


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
