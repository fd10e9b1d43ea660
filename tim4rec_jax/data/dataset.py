"""The prepared dataset as the rest of the system sees it: memory-mapped, checked, never copied."""

import dataclasses
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Int32, Int64

from tim4rec_jax.data.splits import Splits, by_time, date, leave_one_out, moment
from tim4rec_jax.errors import UserError


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
        return self._windows("items", np.int32, starts, lengths, width)

    def timestamps(
        self, starts: Int64[np.ndarray, "B"], lengths: Int[np.ndarray, "B"], width: int
    ) -> Int64[np.ndarray, "B width"]:
        """Times of events in the dataset's own unit; arguments as for `items`."""
        return self._windows("timestamps", np.int64, starts, lengths, width)

    def _windows(self, column, dtype, starts, lengths, width):
        out = np.empty((len(starts), width), dtype)
        chunk_of = np.searchsorted(self._chunk_starts, starts, side="right") - 1
        for number in np.unique(chunk_of):
            chunk = self.chunks[number]
            rows = slice(None) if len(self.chunks) == 1 else np.flatnonzero(chunk_of == number)
            out[rows] = _runs(getattr(chunk, column), starts[rows] - chunk.start, width)
        # A run goes on into the next user's events.
        out[np.arange(width) >= lengths[:, None]] = 0
        return out


def _moment(name: str, text: str | None, default: float) -> int:
    try:
        return int(default) if text is None else moment(text)
    except ValueError as error:
        raise UserError(
            f"config.data.{name} is {text!r}, which is neither an ISO date such as 2003-02-28 nor "
            "seconds since 1970"
        ) from error


def _runs(values: np.ndarray, starts: np.ndarray, width: int) -> np.ndarray:
    """Gathers `values[start : start + width]` for each start; what is past the end is anything.

    Copying runs of memory takes half the time of `np.take` with an index for every element,
    and no index array.
    """
    if len(values) < width:
        values = np.pad(values, (0, width - len(values)))
    reached = np.minimum(starts, len(values) - width)
    out = np.lib.stride_tricks.sliding_window_view(values, width)[reached]
    for row in np.flatnonzero(reached < starts):  # the few that would run past the end
        out[row] = np.roll(out[row], reached[row] - starts[row])
    return out
