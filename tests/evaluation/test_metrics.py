import json

import numpy as np
import pytest

from tim4rec_jax.evaluation import metrics, ranks, standard_errors

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


def test_by_hand():
    found = np.array([1, 3, 11])
    assert metrics(found, ks=(10,)) == pytest.approx(
        {"hit@10": 2 / 3, "ndcg@10": 1.5 / 3, "mrr@10": (1 + 1 / 3) / 3}
    )
    hit = np.array([1, 1, 0])
    assert standard_errors(found, ks=(10,))["hit@10"] == pytest.approx(hit.std(ddof=1) / 3**0.5)
    assert standard_errors(np.array([2]), ks=(10,))["hit@10"] == 0
