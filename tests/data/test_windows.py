"""Gaps and windows against plain loops."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.data.small_dataset import in_memory, random_histories
from tim4rec_jax.data import prefix_batch, time_gaps


def naive_gaps(row, length, convention):
    """DESIGN section 4.3, event by event."""
    if convention == "recbole":
        row = [np.float32(time) for time in row]
        return [0, *(np.float32(b - a) for a, b in itertools.pairwise(row))]
    row = [int(time) for time in row]
    gaps = [np.float32(b - a) for a, b in itertools.pairwise(row)]
    return [0, *(gap if place < length else 0 for place, gap in enumerate(gaps, start=1))]


@given(data=st.data(), convention=st.sampled_from(["recbole", "exact"]))
def test_gaps(data, convention):
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 9)))
    lengths = data.draw(hnp.arrays(np.int32, shape[0], elements=st.integers(1, shape[1])))
    timestamps = data.draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 2**52)))
    timestamps = np.sort(timestamps, axis=1)
    timestamps[np.arange(shape[1]) >= lengths[:, None]] = 0
    gaps = time_gaps(timestamps, lengths, convention)
    expected = [
        naive_gaps(row, length, convention) for row, length in zip(timestamps, lengths, strict=True)
    ]
    assert gaps.dtype == np.float32
    np.testing.assert_array_equal(gaps, np.array(expected, np.float32))


def test_gaps_of_the_two_conventions():
    timestamps = np.array([[960_000_020, 960_000_051, 960_000_111, 0, 0]])
    lengths = np.array([3])
    np.testing.assert_array_equal(
        time_gaps(timestamps, lengths, "recbole"), [[0, 64, 64, -960_000_128, 0]]
    )
    np.testing.assert_array_equal(time_gaps(timestamps, lengths, "exact"), [[0, 31, 60, 0, 0]])


@pytest.mark.parametrize("convention", ["recbole", "exact"])
@pytest.mark.parametrize("splits", [(), (7,), (1, 2, 19)])
@pytest.mark.parametrize(("width", "max_length"), [(20, 20), (8, 8), (6, 11), (5, 6), (1, 1)])
def test_prefixes(convention, splits, width, max_length):
    histories = random_histories(range(1, 21))
    dataset = in_memory(histories, splits=splits)
    samples = [
        (user, end)
        for user, (items, _) in enumerate(histories)
        for end in range(1, len(items))
        if min(end, max_length) <= width
    ]
    users, ends = np.array(samples)[::-1].T
    batch = prefix_batch(
        dataset, users, ends, width=width, max_length=max_length, convention=convention
    )
    for row, (user, end) in enumerate(reversed(samples)):
        items, timestamps = (column[max(0, end - max_length) : end] for column in histories[user])
        length = len(items)
        np.testing.assert_array_equal(batch["items"][row], np.pad(items, (0, width - length)))
        assert batch["lengths"][row] == length
        assert batch["targets"][row] == histories[user][0][end]
        assert batch["time_to_next"][row] == histories[user][1][end] - histories[user][1][end - 1]
        assert batch["dates"][row] == np.float32(histories[user][1][end - 1] / 86_400)
        assert batch["users"][row] == user
        whole = np.pad(timestamps, (0, max_length - length))
        np.testing.assert_array_equal(batch["gaps"][row], naive_gaps(whole, length, convention))
    assert {name: (value.dtype.name, value.shape[1:]) for name, value in batch.items()} == {
        "items": ("int32", (width,)),
        "lengths": ("int32", ()),
        "gaps": ("float32", (max_length,)),
        "targets": ("int32", ()),
        "time_to_next": ("float32", ()),
        "dates": ("float32", ()),
        "users": ("int32", ()),
    }
