"""Measures what choices of protocol change before any model is trained: leaks, and event orders.

    python -m benchmarks.protocols data/ml-100k [--other data/ml-100k-exact]

It ranks by popularity, once as counted over all training events of a leave-one-out split, and once
for each user over the events before the user's own target, which is all that anybody knew. The
other dataset is the same log in another event order.
"""

import argparse

import numpy as np

from tim4rec_jax.data import Dataset, open_dataset
from tim4rec_jax.evaluation.metrics import metrics


def targets(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Item and time of each user's test target; item 0 for a user without one."""
    ends = dataset.splits.test
    starts, one = dataset.offsets[:-1] + ends, np.ones(dataset.n_users, np.int64)
    items, times = dataset.items(starts, one, 1)[:, 0], dataset.timestamps(starts, one, 1)[:, 0]
    return np.where(ends > 0, items, 0), times


def leak(dataset: Dataset) -> None:
    """Prints how much of the training events come after the targets, and what that gives away."""
    items = np.concatenate([chunk.items for chunk in dataset.chunks])
    times = np.concatenate([chunk.timestamps for chunk in dataset.chunks])
    users = np.repeat(np.arange(dataset.n_users), dataset.lengths)
    number = np.arange(dataset.n_events) - dataset.offsets[users]
    trains = number < dataset.splits.train[users]
    items, times = items[trains], times[trains]
    order = np.argsort(times, kind="stable")
    items, times = items[order], times[order]
    target, at = targets(dataset)
    counts, seen = np.zeros(dataset.n_items + 1, np.int64), 0
    whole = np.bincount(items, minlength=dataset.n_items + 1)
    ranks = {"all training events": [], "events before the target": []}
    ties = {name: [] for name in ranks}
    later = []
    for user in np.argsort(at, kind="stable"):
        if not target[user]:
            continue
        before = np.searchsorted(times, at[user])
        np.add.at(counts, items[seen:before], 1)
        seen = before
        later.append(1 - before / len(times))
        for name, known in zip(ranks, (whole, counts), strict=True):
            ranks[name].append(1 + int((known[1:] > known[target[user]]).sum()))
            ties[name].append(int((known[1:] == known[target[user]]).sum()) - 1)
    print(f"{dataset.name}: {np.mean(later):.1%} of the training events come after a test target")
    for name in ranks:
        found = metrics(np.array(ranks[name]), (10, 20), np.array(ties[name]))
        print(f"  popularity over {name}: Hit@20 {found['hit@20']:.4f}, expected ties")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="a prepared dataset")
    parser.add_argument("--other", help="the same log, prepared in another event order")
    flags = parser.parse_args()
    dataset = open_dataset(flags.dataset)
    leak(dataset)
    if flags.other:
        other = open_dataset(flags.other)
        mine, theirs = (
            dict(
                zip(
                    ds.user_ids.to_pylist(),
                    ds.item_ids.take(targets(ds)[0] - 1).to_pylist(),
                    strict=True,
                )
            )
            for ds in (dataset, other)
        )
        differ = np.mean([mine[user] != theirs.get(user) for user in mine])
        print(f"order {dataset.order} against {other.order}: {differ:.1%} of test targets differ")


if __name__ == "__main__":
    main()
