"""Batches by number: which samples they hold is computed, never stored.

Every event that training sees (`tim4rec_jax.data.splits`) but a user's first is the target of a
training sample. Leave one out, as in the paper: the last event of a history tests, the one
before validates; users with three events have no training sample, those with two only test,
those with one do nothing.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from tim4rec_jax.data.buckets import default_buckets, train_prefixes
from tim4rec_jax.data.dataset import Dataset
from tim4rec_jax.data.shuffle import permute
from tim4rec_jax.data.training_events import samples_of_users
from tim4rec_jax.data.windows import Convention, prefix_batch
from tim4rec_jax.errors import UserError

Batch = dict[str, np.ndarray]


def rows_of_process(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """Numbers of the rows of each batch that a process makes.

    Raises:
      UserError: the processes cannot share a batch evenly.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"a batch size of {batch_size} cannot be shared by {process_count} processes; "
            "take a multiple of their number"
        )
    share = batch_size // process_count
    return np.arange(process_index * share, (process_index + 1) * share)


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
        self._rows = rows_of_process(batch_size, process_index, process_count)
        self.dataset, self.seed, self.batch_size = dataset, seed, batch_size
        self.max_length = max_length
        self.convention: Convention = convention

        prefixes = samples_of_users(dataset)
        self._plan = _plan(prefixes, self.buckets, batch_size)
        self.n_samples = int(prefixes.sum())
        self.batches_per_epoch = sum(bucket.batches for bucket in self._plan)
        slots = batch_size * sum(bucket.batches * bucket.width for bucket in self._plan)
        events = train_prefixes(prefixes, max_length) @ np.arange(max_length + 1)
        self.padding_share = 1 - float(events) / slots

    @property
    def layout(self) -> str:
        """How samples are laid out, in words."""
        return f"lengths {', '.join(map(str, self.buckets))}"

    def __getitem__(self, number: int) -> Batch:
        """Makes batch `number`, counted from the start of training (0 and up)."""
        level, users, ends, weights = self._batch(number)
        batch = prefix_batch(
            self.dataset,
            users,
            ends,
            width=self.buckets[level],
            max_length=self.max_length,
            convention=self.convention,
        )
        return batch | {"weights": weights}

    def rows(self, number: int) -> Batch:
        """What batch `number` is gathered from.

        Returns:
          `bucket` int32 [], which of `buckets` `items` is as wide as; and for every row `stops`
          int32, the number of the target among all events of the dataset, `lengths` int32 of the
          window before it, `users` int32 and `weights` float32.
        """
        level, users, ends, weights = self._batch(number)
        return {
            "bucket": np.array(level, np.int32),
            "stops": (self.dataset.offsets[users] + ends).astype(np.int32),
            "lengths": np.minimum(ends, self.max_length).astype(np.int32),
            "users": users.astype(np.int32),
            "weights": weights,
        }

    def _batch(self, number: int):
        """Bucket, users, numbers of their target events and weights of a batch."""
        epoch, number = divmod(number, self.batches_per_epoch)
        key = (self.seed, epoch, len(self.buckets))
        number = permute(np.array([number]), self.batches_per_epoch, key)[0]
        starts = [bucket.first_batch for bucket in self._plan]
        level = int(np.searchsorted(starts, number, side="right")) - 1
        bucket = self._plan[level]
        first = (number - bucket.first_batch) * self.batch_size
        positions = first + self._rows
        real = positions < bucket.size
        users, ends = self._samples(epoch, level, np.where(real, positions, first))
        return level, users, ends, real.astype(np.float32)

    def _samples(self, epoch: int, level: int, positions: np.ndarray):
        """User and target event of the samples at `positions` of a bucket's shuffled list."""
        bucket = self._plan[level]
        order = permute(positions, bucket.size, (self.seed, epoch, level))
        own = order - bucket.carried
        users = np.searchsorted(bucket.before, own, side="right") - 1
        ends = bucket.low + 1 + own - bucket.before[users]
        below = np.flatnonzero(own < 0)
        if below.size:
            left_over = self._plan[level - 1].size + own[below]
            users[below], ends[below] = self._samples(epoch, level - 1, left_over)
        return users, ends


class _Bucket(NamedTuple):
    """The samples whose windows have more than `low` and at most `width` events.

    Its list holds first what the bucket below could not make full batches of, `carried`
    samples, then its own, user after user; `before[u]` of these are of users before u.
    """

    width: int
    low: int
    before: np.ndarray  # int64 [n_users + 1]
    carried: int
    size: int  # carried and own samples
    first_batch: int
    batches: int


def _plan(prefixes: np.ndarray, widths: tuple[int, ...], batch_size: int) -> list[_Bucket]:
    """Deals samples out to buckets; `prefixes` [n_users] counts those of each user."""
    plan, low, carried, first_batch = [], 0, 0, 0
    for width in widths:
        last = width == widths[-1]
        # The last bucket also takes the prefixes that are cut to its width.
        high = max(width, int(prefixes.max())) if last else width
        before = np.concatenate([[0], np.cumsum(np.clip(prefixes, low, high) - low)])
        size = carried + int(before[-1])
        batches = -(-size // batch_size) if last else size // batch_size
        plan.append(_Bucket(width, low, before, carried, size, first_batch, batches))
        low, carried, first_batch = width, size - batches * batch_size, first_batch + batches
    return plan


class EvalBatches:
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
        self.dataset, self.batch_size, self.max_length = dataset, batch_size, max_length
        self.convention: Convention = convention
        ends = getattr(dataset.splits, split)
        users = np.flatnonzero(ends >= 1)
        if not users.size:
            raise UserError(f"{dataset.directory}: no user has events enough for the {split} split")
        lengths = np.minimum(ends[users], max_length)
        self._users = users[np.argsort(lengths, kind="stable")]
        self._ends = ends[self._users]
        self.n_samples = len(users)

    def __len__(self) -> int:
        return -(-self.n_samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> Batch:
        """Makes batch `number`, from 0 to `len(self) - 1`."""
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
        samples = np.maximum(dataset.splits.train - 1, 0)
        return default_buckets(samples, max_length)
    rising = tuple(sorted({int(width) for width in buckets}))
    if not rising or rising[0] < 1 or rising[-1] != max_length:
        raise UserError(f"buckets {tuple(buckets)} must be positive and the longest {max_length}")
    return rising
