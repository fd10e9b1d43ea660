"""Optimizers that change only the rows of a table that a step has gradients for.

Adam of optax changes all rows in every step: a row without a gradient still moves along its mean.
That costs time in proportion to the catalogue. Here a step costs as much as the batch has items.
Neither optax (0.2) nor Flax has such an optimizer; PyTorch's SparseAdam and TensorFlow Addons'
LazyAdam compute the same as `lazy_adam`, and FBGEMM's row-wise Adagrad the same as `adagrad`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from tim4rec_jax.item_rows import Tables
from tim4rec_jax.runtime import AXES

State = Any


@dataclasses.dataclass(frozen=True)
class ByRow:
    """How a step treats tables of items as rows.

    Attributes:
      mesh: the devices that the rows are spread over.
      names: the places of the tables in the model, see `SequenceModel.item_rows`.
      optimizer: a key of `OPTIMIZERS`, which changes only the rows of a batch. None: tables have
        dense gradients and the optimizer of all other parameters.
      rate: the learning rate, or a function of the number of updates before.
      weight_decay: factor of the rows in what is added to their gradients.
    """

    mesh: Mesh
    names: tuple[str, ...]
    optimizer: str | None = None
    rate: optax.ScalarOrSchedule = 0.0
    weight_decay: float = 0.0


class RowOptimizer(NamedTuple):
    """An optimizer of single rows.

    Attributes:
      init: makes the state of a table [V, *row].
      update: `(gradients, state, rows, rate, count)` of some rows, to what is added to them and
        their new state. `state` has a row for each of them. `rate` is the learning rate, and
        `count` how many updates the table has had, this one included.
    """

    init: Callable[[Array], State]
    update: Callable[..., tuple[Array, State]]


def lazy_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> RowOptimizer:
    """Adam, whose means of a row stay as they are in steps without a gradient for the row.

    In a step that has gradients for all rows it is Adam. Otherwise the difference is that rows
    without a gradient do not move, and that their means do not decay. The correction of the means'
    beginning counts all steps, as Adam's does.
    """

    def init(table):
        return {"mean": jnp.zeros_like(table), "square": jnp.zeros_like(table)}

    def update(gradients, state, rows, rate, count):
        del rows
        mean = (1 - b1) * gradients + b1 * state["mean"]
        square = (1 - b2) * gradients**2 + b2 * state["square"]
        count = count.astype(jnp.float32)
        root = jnp.sqrt(square / (1 - b2**count)) + eps
        return -rate * (mean / (1 - b1**count) / root), {"mean": mean, "square": square}

    return RowOptimizer(init, update)


def adagrad(eps: float = 1e-8) -> RowOptimizer:
    """Row-wise Adagrad: one number for each row, the sum of the mean squares of its gradients.

    Adagrad with one number for each row has exactly these updates, also when all rows take part: a
    row without a gradient adds 0 to its sum and does not move.
    """

    def init(table):
        return {"sum": jnp.zeros(len(table), table.dtype)}

    def update(gradients, state, rows, rate, count):
        del rows, count
        squares = jnp.square(gradients).reshape(len(gradients), -1).mean(axis=1)
        total = state["sum"] + squares
        root = jnp.sqrt(total).reshape(-1, *[1] * (gradients.ndim - 1)) + eps
        return -rate * gradients / root, {"sum": total}

    return RowOptimizer(init, update)


OPTIMIZERS = {"lazy_adam": lazy_adam(), "adagrad": adagrad()}


def update_rows(
    optimizer: RowOptimizer,
    table: Float[Array, " V *row"],
    state: State,
    places: Int[Array, " M"],
    gradients: Float[Array, " M *row"],
    *,
    rate: jax.Array | float,
    count: Int[Array, ""],
    weight_decay: float = 0.0,
) -> tuple[Float[Array, " V *row"], State]:
    """Changes some rows of a table and of the optimizer's state.

    In a compiled step that is given the memory of table and state, they are changed in place.

    Args:
      optimizer: of the rows.
      table: the rows that this device has.
      state: what `optimizer.init` has made, or the last update.
      places: rising numbers of the rows, each once; a number past the last row is none.
      gradients: of these rows.
      rate: the learning rate.
      count: number of updates so far, with this one.
      weight_decay: factor of the rows in what is added to their gradients.
    """
    size = len(table)
    # Places of no row must not be equal either.
    places = jnp.where(places < size, places, size + jnp.arange(len(places)))

    def of(x):
        return jnp.take(x, places, axis=0, mode="clip")

    def put(x, rows):
        return x.at[places].set(rows, mode="drop", indices_are_sorted=True, unique_indices=True)

    rows = of(table)
    if weight_decay:
        gradients = gradients + weight_decay * rows
    updates, new = optimizer.update(gradients, jax.tree.map(of, state), rows, rate, count)
    return put(table, optax.apply_updates(rows, updates)), jax.tree.map(put, state, new)


class RowGradients(NamedTuple):
    """Gradients of some rows of the tables of each device.

    Attributes:
      places: of the rows in the tables of the device, rising, each once; then the number of its
        rows. On a mesh this is what all devices have, one after the other.
      tables: the gradient of each of these rows, of each table.
    """

    places: Int[Array, " M"]
    tables: Tables


def update_tables(
    by_row: ByRow,
    tables: Tables,
    states: dict[str, State],
    gradients: RowGradients,
    step: Int[Array, ""],
    good: Bool[Array, ""],
) -> tuple[Tables, dict[str, State]]:
    """Changes the rows of a batch, on the devices that have them.

    Args:
      by_row: the optimizer, its settings and the mesh.
      tables: by name.
      states: of the optimizer, by name.
      gradients: of the rows.
      step: number of updates before this one.
      good: whether anything is changed at all.
    """
    assert by_row.optimizer is not None
    optimizer = OPTIMIZERS[by_row.optimizer]
    rate = by_row.rate(step) if callable(by_row.rate) else by_row.rate

    def one_device(tables, states, gradients, rate, step, good):
        new, of_optimizer = {}, {}
        for name, table in tables.items():
            new[name], of_optimizer[name] = update_rows(
                optimizer,
                table,
                states[name],
                jnp.where(good, gradients.places, len(table)),
                gradients.tables[name],
                rate=rate,
                count=step + 1,
                weight_decay=by_row.weight_decay,
            )
        return new, of_optimizer

    by_item, whole = PartitionSpec(AXES), PartitionSpec()
    return jax.shard_map(
        one_device,
        mesh=by_row.mesh,
        in_specs=(by_item, by_item, by_item, whole, whole, whole),
        out_specs=(by_item, by_item),
        check_vma=False,
    )(tables, states, gradients, jnp.asarray(rate, jnp.float32), step, good)
