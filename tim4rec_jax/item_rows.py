"""Parameters with a row for each item, spread over all devices of a mesh.

A mesh has two axes. `data` splits the rows of a batch; `items` splits nothing of them. The tables
(item vectors, output biases, what the optimizer keeps of them) are cut into equal blocks of rows,
one for each device of both axes. All other parameters are on every device.

The functions here run inside `jax.shard_map`: arrays are what one device has. Every device looks at
all ids that are asked for, and answers for those that it holds. So all devices have the same work
and the same messages, whichever items are frequent, and no order of the rows is better than the
order of their ids. No message is larger than the rows that the batch asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from tim4rec_jax.digests import place
from tim4rec_jax.runtime import AXES, Placement

DATA, ITEMS = AXES

# A table and its gradient, by the place of the parameter in the model.
Tables = dict[str, Any]


def split(params: Any, names: tuple[str, ...]) -> tuple[Any, Tables]:
    """Takes the tables out of the parameters.

    Args:
      params: a tree of parameters.
      names: the places of the tables, `item_embedding/embedding` for example.

    Returns:
      The tree with None in their places, and the tables by name.
    """
    tables = {}

    def take(path, leaf):
        if (name := _name(path)) not in names:
            return leaf
        tables[name] = leaf
        return None

    return jax.tree_util.tree_map_with_path(take, params), tables


def join(params: Any, tables: Mapping[str, Any]) -> Any:
    """Puts tables back into the places that `split` took them from."""

    def put(path, leaf):
        return tables[_name(path)] if leaf is None else leaf

    return jax.tree_util.tree_map_with_path(put, params, is_leaf=lambda leaf: leaf is None)


def _name(path) -> str:
    return place(path).removesuffix("/value")


def padded(rows: int, devices: int) -> int:
    """The number of rows of a table on all devices together: each device has as many."""
    return -(-rows // devices) * devices


def spread(tree: Any, names: tuple[str, ...], placement: Placement) -> Any:
    """Puts parameters on the devices, tables with rows of zeros behind them.

    Every process has all of `tree`, and keeps the rows of its own devices. Where tables are not
    spread, all arrays are put on all devices as they are.

    Args:
      tree: arrays, of the same shapes as in a model: parameters, the state of an optimizer.
      names: the places of the tables.
      placement: of a mesh.
    """
    if placement.by_item is None or placement.mesh.size == 1:
        return jax.device_put(tree, placement.replicated)

    def put(path, leaf):
        if not _is_table(path, leaf, names):
            return _put(np.asarray(leaf), leaf.shape, placement.replicated)
        rows = padded(len(leaf), placement.mesh.size)
        return _put(np.asarray(leaf), (rows, *leaf.shape[1:]), placement.by_item)

    return jax.tree_util.tree_map_with_path(put, tree)


def completed(tree: Any, names: tuple[str, ...], devices: int) -> Any:
    """What `spread` puts on the devices, for a program that makes the arrays there."""

    def pad(path, leaf):
        if not _is_table(path, leaf, names):
            return leaf
        more = padded(len(leaf), devices) - len(leaf)
        return jnp.pad(leaf, [(0, more)] + [(0, 0)] * (leaf.ndim - 1)) if more else leaf

    return jax.tree_util.tree_map_with_path(pad, tree)


def shapes(tree: Any, names: tuple[str, ...], placement: Placement) -> Any:
    """Shapes and shardings that the arrays of a tree have after `spread`."""

    def shape(path, leaf):
        if placement.by_item is None or not _is_table(path, leaf, names):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement.replicated)
        size = (padded(leaf.shape[0], placement.mesh.size), *leaf.shape[1:])
        return jax.ShapeDtypeStruct(size, leaf.dtype, sharding=placement.by_item)

    return jax.tree_util.tree_map_with_path(shape, tree)


def _is_table(path, leaf, names: tuple[str, ...]) -> bool:
    """Whether an array is a table, or what an optimizer keeps of its rows."""
    return leaf.ndim > 0 and any(f"/{name}/" in f"/{place(path)}/" for name in names)


def numbers_of_rows(tree: Any, names: tuple[str, ...]) -> dict[str, int]:
    """The number of rows of each table and of what belongs to it, by its place in a tree."""
    return {
        place(path): leaf.shape[0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if _is_table(path, leaf, names)
    }


def _put(array: np.ndarray, shape: tuple[int, ...], sharding: Any) -> jax.Array:
    if array.shape == shape:
        return jax.make_array_from_callback(shape, sharding, lambda index: array[index])

    def part(index):
        found = array[index]
        missing = [
            (0, len(range(*where.indices(size))) - have)
            for where, size, have in zip(index, shape, found.shape, strict=True)
        ]
        return np.pad(found, missing)

    return jax.make_array_from_callback(shape, sharding, part)


def look_up(table: Shaped[Array, " V *row"], ids: Int[Array, " N"]) -> Shaped[Array, " N *row"]:
    """Rows of a table by the numbers of the rows among those of all devices.

    Args:
      table: the rows of this device.
      ids: the same on all devices of a group along `items`. A number that is none of a row gives
        some row, or zeros.

    Returns:
      One row for each number.
    """
    rows, devices = len(table), jax.lax.axis_size(AXES)
    if devices == 1:
        return jnp.take(table, ids, axis=0, mode="clip")
    everybodys = jax.lax.all_gather(ids, DATA, tiled=True)
    row = everybodys - jax.lax.axis_index(AXES) * rows
    here = ((row >= 0) & (row < rows)).reshape(-1, *[1] * (table.ndim - 1))
    found = jnp.where(here, jnp.take(table, row, axis=0, mode="clip"), 0)
    # Each row is found on one device, and all others add zeros to it.
    return jax.lax.psum(jax.lax.psum_scatter(found, DATA, tiled=True), ITEMS)


def gradient_rows(
    ids: Int[Array, " N"], gradients: Tables, rows: int
) -> tuple[Int[Array, " M"], Tables]:
    """The gradients of rows that are this device's, out of those of all devices.

    Args:
      ids: as for `look_up`.
      gradients: of the rows with these numbers, of each table.
      rows: number of rows of this device.

    Returns:
      The places of the rows in the tables of this device, `rows` for those of others, and the
      gradients. A place may come several times.
    """
    if jax.lax.axis_size(DATA) > 1:
        ids, gradients = jax.tree.map(
            lambda x: jax.lax.all_gather(x, DATA, tiled=True), (ids, gradients)
        )
    row = ids - jax.lax.axis_index(AXES) * rows
    return jnp.where((row >= 0) & (row < rows), row, rows), gradients


def summed_rows(
    places: Int[Array, " M"], gradients: Tables, rows: int
) -> tuple[Int[Array, " M"], Tables]:
    """Adds up the gradients of the same row.

    Args:
      places: of the rows, `rows` for none.
      gradients: of the rows.
      rows: number of rows of this device.

    Returns:
      Rising places, each once, completed with `rows`; and the sums.
    """
    unique, group = jnp.unique(places, size=len(places), fill_value=rows, return_inverse=True)
    return unique, jax.tree.map(lambda g: jax.ops.segment_sum(g, group, len(places)), gradients)


def dense_gradient(places: Int[Array, " M"], gradient: Array, table: Array) -> Array:
    """The gradient of a whole table of this device from that of some rows."""
    return jnp.zeros_like(table).at[places].add(gradient.astype(table.dtype), mode="drop")
