"""Prepared datasets, windows over histories, batches. Needs no JAX, except `data.pipeline`."""

from tim4rec_jax.data.batches import (
    Batch,
    Convention,
    EvalBatches,
    TrainBatches,
    days,
    default_buckets,
    prefix_batch,
    time_gaps,
)
from tim4rec_jax.data.dataset import Dataset, open_dataset, train_dates, train_item_counts
from tim4rec_jax.data.format import FORMAT_VERSION
from tim4rec_jax.data.packing import PackedBatches

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
