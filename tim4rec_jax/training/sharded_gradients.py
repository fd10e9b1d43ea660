"""Loss and gradients of a batch, where tables of items are spread over a mesh or updated by row.

A model never sees a whole table here. It gets a small one, with the rows that its part of the batch
asks for (history, and for a sampled loss targets and drawn items), and numbers of these rows
instead of item indices. Equal items have equal numbers, and padding stays 0, so that a model works
as always. The gradient of the small table is the gradient of the rows of the large one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tim4rec_jax import item_rows
from tim4rec_jax.data import Batch
from tim4rec_jax.item_rows import AXES, DATA
from tim4rec_jax.scoring import HistoryItems
from tim4rec_jax.training.losses import Loss, SummedLoss
from tim4rec_jax.training.negatives import Drawn, ItemFrequencies
from tim4rec_jax.training.objectives import OBJECTIVES
from tim4rec_jax.training.row_optimizers import ByRow, RowGradients
from tim4rec_jax.training.sharded_loss import gathered, scattered, sharded_cross_entropy

BY_DATA, BY_ITEM, WHOLE = PartitionSpec(DATA), PartitionSpec(AXES), PartitionSpec()


def loss_and_gradients(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    fixed: nnx.State,
    batch: Batch,
    seeds: jax.Array,
    *,
    by_row: ByRow,
    microbatches: int,
    objective: str,
    loss: Loss,
    key: jax.Array,
    frequencies: ItemFrequencies | None,
) -> tuple[jax.Array, nnx.State, RowGradients | None]:
    """The mean loss of a batch and its gradient.

    Args:
      graphdef: the structure of the model.
      params: what is trained. On the mesh, its tables have rows behind those of the model.
      fixed: the arrays of the model that are not trained.
      batch: a batch, as the objective has prepared it; its rows are split along `data`.
      seeds: dropout seeds per row.
      by_row: how tables are treated. Gradients of rows alone need a sampled loss, because the
        other one has a gradient for every row.
      microbatches: number of parts that the rows of each device are cut into.
      objective: a key of `tim4rec_jax.training.objectives.OBJECTIVES`.
      loss: one of the package's.
      key: of the random numbers that draw items for the batch. All devices draw the same items,
        whatever the mesh is.
      frequencies: of the items, for a loss that draws by them.

    Returns:
      The loss; the gradient of all parameters; and None. If only rows of tables are changed, None
      takes the places of tables, and their rows' gradients come last.

    Raises:
      ValueError: the loss is a function of the user's, which needs the whole item table.
    """
    if not loss.is_sampled and loss.name != "cross_entropy":
        raise ValueError(f"the loss {loss.name!r} needs the whole item table")
    n_items = nnx.merge(graphdef, params, fixed).n_items
    dense, tables = item_rows.split(params, by_row.names)
    only_rows = by_row.optimizer is not None

    def one_device(dense, tables, fixed, batch, seeds, frequencies, key, total):
        drawn = None
        if loss.is_sampled:
            within = None if frequencies is None else frequencies.within
            drawn = loss.draw(key, n_items, frequencies, _look_up_many(within))
        rows = len(next(iter(tables.values())))
        parts = _split((batch, seeds), microbatches)
        small, ids = _small_tables(parts, drawn, rows)
        found = {name: item_rows.look_up(table, ids.reshape(-1)) for name, table in tables.items()}
        found = {name: x.reshape(*ids.shape, *x.shape[1:]) for name, x in found.items()}
        whole = {} if drawn is not None else {name: gathered(x) for name, x in tables.items()}

        def mean_loss(dense, found, whole, part):
            batch, seeds, ids, drawn_here = part
            model: Any = nnx.merge(graphdef, item_rows.join(dense, found), fixed)
            if drawn is not None:
                summed = loss.of(Drawn(drawn_here, drawn.log_share), n_items)
            else:
                owner: Any = nnx.merge(graphdef, item_rows.join(dense, whole), fixed)
                summed = _over_all_items(owner.item_table(), ids, n_items)
            return OBJECTIVES[objective].loss(model, batch, seeds, summed) / total

        take = jax.value_and_grad(mean_loss, argnums=(0, 1, 2))

        def accumulate(carry, part):
            value, (d_dense, d_found, d_whole) = take(dense, part[0], whole, part[1])
            return jax.tree.map(jnp.add, carry, (value, d_dense, d_whole)), d_found

        if microbatches == 1:  # there is nothing to add up, and sums would touch whole tables
            one, part = jax.tree.map(lambda x: x[0], (found, small))
            value, (d_dense, d_found, d_whole) = take(dense, one, whole, part)
        else:
            zero = jnp.zeros((), total.dtype), *jax.tree.map(jnp.zeros_like, (dense, whole))
            (value, d_dense, d_whole), d_found = jax.lax.scan(accumulate, zero, (found, small))
            d_found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), d_found)
        value, d_dense = jax.lax.psum((value, d_dense), DATA)
        places, d_found = item_rows.gradient_rows(ids.reshape(-1), d_found, rows)
        if only_rows:
            if microbatches > 1 or jax.lax.axis_size(AXES) > 1:
                places, d_found = item_rows.summed_rows(places, d_found, rows)
            return value, d_dense, RowGradients(places, d_found)
        d_tables = {
            name: item_rows.dense_gradient(places, d_found[name], table)
            for name, table in tables.items()
        }
        for name, gradient in d_whole.items():
            d_tables[name] += scattered(gradient)
        return value, d_dense, d_tables

    total = jnp.maximum(batch["weights"].sum(), 1.0)
    of_frequencies: Any = ItemFrequencies._make((WHOLE, BY_ITEM)) if frequencies else None
    sharded: Any = jax.shard_map(
        one_device,
        mesh=by_row.mesh,
        in_specs=(WHOLE, BY_ITEM, WHOLE, BY_DATA, BY_DATA, of_frequencies, WHOLE, WHOLE),
        out_specs=(WHOLE, WHOLE, BY_ITEM),
        check_vma=False,
    )
    value, d_dense, d_tables = sharded(dense, tables, fixed, batch, seeds, frequencies, key, total)
    if only_rows:
        return value, d_dense, d_tables
    return value, item_rows.join(d_dense, d_tables), None


def _split(tree: Any, parts: int) -> Any:
    """Cuts arrays [B, ...] into [parts, B / parts, ...]."""
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), tree)


def _look_up_many(within: Array | None) -> Callable[[jax.Array], jax.Array] | None:
    """Rows of `ItemFrequencies.within`, where each device has some."""
    if within is None:
        return None

    def look_up(ids):
        return item_rows.look_up(within, ids.reshape(-1)).reshape(*ids.shape, -1)

    return look_up


def _small_tables(parts: tuple, drawn: Drawn | None, rows: int) -> tuple[tuple, Int[Array, "m u"]]:
    """Numbers the items of each part of a batch.

    Args:
      parts: batches and seeds with a leading axis of parts.
      drawn: the items that are drawn for the whole batch.
      rows: number of rows of each device.

    Returns:
      For each part its batch with numbers for items, its seeds, its items by number, and the
      numbers of the drawn items; and the items of all parts by number, rising, 0 first. What
      completes them is the index of no item.
    """
    batch, seeds = parts
    count = len(batch["items"])
    asked = {"padding": jnp.zeros((count, 1), jnp.int32), "items": batch["items"]}
    if drawn is not None:
        asked["targets"] = batch["targets"]
        asked["drawn"] = jnp.broadcast_to(drawn.items, (count, len(drawn.items)))
    flat = jnp.concatenate([x.reshape(count, -1) for x in asked.values()], axis=1)
    most = rows * jax.lax.axis_size(AXES)
    unique = jax.vmap(
        lambda ids: jnp.unique(ids, size=min(len(ids), most), fill_value=most, return_inverse=True)
    )
    ids, numbers = unique(flat)
    named, end = {}, 0
    for name, x in asked.items():
        begin, end = end, end + x[0].size
        named[name] = numbers[:, begin:end].reshape(x.shape).astype(jnp.int32)
    drawn_here = named.pop("drawn", None)
    del named["padding"]
    return (batch | named, seeds, ids, drawn_here), ids


def _over_all_items(table: Float[Array, "G D"], ids: Int[Array, " u"], n_items: int) -> SummedLoss:
    """The cross-entropy over all devices' items, for a model that has numbers for items."""

    def summed(hidden, small, targets, weights, history: HistoryItems | None = None):
        del small
        if history is not None:
            history = history._replace(items=ids[history.items])
        total: Any = sharded_cross_entropy(hidden, table, targets, weights, history, n_items + 1)
        return total

    return summed
