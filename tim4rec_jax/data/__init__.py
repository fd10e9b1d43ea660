"""Prepared datasets, windows over histories, batches. Needs no JAX, except `data.pipeline`."""

from tim4rec_jax.data.batches import Batch, EvalBatches, TrainBatches
from tim4rec_jax.data.buckets import default_buckets
from tim4rec_jax.data.dataset import Dataset
from tim4rec_jax.data.format import FORMAT_VERSION
from tim4rec_jax.data.packed import PackedBatches
from tim4rec_jax.data.reader import open_dataset
from tim4rec_jax.data.training_events import train_dates, train_item_counts
from tim4rec_jax.data.windows import Convention, days, prefix_batch, time_gaps

__all__ = [
    "FORMAT_VERSION",
    "Batch",
    "Convention",
    "Dataset",
    "EvalBatches",
    "PackedBatches",
    "TrainBatches",
    "days",
    "default_buckets",
    "open_dataset",
    "prefix_batch",
    "time_gaps",
    "train_dates",
    "train_item_counts",
]
