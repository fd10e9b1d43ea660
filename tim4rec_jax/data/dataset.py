"""The events of users: mapped from a prepared dataset, or a log in memory."""

import dataclasses
import os
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int, Int32, Int64, Shaped

from tim4rec_jax.data import format as fmt
from tim4rec_jax.data.splits import Splits, by_time, format_time, leave_one_out, parse_time
from tim4rec_jax.errors import UserError

Array = Any  # an array of NumPy or of JAX
_COLUMNS = ("items", "timestamps")


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """The events of some consecutive users, as views on one record batch of the mapped file."""

    start: int  # number of the first event among all events of the dataset
    items: Int32[np.ndarray, "events"]
    timestamps: Int64[np.ndarray, "events"]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Event sequences of users, as `open_dataset` returns them. Times are seconds since 1970.

    Users count from 0, events count from 0 over all users, items count from 1 to `n_items`.

    Attributes:
      directory: the directory of the dataset.
      metadata: the content of `dataset.json`.
      user_ids: original id of each user, a pyarrow string array [n_users].
      item_ids: original id of each item, a pyarrow string array [n_items]; the item with index i
        is at position i - 1.
      item_counts: number of events of each item, at the same position.
      offsets: user u has the events `offsets[u]` to `offsets[u + 1]`, the last not included.
      chunks: the events.
      time_splits: the split by time, or `None` for leave one out; see `split`.
      split_in_words: the split, for people.
    """

    directory: Path
    metadata: dict
    user_ids: pa.ChunkedArray
    item_ids: pa.ChunkedArray
    item_counts: Int64[np.ndarray, "n_items"]
    offsets: Int64[np.ndarray, "n_users_and_1"]
    chunks: tuple[Chunk, ...]
    time_splits: Splits | None = None
    split_in_words: str = "leave one out"

    @property
    def name(self) -> str:
        """Name of the dataset."""
        return self.metadata["name"]

    @property
    def order(self) -> str:
        """How the preparation sorted events: `"exact"` or `"recbole"`."""
        return self.metadata["order"]

    @property
    def n_users(self) -> int:
        """Number of users."""
        return len(self.offsets) - 1

    @property
    def n_items(self) -> int:
        """Number of items. The padding item 0 is not counted."""
        return len(self.item_counts)

    @property
    def n_events(self) -> int:
        """Number of events."""
        return int(self.offsets[-1])

    @cached_property
    def lengths(self) -> Int64[np.ndarray, "n_users"]:
        """Number of events of each user."""
        return np.diff(self.offsets)

    @cached_property
    def splits(self) -> Splits:
        """Which events train, validate and test."""
        return self.time_splits or leave_one_out(self.lengths)

    def split(
        self, how: str, valid_from: str | None = None, test_from: str | None = None
    ) -> "Dataset":
        """Returns the same dataset with another split; see `tim4rec_jax.data.splits`.

        Args:
          how: `"leave_one_out"` or `"global_time"`.
          valid_from: for `"global_time"`, an ISO date or seconds since 1970. By default 80 % of
            all events are earlier.
          test_from: likewise. By default 90 % of all events are earlier.

        Raises:
          UserError: a date cannot be read, or nothing is left to train, validate or test on.
        """
        if how == "leave_one_out":
            return dataclasses.replace(self, time_splits=None, split_in_words="leave one out")
        times = np.concatenate([chunk.timestamps for chunk in self.chunks])
        cuts = []
        for name, text, share in (("valid_from", valid_from, 0.8), ("test_from", test_from, 0.9)):
            try:
                cuts.append(int(np.quantile(times, share)) if text is None else parse_time(text))
            except ValueError as error:
                raise UserError(
                    f"config.data.{name} is {text!r}, which is neither an ISO date such as "
                    "2003-02-28 nor seconds since 1970"
                ) from error
        words = "validation from {}, test from {}".format(*map(format_time, cuts))
        splits = by_time(times, self.offsets, *cuts)
        for name, numbers in splits._asdict().items():
            if numbers.max() < (2 if name == "train" else 1):
                raise UserError(
                    f"{self.directory}, {words}, has no {name} events; choose other dates for "
                    "config.data.valid_from and config.data.test_from"
                )
        return dataclasses.replace(self, time_splits=splits, split_in_words=words)

    def items(
        self, starts: Int64[np.ndarray, "B"], lengths: Int[np.ndarray, "B"], width: int
    ) -> Int32[np.ndarray, "B width"]:
        """Item indices of runs of events, padded with 0 on the right.

        Args:
          starts: number of the first event of each run.
          lengths: number of events of each run; those beyond `width` are left out. All events of
            one run belong to one user.
          width: columns of the result.
        """
        return self._windows("items", starts, lengths, width)

    def timestamps(
        self, starts: Int64[np.ndarray, "B"], lengths: Int[np.ndarray, "B"], width: int
    ) -> Int64[np.ndarray, "B width"]:
        """Times of runs of events, in seconds since 1970; the arguments are those of `items`."""
        return self._windows("timestamps", starts, lengths, width)

    def events(
        self, starts: Int64[np.ndarray, "B"], lengths: Int[np.ndarray, "B"]
    ) -> tuple["EventLog", Int64[np.ndarray, "B"]]:
        """Copies runs of events into a small log of their own.

        Args:
          starts: number of the first event of each run.
          lengths: number of events of each run. All events of one run belong to one user.

        Returns:
          The log, and the number of each run's first event in the log. Padding lies between runs.
        """
        width = int(lengths.max())
        items, timestamps = (self._windows(name, starts, lengths, width) for name in _COLUMNS)
        return event_log(items.ravel(), timestamps.ravel()), np.arange(len(starts)) * width

    def all_events(self) -> "EventLog":
        """Copies all events into one log, in which they keep their numbers."""
        columns = ([getattr(chunk, name) for chunk in self.chunks] for name in _COLUMNS)
        return event_log(*map(np.concatenate, columns))

    def _windows(self, column, starts, lengths, width):
        if len(self.chunks) == 1:
            return windows(getattr(self.chunks[0], column), starts, lengths, width)
        out = np.empty((len(starts), width), getattr(self.chunks[0], column).dtype)
        chunk_of = np.searchsorted([chunk.start for chunk in self.chunks], starts, side="right") - 1
        for number in np.unique(chunk_of):
            chunk, rows = self.chunks[number], np.flatnonzero(chunk_of == number)
            values, firsts = getattr(chunk, column), starts[rows] - chunk.start
            out[rows] = windows(values, firsts, lengths[rows], width)
        return out


def open_dataset(directory: str | os.PathLike) -> Dataset:
    """Opens the dataset that `python -m data_prep ... --out DIRECTORY` wrote.

    Events stay in the memory-mapped files. All of them are read once, in small pieces, to check
    them.

    Args:
      directory: a prepared dataset; see `tim4rec_jax.data.format`.

    Raises:
      UserError: something is missing, damaged or of another format version. The message names the
        file, the row where there is one, and the remedy.
    """
    directory = Path(directory)
    metadata = fmt.read_metadata(directory)
    catalogue = fmt.read_items(directory, metadata)
    item_counts = catalogue.column("count").to_numpy()
    users, chunks, ends, events = [], [], [np.zeros(1, np.int64)], 0
    for batch in fmt.map_sequences(directory, metadata):
        chunk = Chunk(events, *(fmt.list_values(batch, name) for name in _COLUMNS))
        users.append(batch.column("user"))
        chunks.append(chunk)
        ends.append(events + fmt.list_offsets(batch, "items")[1:])
        events += len(chunk.items)
    offsets = np.concatenate(ends)
    for key, found in (("users", len(offsets) - 1), ("events", events)):
        if found != metadata[key]:
            raise UserError(
                f"{directory}: the sequences hold {found} {key} and {fmt.DATASET_FILE} says "
                f"{metadata[key]}; {fmt.PREPARE_AGAIN}"
            )
    if item_counts.sum() != events:
        raise UserError(
            f"{directory / fmt.ITEMS_FILE}: the counts of the items add up to "
            f"{item_counts.sum()} and there are {events} events; {fmt.PREPARE_AGAIN}"
        )
    user_ids, item_ids = pa.chunked_array(users, type=pa.string()), catalogue.column("item")
    return Dataset(directory, metadata, user_ids, item_ids, item_counts, offsets, tuple(chunks))


def train_targets(dataset: Dataset) -> Int64[np.ndarray, "n_users"]:
    """Number of training targets of each user: every event that training sees but the first.

    Raises:
      UserError: there is no target at all.
    """
    targets = np.maximum(dataset.splits.train - 1, 0)
    if not targets.any():
        raise UserError(
            f"{dataset.directory}: no user has the 4 events that a training sample takes"
        )
    return targets


def train_item_counts(dataset: Dataset) -> Int64[np.ndarray, "n_items"]:
    """Number of events of each item among those that training sees."""
    counts = np.zeros(dataset.n_items + 1, np.int64)
    for chunk in dataset.chunks:
        counts += np.bincount(chunk.items[_train_mask(dataset, chunk)], minlength=len(counts))
    return counts[1:]


def train_dates(dataset: Dataset) -> tuple[int, int]:
    """Times of the first and of the last event that training sees, in seconds since 1970."""
    times = [chunk.timestamps[_train_mask(dataset, chunk)] for chunk in dataset.chunks]
    times = [part for part in times if part.size]
    return min(int(part.min()) for part in times), max(int(part.max()) for part in times)


def _train_mask(dataset: Dataset, chunk: Chunk) -> np.ndarray:
    """True for the events of a chunk that training sees."""
    numbers = chunk.start + np.arange(len(chunk.items))
    users = np.searchsorted(dataset.offsets, numbers, side="right") - 1
    return numbers - dataset.offsets[users] < dataset.splits.train[users]


class EventLog(NamedTuple):
    """Events in memory, from which batches are gathered.

    The arrays are NumPy's, or JAX's where the log lies on a device. No column needs more than 32
    bits for an event, because devices have no 64-bit integers unless JAX is told so.

    Attributes:
      items: item indices.
      gaps: exact seconds since the event before in the log, whichever user that belongs to.
      times: seconds since 1970, rounded to float32.
      dates: days since 1970.
    """

    items: Int32[Array, "E"]
    gaps: Float32[Array, "E"]
    times: Float32[Array, "E"]
    dates: Float32[Array, "E"]


def event_log(items: Int32[np.ndarray, "E"], timestamps: Int64[np.ndarray, "E"]) -> EventLog:
    """Makes a log of events with exact times in seconds since 1970."""
    gaps = np.diff(timestamps, prepend=timestamps[:1]).astype(np.float32)
    return EventLog(items, gaps, timestamps.astype(np.float32), days(timestamps))


def days(timestamps: Int64[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Days since 1970 of times in seconds, exact to three minutes."""
    return (timestamps / 86_400).astype(np.float32)


def windows(
    values: Shaped[Array, "E"], starts: Int[Array, "B"], lengths: Int[Array, "B"], width: int
) -> Shaped[Array, "B width"]:
    """Gathers `values[start : start + length]` into each row, padded with 0 on the right.

    Args:
      values: one value for each event of a log, in an array of NumPy or of JAX.
      starts: number of the first event of each row.
      lengths: number of events of each row; those beyond `width` are left out.
      width: columns of the result.
    """
    xp = values.__array_namespace__()
    column = xp.arange(width, dtype=starts.dtype)
    inside = column < lengths[:, None]
    if xp is np:
        out = _copy_runs(values, starts, width)
        out[~inside] = 0
        return out
    events = xp.where(inside, starts[:, None] + column, 0)
    return xp.where(inside, values[events], 0)


def _copy_runs(values: np.ndarray, starts: np.ndarray, width: int) -> np.ndarray:
    """Copies `values[start : start + width]` into each row; past the end there may be anything.

    Copying runs of memory takes half the time of an index for every element.
    """
    if len(values) < width:
        values = np.pad(values, (0, width - len(values)))
    reached = np.minimum(starts, len(values) - width)
    out = np.lib.stride_tricks.sliding_window_view(values, width)[reached]
    for row in np.flatnonzero(reached < starts):  # the few rows that would run past the end
        out[row] = np.roll(out[row], reached[row] - starts[row])
    return out
