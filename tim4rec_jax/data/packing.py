"""Packed training batches for the every-position objective: rows full of histories.

The training events of all users, shuffled user by user, make one stream; a row is the next
`max_length` positions of it. Nothing is padded but the end of an epoch, and any batch can be
made from its number. (Grain's packing yields one row after another with a state of its own;
here a batch stays the unit of work, and the resume is that of the prefix batches.)
"""

import functools
from typing import NamedTuple

import numpy as np

from tim4rec_jax.data.batches import Batch, permute, rows_of_process
from tim4rec_jax.data.dataset import Dataset, EventLog, samples_of_users


def pack(log: EventLog, indices: Batch) -> Batch:
    """Makes a packed batch; the same function on the host and inside a compiled step.

    Args:
      log: the events; arrays of NumPy, or of JAX as those in `indices`.
      indices: for every position of R rows of L `events` int32 [R,L], the number of its event in
        the log; `first` bool [R,L], whether a segment begins there; and `weights` float32 [R,L],
        1, or 0 for a position without an event. The event after a position's must be in the log.

    Returns:
      A batch as `PackedBatches` describes it.
    """
    xp = log.items.__array_namespace__()
    events, first, weights = indices["events"], indices["first"], indices["weights"]
    real = weights > 0
    following = xp.where(real, events + 1, 0)
    return {
        "items": xp.where(real, log.items[events], 0),
        "gaps": xp.where(real & ~first, log.gaps[events], 0),
        "segment_ids": xp.cumsum(first, axis=1, dtype=xp.int32),
        "targets": xp.where(real, log.items[following], 0),
        "time_to_next": xp.where(real, log.gaps[following], 0),
        "dates": xp.where(real, log.dates[events], 0),
        "weights": weights,
    }


class PackedBatches:
    """An endless, shuffled sequence of packed training batches with random access.

    The targets of an epoch are those of `TrainBatches` (every event of a history but the
    first and the last two), each predicted from the events before it in its row. Where a row
    ends within a history the rest goes on in the next row as a history of its own, at other
    places in every epoch; so none is longer than `max_length`.

    Elements, with R rows and L = max_length:
      items: int32 [R,L], 0 only behind the end of an epoch.
      gaps: float32 [R,L], exact seconds since the event before, 0 at the first of a segment.
      segment_ids: int32 [R,L], rising along a row from 1; which segment a position belongs to.
      targets: int32 [R,L], the event after.
      time_to_next: float32 [R,L], seconds until it.
      dates: float32 [R,L], of the event, days since 1970.
      weights: float32 [R,L], 1, or 0 behind the end of an epoch.

    Attributes:
      buckets: widths of rows, only one.
      n_samples: targets in an epoch.
      batches_per_epoch: batches in an epoch.
      fill: share of the positions of an epoch that hold an event.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        max_length: int,
        batch_size: int,
        seed: int,
        windows_per_user: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Plans the epochs.

        Args:
          dataset: an open dataset.
          max_length: positions of a row.
          batch_size: rows of a batch over all processes.
          seed: chooses shuffles and windows.
          windows_per_user: an epoch takes at most `windows_per_user * max_length` consecutive
            targets of a user, anew in every epoch; None: all.
          process_index: which share of each batch to make.
          process_count: number of equal shares.

        Raises:
          UserError: the numbers do not fit together, or there is nothing to train on.
        """
        self._rows = rows_of_process(batch_size, process_index, process_count)
        self.dataset, self.seed, self.max_length = dataset, seed, max_length
        samples = samples_of_users(dataset)
        self._users = np.flatnonzero(samples)
        self._samples = samples[self._users]
        most = int(samples.max()) if windows_per_user is None else windows_per_user * max_length
        self._taken = np.minimum(self._samples, most)
        self.n_samples = int(self._taken.sum())
        self._positions = batch_size * max_length
        self.buckets = (max_length,)
        self.batches_per_epoch = -(-self.n_samples // self._positions)
        self.fill = self.n_samples / (self.batches_per_epoch * self._positions)
        # Threads work at the end of one epoch and at the beginning of the next.
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    @property
    def layout(self) -> str:
        """How samples are laid out, in words."""
        return f"rows of {self.max_length} packed to {self.fill:.1%}"

    def __getitem__(self, number: int) -> Batch:
        """Makes batch `number`, counted from the start of training (0 and up)."""
        begins, lengths = self._segments(number)
        # One event more, as this process may have no segment of an epoch's last batch.
        log, places = self.dataset.events(np.append(begins, 0), np.append(lengths + 1, 1))
        return pack(log, self._indices(places[:-1], lengths))

    def indices(self, number: int) -> Batch:
        """What batch `number` is gathered from, if all events lie in one log; see `pack`.

        Returns:
          `bucket` int32 [], always 0; and for every position `events` int32 [R,L], `first` bool
          [R,L] and `weights` float32 [R,L].
        """
        return {"bucket": np.zeros((), np.int32), **self._indices(*self._segments(number))}

    def _indices(self, begins, lengths) -> Batch:
        """The arguments of `pack` for segments that begin at the events `begins` of a log."""
        starts = np.cumsum(lengths) - lengths
        filled = int(lengths.sum())
        shape = (len(self._rows), self.max_length)
        events, first, weights = (np.zeros(shape, kind) for kind in (np.int32, bool, np.float32))
        events.reshape(-1)[:filled] = np.repeat(begins - starts, lengths) + np.arange(filled)
        first.reshape(-1)[starts] = True
        weights.reshape(-1)[:filled] = 1
        return {"events": events, "first": first, "weights": weights}

    def _segments(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the first events of a batch's segments, and how many events they have."""
        epoch, number = divmod(number, self.batches_per_epoch)
        plan, length = self._epoch(epoch), self.max_length
        first = number * self._positions + int(self._rows[0]) * length
        end = max(min(first + len(self._rows) * length, self.n_samples), first)
        # A segment ends with a history or with a row.
        histories = plan.starts[slice(*np.searchsorted(plan.starts, [first, end]))]
        starts = np.union1d(np.arange(first, end, length), histories)
        user = np.searchsorted(plan.starts, starts, side="right") - 1
        return plan.events[user] + starts - plan.starts[user], np.diff(starts, append=end)

    def _plan_epoch(self, epoch: int) -> "_Epoch":
        order = permute(np.arange(len(self._users)), len(self._users), (self.seed, epoch))
        taken, samples, users = self._taken[order], self._samples[order], self._users[order]
        words = np.random.SeedSequence((self.seed, epoch, 1)).generate_state(len(order), np.uint64)
        skipped = (words % (samples - taken + 1).astype(np.uint64)).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(taken)[:-1]])
        return _Epoch(starts, self.dataset.offsets[users] + skipped)


class _Epoch(NamedTuple):
    """The stream of an epoch: the histories in it, one after the other."""

    starts: np.ndarray  # position of the first event in the stream, rising
    events: np.ndarray  # its number in the dataset
