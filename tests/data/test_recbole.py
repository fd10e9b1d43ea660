"""Samples as RecBole 1.2.1 prepares ml-100k (5-core, L = 200), each of them.

The reference's samples lie in the folder that TIM4REC_GOLDEN names; ml-100k may not be
redistributed with this project. Histories come from a dataset prepared with
`--order recbole` (folder `ml-100k` of TIM4REC_DATA) or, without one, from the samples
themselves, for the users whose whole history fits into 200 events.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.data.small_dataset import in_memory
from tim4rec_jax.data import EvalBatches, TrainBatches, open_dataset, time_gaps

L = 200


@pytest.fixture
def rows(golden_all):
    path = golden_all / "recbole_ml100k_L200_valid_test.npz"
    if not path.exists():
        pytest.skip("needs TIM4REC_GOLDEN")
    with np.load(path) as file:
        return dict(file)


@pytest.fixture
def dataset_and_users(rows, golden_all):
    """A dataset and the reference's number of each of its users."""
    prepared = Path(os.environ.get("TIM4REC_DATA", "")) / "ml-100k"
    if prepared.exists():
        dataset = open_dataset(prepared)
        ids = json.loads((golden_all / "recbole_ml100k_idmap.json").read_text())
        assert dataset.user_ids.to_pylist() == ids["user_tokens_in_id_order"][1:]
        assert dataset.item_ids.to_pylist() == ids["item_tokens_in_id_order"][1:]
        return dataset, np.arange(1, 944)
    whole = np.flatnonzero(rows["test/item_length"] < L)
    histories = []
    for row in whole:
        length = rows["test/item_length"][row]
        items = np.append(rows["test/item_id_list"][row, :length], rows["test/item_id"][row])
        times = np.append(rows["test/timestamp_list"][row, :length], rows["test/timestamp"][row])
        histories.append((items.astype(np.int32), times.astype(np.int64)))
    return in_memory(histories, n_items=1349), rows["test/user_id"][whole]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluation_rows(rows, dataset_and_users, split):
    dataset, users = dataset_and_users
    row_of = {user: row for row, user in enumerate(rows[f"{split}/user_id"])}
    batches = EvalBatches(
        dataset, split, max_length=L, batch_size=256, convention="recbole", buckets=(L,)
    )
    seen = 0
    for batch in batches:
        at = [row_of[user] for user in users[batch["users"]]]
        np.testing.assert_array_equal(batch["items"], rows[f"{split}/item_id_list"][at])
        np.testing.assert_array_equal(batch["lengths"], rows[f"{split}/item_length"][at])
        np.testing.assert_array_equal(batch["targets"], rows[f"{split}/item_id"][at])
        times = rows[f"{split}/timestamp_list"][at]
        gaps = np.diff(times, axis=1, prepend=times[:, :1])
        np.testing.assert_array_equal(batch["gaps"], gaps)
        exact = times.astype(np.int64)
        np.testing.assert_array_equal(time_gaps(exact, batch["lengths"], "recbole"), gaps)
        seen += batch["weights"].sum()
    assert seen == dataset.n_users


def test_training_rows(golden_all, dataset_and_users):
    dataset, users = dataset_and_users
    with np.load(golden_all / "recbole_ml100k_L200_train_index.npz") as file:
        names = ("user_id", "item_id", "item_length", "seq_hash", "seq_hash2")
        reference = np.stack([file[name].astype(np.int64) for name in names], axis=1)
    reference = reference[np.isin(reference[:, 0], users)]
    batches = TrainBatches(dataset, max_length=L, batch_size=512, seed=0, convention="recbole")
    made = []
    for number in range(batches.batches_per_epoch):
        batch = batches[number]
        items = batch["items"].astype(np.int64)
        weights = np.arange(1, items.shape[1] + 1)
        columns = (users[batch["users"]], batch["targets"], batch["lengths"])
        columns += (items @ weights, items**2 @ weights)
        made.append(np.stack(columns, axis=1)[batch["weights"] == 1])
    made = np.concatenate(made)
    assert len(made) == batches.n_targets == len(reference)
    if len(users) == 943:
        assert len(made) == 96_458
    np.testing.assert_array_equal(made[np.lexsort(made.T)], reference[np.lexsort(reference.T)])
