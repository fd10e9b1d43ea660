"""The dispatch of training steps: which batch comes next, and where it is gathered."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from grain import DatasetIterator
from jax.sharding import NamedSharding

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
from tim4rec_jax.models import SequenceModel, inputs
from tim4rec_jax.runtime import Placement, put, put_rows
from tim4rec_jax.training.losses import Loss
from tim4rec_jax.training.negatives import ItemFrequencies, item_frequencies
from tim4rec_jax.training.row_optimizers import ByRow
from tim4rec_jax.training.state import TrainState, make_optimizer, make_schedule
from tim4rec_jax.training.step import Metrics, StepSettings, train_step, update


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
            shapes = _of_all_processes(batch, self._batches.batch_size, by_row)
            yield train_step.lower(state, shapes, self.settings, self._cumulative)

    def _needed(self, batch: Batch) -> Batch:
        return {name: batch[name] for name in self._fields if name in batch}


def _of_all_processes(share: Batch, rows: int, by_row: NamedSharding) -> Any:
    """The shapes of a batch of so many rows, of which this process makes a share."""
    parts = rows // len(next(iter(share.values())))
    return {
        name: jax.ShapeDtypeStruct(
            (parts * len(array), *array.shape[1:]), array.dtype, sharding=by_row
        )
        for name, array in share.items()
    }


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
        indices = dict(self._batches.indices(0))
        del indices["bucket"]
        shapes = _of_all_processes(indices, self._batches.batch_size, self._by_row)
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
      batches: of `tim4rec_jax.training.inputs.make_batches`.
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
