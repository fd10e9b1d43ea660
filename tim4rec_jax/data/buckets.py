"""Chooses the few lengths to which batches are padded."""

import numpy as np
from jaxtyping import Int64


def train_prefixes(
    samples: Int64[np.ndarray, "users"], max_length: int
) -> Int64[np.ndarray, "max_length_and_1"]:
    """Number of training samples by window length, 0 to `max_length`.

    Args:
      samples: of each user; with n the events 1 to n (from 0) are targets, and target number t
        has t events before it.
      max_length: longer windows are cut to it.
    """
    users = np.bincount(np.minimum(samples, max_length), minlength=max_length + 1)
    counts = np.cumsum(users[::-1])[::-1]  # users with at least that many prefixes
    counts[0] = 0
    counts[max_length] += np.maximum(samples - max_length, 0).sum()
    return counts


def default_buckets(
    samples: Int64[np.ndarray, "users"], max_length: int, *, max_buckets: int = 5, multiple: int = 4
) -> tuple[int, ...]:
    """Bucket lengths that leave the least padding in an epoch of training.

    Args:
      samples: training samples of each user.
      max_length: the longest window, always a bucket.
      max_buckets: at most so many; each is one more shape to compile.
      multiple: all but the longest are multiples of it.

    Returns:
      Lengths in rising order.
    """
    below = np.cumsum(train_prefixes(samples, max_length))
    lengths = [0, *range(multiple, max_length, multiple), max_length]
    # best[i]: fewest item slots for samples of up to lengths[i] events, and the buckets that do it.
    best = {0: (0, 0, ())}
    for _ in range(max_buckets):
        best |= {
            i: min(
                (slots + int(below[end] - below[lengths[j]]) * end, used + 1, (*chosen, end))
                for j, (slots, used, chosen) in best.items()
                if j < i
            )
            for i, end in enumerate(lengths)
            if i
        }
    return best[len(lengths) - 1][2]
