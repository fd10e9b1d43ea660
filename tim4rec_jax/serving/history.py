"""Checks the histories that callers give, and turns them into arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from tim4rec_jax.errors import UserError
from tim4rec_jax.serving.catalogue import Catalogue, id_text

LAST_SECOND = 9_200_000_000  # in the year 2261; a later time is not in seconds


class Events(NamedTuple):
    """The known events of B histories, one history after the other.

    Attributes:
        items: the items, as indices of the catalogue.
        timestamps: the times, in whole seconds since 1970.
        offsets: history b has the events `offsets[b]` to `offsets[b + 1]`, the last not included.
    """

    items: Int32[np.ndarray, " N"]
    timestamps: Int64[np.ndarray, " N"]
    offsets: Int64[np.ndarray, " B_and_1"]

    @classmethod
    def joined(cls, parts: Sequence[Events]) -> Events:
        """The histories of all parts, one part after the other."""
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        return cls(
            np.concatenate([part.items for part in parts]),
            np.concatenate([part.timestamps for part in parts]),
            np.concatenate([[0], np.cumsum(lengths)]),
        )

    def rows(self, first: int, last: int) -> Events:
        """The histories `first` to `last`, the last not included."""
        start, stop = self.offsets[first], self.offsets[min(last, len(self.offsets) - 1)]
        return Events(
            self.items[start:stop],
            self.timestamps[start:stop],
            self.offsets[first : last + 1] - start,
        )

    def last_times(self) -> Int64[np.ndarray, " B"]:
        """The time of the last event of each history; a meaningless number for an empty one."""
        return np.append(self.timestamps, 0)[self.offsets[1:] - 1]

    def last_items(self, count: int, rows: int) -> Int32[np.ndarray, "R S"]:
        """The last items of each history, the last one first, in `rows` rows completed with 0."""
        place = self.offsets[1:, None] - 1 - np.arange(count)
        out = np.zeros((rows, count), np.int32)
        items = np.append(self.items, np.int32(0))  # there may be no events at all
        inside = place >= self.offsets[:-1, None]
        out[: len(place)] = np.where(inside, items[np.maximum(place, 0)], 0)
        return out

    def padded_items(self) -> Int32[np.ndarray, "B S"]:
        """All items of each history, padded with 0."""
        lengths = np.diff(self.offsets)
        out = np.zeros((len(lengths), int(lengths.max())), np.int32)
        out[np.arange(out.shape[1]) < lengths[:, None]] = self.items
        return out


def check_times(timestamps: Any, where: str = "") -> Int64[np.ndarray, " N"]:
    """The times as int64.

    Args:
        timestamps: whole seconds since 1970.
        where: what the message of an error begins with.

    Raises:
        UserError: a time is not a whole number, is negative, or is beyond the year 2261, as
            milliseconds are.
    """
    try:
        given = np.asarray(timestamps)
        with np.errstate(invalid="ignore"):  # NaN becomes some number, and is refused below
            times = given.astype(np.int64)
    except (TypeError, ValueError, OverflowError):  # texts, lists in lists, huge numbers
        given = times = np.empty((0, 0))
    if given.ndim != 1 or given.dtype.kind not in "iuf" or not np.array_equal(times, given):
        raise UserError(f"{where}timestamps must be whole seconds since 1970, as numbers")
    if times.size and times.min() < 0:
        raise UserError(
            f"{where}event {int(np.argmax(times < 0)) + 1} has the negative timestamp {times.min()}"
        )
    if times.size and times.max() > LAST_SECOND:
        raise UserError(
            f"{where}event {int(np.argmax(times > LAST_SECOND)) + 1} has the timestamp "
            f"{times.max()}, which is beyond the year 2261 if it is seconds; timestamps are whole "
            "seconds since 1970, so divide milliseconds by 1,000"
        )
    return times


def read_histories(
    histories: Sequence[tuple[Any, Any]], catalogue: Catalogue, *, sort: bool
) -> tuple[Events, list[int]]:
    """Checks histories, and leaves out the events whose items the model does not know.

    The order of events is judged as in the dataset of the training: by the exact time, or by the
    float32 that RecBole rounds the time to.

    Args:
        histories: for each user the original ids of the items, and their times in whole seconds
            since 1970.
        catalogue: the items that the model knows.
        sort: whether to sort the events by time, ties in the order given. Otherwise the times must
            not fall.

    Returns:
        The known events, and the number of unknown ones of each history.

    Raises:
        UserError: times fall, are no numbers, or are not as many as the items, or an item is
            neither a text nor a whole number.
    """
    rounded = catalogue.metadata["order"] == "recbole"
    items, times = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    lengths, unknown = [], []
    for number, (ids, timestamps) in enumerate(histories):
        where = f"history {number + 1}: " if len(histories) > 1 else ""
        if isinstance(ids, str) or len(ids) != len(timestamps):
            raise UserError(f"{where}items and timestamps must be lists of the same length")
        indices = catalogue.indices(id_text(item, f"{where}an item is") for item in ids)
        exact = check_times(timestamps, where)
        keys = exact.astype(np.float32) if rounded else exact
        falls = np.flatnonzero(keys[1:] < keys[:-1])
        if falls.size:
            if not sort:
                later = int(falls[0]) + 1
                raise UserError(
                    f"{where}event {later + 1} (item {ids[later]}, time {exact[later]}) is earlier "
                    f"than the one before it (time {exact[later - 1]}); put events in order of "
                    "time, or ask for them to be sorted"
                )
            order = np.argsort(keys, kind="stable")
            indices, exact = indices[order], exact[order]
        known = indices > 0
        items.append(indices[known])
        times.append(exact[known])
        lengths.append(len(items[-1]))
        unknown.append(len(known) - lengths[-1])
    return Events(np.concatenate(items), np.concatenate(times), np.cumsum([0, *lengths])), unknown
