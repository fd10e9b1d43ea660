"""Bucket lengths: the best there are, by trying all."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tim4rec_jax.data import default_buckets
from tim4rec_jax.data.batches import window_counts

samples = st.lists(st.integers(0, 60), min_size=1, max_size=12).map(np.array)


@given(samples=samples, max_length=st.integers(1, 40))
def test_prefixes_by_length(samples, max_length):
    lengths = [min(end, max_length) for n in samples for end in range(1, n + 1)]
    expected = np.bincount(np.array(lengths, int), minlength=max_length + 1)
    np.testing.assert_array_equal(window_counts(samples, max_length), expected)


@given(samples=samples, max_length=st.integers(1, 30), most=st.integers(1, 5))
def test_no_other_buckets_pad_less(samples, max_length, most):
    lengths = np.repeat(np.arange(max_length + 1), window_counts(samples, max_length))

    def slots(buckets):
        return sum(min(width for width in buckets if width >= length) for length in lengths)

    chosen = default_buckets(samples, max_length, max_buckets=most)
    assert chosen[-1] == max_length
    assert len(chosen) <= most
    assert all(width % 4 == 0 for width in chosen[:-1])
    candidates = range(4, max_length, 4)
    assert slots(chosen) == min(
        slots((*some, max_length))
        for size in range(most)
        for some in itertools.combinations(candidates, size)
    )


def test_long_histories_need_one_bucket():
    assert default_buckets(np.array([10_000] * 50), 4) == (4,)
    assert default_buckets(np.array([0]), 50) == (50,)
