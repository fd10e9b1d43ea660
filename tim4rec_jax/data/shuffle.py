"""A shuffle that is never stored: position in, shuffled position out."""

import numpy as np
from jaxtyping import Int64

_ROUNDS = 4


def permute(
    positions: Int64[np.ndarray, "N"], size: int, key: tuple[int, ...]
) -> Int64[np.ndarray, "N"]:
    """Where a pseudo-random permutation of `range(size)` sends `positions`.

    A bijection of the next power of two (rounds of add, multiply by an odd number, xor with
    the own upper half; all invertible), walked until it lands below `size`. So any part of the
    shuffle of a billion samples costs only that part, with no state to keep or to restore.

    Args:
      positions: numbers from 0 to `size - 1`.
      size: how many there are.
      key: non-negative integers; they alone choose the permutation.
    """
    bits = max(size - 1, 1).bit_length()
    mask, half = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)
    # SeedSequence, unlike the methods of Generator, promises the same words in every release.
    words = np.random.SeedSequence(key).generate_state(2 * _ROUNDS, np.uint64)
    out = positions.astype(np.uint64)
    moving = np.arange(len(out))
    while moving.size:
        values = out[moving]
        for add, factor in words.reshape(_ROUNDS, 2):
            values = ((values + add) * (factor | np.uint64(1))) & mask
            values ^= values >> half
        out[moving] = values
        moving = moving[values >= size]
    return out.astype(np.int64)
