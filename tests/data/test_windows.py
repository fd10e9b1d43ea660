"""Gaps, windows and packed rows against plain loops, on the host and in a compiled program."""

import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.data.small_dataset import in_memory, random_histories
from tim4rec_jax.data import DeviceLog, EventLog, collate, pack, prefix_batch, time_gaps


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


E, B, WIDTH, MAX_LENGTH = 24, 5, 6, 8  # one shape, so that each convention is compiled once
logs = st.tuples(
    hnp.arrays(np.int32, E, elements=st.integers(1, 99)),
    hnp.arrays(np.int64, E, elements=st.integers(0, 2**40)).map(np.sort),
)


@functools.partial(jax.jit, static_argnames="convention")
def compiled_collate(log, starts, lengths, convention):
    sizes = dict(width=WIDTH, max_length=MAX_LENGTH)
    return collate(log, starts, lengths, convention=convention, **sizes)


@settings(max_examples=50)
@given(log=logs, data=st.data(), convention=st.sampled_from(["recbole", "exact"]))
def test_collate(log, data, convention):
    items, times = log
    lengths = data.draw(hnp.arrays(np.int32, B, elements=st.integers(1, WIDTH)))
    starts = np.array([data.draw(st.integers(0, E - 1 - length)) for length in lengths], np.int32)
    host = EventLog(items, times)
    batch = collate(
        host, starts, lengths, width=WIDTH, max_length=MAX_LENGTH, convention=convention
    )
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        stop = start + length
        assert batch["items"][row].tolist() == [*items[start:stop], *[0] * (WIDTH - length)]
        whole = np.pad(times[start:stop], (0, MAX_LENGTH - length))
        np.testing.assert_array_equal(batch["gaps"][row], naive_gaps(whole, length, convention))
        assert batch["targets"][row] == items[stop]
        assert batch["time_to_next"][row] == np.float32(int(times[stop]) - int(times[stop - 1]))
        assert batch["dates"][row] == np.float32(int(times[stop - 1]) / 86_400)
    np.testing.assert_array_equal(batch["lengths"], lengths)
    assert_same_bits(
        batch, compiled_collate(DeviceLog.from_host(host), starts, lengths, convention)
    )


@settings(max_examples=50)
@given(log=logs, data=st.data())
def test_pack(log, data):
    items, times = log
    segments = data.draw(  # in three rows of six positions, each the beginning of a run
        st.lists(st.lists(st.integers(1, 3), max_size=2), min_size=3, max_size=3)
    )
    events, weights = np.zeros((3, 6), np.int32), np.zeros((3, 6), np.float32)
    first = np.zeros((3, 6), bool)
    expected = {name: np.zeros((3, 6)) for name in ("items", "gaps", "targets", "time_to_next")}
    for row, lengths in enumerate(segments):
        for column, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
            begin = data.draw(st.integers(0, E - 1 - length))
            first[row, column] = True
            for place in range(length):
                here, event = (row, column + place), begin + place
                events[here], weights[here] = event, 1
                expected["items"][here] = items[event]
                expected["targets"][here] = items[event + 1]
                wait = int(times[event + 1]) - int(times[event])
                expected["time_to_next"][here] = np.float32(wait)
                if place + 1 < length:
                    expected["gaps"][row, column + place + 1] = np.float32(wait)
    host = EventLog(items, times)
    indices = {"events": events, "first": first, "weights": weights}
    batch = pack(host, indices)
    for name, values in expected.items():
        np.testing.assert_array_equal(batch[name], values, err_msg=name)
    dates = np.where(weights > 0, (times / 86_400).astype(np.float32)[events], 0)
    np.testing.assert_array_equal(batch["dates"], dates)
    np.testing.assert_array_equal(batch["segment_ids"], np.cumsum(first, axis=1))
    assert_same_bits(batch, compiled_pack(DeviceLog.from_host(host), indices))


compiled_pack = jax.jit(pack)


def assert_same_bits(host, device):
    assert host.keys() == device.keys()
    for name, values in host.items():
        assert values.dtype == device[name].dtype, name
        np.testing.assert_array_equal(device[name], values, err_msg=name)
        if values.dtype == np.float32:  # the sign of a zero too
            np.testing.assert_array_equal(np.signbit(device[name]), np.signbit(values), name)
