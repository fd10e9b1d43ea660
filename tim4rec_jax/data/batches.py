"""Batches: what they hold, how they are gathered, and which samples each of them has.

A batch is a dictionary of arrays. The table describes its fields for all of the package. B is the
number of rows, which `train.batch_size` and `eval.batch_size` set. L is `data.max_length`. W is the
width of the batch, one of a few buckets up to L. All seconds are exact differences, rounded to
float32 at the end, unless the convention of `gaps` is "recbole" (see `time_gaps`).

| field | one target a row (`TrainBatches`, `EvalBatches`) | packed rows (`PackedBatches`) |
|---|---|---|
| `items` | int32 [B, W], the events of a window, then 0 | int32 [B, L], segments, then 0 |
| `lengths` | int32 [B], number of events in the window | |
| `gaps` | float32 [B, L], seconds since the event before | float32 [B, L], the same |
| `segment_ids` | | int32 [B, L], the segment of a position, from 1 in every row |
| `targets` | int32 [B], the item of the event after the window | int32 [B, L], of the event after |
| `time_to_next` | float32 [B], seconds from the last event to the target | float32 [B, L] |
| `dates` | float32 [B], days since 1970 of the last event | float32 [B, L], of each event |
| `users` | int32 [B], row of the user in the dataset | |
| `weights` | float32 [B], 0 for a row that only fills up, else 1 | float32 [B, L], 0 at padding |

A window is a user's last events before a target, at most L of them. A segment is a run of events of
one user in a packed row; the first gap of a window and of a segment is 0. `gaps` has all L columns
whatever W is, because the time stream of the published model looks at whole rows.

Training has one target for each event that it sees (`tim4rec_jax.data.splits`), except for a user's
first event, before which there is nothing to predict from.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int64

from tim4rec_jax.data.dataset import Dataset, train_targets
from tim4rec_jax.data.events import Array, Convention, DeviceLog, EventLog, windows
from tim4rec_jax.data.splits import Split
from tim4rec_jax.errors import UserError

Batch = dict[str, Any]


def collate(
    log: EventLog | DeviceLog,
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    *,
    width: int,
    max_length: int,
    convention: Convention,
) -> Batch:
    """Gathers windows from a log, each with the event that follows it.

    The same function works on the host and inside a compiled step: with an `EventLog`, `starts`
    and `lengths` are arrays of NumPy, and with a `DeviceLog` they are arrays of JAX.

    Args:
      log: the events.
      starts: number of each window's first event in the log.
      lengths: number of events of each window. The event after them must be in the log too.
      width: columns of `items`; at least the longest window.
      max_length: columns of `gaps`.
      convention: of the gaps; see `time_gaps`.

    Returns:
      A batch without `users` and `weights`.
    """
    xp = log.items.__array_namespace__()
    # With the convention "recbole" the first pad column holds a gap; later columns hold 0.
    reach = min(width + 1, max_length)
    gaps = log.window_gaps(starts, lengths, reach, convention)
    if reach < max_length:
        gaps = xp.pad(gaps, ((0, 0), (0, max_length - reach)))
    stops = starts + lengths
    return {
        "items": windows(log.items, starts, lengths, width),
        "lengths": lengths.astype(xp.int32),
        "gaps": gaps,
        "targets": log.items[stops],
        "time_to_next": log.gaps_at(stops),
        "dates": log.dates_at(stops - 1),
    }


def prefix_batch(
    dataset: Dataset,
    users: Int64[np.ndarray, " B"],
    ends: Int64[np.ndarray, " B"],
    *,
    width: int,
    max_length: int,
    convention: Convention,
) -> Batch:
    """Gathers windows from a dataset, each with the event that follows it.

    Args:
      dataset: holds the events.
      users: the user of each row.
      ends: the target of each row is event number `ends` of the user, counted from 0. The window
        is the last `max_length` events before it.
      width: columns of `items`; at least the longest window.
      max_length: longest window, and columns of `gaps`.
      convention: of the gaps; see `time_gaps`.

    Returns:
      A batch without `weights`.
    """
    lengths = np.minimum(ends, max_length)
    starts = dataset.offsets[users] + ends - lengths
    make = functools.partial(collate, width=width, max_length=max_length, convention=convention)
    return dataset.gather(make, starts, lengths) | {"users": users.astype(np.int32)}


_ROUNDS = 4


def permute(
    positions: Int64[np.ndarray, " N"], size: int, key: tuple[int, ...]
) -> Int64[np.ndarray, " N"]:
    """Maps positions in a shuffled list to positions in the list itself.

    The map is a pseudo-random permutation of `range(size)` that is computed and never stored. So
    any part of the shuffle of a billion samples costs only that part, and a resumed run has no
    state to restore. Rounds of invertible steps (add, multiply by an odd number, xor with the own
    upper half) permute the numbers below the next power of two. A result of `size` or more goes
    through the rounds again until it is smaller.

    Args:
      positions: numbers from 0 to `size - 1`.
      size: length of the list.
      key: non-negative integers, which alone choose the permutation.
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


class ShuffledBatches:
    """An endless, shuffled sequence of training batches, each made from its number alone.

    Batch `g` is a function of the constructor's arguments and of `g`. So any thread or process
    can make any batch at any time. An epoch is `batches_per_epoch` batches and holds every target
    once. `TrainBatches` and `PackedBatches` are the two kinds.

    Attributes:
      dataset: holds the events.
      max_length: longest window or segment.
      batch_size: rows of a batch over all processes.
      buckets: widths that a batch may have, rising; the last is `max_length`.
      batches_per_epoch: number of batches in an epoch.
      n_targets: number of targets in an epoch.
      n_events: number of events in `items` over an epoch.
      padding_share: share of the positions of `items` over an epoch that hold no event.
    """

    buckets: tuple[int, ...]
    batches_per_epoch: int
    n_targets: int
    n_events: int
    padding_share: float

    def __init__(
        self,
        dataset: Dataset,
        max_length: int,
        batch_size: int,
        seed: int,
        process_index: int,
        process_count: int,
    ):
        if batch_size < 1 or batch_size % process_count:
            raise UserError(
                f"a batch size of {batch_size} cannot be shared by {process_count} processes; "
                "take a multiple of their number"
            )
        self.dataset, self.max_length, self.batch_size = dataset, max_length, batch_size
        self.seed = seed
        share = batch_size // process_count
        # The rows of each batch that this process makes.
        self._rows = np.arange(process_index * share, (process_index + 1) * share)

    @property
    def rows_per_step(self) -> int:
        """Number of rows of a batch, over all processes."""
        return self.batch_size

    @property
    def events_per_step(self) -> float:
        """Mean number of events in the `items` of a batch, over all processes."""
        return self.n_events / self.batches_per_epoch

    @property
    def targets_per_step(self) -> float:
        """Mean number of targets of a batch, over all processes."""
        return self.n_targets / self.batches_per_epoch


class TrainBatches(ShuffledBatches):
    """Training batches of the objective `prefix`: each row is a window and its target.

    The samples of an epoch are shuffled. Each goes to the shortest bucket that holds its window.
    What is left of a bucket after its last full batch goes up to the next bucket, and the batches
    are shuffled at the end. At most one batch of an epoch is not full. It is completed by rows of
    weight 0 that repeat one of its rows.
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
          max_length: longest window.
          batch_size: rows of a batch over all processes.
          seed: chooses the shuffles.
          convention: of the time gaps; see `time_gaps`.
          buckets: widths of batches. `None` chooses by `default_buckets`, and `(max_length,)`
            gives all batches the same width.
          process_index: which share of each batch to make, from 0.
          process_count: number of equal shares.

        Raises:
          UserError: the numbers do not fit together, or there is nothing to train on.
        """
        super().__init__(dataset, max_length, batch_size, seed, process_index, process_count)
        self.convention: Convention = convention
        self.buckets = _checked_buckets(dataset, buckets, max_length)
        targets = train_targets(dataset)
        self._plan = _plan(targets, self.buckets, batch_size)
        self.batches_per_epoch = sum(bucket.batches for bucket in self._plan)
        self.n_targets = int(targets.sum())
        self.n_events = int(window_counts(targets, max_length) @ np.arange(max_length + 1))
        slots = batch_size * sum(bucket.batches * bucket.width for bucket in self._plan)
        self.padding_share = 1 - self.n_events / slots

    @property
    def layout(self) -> str:
        """The widths of the batches, for people."""
        return f"lengths {', '.join(map(str, self.buckets))}"

    def __getitem__(self, number: int) -> Batch:
        """Makes batch `number`, counted from 0 at the start of training."""
        level, users, ends, weights = self._samples_of_batch(number)
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
        """What `collate` gathers batch `number` from, if the log holds all events of the dataset.

        Returns:
          `bucket` int32 [], the position of the batch's width in `buckets`; and for each row
          `starts` int32 and `lengths` int32, the arguments of `collate`, and `users` int32 and
          `weights` float32, fields of the batch.
        """
        level, users, ends, weights = self._samples_of_batch(number)
        lengths = np.minimum(ends, self.max_length)
        return {
            "bucket": np.array(level, np.int32),
            "starts": (self.dataset.offsets[users] + ends - lengths).astype(np.int32),
            "lengths": lengths.astype(np.int32),
            "users": users.astype(np.int32),
            "weights": weights,
        }

    def _samples_of_batch(self, number: int):
        """The position of the batch's bucket; and users, target events and weights of the rows."""
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
        """Users and target events of the samples at some positions of a bucket's shuffled list."""
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

    The list of a bucket begins with the `carried` samples of which the bucket below could not make
    full batches. The bucket's own samples follow, one user's after the other's.
    """

    width: int
    low: int
    before: np.ndarray  # int64 [n_users + 1], own samples of all users before each user
    carried: int
    size: int  # number of samples, carried and own
    first_batch: int  # number of its first batch in the epoch, before the shuffle
    batches: int


def _plan(targets: np.ndarray, widths: tuple[int, ...], batch_size: int) -> list[_Bucket]:
    """Deals samples out to buckets; `targets` int64 [n_users] counts the samples of each user."""
    plan, low, carried, first_batch = [], 0, 0, 0
    for width in widths:
        last = width == widths[-1]
        # The last bucket also takes the windows that are cut to its width.
        high = max(width, int(targets.max())) if last else width
        before = np.concatenate([[0], np.cumsum(np.clip(targets, low, high) - low)])
        size = carried + int(before[-1])
        batches = -(-size // batch_size) if last else size // batch_size
        plan.append(_Bucket(width, low, before, carried, size, first_batch, batches))
        low, carried, first_batch = width, size - batches * batch_size, first_batch + batches
    return plan


class EvalBatches:
    """Batches that hold every user with a target in a split once, shortest windows first.

    A row is the window before the user's target. The last batch is completed by rows of weight 0
    that repeat its first row.

    Attributes:
      dataset: holds the events.
      max_length: longest window.
      batch_size: rows of a batch.
      buckets: widths that a batch may have, rising; the last is `max_length`.
      n_targets: number of users with a target.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        *,
        max_length: int,
        batch_size: int,
        convention: Convention,
        buckets: Sequence[int] | None = None,
        sample: tuple[int, int] | None = None,
    ):
        """Plans the batches.

        Args:
          dataset: as for `TrainBatches`, and so are the others.
          split: whose targets the rows have.
          max_length: longest window.
          batch_size: rows of a batch.
          convention: of the time gaps.
          buckets: widths of batches.
          sample: a number of users and a seed that draws them. None: all users with a target.

        Raises:
          UserError: the buckets do not fit `max_length`, or no user has a target.
        """
        self.buckets = _checked_buckets(dataset, buckets, max_length)
        self.dataset, self.max_length, self.batch_size = dataset, max_length, batch_size
        self.convention: Convention = convention
        ends = getattr(dataset.splits, split)
        users = np.flatnonzero(ends >= 1)
        if not users.size:
            raise UserError(f"{dataset.directory}: no user has events enough for the {split} split")
        if sample is not None and sample[0] < len(users):
            number, seed = sample
            users = users[np.sort(permute(np.arange(number), len(users), (seed, number)))]
        lengths = np.minimum(ends[users], max_length)
        self._users = users[np.argsort(lengths, kind="stable")]
        self._ends = ends[self._users]
        self.n_targets = len(users)

    def __len__(self) -> int:
        return -(-self.n_targets // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.__getitem__, range(len(self)))

    def width(self, number: int) -> int:
        """Number of columns of `items` in batch `number`."""
        stop = min((number + 1) * self.batch_size, self.n_targets)
        longest = min(int(self._ends[stop - 1]), self.max_length)  # lengths rise
        return next(width for width in self.buckets if width >= longest)

    def __getitem__(self, number: int) -> Batch:
        """Makes batch `number`, from 0 to `len(self) - 1`."""
        first = number * self.batch_size
        rows = np.arange(first, first + self.batch_size)
        real = rows < self.n_targets
        rows = np.where(real, rows, first)
        batch = prefix_batch(
            self.dataset,
            self._users[rows],
            self._ends[rows],
            width=self.width(number),
            max_length=self.max_length,
            convention=self.convention,
        )
        return batch | {"weights": real.astype(np.float32)}


def default_buckets(
    targets: Int64[np.ndarray, " users"],
    max_length: int,
    *,
    max_buckets: int = 5,
    multiple: int = 4,
) -> tuple[int, ...]:
    """Chooses the widths of batches that leave the least padding in an epoch of training.

    Args:
      targets: number of training targets of each user.
      max_length: longest window, which is always a bucket.
      max_buckets: largest number of buckets. Each one is one more shape to compile.
      multiple: all buckets but the longest are multiples of this number.

    Returns:
      The widths, rising.
    """
    below = np.cumsum(window_counts(targets, max_length))
    longest = min(max_length, int(targets.max()) + multiple)
    lengths = [0, *range(multiple, longest, multiple), max_length]
    # best[i] is about the samples of up to lengths[i] events: the fewest positions of `items` that
    # hold them, the number of buckets used, and the buckets.
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


def window_counts(
    targets: Int64[np.ndarray, " users"], max_length: int
) -> Int64[np.ndarray, " max_length_and_1"]:
    """Number of training windows of each length, from 0 to `max_length`.

    Args:
      targets: number of training targets of each user. The n-th has n events before it.
      max_length: longer windows are cut to this length.
    """
    users = np.bincount(np.minimum(targets, max_length), minlength=max_length + 1)
    counts = np.cumsum(users[::-1])[::-1]  # users with at least that many targets
    counts[0] = 0
    counts[max_length] += np.maximum(targets - max_length, 0).sum()
    return counts


def _checked_buckets(
    dataset: Dataset, buckets: Sequence[int] | None, max_length: int
) -> tuple[int, ...]:
    if max_length < 1:
        raise UserError(f"a maximum length of {max_length} leaves no event; take 1 or more")
    if buckets is None:
        return default_buckets(np.maximum(dataset.splits.train - 1, 0), max_length)
    rising = tuple(sorted({int(width) for width in buckets}))
    if not rising or rising[0] < 1 or rising[-1] != max_length:
        raise UserError(f"buckets {tuple(buckets)} must be positive and the longest {max_length}")
    return rising
