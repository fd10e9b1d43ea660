"""What training sees of a dataset: how many samples, which items how often, from when to when."""

import numpy as np

from tim4rec_jax.data.dataset import Chunk, Dataset
from tim4rec_jax.errors import UserError


def samples_of_users(dataset: Dataset) -> np.ndarray:
    """Number of training samples of each user.

    Raises:
      UserError: there is none at all.
    """
    samples = np.maximum(dataset.splits.train - 1, 0)
    if not samples.any():
        raise UserError(
            f"{dataset.directory}: no user has the 4 events that a training sample takes"
        )
    return samples


def train_item_counts(dataset: Dataset) -> np.ndarray:
    """Events of each item, int64 [n_items], among those that training sees."""
    counts = np.zeros(dataset.n_items + 1, np.int64)
    for chunk in dataset.chunks:
        counts += np.bincount(chunk.items[_seen(dataset, chunk)], minlength=len(counts))
    return counts[1:]


def train_dates(dataset: Dataset) -> tuple[int, int]:
    """Times of the first and the last event that training sees, seconds since 1970."""
    seen = [chunk.timestamps[_seen(dataset, chunk)] for chunk in dataset.chunks]
    seen = [times for times in seen if times.size]
    return min(int(times.min()) for times in seen), max(int(times.max()) for times in seen)


def _seen(dataset: Dataset, chunk: Chunk) -> np.ndarray:
    """Which events of a chunk training sees."""
    numbers = chunk.start + np.arange(len(chunk.items))
    users = np.searchsorted(dataset.offsets, numbers, side="right") - 1
    return numbers - dataset.offsets[users] < dataset.splits.train[users]
