"""Makes rectools_metrics.json: lists of best items, and what RecTools and ir-measures say of them.

RecTools needs an older numpy than this package, so it has an environment of its own:

    python -m venv /tmp/rectools
    /tmp/rectools/bin/pip install rectools==0.19.0 ir-measures==0.4.3
    /tmp/rectools/bin/python tests/golden/make_rectools.py tests/golden/rectools_metrics.json
"""

import json
import sys
from pathlib import Path

import ir_measures
import numpy as np
import pandas as pd
from ir_measures import RR, Success, nDCG
from rectools import metrics
from rectools.metrics.distances import PairwiseDistanceCalculator

USERS, ITEMS, LONGEST, KS = 60, 40, 12, (1, 3, 5, 12)


class Cosine(PairwiseDistanceCalculator):
    """1 - cosine between the columns of the user-item matrix."""

    def __init__(self, matrix: np.ndarray):
        size = np.sqrt(np.maximum((matrix**2).sum(axis=0), 1))
        self.distances = 1 - (matrix.T @ matrix) / np.outer(size, size)

    def _get_distances_for_item_pairs(self, items_0, items_1):
        return self.distances[np.asarray(items_0, int), np.asarray(items_1, int)]


def main(path: Path) -> None:
    """Draws histories and lists, has both libraries judge them, and writes all of it."""
    rng = np.random.default_rng(0)
    chance = 1 / np.arange(1, ITEMS + 1) ** 0.8
    chance[-4:] = 0  # items that nobody had in training
    chance /= chance.sum()
    histories = [rng.choice(ITEMS, rng.integers(3, 15), p=chance) + 1 for _ in range(USERS)]
    for user in range(0, USERS, 7):
        histories[user][-1] = ITEMS - user % 4
    lists = np.zeros((USERS, LONGEST), int)
    for user, history in enumerate(histories):
        length = LONGEST if user % 5 else 1 + user % 9
        lists[user, :length] = rng.permutation(ITEMS)[:length] + 1
        if user % 3 == 0:  # the target is among them
            lists[user][lists[user] == history[-1]] = 0
            lists[user] = np.append(lists[user][lists[user] > 0], np.zeros(LONGEST, int))[:LONGEST]
            lists[user, rng.integers(0, max((lists[user] > 0).sum(), 1))] = history[-1]

    user, place = np.nonzero(lists)
    reco = pd.DataFrame({"user_id": user, "item_id": lists[user, place], "rank": place + 1})
    events = [(u, item) for u, history in enumerate(histories) for item in history[:-2]]
    train = pd.DataFrame(events, columns=["user_id", "item_id"])
    target = [history[-1] for history in histories]
    test = pd.DataFrame({"user_id": range(USERS), "item_id": target})
    matrix = np.zeros((USERS, ITEMS + 1))
    matrix[train.user_id, train.item_id] = 1
    catalog = list(range(1, ITEMS + 1))

    found = {}
    for k in KS:
        judges = {
            "coverage": metrics.CatalogCoverage(k=k, normalize=True),
            "popularity": metrics.AvgRecPopularity(k=k),
            "novelty": metrics.MeanInvUserFreq(k=k),
            "diversity": metrics.IntraListDiversity(k=k, distance_calculator=Cosine(matrix)),
            "serendipity": metrics.Serendipity(k=k),
            "hit": metrics.HitRate(k=k),
            "ndcg": metrics.NDCG(k=k, divide_by_achievable=True),
            "mrr": metrics.MRR(k=k),
        }
        values = metrics.calc_metrics(judges, reco, test, train, catalog)
        found |= {f"{name}@{k}": float(value) for name, value in values.items()}

    qrels = [ir_measures.Qrel(str(u), str(item), 1) for u, item in enumerate(target)]
    run = [
        ir_measures.ScoredDoc(str(u), str(lists[u, p]), float(LONGEST - p))
        for u, p in zip(user, place, strict=True)
    ]
    names = {f"hit@{k}": Success @ k for k in KS} | {f"ndcg@{k}": nDCG @ k for k in KS}
    names |= {f"mrr@{k}": RR @ k for k in KS}
    values = ir_measures.calc_aggregate(list(names.values()), qrels, run)
    measured = {name: float(values[measure]) for name, measure in names.items()}

    content = {
        "ks": list(KS),
        "items": ITEMS,
        "histories": [history.tolist() for history in histories],
        "lists": lists.tolist(),
        "rectools 0.19.0": found,
        "ir-measures 0.4.3": measured,
    }
    rows = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
