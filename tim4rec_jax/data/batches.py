"""Batches by number: which samples they hold is computed, never stored.

Leave one out, as in the paper: the last event of a history tests, the one before validates,
each earlier one (but the first) is the target of a training sample. A target needs an event
before it: users with three events have no training sample, those with two only test, those
with one do nothing.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tim4rec_jax.data.buckets import default_buckets, train_prefixes
from tim4rec_jax.data.dataset import Dataset
from tim4rec_jax.data.shuffle import permute
from tim4rec_jax.data.windows import Convention, prefix_batch
from tim4rec_jax.errors import UserError

Batch = dict[str, np.ndarray]


class TrainBatches:
    """An endless, shuffled sequence of training batches with random access.

    Batch `g` is a pure function of the arguments and `g`: any of them can be made at any time,
    on any thread or process. An epoch is `batches_per_epoch` batches and holds every sample
    once. Its samples are shuffled; each goes to the shortest bucket that holds its window;
    what is left of a bucket after the last full batch goes up to the next one; the batches are
    shuffled. The one batch that may not be full at the end is completed by rows of weight 0
    that repeat a real row.

    Elements are as `tim4rec_jax.data.windows.prefix_batch` describes, with `weights` float32
    [B] besides.

    Attributes:
      buckets: widths of `items`, rising; the last is `max_length`.
      n_samples: samples in an epoch.
      batches_per_epoch: batches in an epoch.
      padding_share: share of the positions in `items` over an epoch that hold no event.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        max_length: int,
        batch_size: int,
        seed: int,
        convention: Convention,
        buckets: Sequence[int] | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Plans the epochs.

        Args:
          dataset: an open dataset.
          max_length: windows are the last `max_length` events.
          batch_size: rows of a batch over all processes.
          seed: chooses the shuffles.
          convention: of the time gaps; see `tim4rec_jax.data.time_gaps`.
          buckets: widths of batches; `None` chooses by `default_buckets`, `(max_length,)`
            makes all batches alike.
          process_index: which share of each batch to make.
          process_count: number of equal shares.

        Raises:
          UserError: the numbers do not fit together, or there is nothing to train on.
        """
        self.buckets = _checked_buckets(dataset, buckets, max_length)
        if batch_size < 1 or batch_size % process_count:
            raise UserError(
                f"a batch size of {batch_size} cannot be shared by {process_count} processes; "
                "take a multiple of their number"
            )
        self.dataset, self.seed = dataset, seed
        self.max_length, self.batch_size, self.convention = max_length, batch_size, convention
        share = batch_size // process_count
        self._rows = np.arange(process_index * share, (process_index + 1) * share)

        # Bucket k holds windows of more than low[k] events, up to its width or, in the last,
        # however many the prefix has. cumulative[k][u]: its samples of users before u.
        self._low = (0, *self.buckets[:-1])
        prefixes = np.maximum(dataset.lengths - 3, 0)
        high = (*self.buckets[:-1], max(int(prefixes.max(initial=0)), max_length))
        self._cumulative = [
            np.concatenate([[0], np.cumsum(np.clip(prefixes, low, high) - low)])
            for low, high in zip(self._low, high, strict=True)
        ]
        own = [int(cumulative[-1]) for cumulative in self._cumulative]
        self.n_samples = sum(own)
        if not self.n_samples:
            raise UserError(
                f"{dataset.directory}: no user has the 4 events that a training sample takes"
            )
        self._carried, self._sizes, full = [], [], []
        left = 0
        for samples in own:
            self._carried.append(left)
            self._sizes.append(left + samples)
            batches, left = divmod(left + samples, batch_size)
            full.append(batches)
        full[-1] += left > 0
        self._first_batch = np.concatenate([[0], np.cumsum(full)])
        self.batches_per_epoch = int(self._first_batch[-1])
        slots = batch_size * int(np.dot(full, self.buckets))
        counts = train_prefixes(dataset.lengths, max_length)
        self.padding_share = 1 - float(counts @ np.arange(max_length + 1)) / slots

    def __getitem__(self, number: int) -> Batch:
        """Makes batch `number`, counted from the start of training (0 and up)."""
        epoch, number = divmod(number, self.batches_per_epoch)
        key = (self.seed, epoch, len(self.buckets))
        number = permute(np.array([number]), self.batches_per_epoch, key)[0]
        bucket = int(np.searchsorted(self._first_batch, number, side="right")) - 1
        first = (number - self._first_batch[bucket]) * self.batch_size
        positions = first + self._rows
        real = positions < self._sizes[bucket]
        users, ends = self._samples(epoch, bucket, np.where(real, positions, first))
        batch = prefix_batch(
            self.dataset,
            users,
            ends,
            width=self.buckets[bucket],
            max_length=self.max_length,
            convention=self.convention,
        )
        return batch | {"weights": real.astype(np.float32)}

    def _samples(self, epoch: int, bucket: int, positions: np.ndarray):
        """User and target event of the samples at `positions` of a bucket's shuffled list."""
        carried = self._carried[bucket]
        order = permute(positions, self._sizes[bucket], (self.seed, epoch, bucket))
        cumulative = self._cumulative[bucket]
        users = np.searchsorted(cumulative, order - carried, side="right") - 1
        ends = self._low[bucket] + 1 + order - carried - cumulative[users]
        # The first ones are what the bucket below could not make a full batch of.
        below = np.flatnonzero(order < carried)
        if below.size:
            first_left = self._sizes[bucket - 1] - carried
            users[below], ends[below] = self._samples(epoch, bucket - 1, first_left + order[below])
        return users, ends


class EvalBatches(Sequence[Batch]):
    """Batches that hold every user with a target in a split once, shortest histories first.

    `valid`: the target is the last event but one, `test`: the last, with the validation event
    in the input. Elements are those of `TrainBatches`; `users` says whose row is which.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Literal["valid", "test"],
        *,
        max_length: int,
        batch_size: int,
        convention: Convention,
        buckets: Sequence[int] | None = None,
    ):
        """Takes arguments as `TrainBatches` does.

        Raises:
          UserError: the buckets do not fit `max_length`, or no user has a target.
        """
        self.buckets = _checked_buckets(dataset, buckets, max_length)
        self.dataset, self.batch_size = dataset, batch_size
        self.max_length, self.convention = max_length, convention
        ends = dataset.lengths - (1 if split == "test" else 2)
        users = np.flatnonzero(ends >= 1)
        if not users.size:
            raise UserError(f"{dataset.directory}: no user has events enough for the {split} split")
        lengths = np.minimum(ends[users], max_length)
        self._users = users[np.argsort(lengths, kind="stable")]
        self._ends = ends[self._users]
        self.n_samples = len(users)

    def __len__(self) -> int:
        return -(-self.n_samples // self.batch_size)

    def __getitem__(self, number):
        if not 0 <= number < len(self):
            raise IndexError(number)
        first = number * self.batch_size
        rows = np.arange(first, first + self.batch_size)
        real = rows < self.n_samples
        rows = np.where(real, rows, first)
        longest = min(self._ends[rows].max(), self.max_length)
        batch = prefix_batch(
            self.dataset,
            self._users[rows],
            self._ends[rows],
            width=next(width for width in self.buckets if width >= longest),
            max_length=self.max_length,
            convention=self.convention,
        )
        return batch | {"weights": real.astype(np.float32)}


def _checked_buckets(
    dataset: Dataset, buckets: Sequence[int] | None, max_length: int
) -> tuple[int, ...]:
    if max_length < 1:
        raise UserError(f"a maximum length of {max_length} leaves no event; take 1 or more")
    if buckets is None:
        return default_buckets(dataset.lengths, max_length)
    rising = tuple(sorted({int(width) for width in buckets}))
    if not rising or rising[0] < 1 or rising[-1] != max_length:
        raise UserError(f"buckets {tuple(buckets)} must be positive and the longest {max_length}")
    return rising
