"""What lists are like besides accurate, against RecTools and against the definitions."""

import json
import re
import tracemalloc

import numpy as np
import pytest

from tests.data.small_dataset import in_memory
from tim4rec_jax.evaluation import beyond_accuracy
from tim4rec_jax.evaluation.beyond_accuracy import NAMES, BeyondAccuracy, gini
from tim4rec_jax.evaluation.metrics import metrics
from tim4rec_jax.evaluation.ranking import UNRANKED


@pytest.fixture
def case(golden):
    return json.loads((golden / "rectools_metrics.json").read_text())


def dataset(case, n_items=None, splits=()):
    histories = [
        (np.array(items, np.int32), np.arange(len(items), dtype=np.int64))
        for items in case["histories"]
    ]
    return in_memory(histories, n_items=n_items or case["items"], splits=splits)


def judged(case, ds, batch=17, ks=None):
    lists, targets = np.array(case["lists"]), np.array([h[-1] for h in case["histories"]])
    judge = BeyondAccuracy(ds, ks or case["ks"], len(lists))
    for start in range(0, len(lists), batch):
        judge.add(lists[start : start + batch], targets[start : start + batch])
    return judge.figures()


def test_figures_of_rectools(case):
    found, expected = judged(case, dataset(case)), case["rectools 0.19.0"]
    for name, k in ((name, k) for name in NAMES if name != "gini" for k in case["ks"]):
        # The counts of common users are exact in float32.
        assert found[f"{name}@{k}"] == pytest.approx(expected[f"{name}@{k}"], rel=1e-12), name


@pytest.mark.parametrize("library", ["rectools 0.19.0", "ir-measures 0.4.3"])
def test_accuracy_of_other_libraries(case, library):
    lists, targets = np.array(case["lists"]), np.array([h[-1] for h in case["histories"]])
    user, place = np.nonzero(lists == targets[:, None])
    ranks = np.full(len(lists), UNRANKED)
    ranks[user] = place + 1
    for name, value in metrics(ranks, case["ks"]).items():
        assert value == pytest.approx(case[library][name], rel=1e-12), name


def test_parts_of_the_data_make_no_difference(case, monkeypatch):
    expected = judged(case, dataset(case), batch=60)
    monkeypatch.setattr(beyond_accuracy, "_EVENTS_AT_ONCE", 20)
    monkeypatch.setattr(beyond_accuracy, "_PAIRS_AT_ONCE", 500)
    assert judged(case, dataset(case, splits=[1, 20, 33]), batch=1) == pytest.approx(expected)
    monkeypatch.setattr(beyond_accuracy, "_MOST_PAIRS", 1)  # common users in a sparse matrix
    monkeypatch.setattr(beyond_accuracy, "_affordable", lambda counts, most: counts >= 0)
    assert judged(case, dataset(case)) == pytest.approx(expected)


def test_cut_offs_need_no_order(case):
    expected, ds = judged(case, dataset(case)), dataset(case)
    found = judged(case, ds, ks=(12, 1, 100, 5))
    names = [f"{name}@{k}" for name in NAMES for k in (12, 1, 5)]
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}
    assert found["diversity@100"] == found["diversity@12"]
    long = judged(case, ds, ks=(12, 1001))
    assert "diversity@1001" not in long
    assert long["diversity@12"] == found["diversity@12"]


def test_gini_is_the_mean_difference():
    counts = np.random.default_rng(0).integers(0, 9, 50)
    difference = np.abs(counts[:, None] - counts).mean()
    assert gini(counts) == pytest.approx(difference / (2 * counts.mean()), rel=1e-12)
    assert (gini(np.full(9, 3)), gini(np.eye(4, dtype=int)[0]), gini(np.zeros(3, int))) == (
        0,
        0.75,
        0,
    )


def test_a_part_of_too_many_users_and_lists(case, monkeypatch):
    counts = np.array([3, 100, 2, 2, 2, 0])
    assert beyond_accuracy._affordable(counts, 10**5).all()
    chosen = beyond_accuracy._affordable(counts, 1000)
    assert chosen.tolist() == [True, False, True, True, True, True]
    assert 0 < beyond_accuracy._affordable(np.full(500, 3), 900).sum() <= 100
    monkeypatch.setattr(beyond_accuracy, "_MOST_LISTS", 30)
    found, ds = judged(case, dataset(case), batch=7), dataset(case)
    judge = BeyondAccuracy(ds, [2], len(case["lists"]))
    judge.add(np.array(case["lists"]), np.zeros(len(case["lists"]), int))
    monkeypatch.setattr(beyond_accuracy, "_MOST_WORK", 500)
    judge.figures()
    said = r"measured on \d+ of \d+ lists, spread evenly and what [\d.]+% of the users have"
    assert re.search(said, judge.sampled)
    half = case | {"lists": case["lists"][::2], "histories": case["histories"][::2]}
    monkeypatch.undo()
    lists = np.array(half["lists"])
    judge = BeyondAccuracy(ds, case["ks"], len(lists))
    judge.add(lists, np.zeros(len(lists), int))
    assert found["diversity@12"] == pytest.approx(judge.figures()["diversity@12"])
    assert judge.sampled == ""
    assert found["coverage@1"] == case["rectools 0.19.0"]["coverage@1"]


def test_a_large_catalogue_takes_a_few_numbers_for_each_item(case):
    n_items = 200_000
    ds = dataset(case, n_items=n_items)
    tracemalloc.start()
    try:
        found = judged(case, ds)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 150 * n_items < 4 * n_items * len(case["lists"])
    assert found["popularity@5"] == pytest.approx(case["rectools 0.19.0"]["popularity@5"])
