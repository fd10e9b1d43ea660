"""The prepared dataset: opened, checked, memory-mapped, never copied."""

import dataclasses
import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int, Int32, Int64, Shaped

from tim4rec_jax.data import format as fmt
from tim4rec_jax.data.splits import Splits, by_time, date, leave_one_out, moment
from tim4rec_jax.errors import UserError

# ---- data.dataset
# The prepared dataset as the rest of the system sees it: memory-mapped, checked, never copied.


Array = Any  # an array of NumPy or of JAX
_COLUMNS = ("items", "timestamps")


def days(timestamps: Int64[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Days since 1970 of times in seconds, exact to three minutes."""
    return (timestamps / 86_400).astype(np.float32)


class EventLog(NamedTuple):
    """Events in memory, one user's after the other's, as batches are gathered from them.

    The arrays are NumPy's, or JAX's where the log lies on a device. No column needs more than
    32 bits, which is what a device has.

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
    """The log of events with exact times, in seconds since 1970."""
    gaps = np.diff(timestamps, prepend=timestamps[:1]).astype(np.float32)
    return EventLog(items, gaps, timestamps.astype(np.float32), days(timestamps))


def windows(
    values: Shaped[Array, "E"], starts: Int[Array, "B"], lengths: Int[Array, "B"], width: int
) -> Shaped[Array, "B width"]:
    """Gathers `values[start : start + length]` for every row and pads it with 0 on the right.

    Args:
      values: one value of every event of a log; an array of NumPy or of JAX.
      starts: number of the first event of each row.
      lengths: number of events of each row; those beyond `width` are left out.
      width: columns of the result.
    """
    xp = values.__array_namespace__()
    column = xp.arange(width, dtype=starts.dtype)
    inside = column < lengths[:, None]
    if xp is np:
        out = _runs(values, starts, width)
        out[~inside] = 0
        return out
    events = xp.where(inside, starts[:, None] + column, 0)
    return xp.where(inside, values[events], 0)


def _runs(values: np.ndarray, starts: np.ndarray, width: int) -> np.ndarray:
    """Gathers `values[start : start + width]` for each start; what is past the end is anything.

    Copying runs of memory takes half the time of an index for every element.
    """
    if len(values) < width:
        values = np.pad(values, (0, width - len(values)))
    reached = np.minimum(starts, len(values) - width)
    out = np.lib.stride_tricks.sliding_window_view(values, width)[reached]
    for row in np.flatnonzero(reached < starts):  # the few that would run past the end
        out[row] = np.roll(out[row], reached[row] - starts[row])
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """One record batch: the events of consecutive users, views on the mapped file."""

    start: int  # position of its first event among all events of the dataset
    items: Int32[np.ndarray, "events"]
    timestamps: Int64[np.ndarray, "events"]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Event sequences of users, as `tim4rec_jax.data.open_dataset` returns them.

    Attributes:
      directory: where it lies.
      metadata: what dataset.json holds.
      user_ids: original id of each user, a pyarrow string array [n_users].
      item_ids: original id of each item, a pyarrow string array; position i - 1 for index i.
      item_counts: events of each item, likewise.
      offsets: the events of user u are numbers `offsets[u]` to `offsets[u + 1]` of the dataset.
      chunks: the events themselves.
      time_splits: how it is split, where not leave one out; see `split`.
      split_in_words: the same, to be read.
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
        """Event order of the preparation: `"exact"` or `"recbole"`."""
        return self.metadata["order"]

    @property
    def n_users(self) -> int:
        """Number of users."""
        return len(self.offsets) - 1

    @property
    def n_items(self) -> int:
        """Number of items, the padding item 0 not counted: indices run from 1 to `n_items`."""
        return len(self.item_counts)

    @property
    def n_events(self) -> int:
        """Number of events."""
        return int(self.offsets[-1])

    @cached_property
    def lengths(self) -> Int64[np.ndarray, "n_users"]:
        """Events of each user."""
        return np.diff(self.offsets)

    @cached_property
    def splits(self) -> Splits:
        """Which events train, validate and test."""
        return self.time_splits or leave_one_out(self.lengths)

    def split(
        self, how: str, valid_from: str | None = None, test_from: str | None = None
    ) -> "Dataset":
        """The same dataset, split in another way; see `tim4rec_jax.data.splits`.

        Args:
          how: `"leave_one_out"` or `"global_time"`.
          valid_from: for `global_time`, an ISO date or seconds since 1970; by default 80 % of all
            events are before.
          test_from: likewise; by default 90 % are.

        Raises:
          UserError: a date cannot be read, or they leave nothing to train, validate or test on.
        """
        if how == "leave_one_out":
            return dataclasses.replace(self, time_splits=None, split_in_words="leave one out")
        times = np.concatenate([chunk.timestamps for chunk in self.chunks])
        valid = _moment("valid_from", valid_from, np.quantile(times, 0.8))
        test = _moment("test_from", test_from, np.quantile(times, 0.9))
        words = f"validation from {date(valid)}, test from {date(test)}"
        splits = by_time(times, self.offsets, valid, test)
        for name, numbers in splits._asdict().items():
            if numbers.max() < (2 if name == "train" else 1):
                raise UserError(
                    f"{self.directory}, {words}, has no {name} events; choose other dates for "
                    "config.data.valid_from and config.data.test_from"
                )
        return dataclasses.replace(self, time_splits=splits, split_in_words=words)

    @cached_property
    def _chunk_starts(self) -> Int64[np.ndarray, "chunks"]:
        return np.array([chunk.start for chunk in self.chunks], np.int64)

    def items(
        self, starts: Int64[np.ndarray, "B"], lengths: Int[np.ndarray, "B"], width: int
    ) -> Int32[np.ndarray, "B width"]:
        """Item indices of the events `starts[b]` to `starts[b] + lengths[b]`, padded with 0.

        Args:
          starts: number of the first event, as counted by `offsets`.
          lengths: how many events; more than `width` are cut. All of one row belong to one user.
          width: columns of the result.
        """
        return self._padded("items", starts, lengths, width)

    def timestamps(
        self, starts: Int64[np.ndarray, "B"], lengths: Int[np.ndarray, "B"], width: int
    ) -> Int64[np.ndarray, "B width"]:
        """Times of events in seconds since 1970; arguments as for `items`."""
        return self._padded("timestamps", starts, lengths, width)

    def _padded(self, column, starts, lengths, width):
        if len(self.chunks) == 1:
            return windows(getattr(self.chunks[0], column), starts, lengths, width)
        chunk_of = np.searchsorted(self._chunk_starts, starts, side="right") - 1
        out = np.empty((len(starts), width), getattr(self.chunks[0], column).dtype)
        for number in np.unique(chunk_of):
            chunk, rows = self.chunks[number], np.flatnonzero(chunk_of == number)
            values, firsts = getattr(chunk, column), starts[rows] - chunk.start
            out[rows] = windows(values, firsts, lengths[rows], width)
        return out

    def events(
        self, starts: Int64[np.ndarray, "B"], lengths: Int[np.ndarray, "B"]
    ) -> tuple[EventLog, Int64[np.ndarray, "B"]]:
        """Copies runs of events into a log of their own.

        Args:
          starts: number of the first event of each run, as counted by `offsets`.
          lengths: how many events. All of one run belong to one user.

        Returns:
          The log, and the number of each run's first event in it. Between runs lies padding.
        """
        width = int(lengths.max())
        items, timestamps = (self._padded(name, starts, lengths, width) for name in _COLUMNS)
        return event_log(items.ravel(), timestamps.ravel()), np.arange(len(starts)) * width

    def all_events(self) -> EventLog:
        """Copies all events into one log, in which they have the numbers that `offsets` counts."""
        columns = ([getattr(chunk, name) for chunk in self.chunks] for name in _COLUMNS)
        return event_log(*map(np.concatenate, columns))


def _moment(name: str, text: str | None, default: float) -> int:
    try:
        return int(default) if text is None else moment(text)
    except ValueError as error:
        raise UserError(
            f"config.data.{name} is {text!r}, which is neither an ISO date such as 2003-02-28 nor "
            "seconds since 1970"
        ) from error


# ---- data.reader
# Opens a prepared dataset directory: maps it, checks it, says what is wrong with it.

# Events looked at in one go: bounds what checking costs in memory, whatever the dataset's size.
_CHECK_EVENTS = 1 << 18
_AGAIN = "prepare the dataset again with `python -m data_prep`"


def open_dataset(directory: str | os.PathLike) -> Dataset:
    """Opens the dataset that `python -m data_prep ... --out DIRECTORY` wrote.

    Events stay in the memory-mapped files. All of them are read once, in small pieces, to
    check them.

    Args:
      directory: a prepared dataset (format: `tim4rec_jax.data.format`).

    Raises:
      UserError: something is missing, damaged or of another format version. Names the file,
        the row where there is one, and the remedy.
    """
    directory = Path(directory)
    metadata = read_metadata(directory)
    catalogue = read_items(directory, metadata)
    item_ids, item_counts = catalogue.column("item"), catalogue.column("count").to_numpy()
    users, chunks, ends, events = [], [], [np.zeros(1, np.int64)], 0
    for path in _sequence_files(directory, metadata["shards"]):
        for batch in _checked_batches(path, metadata):
            items, timestamps = (_values(batch, name) for name in ("items", "timestamps"))
            users.append(batch.column("user"))
            chunks.append(Chunk(events, items, timestamps))
            ends.append(events + _offsets(batch, "items")[1:])
            events += len(items)
    offsets = np.concatenate(ends)
    for key, found in (("users", len(offsets) - 1), ("events", events)):
        if found != metadata[key]:
            raise UserError(
                f"{directory}: the sequences hold {found} {key} and {fmt.DATASET_FILE} says "
                f"{metadata[key]}; {_AGAIN}"
            )
    if item_counts.sum() != events:
        raise UserError(
            f"{directory / fmt.ITEMS_FILE}: the counts of the items add up to "
            f"{item_counts.sum()} and there are {events} events; {_AGAIN}"
        )
    user_ids = pa.chunked_array(users, type=pa.string())
    return Dataset(directory, metadata, user_ids, item_ids, item_counts, offsets, tuple(chunks))


def read_metadata(directory: Path) -> dict:
    """What dataset.json of a prepared dataset holds.

    Raises:
      UserError: it is missing, damaged or of another format version.
    """
    path = directory / fmt.DATASET_FILE
    if not path.is_file():
        raise UserError(
            f"{path.parent} is not a prepared dataset ({path.name} is missing); make it with "
            f"`python -m data_prep NAME --out {path.parent}`"
        )
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {_AGAIN}") from error
    version = metadata.get("format_version") if isinstance(metadata, dict) else None
    if version != fmt.FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version}, and this release reads version "
            f"{fmt.FORMAT_VERSION}; {_AGAIN} of this release"
        )
    for key in fmt.DATASET_KEYS:
        kind = str if key in ("name", "order") else int
        if not isinstance(metadata.get(key), kind):
            raise UserError(f"{path}: `{key}` is missing or no {kind.__name__}; {_AGAIN}")
    if metadata["order"] not in ("exact", "recbole"):
        raise UserError(f"{path}: unknown event order {metadata['order']!r}; {_AGAIN}")
    return metadata


def read_items(directory: Path, metadata: dict) -> pa.Table:
    """The items of a prepared dataset: `ITEMS_SCHEMA`, and titles where there are any.

    Raises:
      UserError: the file is missing, damaged, or not the one that `metadata` describes.
    """
    path = directory / fmt.ITEMS_FILE
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    if list(table.schema)[:3] != list(fmt.ITEMS_SCHEMA):
        raise _other_columns(path, table.schema, fmt.ITEMS_SCHEMA)
    index = table.column("index").to_numpy()
    wrong = np.flatnonzero(index != np.arange(1, len(index) + 1))
    if wrong.size or len(index) != metadata["items"]:
        what = f"row {wrong[0]} has index {index[wrong[0]]}" if wrong.size else f"{len(index)} rows"
        raise UserError(
            f"{path}: {what}, expected indices 1 to {metadata['items']} in order; {_AGAIN}"
        )
    return table


def _sequence_files(directory: Path, shards: int) -> list[Path]:
    paths = [directory / fmt.sequences_file(shard, shards) for shard in range(shards)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing ({shards} in all); copy it here too, or {_AGAIN}")
    return paths


def _checked_batches(path: Path, metadata: dict) -> Iterator[pa.RecordBatch]:
    """Yields the record batches of one mapped sequences file, empty ones left out."""
    rows = 0
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if not reader.schema.equals(fmt.SEQUENCES_SCHEMA):
            raise _other_columns(path, reader.schema, fmt.SEQUENCES_SCHEMA)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            batch.validate(full=True)  # buffers, offsets and UTF-8, by Arrow itself
            if not len(batch):
                continue
            if problem := _first_problem(batch, metadata):
                row, reason = problem
                user = batch.column("user")[row].as_py()
                raise UserError(f"{path}: row {rows + row} (user {user!r}) {reason}; {_AGAIN}")
            yield batch
            rows += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _first_problem(batch: pa.RecordBatch, metadata: dict) -> tuple[int, str] | None:
    """Returns the row of the batch in which something is wrong, and what."""
    for column in batch.columns:
        if column.null_count:
            return _first_null(column), "holds a null"
    offsets, times_offsets = _offsets(batch, "items"), _offsets(batch, "timestamps")
    unequal = np.flatnonzero(offsets != times_offsets)
    if unequal.size:
        return int(unequal[0]) - 1, "has not as many timestamps as items"
    empty = np.flatnonzero(offsets[1:] == offsets[:-1])
    if empty.size:
        return int(empty[0]), "has no events"
    problem = _event_problem(batch, offsets, metadata)
    if not problem:
        return None
    event, reason = problem
    row = int(np.searchsorted(offsets, event, side="right")) - 1
    return row, f"{reason} at event {event - offsets[row]}"


def _event_problem(batch, offsets, metadata: dict) -> tuple[int, str] | None:
    """Returns the number of an event of the batch that is wrong, and what is wrong with it."""
    for name in ("items", "timestamps"):
        lists = batch.column(name).flatten()
        if lists.null_count:
            return _first_null(lists), f"holds a null in its {name}"
    items, timestamps = _values(batch, "items"), _values(batch, "timestamps")
    for first in range(0, len(items), _CHECK_EVENTS):
        some = items[first : first + _CHECK_EVENTS]
        if some.min() < 1 or some.max() > metadata["items"]:
            wrong = int(np.argmax((some < 1) | (some > metadata["items"])))
            return first + wrong, f"has item {some[wrong]}, outside 1 to {metadata['items']},"
        times = timestamps[first : first + _CHECK_EVENTS + 1]  # one more: pairs across pieces
        if times.min() < 0:
            return first + int(np.argmax(times < 0)), "has a negative timestamp"
        if metadata["order"] == "recbole":
            times = times.astype(np.float32)
        falls = first + 1 + np.flatnonzero(times[1:] < times[:-1])
        # Time may fall only where the next user starts.
        falls = falls[offsets[np.searchsorted(offsets, falls)] != falls]
        if falls.size:
            return int(falls[0]), f"is not in time order ({metadata['order']})"
    return None


def _first_null(values: pa.Array) -> int:
    return int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))


def _offsets(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """Where each row's events start, and the end of the last's: int64 [rows + 1], from 0."""
    offsets = batch.column(name).offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0]


def _values(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """The events of all rows, a view on the mapped file."""
    return batch.column(name).flatten().to_numpy(zero_copy_only=True)


def _other_columns(path: Path, found: pa.Schema, expected: pa.Schema) -> UserError:
    found, expected = (
        ", ".join(str(field)[len("pyarrow.Field<") : -1] for field in schema)
        for schema in (found, expected)
    )
    return UserError(f"{path} has the columns ({found}) instead of ({expected}); {_AGAIN}")


def _unreadable(path: Path, error: Exception) -> UserError:
    if not path.exists():
        return UserError(f"{path} is missing; {_AGAIN}")
    return UserError(f"{path} is damaged or incomplete ({error}); {_AGAIN}")


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
