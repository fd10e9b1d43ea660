"""Histories as callers give them, checked and turned into arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from tim4rec_jax.errors import UserError
from tim4rec_jax.serving.catalogue import Catalogue


class Events(NamedTuple):
    """Known events of B histories, one after the other: row b is `offsets[b] : offsets[b + 1]`."""

    items: Int32[np.ndarray, " N"]
    timestamps: Int64[np.ndarray, " N"]
    offsets: Int64[np.ndarray, " B_and_1"]

    def rows(self, first: int, last: int) -> Events:
        """Histories `first` to `last`, the last not included."""
        start, stop = self.offsets[first], self.offsets[min(last, len(self.offsets) - 1)]
        return Events(
            self.items[start:stop],
            self.timestamps[start:stop],
            self.offsets[first : last + 1] - start,
        )

    def last_times(self) -> Int64[np.ndarray, " B"]:
        """When the last event of each history was; of an empty one it means nothing."""
        return np.append(self.timestamps, 0)[self.offsets[1:] - 1]

    def padded_items(self) -> Int32[np.ndarray, "B S"]:
        """All items of each history, padded with 0."""
        lengths = np.diff(self.offsets)
        out = np.zeros((len(lengths), int(lengths.max())), np.int32)
        out[np.arange(out.shape[1]) < lengths[:, None]] = self.items
        return out


def check_times(timestamps: Any, where: str = "") -> Int64[np.ndarray, " N"]:
    """Times as int64.

    Args:
        timestamps: whole seconds since 1970.
        where: what to begin the message of an error with.

    Raises:
        UserError: some are no whole numbers, or negative.
    """
    try:
        given = np.asarray(timestamps)
        with np.errstate(invalid="ignore"):  # of NaN
            times = given.astype(np.int64)
    except (TypeError, ValueError, OverflowError):  # texts, lists in lists, huge numbers
        given = times = np.empty((0, 0))
    if given.ndim != 1 or given.dtype.kind not in "iuf" or not np.array_equal(times, given):
        raise UserError(f"{where}timestamps must be whole seconds since 1970, as numbers")
    if times.size and times.min() < 0:
        raise UserError(
            f"{where}event {int(np.argmax(times < 0)) + 1} has the negative timestamp {times.min()}"
        )
    return times


def read_histories(
    histories: Sequence[tuple[Any, Any]], catalogue: Catalogue, *, sort: bool
) -> tuple[Events, list[int]]:
    """Checks histories and leaves out events with items that the model does not know.

    Order is judged as the dataset of the training was sorted: by exact time, or by the float32
    that RecBole rounds it to.

    Args:
        histories: per user, original item ids and whole seconds since 1970.
        catalogue: items known.
        sort: sort by time, ties in the order given; otherwise times must not fall.

    Returns:
        The known events, and per history the number of unknown ones.

    Raises:
        UserError: times fall, are no numbers, or are not as many as items.
    """
    rounded = catalogue.metadata["order"] == "recbole"
    items, times, unknown = [], [], []
    for number, (ids, timestamps) in enumerate(histories):
        where = f"history {number + 1}: " if len(histories) > 1 else ""
        if isinstance(ids, str) or len(ids) != len(timestamps):
            raise UserError(f"{where}items and timestamps must be lists of the same length")
        indices, exact = catalogue.indices(ids), check_times(timestamps, where)
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
        unknown.append(len(known) - int(known.sum()))
        items.append(indices[known])
        times.append(exact[known])
    offsets = np.cumsum([0, *map(len, items)])
    return Events(_joined(items, np.int32), _joined(times, np.int64), offsets), unknown


def _joined(arrays: list[np.ndarray], dtype) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays])
