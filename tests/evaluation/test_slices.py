import numpy as np
import pytest

from tests.data.small_dataset import in_memory, random_histories
from tim4rec_jax.evaluation import metrics
from tim4rec_jax.evaluation.metrics import SLICES, sliced_metrics

DAY = 86_400


def dataset(gaps, items=None):
    """Four events a user; `gaps`: seconds from the first to the second event."""
    histories = [
        (
            np.array([1, 2, 3, 4] if items is None else items[user], np.int32),
            1_000_000 + np.cumsum([0, gap, 5, 5]),
        )
        for user, gap in enumerate(gaps)
    ]
    return in_memory(histories, n_items=6)


def bins(groups):
    return [(group["bin"], group["users"]) for group in groups]


def test_last_gap_in_readable_units():
    ds = dataset([0, 45, 90, 5400, 2 * DAY])
    groups = sliced_metrics(ds, "valid", np.array([1, 2, 3, 4, 50]), "gap")
    expected = [("0 s", 1), ("45 s", 1), ("1.5 min", 1), ("1.5 h", 1), ("2 d", 1)]
    assert bins(groups) == expected
    assert groups[1]["metrics"] == metrics(np.array([2]))


def test_a_range_names_its_unit_once():
    ds = dataset([61, 90, 120, 3600 * 5, 3600 * 30])
    groups = sliced_metrics(ds, "valid", np.ones(5, int), "gap", bins=2)
    assert bins(groups) == [("1 – 1.5 min", 2), ("2 min – 1.2 d", 3)]


def test_users_without_a_gap_or_a_target():
    ds = in_memory(random_histories([1, 2, 2, 3]))
    groups = sliced_metrics(ds, "test", np.array([0, 3, 5, 7]), "gap")
    assert bins(groups)[0] == ("no gap", 2)
    assert groups[0]["metrics"] == metrics(np.array([3, 5]))
    assert sum(users for _, users in bins(groups)) == 3


def test_length_counts_the_whole_history():
    ds = in_memory(random_histories([3, 5, 5, 40, 60, 60]))
    test = sliced_metrics(ds, "test", np.ones(6, int), "length", bins=3)
    assert bins(test) == [("2", 1), ("4 – 39", 3), ("59", 2)]
    valid = sliced_metrics(ds, "valid", np.ones(6, int), "length", bins=3)
    assert bins(valid) == [("1", 1), ("3 – 38", 3), ("58", 2)]


def test_popularity_counts_training_events_only():
    items = [[1, 1, 2, 3], [2, 4, 3, 1], [2, 1, 1, 4]]
    ds = dataset([1, 1, 1], items)  # training events: 1 1, 2 4, 2 1
    groups = sliced_metrics(ds, "test", np.array([1, 2, 3]), "popularity")  # targets 3, 1, 4
    assert bins(groups) == [("0", 1), ("1", 1), ("3", 1)]
    assert [group["metrics"]["mrr@10"] for group in groups] == [1, 1 / 3, 1 / 2]


def test_items_new_to_the_model_are_a_group():
    items = [[1, 1, 2, 3], [2, 4, 3, 1], [2, 1, 1, 4], [1, 2, 4, 2]]
    ds = dataset([1, 1, 1, 1], items)  # training events: 1 1, 2 4, 2 1, 1 2
    groups = sliced_metrics(ds, "test", np.array([1, 2, 3, 2]), "known")  # targets 3, 1, 4, 2
    assert bins(groups) == [("no", 1), ("yes", 3)]
    assert groups[0]["metrics"]["mrr@10"] == 1


@pytest.mark.parametrize("by", SLICES)
def test_groups_are_a_partition(by):
    rng = np.random.default_rng(0)
    ds = in_memory(random_histories(rng.integers(1, 50, 400)))
    ranks = np.where(ds.lengths > 2, rng.integers(1, 31, 400), 0)
    groups = sliced_metrics(ds, "valid", ranks, by)
    users = np.array([group["users"] for group in groups])
    assert users.sum() == (ranks > 0).sum()
    fewest, most = (1, 2) if by == "known" else (4, 6)
    assert fewest <= len(users) <= most
    hits = np.array([group["metrics"]["hit@10"] for group in groups])
    assert hits @ users / users.sum() == pytest.approx(metrics(ranks[ranks > 0])["hit@10"])
