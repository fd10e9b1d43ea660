"""Training batches that threads make ahead of time, and a state that checkpoints."""

import sys

import grain

from tim4rec_jax.data.batches import TrainBatches
from tim4rec_jax.data.packing import PackedBatches

# Number of batches that are made ahead.
PREFETCH = 8


def train_iterator(
    batches: TrainBatches | PackedBatches,
    *,
    indices_only: bool = False,
    start_batch: int = 0,
    threads: int = 2,
    prefetch: int = PREFETCH,
) -> grain.DatasetIterator:
    """Iterates over training batches without end.

    One element of the grain pipeline is a whole batch, because grain spends microseconds on every
    element. The state is `{"next_index": number of the next batch}`. `set_state` of grain, and
    Orbax with `grain.checkpoint.CheckpointSave` and `CheckpointRestore`, continue exactly there.

    Args:
      batches: the batches by number.
      indices_only: yield `batches.indices(number)` instead of the batches themselves.
      start_batch: number of the first batch, counted over all epochs.
      threads: number of threads that make batches; with 0 they are made when asked for.
      prefetch: number of batches to hold ready.
    """
    numbers = grain.MapDataset.range(sys.maxsize)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    make = batches.indices if indices_only else batches.__getitem__
    iterator = iter(numbers.map(make).to_iter_dataset(options))
    iterator.set_state({"next_index": start_batch})
    return iterator
