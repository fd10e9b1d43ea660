"""The training step: gradients, one optimizer update, and the dispatch of steps to the devices."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from grain import DatasetIterator

from tim4rec_jax import item_rows
from tim4rec_jax.config import Config
from tim4rec_jax.data import (
    Batch,
    Convention,
    Dataset,
    DeviceLog,
    PackedBatches,
    TrainBatches,
    collate,
    pack,
    train_item_counts,
)
from tim4rec_jax.data.pipeline import train_iterator
from tim4rec_jax.layers import row_seeds
from tim4rec_jax.models import SequenceModel, inputs
from tim4rec_jax.runtime import Placement, put, put_rows, target
from tim4rec_jax.training import sharded_gradients
from tim4rec_jax.training.losses import Loss, SummedLoss, full_cross_entropy
from tim4rec_jax.training.negatives import ItemFrequencies, item_frequencies
from tim4rec_jax.training.objectives import OBJECTIVES
from tim4rec_jax.training.row_optimizers import OPTIMIZERS, ByRow, RowGradients, update_tables

Metrics = dict[str, jax.Array]
CROSS_ENTROPY = Loss()


@struct.dataclass
class TrainState:
    """Everything that changes while training; every step is given it and takes its memory.

    Attributes:
      step: number of updates made, int32.
      params: the model's parameters, an `nnx.State`. What it knows of the items' features is
        among them, and stays as it is.
      opt_state: the state of the optimizer.
      rng: the key from which the random numbers of every step are derived.
      loss_sum: sum over the running epoch of weight times loss, float32.
      weight_sum: sum over the running epoch of the weights, float32.
      bad_step: the first step whose loss or gradient was not finite, or -1, int32. Parameters and
        optimizer stay as they were before that step.
    """

    # `Any`, because `jax.eval_shape` puts shapes in the place of arrays.
    step: Any
    params: Any
    opt_state: Any
    rng: Any
    loss_sum: Any
    weight_sum: Any
    bad_step: Any


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


def init_state(
    params: nnx.State, tx: optax.GradientTransformation, seed: int, by_row: ByRow | None = None
) -> TrainState:
    """The state before the first step; arguments are those of `StepSettings`."""
    changed = trained(params)[0]
    opt_state = tx.init(changed)
    if by_row is not None and by_row.optimizer is not None:
        changed, tables = item_rows.split(changed, by_row.names)
        init = OPTIMIZERS[by_row.optimizer].init
        opt_state = {"dense": tx.init(changed), "tables": {n: init(x) for n, x in tables.items()}}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=opt_state,
        rng=jax.random.key(seed),
        loss_sum=jnp.zeros((), jnp.float32),
        weight_sum=jnp.zeros((), jnp.float32),
        bad_step=jnp.full((), -1, jnp.int32),
    )


def trained(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """The parameters that training changes, and the arrays that it does not."""
    changed, fixed = nnx.split_state(params, nnx.Param, ...)
    return changed, fixed


def start_epoch(state: TrainState) -> TrainState:
    """The same state, with the loss of an epoch that has not begun yet."""
    zeros = np.zeros((), np.float32), np.zeros((), np.float32)
    loss_sum, weight_sum = put(zeros, state.loss_sum.sharding)
    return dataclasses.replace(state, loss_sum=loss_sum, weight_sum=weight_sum)


@functools.cache  # compiled steps are found by the identity of the function
def make_schedule(
    learning_rate: float, cosine_steps: int | None = None, warmup_steps: int = 0
) -> optax.ScalarOrSchedule:
    """The learning rate of each step.

    Args:
      learning_rate: that of the first step.
      cosine_steps: number of steps in which the learning rate falls to 0 along a cosine. None: the
        learning rate is constant.
      warmup_steps: number of steps in which the learning rate rises linearly to what it is
        otherwise. 0: it does not.
    """
    rate: optax.ScalarOrSchedule = learning_rate
    if cosine_steps is not None:
        rate = optax.cosine_decay_schedule(learning_rate, cosine_steps)
    if warmup_steps:
        warm = rate if callable(rate) else optax.constant_schedule(rate)
        rate = lambda step: warm(step) * jnp.minimum((step + 1) / warmup_steps, 1.0)  # noqa: E731
    return rate


@functools.cache  # compiled steps are found by the identity of the optimizer
def make_optimizer(
    learning_rate: float,
    weight_decay: float,
    cosine_steps: int | None = None,
    warmup_steps: int = 0,
) -> optax.GradientTransformation:
    """Adam as the published code uses it: weight decay is added to the gradient.

    Args:
      learning_rate: as for `make_schedule`, and so are the others.
      weight_decay: factor of the parameters in what is added to their gradient.
      cosine_steps: number of steps until the learning rate is 0.
      warmup_steps: number of steps in which it rises.
    """
    rate = make_schedule(learning_rate, cosine_steps, warmup_steps)
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(rate))


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


class HostSteps:
    """Dispatches one step at a time, on batches that the host gathers.

    Attributes:
      settings: what the steps are compiled for.
    """

    def __init__(
        self,
        batches: TrainBatches | PackedBatches,
        settings: StepSettings,
        fields: tuple[str, ...],
        placement: Placement,
        cumulative: ItemFrequencies | None,
    ):
        """Begins with the first batch.

        Args:
          batches: the batches by number.
          settings: what the steps are compiled for.
          fields: the fields of a batch that the step needs.
          placement: of batches on the devices.
          cumulative: see `update`.
        """
        self.settings = settings
        self._batches, self._fields, self._placement = batches, fields, placement
        self._cumulative = cumulative

    @functools.cached_property
    def iterator(self) -> DatasetIterator:
        """Yields the batches; its state is saved with the run's."""
        return train_iterator(self._batches)

    def run(self, state: TrainState) -> tuple[TrainState, Metrics]:
        """Dispatches the next step.

        Args:
          state: the state before it; its memory is taken.

        Returns:
          The next state, and the metrics. The device is still at work on both.
        """
        batch = put_rows(self._needed(next(self.iterator)), self._placement.by_row)
        return train_step(state, batch, self.settings, self._cumulative)

    def lowered(self, state: Any) -> Iterator[jax.stages.Lowered]:
        """The programs that `run` needs, for a state of this shape and sharding."""
        by_row = self._placement.by_row
        for width in self._batches.buckets:
            batch = self._needed(self._batches[0])
            batch["items"] = np.zeros((len(batch["items"]), width), np.int32)
            shapes = {
                name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=by_row)
                for name, array in batch.items()
            }
            yield train_step.lower(state, shapes, self.settings, self._cumulative)

    def _needed(self, batch: Batch) -> Batch:
        return {name: batch[name] for name in self._fields if name in batch}


@dataclasses.dataclass(frozen=True)
class Gather:
    """How batches are gathered from a log of all events.

    Attributes:
      packed: whether the rows are packed.
      max_length: columns of `gaps`.
      convention: of the gaps.
      fields: the fields of a batch that the step needs.
    """

    packed: bool
    max_length: int
    convention: Convention
    fields: tuple[str, ...]

    def batch(self, log: DeviceLog, indices: Batch, width: int) -> Batch:
        """Gathers a batch.

        Args:
          log: the events.
          indices: of the batch, without `bucket`; see `TrainBatches.indices`.
          width: columns of `items`, one of `TrainBatches.buckets`.
        """
        if self.packed:
            batch = pack(log, indices)
        else:
            batch = indices | collate(
                log,
                indices["starts"],
                indices["lengths"],
                width=width,
                max_length=self.max_length,
                convention=self.convention,
            )
        return {name: batch[name] for name in self.fields if name in batch}


@functools.partial(
    jax.jit, static_argnames=("settings", "gather", "width"), donate_argnames="state"
)
def gathered_train_step(
    state: TrainState,
    log: DeviceLog,
    indices: Batch,
    settings: StepSettings,
    gather: Gather,
    width: int,
    cumulative: ItemFrequencies | None,
) -> tuple[TrainState, Metrics]:
    """One update, on a batch that the device gathers.

    Args:
      state: the state before it; its memory is taken.
      log: all events of the dataset.
      indices: those of the batch; see `Gather.batch`.
      settings: what the step is compiled for.
      gather: how batches are gathered from the log.
      width: columns of the batch's items.
      cumulative: see `update`.

    Returns:
      See `update`.
    """
    return update(state, gather.batch(log, indices, width), settings, cumulative)


class DeviceSteps:
    """Dispatches one step at a time, on batches that the device gathers from all events.

    A step of a few milliseconds leaves the host no time to gather batches and to send them. Here
    only the indices of their events are sent. The batches are equal to the host's.

    There is a program for each width of batches, and the host knows which one comes next. A program
    that chose the width by itself would stop the device for each batch: a GPU has to ask the host
    which branch to take.

    Attributes:
      settings: what the steps are compiled for.
    """

    def __init__(
        self,
        batches: TrainBatches | PackedBatches,
        settings: StepSettings,
        gather: Gather,
        placement: Placement,
        cumulative: ItemFrequencies | None,
    ):
        """Puts all events on the devices.

        Arguments are those of `gathered_train_step` and `HostSteps`.
        """
        self.settings = settings
        self._log = put(batches.dataset.all_events(), placement.replicated)
        self._batches, self._gather, self._cumulative = batches, gather, cumulative
        self._by_row = placement.by_row

    @functools.cached_property
    def iterator(self) -> DatasetIterator:
        """Yields the indices of the batches; its state is saved with the run's."""
        return train_iterator(self._batches, indices_only=True)

    def run(self, state: TrainState) -> tuple[TrainState, Metrics]:
        """See `HostSteps.run`."""
        indices = dict(next(self.iterator))
        width = self._batches.buckets[indices.pop("bucket")]
        indices = put_rows(indices, self._by_row)
        return gathered_train_step(
            state, self._log, indices, self.settings, self._gather, width, self._cumulative
        )

    def lowered(self, state: Any) -> Iterator[jax.stages.Lowered]:
        """See `HostSteps.lowered`."""
        indices = self._batches.indices(0)
        shapes = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self._by_row)
            for name, array in indices.items()
            if name != "bucket"
        }
        for width in self._batches.buckets:
            yield gathered_train_step.lower(
                state, self._log, shapes, self.settings, self._gather, width, self._cumulative
            )


# The share of a device's memory that all events may take, and the memory of the smallest GPU of
# interest, for devices that do not say how much they have.
_SHARE, _MEMORY = 0.25, 16 * 2**30


def choose_placement(asked: str, dataset: Dataset) -> str:
    """Says where batches are gathered.

    Args:
      asked: "host", "device", or "auto": on the device if that is not a CPU and the events fit.
      dataset: holds the events.

    Returns:
      "host" or "device".
    """
    if asked != "auto":
        return asked
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return "host"
    memory = (device.memory_stats() or {}).get("bytes_limit", _MEMORY)
    # Indices of events are int32. The four columns of `DeviceLog` have 4 bytes each.
    fits = dataset.n_events < 2**31 and 16 * dataset.n_events <= _SHARE * memory
    return "device" if fits else "host"


def make_steps(
    config: Config,
    batches: TrainBatches | PackedBatches,
    model: SequenceModel,
    placement: Placement,
) -> HostSteps | DeviceSteps:
    """The steps of a run.

    Args:
      config: the settings of the run, resolved.
      batches: of `tim4rec_jax.training.train.make_batches`.
      model: the model to train. Only its structure is used: its arrays may be shapes.
      placement: of batches on the devices.
    """
    train = config.train
    total_steps = train.epochs * batches.batches_per_epoch
    cosine_steps = total_steps if train.schedule == "cosine" else None
    # It does not depend on the number of epochs, so that more epochs only go on.
    rewarms = train.init_from and train.init_optimizer == "rewarm"
    warmup_steps = max(batches.batches_per_epoch // 10, 1) if rewarms else 0
    by_row = None
    if placement.by_item is not None:
        by_row = ByRow(
            placement.mesh,
            model.item_rows,
            None if train.item_optimizer == "adam" else train.item_optimizer,
            make_schedule(train.learning_rate, cosine_steps, warmup_steps),
            train.weight_decay,
        )
    settings = StepSettings(
        graphdef=nnx.graphdef(model),
        tx=make_optimizer(train.learning_rate, train.weight_decay, cosine_steps, warmup_steps),
        objective=train.objective,
        loss=Loss(train.loss, train.negatives, train.calibration),
        devices=placement.devices,
        by_row=by_row,
    )
    cumulative = None
    if train.loss == "sampled_softmax":
        counts = item_frequencies(train_item_counts(batches.dataset))
        cumulative = item_rows.spread(counts, ("within",), placement)
    fields = (*inputs(model), "targets", "weights")
    # The events that a device holds have one order.
    asked = "host" if config.data.shuffle_ties else config.data.placement
    if choose_placement(asked, batches.dataset) == "host":
        return HostSteps(batches, settings, fields, placement, cumulative)
    gather = Gather(
        packed=isinstance(batches, PackedBatches),
        max_length=batches.max_length,
        convention=config.data.convention,
        fields=fields,
    )
    return DeviceSteps(batches, settings, gather, placement, cumulative)
