"""The jitted training step, and how steps are dispatched."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jax.sharding import NamedSharding, PartitionSpec

from tim4rec_jax.config import Config
from tim4rec_jax.data import (
    Convention,
    Dataset,
    EventLog,
    PackedBatches,
    TrainBatches,
    collate,
    pack,
    train_item_counts,
)
from tim4rec_jax.data.pipeline import train_iterator
from tim4rec_jax.layers import row_seeds
from tim4rec_jax.models import SequenceModel, inputs
from tim4rec_jax.runtime import Placement, target
from tim4rec_jax.training.losses import Loss, SummedLoss, cumulative_counts, full_cross_entropy
from tim4rec_jax.training.objectives import OBJECTIVES, mask_batch

# ---- training.step
# The jitted training step: gradients over micro-batches, one optimizer update.

Batch = dict[str, jax.Array]
CROSS_ENTROPY = Loss()


@struct.dataclass
class TrainState:
    """Everything that changes while training; one pytree, donated to every step.

    Attributes:
      step: updates made so far, int32.
      params: the model's parameters (`nnx.State`).
      opt_state: optax state.
      rng: key the dropout seeds of every step are folded from.
      loss_sum, weight_sum: of the running epoch, float32; their ratio is its mean loss.
      bad_step: the first step whose loss or gradient was not finite, or -1. The
        parameters stay as they were before that step, and so does everything after it.
    """

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState
    rng: jax.Array
    loss_sum: jax.Array
    weight_sum: jax.Array
    bad_step: jax.Array


def init_state(params: nnx.State, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        rng=jax.random.key(seed),
        loss_sum=jnp.zeros((), jnp.float32),
        weight_sum=jnp.zeros((), jnp.float32),
        bad_step=jnp.full((), -1, jnp.int32),
    )


@functools.cache  # the same one again lets another run in this process keep compiled code
def make_optimizer(
    learning_rate: float, weight_decay: float, cosine_steps: int | None = None
) -> optax.GradientTransformation:
    """Adam as the reference uses it: weight decay, if any, is added to the gradient.

    Args:
      learning_rate: of the first step.
      weight_decay: weight of the squared norm of all parameters, halved.
      cosine_steps: the learning rate falls along a cosine to 0 in so many steps; None: never.
    """
    rate: optax.ScalarOrSchedule = learning_rate
    if cosine_steps is not None:
        rate = optax.cosine_decay_schedule(learning_rate, cosine_steps)
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(rate))


def num_microbatches(rows: int, length: int, devices: int) -> int:
    """How many micro-batches to cut a batch of `rows` histories of `length` into.

    On CPU as many as bring one down to 3,072 events and 128 rows of scores, which is where
    its temporaries fit a cache (see `loss_and_gradients`); one on other devices. Each
    keeps at least 8 rows per device.
    """
    if target().platform != "cpu":
        return 1
    largest = min(3072 // length, 128)
    count = 1
    while (
        rows // count > largest
        and rows % (2 * count * devices) == 0
        and rows // (2 * count) >= 8 * devices
    ):
        count *= 2
    return count


def micro_batches(rows: Any, count: int) -> Any:
    """Splits every array [B, ...] of a tree into [count, B / count, ...].

    Row i goes to micro-batch i % count: with the rows of a batch laid out over devices in
    contiguous blocks, every micro-batch then has its share of rows on every device.
    """
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), rows
    )


def loss_and_gradients(
    graphdef,
    params,
    batch: Batch,
    seeds: jax.Array,
    micro: int,
    objective: str = "prefix",
    loss: SummedLoss = full_cross_entropy,
):
    """Mean loss of a batch and its gradient, `micro` micro-batches one after the other.

    On CPU a step's temporaries are fresh pages every time, and touching them costs more
    than computing with them: small micro-batches keep them in cache. Values do not depend
    on `micro` but for the order of summation.
    """
    total = jnp.maximum(batch["weights"].sum(), 1.0)

    def loss_fn(params, rows, seeds):
        return OBJECTIVES[objective](nnx.merge(graphdef, params), rows, seeds, loss) / total

    if micro == 1:
        return jax.value_and_grad(loss_fn)(params, batch, seeds)

    def accumulate(carry, rows):
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss_fn)(params, *rows)), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(accumulate, zero, micro_batches((batch, seeds), micro))[0]


def update(
    state: TrainState,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    micro: int,
    objective: str = "prefix",
    loss: Loss = CROSS_ENTROPY,
    up_to: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update.

    Args:
      state: before; donated by `train_step`, which is this, compiled.
      batch: what the objective takes.
      graphdef: the model's structure.
      tx: the optimizer.
      micro: number of micro-batches; divides B.
      objective: a name in `tim4rec_jax.training.objectives.OBJECTIVES`.
      loss: how states are held against targets.
      up_to: see `tim4rec_jax.training.losses.Loss.prepare`.

    Returns:
      The next state, and for the log the mean `loss` of the epoch so far and `bad_step`, in
      arrays of their own that outlive the state.
    """
    key = jax.random.fold_in(state.rng, state.step)
    seeds = row_seeds(key, batch["targets"].shape[0])
    model: Any = nnx.merge(graphdef, state.params)
    summed = loss.prepare(jax.random.fold_in(key, 1), model.n_items, up_to)
    if objective == "cloze":  # before the batch is cut: its targets are counted as a whole
        batch = mask_batch(model, batch, jax.random.fold_in(key, 2))
    value, grads = loss_and_gradients(
        graphdef, state.params, batch, seeds, micro, objective, summed
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((value, grads))]).all()
    good = finite & (state.bad_step < 0)
    new = (params, opt_state)
    old = (state.params, state.opt_state)
    params, opt_state = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
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
    metrics = {"loss": loss_so_far, "bad_step": state.bad_step}
    return state, jax.tree.map(lambda x: x + 0, metrics)


train_step = jax.jit(
    update, static_argnames=("graphdef", "tx", "micro", "objective", "loss"), donate_argnums=0
)


# ---- training.on_device
# Training from an event log that lies on the device.
#
# A step of a few milliseconds leaves the host no time to gather windows and send them. Here only
# the numbers of samples cross the bus, for several steps at once; the batches are those of
# `tim4rec_jax.data`, value for value.

# Of the device's memory, or of as much as the smallest GPU of interest has.
_SHARE, _MEMORY = 0.25, 16 * 2**30


def choose_placement(asked: str, dataset: Dataset) -> str:
    """`device` or `host`; `auto` is the device if that is not the host's own and the log fits."""
    if asked != "auto":
        return asked
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return "host"
    memory = (device.memory_stats() or {}).get("bytes_limit", _MEMORY)
    # Event numbers are int32.
    fits = dataset.n_events < 2**31 and 16 * dataset.n_events <= _SHARE * memory
    return "device" if fits else "host"


class Layout(NamedTuple):
    """How batches are gathered from their indices; static, so hashable."""

    packed: bool
    buckets: tuple[int, ...]
    max_length: int
    convention: Convention
    devices: int

    def batch(self, log: EventLog, indices: Batch, width: int) -> Batch:
        """A batch whose items have `width` columns, one of `buckets`."""
        if self.packed:
            return pack(log, indices)
        batch = collate(
            log,
            indices["starts"],
            indices["lengths"],
            width=width,
            max_length=self.max_length,
            convention=self.convention,
        )
        return batch | {name: indices[name] for name in ("users", "weights")}


def layout(batches: TrainBatches | PackedBatches, convention: Convention, devices: int) -> Layout:
    """How the batches of `batches` are gathered and spread over `devices`."""
    packed = isinstance(batches, PackedBatches)
    return Layout(packed, batches.buckets, batches.max_length, convention, devices)


@functools.partial(jax.jit, static_argnames=("layout", "needed", "settings"), donate_argnums=0)
def train_steps(
    state: TrainState,
    log: EventLog,
    indices: Batch,
    up_to: jax.Array | None,
    *,
    layout: Layout,
    needed: tuple[str, ...],
    settings: tuple[tuple[str, Any], ...],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Several updates, one after the other, in one dispatch.

    Args:
      state: donated.
      log: of all events of the dataset.
      indices: of the steps' batches, each array with a leading axis of steps.
      up_to: as for `tim4rec_jax.training.step.update`.
      layout: of the batches.
      needed: the arrays of a batch that the model and the objective use.
      settings: other arguments of `update`, as pairs.

    Returns:
      The state after the last step, and its metrics.
    """
    rows = indices["weights"].shape[1]

    def with_width(width):
        micro = num_microbatches(rows, width, layout.devices)

        def one(state, indices):
            batch = layout.batch(log, indices, width)
            batch = {name: batch[name] for name in needed if name in batch}
            return update(state, batch, micro=micro, up_to=up_to, **dict(settings))

        return one

    def step(state, indices):
        indices = dict(indices)
        bucket = indices.pop("bucket")
        return jax.lax.switch(bucket, [with_width(w) for w in layout.buckets], state, indices)

    state, metrics = jax.lax.scan(step, state, indices)
    return state, jax.tree.map(lambda each: each[-1], metrics)


# ---- training.steps
# Dispatches training steps: on batches the host makes, or on numbers of samples.

# Steps a dispatch on the device's own data: the host is done with one long before the device is.
STEPS = 8

Metrics = dict[str, jax.Array]


class HostSteps:
    """One step at a time, on batches that the host gathers.

    Attributes:
      iterator: over the batches; its state is saved with the run's.
    """

    def __init__(self, batches, needed: tuple[str, ...], placement: Placement, **settings: Any):
        self.iterator = train_iterator(batches)
        self._needed, self._placement, self._settings = needed, placement, settings

    def run(self, state: TrainState, left: int, done: int) -> tuple[TrainState, Metrics, int]:
        """Dispatches the next steps.

        Args:
          state: donated.
          left: how many steps there may be at most.
          done: steps of the running epoch so far.

        Returns:
          The next state, metrics to be fetched later, and how many steps were dispatched.
        """
        batch = next(self.iterator)
        rows, width = batch["items"].shape
        batch = {name: batch[name] for name in self._needed if name in batch}
        state, metrics = train_step(
            state,
            jax.device_put(batch, self._placement.by_row),
            micro=num_microbatches(rows, width, self._placement.devices),
            **self._settings,
        )
        return state, metrics, 1


class DeviceSteps:
    """`STEPS` steps at a time, on batches gathered from an event log on the device.

    Groups begin at multiples of `STEPS` in an epoch, what is left of one goes step by step: two
    programs, and a run that is resumed has the groups of one that was not interrupted.

    Attributes:
      iterator: over what batches are gathered from.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: TrainBatches | PackedBatches,
        convention: Convention,
        needed: tuple[str, ...],
        placement: Placement,
        *,
        up_to: jax.Array | None,
        **settings: Any,
    ):
        self.iterator = train_iterator(batches, indices_only=True)
        self._log = jax.device_put(dataset.all_events(), placement.replicated)
        mesh = placement.by_row.mesh
        self._by_row = NamedSharding(mesh, PartitionSpec(None, "batch"))
        self._replicated = placement.replicated
        self._up_to = up_to
        self._static = dict(
            layout=layout(batches, convention, placement.devices),
            needed=needed,
            settings=tuple(settings.items()),
        )

    def run(self, state: TrainState, left: int, done: int) -> tuple[TrainState, Metrics, int]:
        """See `HostSteps`."""
        count = STEPS if done % STEPS == 0 and left >= STEPS else 1
        indices = [next(self.iterator) for _ in range(count)]
        stacked = {name: np.stack([each[name] for each in indices]) for name in indices[0]}
        shardings = {
            name: self._by_row if array.ndim > 1 else self._replicated
            for name, array in stacked.items()
        }
        stacked = jax.device_put(stacked, shardings)
        state, metrics = train_steps(state, self._log, stacked, self._up_to, **self._static)
        return state, metrics, count


def make_batches(config: Config, dataset: Dataset) -> TrainBatches | PackedBatches:
    """The batches that a run trains on.

    Args:
      config: of the run, resolved.
      dataset: split as it says.
    """
    data, train = config.data, config.train
    settings = dict(max_length=data.max_length, batch_size=train.batch_size, seed=config.seed)
    if train.objective == "every_position":
        return PackedBatches(dataset, windows_per_user=data.windows_per_user, **settings)
    return TrainBatches(dataset, convention=data.convention, buckets=data.buckets, **settings)


def make_steps(
    config: Config,
    dataset: Dataset,
    batches: TrainBatches | PackedBatches,
    model: SequenceModel,
    placement: Placement,
) -> tuple[HostSteps | DeviceSteps, Any]:
    """The steps of a run, and its optimizer.

    Args:
      config: of the run, resolved.
      dataset: split as it says.
      batches: of `make_batches`.
      model: to train.
      placement: of batches on devices.
    """
    train = config.train
    steps = train.epochs * batches.batches_per_epoch if train.schedule == "cosine" else None
    tx = make_optimizer(train.learning_rate, train.weight_decay, steps)
    up_to = None
    if train.loss == "sampled_softmax":
        counts = cumulative_counts(train_item_counts(dataset))
        up_to = jax.device_put(counts, placement.replicated)
    needed = (*inputs(model), "targets", "weights")
    settings: dict[str, Any] = dict(
        graphdef=nnx.graphdef(model),
        tx=tx,
        objective=train.objective,
        loss=Loss(train.loss, train.negatives, train.calibration),
        up_to=up_to,
    )
    if choose_placement(config.data.placement, dataset) == "device":
        convention = "exact" if isinstance(batches, PackedBatches) else config.data.convention
        return DeviceSteps(dataset, batches, convention, needed, placement, **settings), tx
    return HostSteps(batches, needed, placement, **settings), tx
