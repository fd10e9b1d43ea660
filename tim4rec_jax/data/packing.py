"""Packed training batches for the objective `every_position`: rows full of histories.

The training events of all users, in the shuffled order of the users, make one stream. A row is the
next `max_length` events of the stream. Only the end of an epoch is padded.

Grain has a packing of its own, which yields one row after the other from a state. Here any batch
is made from its number, so that training resumes as it does with `TrainBatches`.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from tim4rec_jax.data.batches import Batch, ShuffledBatches, permute
from tim4rec_jax.data.dataset import Dataset, train_targets
from tim4rec_jax.data.events import DeviceLog, EventLog


def pack(log: EventLog | DeviceLog, indices: Batch) -> Batch:
    """Gathers a packed batch from a log.

    The same function works on the host and inside a compiled step: with an `EventLog` the arrays
    of `indices` are NumPy's, and with a `DeviceLog` they are JAX's.

    Args:
      log: the events.
      indices: for every position of B rows of L, `events` int32 [B, L], the number of the event in
        the log; `first` bool [B, L], whether a segment begins there; and `weights` float32
        [B, L], 1 for an event and 0 for padding. The event after each one must be in the log too.

    Returns:
      A batch of packed rows, as the table in `tim4rec_jax.data.batches` describes it.
    """
    xp = log.items.__array_namespace__()
    events, first, weights = indices["events"], indices["first"], indices["weights"]
    real = weights > 0
    following = xp.where(real, events + 1, 0)
    return {
        "items": xp.where(real, log.items[events], 0),
        "gaps": xp.where(real & ~first, log.gaps_at(events), 0),
        "segment_ids": xp.cumsum(first, axis=1, dtype=xp.int32),
        "targets": xp.where(real, log.items[following], 0),
        "time_to_next": xp.where(real, log.gaps_at(following), 0),
        "dates": xp.where(real, log.dates_at(events), 0),
        "weights": weights,
    }


def shuffle_ties(
    log: EventLog,
    starts: Int[np.ndarray, " H"],
    lengths: Int[np.ndarray, " H"],
    order: str,
    ranks: Int[np.ndarray, " E"],
) -> EventLog:
    """A log of some histories, in which the events of one moment stand in another order.

    Nobody knows the order of events of the same time; that of the source is one of many.

    Args:
      log: the events.
      starts: number of the first event of each history.
      lengths: number of events of each history; E in all.
      order: of the events of the dataset, which says what is one moment: "exact", the same second,
        or "recbole", the same time as float32.
      ranks: events of one moment come in the order of their ranks. The events of the histories have
        them one after the other.

    Returns:
      The histories one after the other.
    """
    events = _runs(starts, lengths)
    items, times = log.items[events], log.timestamps[events]
    begins = np.diff(times.astype(np.float32) if order == "recbole" else times, prepend=0) != 0
    begins[np.cumsum(lengths) - lengths] = True
    places = np.lexsort((ranks, begins.cumsum()))
    return EventLog(items[places], times[places])


def _runs(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers `start`, `start + 1` and so on of each run, one run after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])


class PackedBatches(ShuffledBatches):
    """Training batches of the objective `every_position`: each event of a row has a target.

    The targets of an epoch are those of `TrainBatches`. Each is predicted from the events before
    it in its segment. Where a row ends within a history, the rest of the history begins a new
    segment in the next row. The shuffle of the users moves these places in every epoch.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        max_length: int,
        batch_size: int,
        seed: int,
        windows_per_user: int | None = None,
        shuffle_ties: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Plans the epochs.

        Args:
          dataset: an open dataset.
          max_length: positions of a row.
          batch_size: rows of a batch over all processes.
          seed: chooses the shuffles and the windows.
          windows_per_user: an epoch takes at most `windows_per_user * max_length` targets of a
            user, consecutive ones that are drawn anew in every epoch. `None` takes all.
          shuffle_ties: whether events of one moment come in a new order in each epoch, see
            `shuffle_ties`. `indices` knows nothing of that.
          process_index: which share of each batch to make, from 0.
          process_count: number of equal shares.

        Raises:
          UserError: the numbers do not fit together, or there is nothing to train on.
        """
        super().__init__(dataset, max_length, batch_size, seed, process_index, process_count)
        self._shuffles = shuffle_ties
        self._of_users = targets = train_targets(dataset)
        self._users = np.flatnonzero(targets)
        self._targets = targets[self._users]
        most = int(targets.max()) if windows_per_user is None else windows_per_user * max_length
        self._taken = np.minimum(self._targets, most)
        self._positions = batch_size * max_length
        self.buckets = (max_length,)
        self.n_targets = self.n_events = int(self._taken.sum())
        self.batches_per_epoch = -(-self.n_events // self._positions)
        self.padding_share = 1 - self.n_events / (self.batches_per_epoch * self._positions)
        # Threads work at the end of one epoch and at the beginning of the next.
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    @property
    def layout(self) -> str:
        """The length and the filling of the rows, for people."""
        return f"rows of {self.max_length} packed to {1 - self.padding_share:.1%}"

    def __getitem__(self, number: int) -> Batch:
        """Makes batch `number`, counted from 0 at the start of training."""
        begins, lengths = self._segments(number)
        if self._shuffles and len(begins):
            log, places = self._shuffled(number, begins)
        else:
            # The log has one event more, because this process may have no segment in an epoch's
            # last batch.
            log, places = self.dataset.events(np.append(begins, 0), np.append(lengths + 1, 1))
            places = places[:-1]
        return pack(log, self._indices(places, lengths))

    def _shuffled(self, number: int, begins: np.ndarray) -> tuple[EventLog, np.ndarray]:
        """A log with the segments of a batch after `shuffle_ties`, and where they begin in it.

        It holds the training events of all users of the batch, because the ties of a moment may lie
        in several segments, and each event of them must be the target of one.
        """
        data, offsets = self.dataset, self.dataset.offsets
        users, user = np.unique(
            np.searchsorted(offsets, begins, side="right") - 1, return_inverse=True
        )
        first, counts = offsets[users], self._of_users[users] + 1
        key = (self.seed, number // self.batches_per_epoch, 2)
        ranks = permute(_runs(first, counts), data.n_events, key)
        log, places = data.events(first, counts)
        log = shuffle_ties(log, places, counts, data.order, ranks)
        return log, (np.cumsum(counts) - counts - first)[user] + begins

    def indices(self, number: int) -> Batch:
        """What `pack` gathers batch `number` from, if the log holds all events of the dataset.

        Returns:
          The `indices` of `pack`, and `bucket` int32 [], the position of the batch's width in
          `buckets`, which is always 0.
        """
        return {"bucket": np.zeros((), np.int32), **self._indices(*self._segments(number))}

    def _indices(self, begins: np.ndarray, lengths: np.ndarray) -> Batch:
        """The `indices` of `pack` for segments that begin at the events `begins` of a log."""
        starts = np.cumsum(lengths) - lengths
        filled = int(lengths.sum())
        shape = (len(self._rows), self.max_length)
        events, first, weights = (np.zeros(shape, kind) for kind in (np.int32, bool, np.float32))
        events.reshape(-1)[:filled] = np.repeat(begins - starts, lengths) + np.arange(filled)
        first.reshape(-1)[starts] = True
        weights.reshape(-1)[:filled] = 1
        return {"events": events, "first": first, "weights": weights}

    def _segments(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The first event of each segment of a batch in the dataset, and the segments' lengths."""
        epoch, number = divmod(number, self.batches_per_epoch)
        plan, length = self._epoch(epoch), self.max_length
        first = number * self._positions + int(self._rows[0]) * length
        end = max(min(first + len(self._rows) * length, self.n_events), first)
        # A segment ends where a history or a row ends.
        histories = plan.starts[slice(*np.searchsorted(plan.starts, [first, end]))]
        starts = np.union1d(np.arange(first, end, length), histories)
        user = np.searchsorted(plan.starts, starts, side="right") - 1
        return plan.events[user] + starts - plan.starts[user], np.diff(starts, append=end)

    def _plan_epoch(self, epoch: int) -> "_Epoch":
        order = permute(np.arange(len(self._users)), len(self._users), (self.seed, epoch))
        taken, targets, users = self._taken[order], self._targets[order], self._users[order]
        words = np.random.SeedSequence((self.seed, epoch, 1)).generate_state(len(order), np.uint64)
        skipped = (words % (targets - taken + 1).astype(np.uint64)).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(taken)[:-1]])
        return _Epoch(starts, self.dataset.offsets[users] + skipped)


class _Epoch(NamedTuple):
    """The stream of an epoch: the histories in it, one after the other."""

    starts: np.ndarray  # position of each history's first event in the stream, rising
    events: np.ndarray  # number of that event in the dataset
