"""The training step: the gradients of a batch, and one update of the parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tim4rec_jax import item_rows
from tim4rec_jax.data import Batch
from tim4rec_jax.layers import row_seeds
from tim4rec_jax.runtime import target
from tim4rec_jax.training import sharded_gradients
from tim4rec_jax.training.losses import Loss, SummedLoss, full_cross_entropy
from tim4rec_jax.training.negatives import ItemFrequencies
from tim4rec_jax.training.objectives import OBJECTIVES
from tim4rec_jax.training.row_optimizers import ByRow, RowGradients, update_tables
from tim4rec_jax.training.state import TrainState, trained

Metrics = dict[str, jax.Array]
CROSS_ENTROPY = Loss()


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What a step is compiled for.

    Attributes:
      graphdef: the structure of the model.
      tx: the optimizer.
      objective: a key of `tim4rec_jax.training.objectives.OBJECTIVES`.
      loss: the loss of the objective.
      devices: number of devices that share the rows of a batch.
      num_microbatches: number of parts that a batch is cut into; it divides the number of rows.
        None: the function `num_microbatches` chooses.
      by_row: how tables of items are treated as rows. None: they are parameters like all others,
        and all devices have them.
    """

    graphdef: nnx.GraphDef
    tx: optax.GradientTransformation
    objective: str = "prefix"
    loss: Loss = CROSS_ENTROPY
    devices: int = 1
    num_microbatches: int | None = None
    by_row: ByRow | None = None


def num_microbatches(rows: int, length: int, devices: int, objective: str = "prefix") -> int:
    """Chooses the number of micro-batches of a batch.

    On a CPU, a micro-batch has at most 3,072 events and 128 rows of scores, so that its temporary
    arrays fit the cache (see `loss_and_gradients`), but at least 8 rows per device. With the
    objective `every_position` each event has a row of scores, and 512 of them are taken at once if
    they come from 8 rows or more. Other devices take the batch as a whole.

    Args:
      rows: number of rows of the batch.
      length: number of positions of a row.
      devices: number of devices that share the rows.
      objective: a key of `tim4rec_jax.training.objectives.OBJECTIVES`.
    """
    if target().platform != "cpu":
        return 1
    largest = min(3072 // length, 128)
    if objective == "every_position":
        largest = min(largest, 512 // length)
    count = 1
    while (
        rows // count > largest
        and rows % (2 * count * devices) == 0
        and rows // (2 * count) >= 8 * devices
    ):
        count *= 2
    return count


def loss_and_gradients(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    batch: Batch,
    seeds: jax.Array,
    microbatches: int,
    objective: str = "prefix",
    loss: SummedLoss = full_cross_entropy,
    row_key: jax.Array | None = None,
) -> tuple[jax.Array, nnx.State]:
    """The mean loss of a batch and its gradient, one micro-batch after the other.

    On a CPU, the temporary arrays of a step lie in fresh pages of memory, and to touch these costs
    more than to compute with them. Those of a small micro-batch stay in the cache. The number of
    micro-batches changes the result only by the order of summation.

    Args:
      graphdef: the structure of the model.
      params: the parameters.
      batch: a batch, as the objective has prepared it.
      seeds: dropout seeds per row.
      microbatches: number of micro-batches; it divides the number of rows.
      objective: a key of `tim4rec_jax.training.objectives.OBJECTIVES`.
      loss: of `tim4rec_jax.training.losses`.
      row_key: chooses the items whose own rows are left out, of a model with item features.
    """
    total = jnp.maximum(batch["weights"].sum(), 1.0)
    params, fixed = trained(params)

    def mean_loss(params, batch, seeds):
        model: Any = nnx.merge(graphdef, params, fixed)
        if row_key is not None and model.feature_maps is not None:
            model.item_embedding.drop_rows(row_key)
        return OBJECTIVES[objective].loss(model, batch, seeds, loss) / total

    if microbatches == 1:
        return jax.value_and_grad(mean_loss)(params, batch, seeds)

    def accumulate(carry, rows):
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(mean_loss)(params, *rows)), None

    def split(x):
        # Row i goes to micro-batch i % microbatches. Devices hold blocks of consecutive rows, so
        # each micro-batch has its share of rows on every device.
        return x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1)

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(accumulate, zero, jax.tree.map(split, (batch, seeds)))[0]


def update(
    state: TrainState,
    batch: Batch,
    settings: StepSettings,
    cumulative: ItemFrequencies | None = None,
) -> tuple[TrainState, Metrics]:
    """One update.

    Args:
      state: the state before the step. `train_step`, the compiled form, takes its memory.
      batch: a batch with the fields that the model and the objective need.
      settings: what the step is compiled for.
      cumulative: how often each item occurs, for a loss that draws by it.

    Returns:
      The next state, and for the log `loss`, the mean of the epoch so far, and `bad_step`. The
      compiled form gives them memory of their own, so that they outlive the state.
    """
    rows, length = batch["items"].shape
    key = jax.random.fold_in(state.rng, state.step)
    seeds = row_seeds(key, rows)
    model: Any = nnx.merge(settings.graphdef, state.params)
    objective = OBJECTIVES[settings.objective]
    batch = objective.prepare(model, batch, jax.random.fold_in(key, 2))
    before, fixed = trained(state.params)
    draw, of_rows = jax.random.fold_in(key, 1), None
    if settings.by_row is None:
        value, grads = loss_and_gradients(
            settings.graphdef,
            state.params,
            batch,
            seeds,
            settings.num_microbatches
            or num_microbatches(rows, length, settings.devices, settings.objective),
            settings.objective,
            settings.loss.prepare(draw, model.n_items, cumulative),
            jax.random.fold_in(key, 3),
        )
    else:
        # Each device cuts its own rows.
        own = rows // settings.devices
        value, grads, of_rows = sharded_gradients.loss_and_gradients(
            settings.graphdef,
            before,
            fixed,
            batch,
            seeds,
            by_row=settings.by_row,
            microbatches=settings.num_microbatches
            or num_microbatches(own, length, 1, settings.objective),
            objective=settings.objective,
            loss=settings.loss,
            key=draw,
            frequencies=cumulative,
        )

    # The largest magnitude of an array is finite if all of the array is. One test of all these
    # compiles faster than a test of each: XLA would repeat every test for every parameter below.
    tables = {} if of_rows is None else of_rows.tables
    arrays = [leaf for leaf in jax.tree.leaves((value, grads, tables)) if leaf.size]
    largest = jnp.stack([jnp.abs(leaf).max() for leaf in arrays])
    finite = jnp.isfinite(largest).all()
    good = finite & (state.bad_step < 0)
    params, opt_state = _updated(settings, state, before, grads, of_rows, good)
    params = nnx.merge_state(params, fixed)
    weight = batch["weights"].sum()
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        loss_sum=state.loss_sum + value * weight,
        weight_sum=state.weight_sum + weight,
        bad_step=jnp.where((state.bad_step < 0) & ~finite, state.step, state.bad_step),
    )
    loss_so_far = state.loss_sum / jnp.maximum(state.weight_sum, 1.0)
    return state, {"loss": loss_so_far, "bad_step": state.bad_step}


def _updated(
    settings: StepSettings,
    state: TrainState,
    before: nnx.State,
    grads: nnx.State,
    of_rows: RowGradients | None,
    good: jax.Array,
) -> tuple[nnx.State, Any]:
    """Parameters and state of the optimizer after a step; as before unless it is `good`."""

    def kept(new, old):
        return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

    if of_rows is None:
        updates, opt_state = settings.tx.update(grads, state.opt_state, before)
        params = optax.apply_updates(before, updates)
        return kept((params, opt_state), (before, state.opt_state))
    assert settings.by_row is not None
    dense, tables = item_rows.split(before, settings.by_row.names)
    old, of_tables = state.opt_state["dense"], state.opt_state["tables"]
    updates, new = settings.tx.update(grads, old, dense)
    dense, new = kept((optax.apply_updates(dense, updates), new), (dense, old))
    tables, of_tables = update_tables(settings.by_row, tables, of_tables, of_rows, state.step, good)
    return item_rows.join(dense, tables), {"dense": new, "tables": of_tables}


train_step = jax.jit(update, static_argnames="settings", donate_argnames="state")
