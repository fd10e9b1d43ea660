"""The events of users, mapped from a prepared dataset."""

import dataclasses
import mmap
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Int32, Int64

from tim4rec_jax.data import format as fmt
from tim4rec_jax.data.events import DeviceLog, EventLog, windows
from tim4rec_jax.data.features import FeatureTable
from tim4rec_jax.data.splits import Splits, by_time, format_time, leave_one_out, parse_time
from tim4rec_jax.errors import UserError

_COLUMNS = ("items", "timestamps")


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk(EventLog):
    """The events of some consecutive users, as views on one record batch of the mapped file.

    Attributes:
      start: number of the first event among all events of the dataset.
      mapped: the file; None: the events are no views on one.
    """

    start: int
    mapped: mmap.mmap | None = None

    def release(self) -> None:
        """Gives back the memory of the file, which is read again when it is needed."""
        if self.mapped is not None:
            fmt.release(self.mapped)


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
      features: what else is known of the items, or None.
      time_splits: the split by time, or `None` for leave one out; see `split`.
      split_in_words: the split, for people.
    """

    directory: Path
    metadata: dict
    user_ids: pa.ChunkedArray
    item_ids: pa.ChunkedArray
    item_counts: Int64[np.ndarray, "n_items"]
    offsets: Int64[np.ndarray, " n_users_and_1"]
    chunks: tuple[Chunk, ...]
    features: FeatureTable | None = None
    time_splits: Splits | None = None
    split_in_words: str = "leave one out"

    def __repr__(self) -> str:
        """One line; the columns would fill the screen of a notebook."""
        return (
            f"Dataset({self.name}: {self.n_users:,} users, {self.n_items:,} items, "
            f"{self.n_events:,} events, {self.split_in_words})"
        )

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
        self, starts: Int64[np.ndarray, " B"], lengths: Int[np.ndarray, " B"], width: int
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
        self, starts: Int64[np.ndarray, " B"], lengths: Int[np.ndarray, " B"], width: int
    ) -> Int64[np.ndarray, "B width"]:
        """Times of runs of events, in seconds since 1970; the arguments are those of `items`."""
        return self._windows("timestamps", starts, lengths, width)

    def events(
        self, starts: Int64[np.ndarray, " B"], lengths: Int[np.ndarray, " B"]
    ) -> tuple[EventLog, Int64[np.ndarray, " B"]]:
        """A log that holds runs of events.

        Args:
          starts: number of the first event of each run.
          lengths: number of events of each run. All events of one run belong to one user.

        Returns:
          The log, and the number of each run's first event in it. If the dataset has one chunk, the
          log is that chunk. Otherwise it is a copy of the runs with padding between them.
        """
        if len(self.chunks) == 1:
            return self.chunks[0], starts
        width = int(lengths.max())
        columns = (self._windows(name, starts, lengths, width).ravel() for name in _COLUMNS)
        return EventLog(*columns), np.arange(len(starts)) * width

    def all_events(self) -> DeviceLog:
        """Copies all events into one log for a device, in which they keep their numbers."""
        columns = ([getattr(chunk, name) for chunk in self.chunks] for name in _COLUMNS)
        return DeviceLog.from_host(EventLog(*map(np.concatenate, columns)))

    def gather(
        self,
        make: Callable[[EventLog, np.ndarray, np.ndarray], dict[str, np.ndarray]],
        starts: Int64[np.ndarray, " B"],
        lengths: Int[np.ndarray, " B"],
    ) -> dict[str, np.ndarray]:
        """Makes rows from runs of events, straight from the mapped files.

        Args:
          make: takes a log, and the `starts` and `lengths` of some runs in it. It returns arrays
            with one row for each run.
          starts: number of the first event of each run in the dataset.
          lengths: number of events of each run. All events of one run belong to one user.

        Returns:
          The arrays of `make`, with one row for each of the B runs.
        """
        if len(self.chunks) == 1:
            return make(self.chunks[0], starts, lengths)
        out = {}
        chunk_of = np.searchsorted([chunk.start for chunk in self.chunks], starts, side="right") - 1
        for number in np.unique(chunk_of):
            chunk, rows = self.chunks[number], np.flatnonzero(chunk_of == number)
            for name, part in make(chunk, starts[rows] - chunk.start, lengths[rows]).items():
                whole = np.empty((len(starts), *part.shape[1:]), part.dtype)
                out.setdefault(name, whole)[rows] = part
        return out

    def _windows(self, column: str, starts, lengths, width: int) -> np.ndarray:
        def make(log, starts, lengths):
            return {column: windows(getattr(log, column), starts, lengths, width)}

        return self.gather(make, starts, lengths)[column]


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
    counts, digest = np.zeros(len(catalogue) + 1, np.int64), fmt.SequencesDigest()
    for batch, mapped in fmt.map_sequences(directory, metadata):
        columns = (fmt.list_values(batch, name) for name in _COLUMNS)
        chunk = Chunk(*columns, start=events, mapped=mapped)
        users.append(batch.column("user"))
        chunks.append(chunk)
        ends.append(events + fmt.list_offsets(batch, "items")[1:])
        events += len(chunk.items)
        counts += np.bincount(chunk.items, minlength=len(counts))
        digest.update(batch)
    offsets = np.concatenate(ends)
    for key, found in (("users", len(offsets) - 1), ("events", events)):
        if found != metadata[key]:
            raise UserError(
                f"{directory}: the sequences hold {found} {key} and {fmt.DATASET_FILE} says "
                f"{metadata[key]}; {fmt.PREPARE_AGAIN}"
            )
    wrong = np.flatnonzero(item_counts != counts[1:])
    if wrong.size:
        row = int(wrong[0])
        raise UserError(
            f"{directory / fmt.ITEMS_FILE}: row {row} says that its item has {item_counts[row]} "
            f"events, and there are {counts[row + 1]}; {fmt.PREPARE_AGAIN}"
        )
    content = {"sequences": digest.hexdigest()}
    fmt.check_content(directory / fmt.SEQUENCES_GLOB, content, metadata)
    # A dataset of an earlier version records no digests. A run that is trained on it does.
    metadata["content"] = metadata.get("content") or content | fmt.items_digests(catalogue)
    user_ids, item_ids = pa.chunked_array(users, type=pa.string()), catalogue.column("item")
    features = fmt.read_item_features(directory, metadata)
    return Dataset(
        directory, metadata, user_ids, item_ids, item_counts, offsets, tuple(chunks), features
    )


def train_targets(dataset: Dataset) -> Int64[np.ndarray, " n_users"]:
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


def train_item_counts(dataset: Dataset) -> Int64[np.ndarray, " n_items"]:
    """Number of events of each item among those that training sees."""
    counts = np.zeros(dataset.n_items + 1, np.int64)
    for chunk in dataset.chunks:
        counts += np.bincount(chunk.items[_train_mask(dataset, chunk)], minlength=len(counts))
    return counts[1:]


def train_events(
    dataset: Dataset,
) -> tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " n"]]:
    """The items of the events that training sees, and their users, whose events are in order."""
    items, users = [], []
    for chunk in dataset.chunks:
        seen = _train_mask(dataset, chunk)
        numbers = chunk.start + np.flatnonzero(seen)
        items.append(chunk.items[seen])
        users.append((np.searchsorted(dataset.offsets, numbers, side="right") - 1).astype(np.int32))
    return np.concatenate(items), np.concatenate(users)


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
