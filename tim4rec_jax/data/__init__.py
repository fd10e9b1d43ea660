"""Prepared datasets, windows over histories, and batches.

Nothing here imports JAX, except `tim4rec_jax.data.pipeline` through grain.
"""

from tim4rec_jax.data.batches import (
    Batch,
    EvalBatches,
    TrainBatches,
    collate,
    default_buckets,
    prefix_batch,
)
from tim4rec_jax.data.dataset import Dataset, open_dataset, train_dates, train_item_counts
from tim4rec_jax.data.events import Convention, DeviceLog, EventLog, days, time_gaps
from tim4rec_jax.data.format import FORMAT_VERSION
from tim4rec_jax.data.neighbours import item_neighbours
from tim4rec_jax.data.packing import PackedBatches, pack

__all__ = [
    "FORMAT_VERSION",
    "Batch",
    "Convention",
    "Dataset",
    "DeviceLog",
    "EvalBatches",
    "EventLog",
    "PackedBatches",
    "TrainBatches",
    "collate",
    "days",
    "default_buckets",
    "item_neighbours",
    "open_dataset",
    "pack",
    "prefix_batch",
    "time_gaps",
    "train_dates",
    "train_item_counts",
]
