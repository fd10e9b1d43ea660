import json

import numpy as np
import pytest

from tim4rec_jax.evaluation import metrics, ranks, standard_errors
from tim4rec_jax.evaluation.metrics import per_user
from tim4rec_jax.evaluation.ranking import UNRANKED, ranks_and_ties

FORMULA = "random_by_formula(rank=1+#strictly greater, item 0 excluded)"


def ranks_of_scores(scores, targets):
    """Ranks of given scores: a unit table hands them through the product unchanged."""
    scores = scores.astype(np.float32)
    unit = np.eye(scores.shape[1], dtype=np.float32)
    return np.asarray(ranks(scores, unit, targets.astype(np.int32), block_size=128))


def test_recbole_figures(golden):
    expected = json.loads((golden / "recbole_metrics.json").read_text())
    with np.load(golden / "recbole_metrics.npz") as arrays:
        found = ranks_of_scores(arrays["random/scores"], arrays["random/target"])
        np.testing.assert_array_equal(found, arrays["random/rank_excluding_pad"])
    assert metrics(found) == pytest.approx(expected["random"], abs=1e-9)
    assert metrics(found) == pytest.approx(expected[FORMULA], abs=1e-14)


def test_ties_count_for_the_target(golden):
    expected = json.loads((golden / "recbole_metrics.json").read_text())
    with np.load(golden / "recbole_metrics.npz") as arrays:
        scores, targets = arrays["ties_N300_20levels/scores"], arrays["ties_N300_20levels/target"]
        found = ranks_of_scores(scores, targets)
    optimistic = expected["ties_N300_20levels"]["optimistic"]
    assert metrics(found) == pytest.approx(optimistic, abs=1e-12)


def test_ties_share_their_places(golden):
    """What a tie gives on average is what RecBole's order, which is arbitrary, gives nearly."""
    expected = json.loads((golden / "recbole_metrics.json").read_text())["ties_N300_20levels"]
    with np.load(golden / "recbole_metrics.npz") as arrays:
        scores, targets = arrays["ties_N300_20levels/scores"], arrays["ties_N300_20levels/target"]
        unit = np.eye(scores.shape[1], dtype=np.float32)
        best, ties = ranks_and_ties(scores.astype(np.float32), unit, targets.astype(np.int32))
    best, ties = np.asarray(best), np.asarray(ties)
    assert metrics(best + ties) == pytest.approx(expected["pessimistic"], abs=1e-12)
    shared, optimistic = metrics(best, ties=ties), metrics(best)
    for name, value in expected["recbole"].items():
        assert expected["pessimistic"][name] < shared[name] < optimistic[name]
        assert abs(shared[name] - value) < abs(optimistic[name] - value)


def test_a_random_order_among_equals():
    """Every order of five items, of which three have the score of the target."""
    best, ties = np.array([2]), np.array([3])
    orders = np.array([rank for rank in range(2, 6) for _ in range(6)])
    for ks in ((1, 2, 3, 4, 5, 10), (3,)):
        assert metrics(best, ks, ties) == pytest.approx(metrics(orders, ks), abs=1e-12)


def test_all_equal_scores_are_no_hits():
    ranks, ties = np.ones(50, int), np.full(50, 999)
    assert metrics(ranks, (10,))["hit@10"] == 1
    assert metrics(ranks, (10,), ties)["hit@10"] == pytest.approx(10 / 1000)


def test_figures_without_ties_are_the_same_bits():
    ranks, ties = np.array([1, 3, 7, 60]), np.array([0, 0, 0, 0])
    found = per_user(np.append(ranks, 4), ties=np.append(ties, 9))
    for name, values in per_user(ranks).items():
        np.testing.assert_array_equal(found[name][:4], values)
        np.testing.assert_array_equal(per_user(ranks, ties=ties)[name], values)


def test_a_score_of_nan_is_no_hit_in_the_smallest_catalogue():
    ranks = np.array([UNRANKED, 1], np.int32)
    found = metrics(ranks, (10**6,), np.zeros(2, np.int32))
    assert found["hit@1000000"] == found["ndcg@1000000"] == 0.5


def test_by_hand():
    found = np.array([1, 3, 11])
    assert metrics(found, ks=(10,)) == pytest.approx(
        {"hit@10": 2 / 3, "ndcg@10": 1.5 / 3, "mrr@10": (1 + 1 / 3) / 3}
    )
    hit = np.array([1, 1, 0])
    assert standard_errors(found, ks=(10,))["hit@10"] == pytest.approx(hit.std(ddof=1) / 3**0.5)
    assert standard_errors(np.array([2]), ks=(10,))["hit@10"] == 0
