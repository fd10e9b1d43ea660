"""Training batches made ahead by threads, with a state that checkpoints."""

import sys

import grain

from tim4rec_jax.data.batches import TrainBatches
from tim4rec_jax.data.packing import PackedBatches


def train_iterator(
    batches: TrainBatches | PackedBatches,
    *,
    indices_only: bool = False,
    start_batch: int = 0,
    threads: int = 2,
    prefetch: int = 8,
) -> grain.DatasetIterator:
    """Iterates over training batches without end.

    One element of the pipeline is a whole batch, because grain spends microseconds on every
    element whatever it is. `get_state()["next_index"]` is the number of the next batch and is
    all there is to save: `set_state`, `grain.checkpoint.CheckpointSave` and
    `CheckpointRestore` of Orbax continue exactly there.

    Args:
      batches: makes them.
      indices_only: yield only what the batches are gathered from (`batches.indices`).
      start_batch: number of the first batch, counted over all epochs.
      threads: how many make batches; 0 makes them when they are asked for.
      prefetch: how many batches to hold ready.
    """
    numbers = grain.MapDataset.range(sys.maxsize)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    make = batches.indices if indices_only else batches.__getitem__
    iterator = iter(numbers.map(make).to_iter_dataset(options))
    iterator.set_state({"next_index": start_batch})
    return iterator
