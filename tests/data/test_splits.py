"""Which events train, validate and test: leave one out, and by time without a look ahead."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.small_dataset import in_memory, random_histories
from tim4rec_jax.data import EvalBatches, TrainBatches, train_item_counts
from tim4rec_jax.data.splits import by_time, format_time, leave_one_out, parse_time
from tim4rec_jax.errors import UserError


def test_leave_one_out():
    splits = leave_one_out(np.array([1, 2, 3, 9]))
    assert [list(part) for part in splits] == [[0, 0, 1, 7], [0, 0, 1, 7], [0, 1, 2, 8]]


histories = st.lists(
    st.lists(st.integers(0, 30), min_size=1, max_size=6).map(sorted), min_size=1, max_size=6
)


@given(histories=histories, cuts=st.lists(st.integers(0, 31), min_size=2, max_size=2).map(sorted))
def test_by_time(histories, cuts):
    times = np.concatenate(histories)
    offsets = np.cumsum([0, *map(len, histories)])
    train, valid, test = by_time(times, offsets, *cuts)
    for user, history in enumerate(histories):
        seen = [t for t in history if t < cuts[0]]
        between = [t for t in history if cuts[0] <= t < cuts[1]]
        later = [t for t in history if t >= cuts[1]]
        assert train[user] == len(seen)
        assert valid[user] == (len(seen) if seen and between else 0)
        before = len(seen) + len(between)
        assert test[user] == (before if before and later else 0)


@pytest.fixture(scope="module")
def dataset():
    return in_memory(random_histories([9, 4, 30, 12, 2, 1], start=0))


@pytest.mark.parametrize("how", ["leave_one_out", "global_time"])
def test_training_sees_nothing_that_is_held_out(dataset, how):
    split = dataset.split(how)
    settings = dict(max_length=5, batch_size=4, convention="exact")
    batches = TrainBatches(split, seed=0, **settings)
    trained = np.concatenate(
        [
            batch["targets"][batch["weights"] > 0]
            for batch in map(batches.__getitem__, range(batches.batches_per_epoch))
        ]
    )
    expected, counted = [], []
    for user, many in enumerate(split.splits.train.tolist()):
        start = dataset.offsets[user]
        items = dataset.items(np.array([start]), np.array([many]), max(many, 1))[0, :many]
        counted += list(items)
        expected += list(items[1:])
    assert sorted(trained) == sorted(expected)
    counts = np.bincount(np.array(counted), minlength=dataset.n_items + 1)[1:]
    np.testing.assert_array_equal(train_item_counts(split), counts)
    for name in ("valid", "test"):
        for batch in EvalBatches(split, name, **settings):
            for row in np.flatnonzero(batch["weights"]):
                event = dataset.offsets[batch["users"][row]]
                event += getattr(split.splits, name)[batch["users"][row]]
                target = dataset.items(np.array([event]), np.array([1]), 1)[0, 0]
                assert batch["targets"][row] == target


def test_by_time_everything_held_out_is_later(dataset):
    split = dataset.split("global_time", "300", "600")
    assert split.split_in_words == (
        "validation from 1970-01-01T00:05:00+00:00, test from 1970-01-01T00:10:00+00:00"
    )
    for user in range(dataset.n_users):
        length = dataset.lengths[user : user + 1]
        times = dataset.timestamps(dataset.offsets[user : user + 1], length, int(length[0]))[0]
        train, valid, test = (int(part[user]) for part in split.splits)
        assert (times[:train] < 300).all()
        assert not valid or 300 <= times[valid] < 600
        assert not test or times[test] >= 600


@pytest.mark.parametrize(
    ("dates", "words"),
    [
        (("28.2.2003", None), "config.data.valid_from is '28.2.2003', which is neither an ISO"),
        ((None, "soon"), "config.data.test_from is 'soon'"),
        (("0", "10"), "has no train events; choose other dates"),
        (("500", "500"), "has no valid events"),
        (("500", "2100-01-01"), "has no test events"),
    ],
)
def test_dates_that_cannot_be(dataset, dates, words):
    with pytest.raises(UserError, match=words):
        dataset.split("global_time", *dates)


def test_moments():
    assert (
        parse_time("86400")
        == parse_time("1970-01-02")
        == parse_time("1970-01-02T01:00+01:00")
        == 86400
    )
    assert format_time(86400) == "1970-01-02T00:00:00+00:00"
    assert format_time(10**18) == str(10**18)
