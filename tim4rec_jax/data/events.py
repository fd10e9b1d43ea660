"""Logs of events, and the windows and time gaps that batches are made of.

A log holds the events of users, one user's after the other's. `EventLog` is for the host and has
exact times. `DeviceLog` is for devices, which have no 64-bit integers unless JAX is told so, so
that everything that needs exact times is computed beforehand. Both have the same methods and give
the same bits.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64, Shaped

Array = Any  # an array of NumPy or of JAX
Convention = Literal["recbole", "exact"]


@dataclasses.dataclass(frozen=True, eq=False)
class EventLog:
    """Events in the memory of the host, in arrays of NumPy.

    Attributes:
      items: item indices.
      timestamps: seconds since 1970.
    """

    items: Int32[np.ndarray, " E"]
    timestamps: Int64[np.ndarray, " E"]

    def gaps_at(self, events: Int[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
        """Exact seconds from the event before in the log, whichever user that belongs to.

        Args:
          events: numbers of events; the gap of event 0 means nothing.
        """
        return (self.timestamps[events] - self.timestamps[events - 1]).astype(np.float32)

    def dates_at(self, events: Int[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
        """Days since 1970 of some events."""
        return days(self.timestamps[events])

    def window_gaps(
        self,
        starts: Int[np.ndarray, " B"],
        lengths: Int[np.ndarray, " B"],
        width: int,
        convention: Convention,
    ) -> Float32[np.ndarray, "B width"]:
        """The gaps in the windows that `windows` would gather; see `time_gaps`."""
        return time_gaps(windows(self.timestamps, starts, lengths, width), lengths, convention)


class DeviceLog(NamedTuple):
    """Events in the memory of a device, in arrays of JAX; the methods are those of `EventLog`.

    Attributes:
      items: item indices.
      gaps: exact seconds from the event before in the log.
      times: seconds since 1970, rounded to float32.
      dates: days since 1970.
    """

    items: Int32[Array, " E"]
    gaps: Float32[Array, " E"]
    times: Float32[Array, " E"]
    dates: Float32[Array, " E"]

    @classmethod
    def from_host(cls, log: EventLog) -> "DeviceLog":
        """Computes the columns, which are still arrays of NumPy."""
        gaps = np.diff(log.timestamps, prepend=log.timestamps[:1]).astype(np.float32)
        return cls(log.items, gaps, log.timestamps.astype(np.float32), days(log.timestamps))

    def gaps_at(self, events: Int[Array, "..."]) -> Float32[Array, "..."]:
        """See `EventLog.gaps_at`."""
        return self.gaps[events]

    def dates_at(self, events: Int[Array, "..."]) -> Float32[Array, "..."]:
        """See `EventLog.dates_at`."""
        return self.dates[events]

    def window_gaps(
        self,
        starts: Int[Array, " B"],
        lengths: Int[Array, " B"],
        width: int,
        convention: Convention,
    ) -> Float32[Array, "B width"]:
        """See `EventLog.window_gaps`."""
        xp = self.items.__array_namespace__()
        if convention == "recbole":
            times = windows(self.times, starts, lengths, width)
            return xp.diff(times, axis=1, prepend=times[:, :1])
        # In the log, the event before a window's first one may be another user's.
        return xp.where(xp.arange(width) > 0, windows(self.gaps, starts, lengths, width), 0)


def days(timestamps: Int64[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Days since 1970 of times in seconds, exact to three minutes."""
    return (timestamps / 86_400).astype(np.float32)


def time_gaps(
    timestamps: Int64[np.ndarray, "B L"],
    lengths: Int[np.ndarray, " B"],
    convention: Convention = "recbole",
) -> Float32[np.ndarray, "B L"]:
    """Seconds from the event before to each event.

    Args:
      timestamps: times of events in seconds, padded with 0 on the right.
      lengths: number of events of each row.
      convention: `"recbole"` computes what the published implementation feeds its model. Times
        are first rounded to float32, whose values are 64 s apart near 9e8. The difference runs
        on into the padding, so that the first pad holds minus the last time. `"exact"` takes
        differences in int64 and leaves 0 at pads.

    Returns:
      The gaps. The first of each row is 0.
    """
    times = timestamps.astype(np.float32) if convention == "recbole" else timestamps
    gaps = np.zeros(times.shape, np.float32)
    np.subtract(times[:, 1:], times[:, :-1], out=gaps[:, 1:])  # rounds the differences of int64
    if convention == "exact":
        _clear_padding(gaps, lengths)
    return gaps


def windows(
    values: Shaped[Array, " E"], starts: Int[Array, " B"], lengths: Int[Array, " B"], width: int
) -> Shaped[Array, "B width"]:
    """Gathers `values[start : start + length]` into each row, padded with 0 on the right.

    Args:
      values: one value for each event of a log, in an array of NumPy or of JAX.
      starts: number of the first event of each row.
      lengths: number of events of each row; those beyond `width` are left out.
      width: columns of the result.
    """
    xp = values.__array_namespace__()
    if xp is np:
        out = _copy_runs(values, starts, width)
        _clear_padding(out, lengths)
        return out
    column = xp.arange(width, dtype=starts.dtype)
    inside = column < lengths[:, None]
    events = xp.where(inside, starts[:, None] + column, 0)
    return xp.where(inside, values[events], 0)


def _clear_padding(rows: np.ndarray, lengths: np.ndarray) -> None:
    """Sets what follows the first `length` values of each row to 0."""
    # A comparison of int32 takes half the time of one of int64.
    column = np.arange(rows.shape[1], dtype=np.int32)
    np.copyto(rows, 0, where=column >= lengths.astype(np.int32)[:, None])


def _copy_runs(values: np.ndarray, starts: np.ndarray, width: int) -> np.ndarray:
    """Copies `values[start : start + width]` into each row; past the end there may be anything.

    Copying runs of memory takes a third of the time of an index for every element.
    """
    if len(values) < width:
        values = np.pad(values, (0, width - len(values)))
    last = len(values) - width
    # The run that begins at each event, without a copy. `sliding_window_view` makes the same view
    # in ten times as long, which a single history would feel.
    runs = np.ndarray((last + 1, width), values.dtype, values, strides=2 * values.strides)
    reached = np.minimum(starts, last)
    out = runs[reached]
    for row in np.flatnonzero(reached < starts):  # the few rows that would run past the end
        out[row] = np.roll(out[row], reached[row] - starts[row])
    return out
