"""ml-100k in RecBole's order, sample by sample as RecBole 1.2.1 prepares it.

Neither the events nor the reference's samples may be redistributed with this project:
TIM4REC_RAW names a folder with `ml-100k/ml-100k.inter.gz` (and `ml-1m/interactions.csv.gz` and
so on for the sizes), TIM4REC_GOLDEN one with the samples.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

L = 200


def raw(name):
    path = Path(os.environ.get("TIM4REC_RAW", "nowhere")) / name
    if not path.exists():
        pytest.skip(f"needs {name} in the folder TIM4REC_RAW; it may not be redistributed")
    return path


@pytest.fixture
def samples(golden_all):
    path = golden_all / "recbole_ml100k_L200_valid_test.npz"
    if not path.exists():
        pytest.skip("needs the reference's samples in the folder TIM4REC_GOLDEN")
    ids = json.loads((golden_all / "recbole_ml100k_idmap.json").read_text())
    train = golden_all / "recbole_ml100k_L200_train_index.npz"
    return ids, dict(np.load(path)), dict(np.load(train))


@pytest.mark.parametrize(
    "command, name", [("recbole", "ml-100k.inter.gz"), ("movielens", "u.data.gz")]
)
def test_every_sample_of_ml_100k(run, samples, command, name):
    ids, held_out, train = samples
    source = raw(f"ml-100k/{name}")
    ds = run(command, "--source", source, "--order", "recbole")
    assert ds.item_ids.to_pylist() == ids["item_tokens_in_id_order"][1:]
    assert ds.user_ids.to_pylist() == ids["user_tokens_in_id_order"][1:]
    for split, back in (("test", 1), ("valid", 2)):
        users = held_out[f"{split}/user_id"] - 1
        ends = ds.offsets[users + 1] - back
        lengths = np.minimum(ds.lengths[users] - back, L)
        assert (lengths == held_out[f"{split}/item_length"]).all()
        items = ds.items(ends - lengths, lengths, L)
        assert (items == held_out[f"{split}/item_id_list"]).all()
        times = ds.timestamps(ends - lengths, lengths, L).astype(np.float32)
        assert (times == held_out[f"{split}/timestamp_list"]).all()
        assert (targets(ds, ends) == held_out[f"{split}/item_id"]).all()
    users = train["user_id"].astype(np.int64) - 1
    starts = np.flatnonzero(np.diff(users, prepend=-1))  # samples are grouped by user
    prefix = np.arange(len(users)) - np.repeat(starts, np.diff(starts, append=len(users))) + 1
    assert len(users) == 96_458 and (np.bincount(users) == ds.lengths - 3).all()
    ends = ds.offsets[users] + prefix
    lengths = np.minimum(prefix, L)
    items = ds.items(ends - lengths, lengths, L).astype(np.int64)
    places = np.arange(1, L + 1)
    assert (lengths == train["item_length"]).all()
    assert (items @ places == train["seq_hash"]).all()
    assert (items**2 @ places == train["seq_hash2"]).all()
    assert (targets(ds, ends) == train["item_id"]).all()


def targets(ds, events):
    return ds.items(events, np.ones(len(events), np.int64), 1)[:, 0]


@pytest.mark.parametrize(
    "command, source, sizes",
    [
        (["table"], "ml-1m/interactions.csv.gz", (6_040, 3_416, 999_611)),
        (["table"], "amazon-beauty/interactions.csv.gz", (22_363, 12_101, 198_502)),
        (["movielens"], "movietweetings/ratings.dat.gz", (5_973, 3_119, 102_461)),
        (["kuairand"], "kuairand-pure-slice/*.parquet", (15_989, 4_151, 200_825)),
        (
            ["table", "--time", "time_ms", "--time-unit", "ms"],
            "kuairand-pure-slice/interactions.csv.gz",
            (15_989, 4_151, 200_825),
        ),
    ],
    ids=["ml-1m", "beauty", "movietweetings", "kuairand", "kuairand csv"],
)
def test_sizes_of_real_data(run, command, source, sizes):
    path = raw(Path(source).parent) / Path(source).name
    ds = run(*command, "--source", path)
    assert (ds.n_users, ds.n_items, ds.n_events) == sizes
    if "movietweetings" in source:
        assert {len(item) for item in ds.item_ids.to_pylist()} == {7}  # leading zeros kept
