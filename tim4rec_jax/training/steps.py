"""Dispatches training steps: on batches the host makes, or on numbers of samples."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tim4rec_jax.config import Config
from tim4rec_jax.data import Convention, Dataset, PackedBatches, TrainBatches, train_item_counts
from tim4rec_jax.data.pipeline import train_iterator
from tim4rec_jax.devices import Placement
from tim4rec_jax.models import SequenceModel, inputs
from tim4rec_jax.training.losses import Loss, cumulative_counts
from tim4rec_jax.training.on_device import choose_placement, event_log, layout, train_steps
from tim4rec_jax.training.step import TrainState, make_optimizer, micro_count, train_step

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
            micro=micro_count(rows, width, self._placement.devices),
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
        self.iterator = train_iterator(batches, rows_only=True)
        self._log = jax.device_put(event_log(dataset, convention), placement.replicated)
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
        rows = [next(self.iterator) for _ in range(count)]
        stacked = {name: np.stack([each[name] for each in rows]) for name in rows[0]}
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
