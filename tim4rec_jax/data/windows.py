"""Windows over histories: the last events before a target, their time gaps, batches of them."""

from typing import Literal

import numpy as np
from jaxtyping import Float32, Int, Int64

from tim4rec_jax.data.dataset import Dataset

Convention = Literal["recbole", "exact"]


def time_gaps(
    timestamps: Int64[np.ndarray, "B L"],
    lengths: Int[np.ndarray, "B"],
    convention: Convention = "recbole",
) -> Float32[np.ndarray, "B L"]:
    """Time passed since the event before, per event.

    Args:
      timestamps: times of events, right padded with 0.
      lengths: events of each row.
      convention: `"recbole"` computes what the published implementation feeds its model: times
        are rounded to float32 first (64 s apart near 9e8), and the difference runs on into the
        padding, so that the first pad holds minus the last time. `"exact"` takes differences
        in int64 and leaves 0 at pads.

    Returns:
      Gaps in the unit of `timestamps`; the first of each row is 0.
    """
    gaps = np.zeros(timestamps.shape, np.float32)
    if convention == "recbole":
        gaps[:, 1:] = np.diff(timestamps.astype(np.float32), axis=1)
    else:
        gaps[:, 1:] = np.diff(timestamps, axis=1)
        gaps[np.arange(timestamps.shape[1]) >= lengths[:, None]] = 0
    return gaps


def days(timestamps: Int64[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Days since 1970, exact to three minutes."""
    return (timestamps / 86_400).astype(np.float32)


def prefix_batch(
    dataset: Dataset,
    users: Int64[np.ndarray, "B"],
    ends: Int64[np.ndarray, "B"],
    *,
    width: int,
    max_length: int,
    convention: Convention,
) -> dict[str, np.ndarray]:
    """Gathers prefixes of histories and the events that follow them.

    Args:
      dataset: where from.
      users: row numbers of users.
      ends: the target is the user's event number `ends` (from 0), the input all before it.
      width: columns of `items`; at least the longest input or `max_length`.
      max_length: inputs are cut to their last `max_length` events.
      convention: see `time_gaps`.

    Returns:
      `items` int32 [B, width] right padded with 0; `lengths` int32 [B]; `gaps` float32
      [B, max_length], all columns whatever `width` is, because the time stream of the model
      looks at whole rows; `targets` int32 [B]; `waits` float32 [B], exact time from the last
      event to the target; `dates` float32 [B], of the last event, see `days`; `users` int32 [B].
    """
    lengths = np.minimum(ends, max_length)
    stop = dataset.offsets[users] + ends
    starts = stop - lengths
    gaps = np.zeros((len(users), max_length), np.float32)
    # The first pad column holds the spike of the recbole convention; beyond it all is 0.
    seen = min(width + 1, max_length)
    gaps[:, :seen] = time_gaps(dataset.timestamps(starts, lengths, seen), lengths, convention)
    around = dataset.timestamps(stop - 1, np.full_like(lengths, 2), 2)
    return {
        "items": dataset.items(starts, lengths, width),
        "lengths": lengths.astype(np.int32),
        "gaps": gaps,
        "targets": dataset.items(stop, np.ones_like(lengths), 1)[:, 0],
        "waits": (around[:, 1] - around[:, 0]).astype(np.float32),
        "dates": days(around[:, 0]),
        "users": users.astype(np.int32),
    }
