"""Windows over histories: the last events before a target, their time gaps, batches of them."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int64

from tim4rec_jax.data.dataset import (
    Array,
    Dataset,
    EventLog,
    event_log,
    samples_of_users,
    windows,
)
from tim4rec_jax.errors import UserError

Batch = dict[str, Any]
Convention = Literal["recbole", "exact"]


def collate(
    log: EventLog,
    starts: Int[Array, "B"],
    lengths: Int[Array, "B"],
    *,
    width: int,
    max_length: int,
    convention: Convention,
) -> Batch:
    """Makes a batch of windows over histories, each with the event that follows it.

    It is the same function on the host and inside a compiled step: `log`, `starts` and
    `lengths` are arrays of NumPy, or all are arrays of JAX.

    Args:
      log: the events.
      starts: number of each window's first event in the log.
      lengths: events of each window. The event after them must be in the log too.
      width: columns of `items`; at least the longest window.
      max_length: columns of `gaps`.
      convention: of the gaps; see `time_gaps`.

    Returns:
      `items` int32 [B, width] right padded with 0; `lengths` int32 [B]; `gaps` float32
      [B, max_length], all columns whatever `width` is, because the time stream of the model
      looks at whole rows; `targets` int32 [B], the event after; `time_to_next` float32 [B], exact
      seconds until it; `dates` float32 [B], of the window's last event, days since 1970.
    """
    xp = log.items.__array_namespace__()
    # The first pad column holds the spike of the recbole convention; beyond it all is 0.
    reach = min(width + 1, max_length)
    gaps = _window_gaps(log, starts, lengths, reach, convention)
    stops = starts + lengths
    return {
        "items": windows(log.items, starts, lengths, width),
        "lengths": lengths.astype(xp.int32),
        "gaps": xp.pad(gaps, ((0, 0), (0, max_length - reach))),
        "targets": log.items[stops],
        "time_to_next": log.gaps[stops],
        "dates": log.dates[stops - 1],
    }


def time_gaps(
    timestamps: Int64[np.ndarray, "B L"],
    lengths: Int[np.ndarray, "B"],
    convention: Convention = "recbole",
) -> Float32[np.ndarray, "B L"]:
    """Time passed since the event before, per event.

    Args:
      timestamps: times of events, right padded with 0.
      lengths: events of each row.
      convention: `"recbole"` computes what the published implementation feeds its model: times
        are rounded to float32 first (64 s apart near 9e8), and the difference runs on into the
        padding, so that the first pad holds minus the last time. `"exact"` takes differences
        in int64 and leaves 0 at pads.

    Returns:
      Gaps in the unit of `timestamps`; the first of each row is 0.
    """
    times = timestamps.ravel()
    rows, width = timestamps.shape
    log = event_log(np.zeros(times.size, np.int32), times)
    return _window_gaps(log, np.arange(rows) * width, lengths, width, convention)


def _window_gaps(log: EventLog, starts, lengths, width: int, convention: Convention):
    """The gaps within windows, float32 [B, width]; see `time_gaps`."""
    xp = log.items.__array_namespace__()
    if convention == "recbole":
        times = windows(log.times, starts, lengths, width)
        return xp.diff(times, axis=1, prepend=times[:, :1])
    # In the log, the event before a window's first one may be another user's.
    return xp.where(xp.arange(width) > 0, windows(log.gaps, starts, lengths, width), 0)


def prefix_batch(
    dataset: Dataset,
    users: Int64[np.ndarray, "B"],
    ends: Int64[np.ndarray, "B"],
    *,
    width: int,
    max_length: int,
    convention: Convention,
) -> Batch:
    """Gathers prefixes of histories and the events that follow them.

    Args:
      dataset: where from.
      users: row numbers of users.
      ends: the target is the user's event number `ends` (from 0), the input all before it.
      width: columns of `items`; at least the longest input or `max_length`.
      max_length: inputs are cut to their last `max_length` events.
      convention: see `time_gaps`.

    Returns:
      What `collate` returns, and `users` int32 [B].
    """
    lengths = np.minimum(ends, max_length)
    log, starts = dataset.events(dataset.offsets[users] + ends - lengths, lengths + 1)
    batch = collate(log, starts, lengths, width=width, max_length=max_length, convention=convention)
    return batch | {"users": users.astype(np.int32)}


# ---- data.buckets
# Chooses the few lengths to which batches are padded.


def train_prefixes(
    samples: Int64[np.ndarray, "users"], max_length: int
) -> Int64[np.ndarray, "max_length_and_1"]:
    """Number of training samples by window length, 0 to `max_length`.

    Args:
      samples: of each user; with n the events 1 to n (from 0) are targets, and target number t
        has t events before it.
      max_length: longer windows are cut to it.
    """
    users = np.bincount(np.minimum(samples, max_length), minlength=max_length + 1)
    counts = np.cumsum(users[::-1])[::-1]  # users with at least that many prefixes
    counts[0] = 0
    counts[max_length] += np.maximum(samples - max_length, 0).sum()
    return counts


def default_buckets(
    samples: Int64[np.ndarray, "users"], max_length: int, *, max_buckets: int = 5, multiple: int = 4
) -> tuple[int, ...]:
    """Bucket lengths that leave the least padding in an epoch of training.

    Args:
      samples: training samples of each user.
      max_length: the longest window, always a bucket.
      max_buckets: at most so many; each is one more shape to compile.
      multiple: all but the longest are multiples of it.

    Returns:
      Lengths in rising order.
    """
    below = np.cumsum(train_prefixes(samples, max_length))
    lengths = [0, *range(multiple, max_length, multiple), max_length]
    # best[i]: fewest item slots for samples of up to lengths[i] events, and the buckets that do it.
    best = {0: (0, 0, ())}
    for _ in range(max_buckets):
        best |= {
            i: min(
                (slots + int(below[end] - below[lengths[j]]) * end, used + 1, (*chosen, end))
                for j, (slots, used, chosen) in best.items()
                if j < i
            )
            for i, end in enumerate(lengths)
            if i
        }
    return best[len(lengths) - 1][2]


# ---- data.shuffle
# A shuffle that is never stored: position in, shuffled position out.

_ROUNDS = 4


def permute(
    positions: Int64[np.ndarray, "N"], size: int, key: tuple[int, ...]
) -> Int64[np.ndarray, "N"]:
    """Where a pseudo-random permutation of `range(size)` sends `positions`.

    A bijection of the next power of two (rounds of add, multiply by an odd number, xor with
    the own upper half; all invertible), walked until it lands below `size`. So any part of the
    shuffle of a billion samples costs only that part, with no state to keep or to restore.

    Args:
      positions: numbers from 0 to `size - 1`.
      size: how many there are.
      key: non-negative integers; they alone choose the permutation.
    """
    bits = max(size - 1, 1).bit_length()
    mask, half = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)
    # SeedSequence, unlike the methods of Generator, promises the same words in every release.
    words = np.random.SeedSequence(key).generate_state(2 * _ROUNDS, np.uint64)
    out = positions.astype(np.uint64)
    moving = np.arange(len(out))
    while moving.size:
        values = out[moving]
        for add, factor in words.reshape(_ROUNDS, 2):
            values = ((values + add) * (factor | np.uint64(1))) & mask
            values ^= values >> half
        out[moving] = values
        moving = moving[values >= size]
    return out.astype(np.int64)


# ---- data.batches
# Batches by number: which samples they hold is computed, never stored.
#
# Every event that training sees (`tim4rec_jax.data.splits`) but a user's first is the target of a
# training sample. Leave one out, as in the paper: the last event of a history tests, the one
# before validates; users with three events have no training sample, those with two only test,
# those with one do nothing.


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

    Elements are as `tim4rec_jax.data.batches.prefix_batch` describes, with `weights` float32
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

    def indices(self, number: int) -> Batch:
        """What batch `number` is gathered from, if all events lie in one log.

        Returns:
          `bucket` int32 [], which of `buckets` `items` is as wide as; and for every row `starts`
          int32, the number of the window's first event among all of the dataset, its `lengths`
          int32, `users` int32 and `weights` float32.
        """
        level, users, ends, weights = self._batch(number)
        lengths = np.minimum(ends, self.max_length)
        return {
            "bucket": np.array(level, np.int32),
            "starts": (self.dataset.offsets[users] + ends - lengths).astype(np.int32),
            "lengths": lengths.astype(np.int32),
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
