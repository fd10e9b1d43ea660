"""Recommendations by history."""

import json
import shutil
import threading

import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest

from tests.data.small_dataset import random_histories
from tests.serving.tiny_run import (
    LENGTHS,
    MAX_LENGTH,
    N_ITEMS,
    tiny_dataset,
)
from tim4rec_jax.data import open_dataset
from tim4rec_jax.data.format import content
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation.evaluate import write_predictions
from tim4rec_jax.serving import Recommender
from tim4rec_jax.serving.catalogue import Catalogue

HISTORIES = [([f"i{item}" for item in items], times) for items, times in random_histories(LENGTHS)]
ENCODINGS = ("masked", "paper", "causal", "bert4rec", "next_time")


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_equal_to_evaluation(tiny_data, recommenders, tmp_path, encoding, exclude_seen):
    model = recommenders(encoding).model
    settings = dict(max_length=MAX_LENGTH, batch_size=8, convention=model.convention)
    settings |= dict(buckets=(MAX_LENGTH,), exclude_seen=exclude_seen)
    ds, path = open_dataset(tiny_data), tmp_path / "top.parquet"
    write_predictions(path, model.sequence_model, ds, "test", 5, **settings)
    table = pq.read_table(path).to_pylist()
    for user, (items, times) in enumerate(HISTORIES):
        rows = [row for row in table if row["user"] == f"u{user}"]
        at = int(times[-1]) if encoding == "next_time" else None  # which evaluation knows
        found = recommenders(encoding).recommend(
            items[:-1], times[:-1], k=5, exclude_seen=exclude_seen, at=at
        )
        assert found.items == [row["item"] for row in rows]
        assert found.scores == pytest.approx([row["score"] for row in rows], rel=1e-5, abs=1e-5)
        assert (found.unknown, found.fallback) == (0, False)


@pytest.mark.parametrize("encoding", ["masked", "causal"])
def test_batch_equals_single(recommenders, encoding):
    recommender = recommenders(encoding)
    batch = recommender.recommend_batch(HISTORIES, k=4)
    for (items, times), found in zip(HISTORIES, batch, strict=True):
        single = recommender.recommend(items, times, k=4)
        assert found.items == single.items
        assert found.scores == pytest.approx(single.scores, rel=1e-5, abs=1e-5)
    assert recommender.recommend_batch([]) == []


def test_more_histories_than_are_computed_at_once(recommenders, monkeypatch):
    """Eight histories, seven of them at once."""
    expected = recommenders("masked").recommend_batch(HISTORIES)
    monkeypatch.setattr("tim4rec_jax.serving.ranker.MAX_ROWS", 7)
    for ours, theirs in zip(
        recommenders("masked").recommend_batch(HISTORIES), expected, strict=True
    ):
        assert ours.items == theirs.items


def test_unknown_items_are_left_out_and_counted(recommenders):
    found = recommenders("causal").recommend(["i1", "new", "i2", 7], [10, 20, 30, 40])
    known = recommenders("causal").recommend(["i1", "i2"], [10, 30])
    assert found.unknown == 2
    assert (found.items, found.scores) == (known.items, known.scores)


@pytest.mark.parametrize("items", [[], ["new", "newer"]])
def test_without_a_known_event_the_popular(tiny_data, recommenders, items):
    found = recommenders("masked").recommend(items, [5] * len(items), k=3, deny=["i1"])
    counts = open_dataset(tiny_data).item_counts.copy()
    counts[0] = 0
    best = np.argsort(-counts, kind="stable")[:3]
    assert found.items == [f"i{index + 1}" for index in best]
    assert found.scores == counts[best].tolist()
    assert (found.unknown, found.fallback) == (len(items), True)


def rename_items(dataset, new):
    """Gives the items of a dataset other ids, as if it had been prepared with them."""
    table = pq.read_table(dataset / "items.parquet")
    ids = new(table["item"].to_pylist())
    pq.write_table(table.set_column(1, table.schema.field(1), [ids]), dataset / "items.parquet")
    metadata = json.loads((dataset / "dataset.json").read_text())
    del metadata["content"]
    metadata["content"] = content(dataset, metadata)
    (dataset / "dataset.json").write_text(json.dumps(metadata))


def test_numbers_are_ids_too(tmp_path, recommenders):
    dataset = tiny_dataset(tmp_path / "data")
    rename_items(dataset, lambda ids: [item[1:] for item in ids])
    recommender = Recommender(recommenders("masked").model, Catalogue(dataset))
    by_number = recommender.recommend(np.array([3, 4]), [1, 2])
    assert by_number == recommender.recommend(["3", "4"], [1, 2])
    assert by_number.unknown == 0


def test_order_of_time(recommenders):
    recommender = recommenders("causal")
    with pytest.raises(UserError, match=r"event 3 \(item i7, time 20\) is earlier than the one"):
        recommender.recommend(["i5", "i6", "i7"], [10, 30, 20])
    with pytest.raises(UserError, match=r"^history 2: event 2 "):
        recommender.recommend_batch([(["i5"], [1]), (["i5", "i6"], [2, 1])])
    found = recommender.recommend(["i5", "i6", "i7", "i8"], [10, 30, 20, 20], sort=True)
    assert found == recommender.recommend(["i5", "i7", "i8", "i6"], [10, 20, 20, 30])


def test_times_that_recbole_rounds_alike_may_fall(tmp_path, recommenders):
    dataset = tiny_dataset(tmp_path / "data", order="recbole")
    recommender = Recommender(recommenders("paper").model, Catalogue(dataset))
    items, times = ["i1", "i2"], [880_000_010, 880_000_000]
    assert recommender.recommend(items, times) == recommender.recommend(items, times, sort=True)
    with pytest.raises(UserError, match="earlier"):
        recommender.recommend(items, [880_000_500, 880_000_000])
    # What is sorted keeps their order, as in the dataset that the model was trained on.
    found = recommender.recommend(["i3", *items], [880_000_500, *times], sort=True)
    assert found == recommender.recommend([*items, "i3"], [*times, 880_000_500])
    assert found != recommender.recommend(["i2", "i1", "i3"], [*times[::-1], 880_000_500])


def test_allow_and_deny(recommenders):
    recommender, (items, times) = recommenders("masked"), HISTORIES[3]
    all_items = recommender.recommend(items, times, k=N_ITEMS, exclude_seen=False)
    assert len(all_items.items) == N_ITEMS
    scores = dict(zip(all_items.items, all_items.scores, strict=True))
    seen = set(items)

    def expect(found, candidates):
        best = [item for item in all_items.items if item in candidates]
        assert found.items == best
        assert found.scores == pytest.approx([scores[item] for item in best], rel=1e-5)

    some = ["i4", items[0], "i9", "i30", "i17", "new"]
    expect(recommender.recommend(items, times, 30, allow=some), set(some) - seen)
    expect(recommender.recommend(items, times, 30, allow=some, exclude_seen=False), set(some))
    rest = set(scores) - set(some)
    expect(recommender.recommend(items, times, 30, deny=some, exclude_seen=False), rest)
    expect(recommender.recommend(items, times, 30, deny=some), rest - seen)
    allow = recommender.recommend(items, times, 30, allow=some, deny=["i9"], exclude_seen=False)
    expect(allow, {"i4", items[0], "i30", "i17"})
    assert recommender.recommend(items, times, allow=["new"]).items == []
    assert recommender.recommend(items, times, deny=list(scores)).items == []
    assert recommender.recommend([], [], allow=["new"]).items == []


@pytest.mark.parametrize("kind", [pd.DataFrame, pl.DataFrame, dict])
def test_a_filter_is_no_table(recommenders, kind):
    """Of a table, the name of its column would be the only id."""
    table = kind({"i4": ["i5", "i6"]})
    for name in ("allow", "deny"):
        with pytest.raises(UserError, match=f"{name} is a .*; give a list or one column of ids"):
            recommenders("masked").recommend(["i1"], [1], **{name: table})
    if kind is not dict:
        recommenders("masked").recommend(["i1"], [1], deny=table["i4"])


def test_seen_items_reach_back_beyond_the_window(recommenders):
    items, times = HISTORIES[6]
    found = recommenders("masked").recommend(items, times, k=N_ITEMS)
    assert not set(found.items) & set(items)
    assert len(found.items) == N_ITEMS - len(set(items))


def test_the_moment_of_prediction(recommenders):
    recommender, (items, times) = recommenders("next_time"), HISTORIES[4]
    now = recommender.recommend(items, times, at=int(times[-1]))
    later = recommender.recommend(items, times, at=int(times[-1]) + 10**7)
    assert now.scores != later.scores
    moments = [int(times[-1]), int(times[-1]) + 10**7]
    both = recommender.recommend_batch([(items, times)] * 2, at=moments)
    assert both[0].scores == pytest.approx(now.scores, rel=1e-5, abs=1e-5)
    assert both[1].scores == pytest.approx(later.scores, rel=1e-5, abs=1e-5)
    assert recommender.recommend([], [], at=5).fallback
    with pytest.raises(UserError, match="`at` is before the last event"):
        recommender.recommend(items, times, at=int(times[-1]) - 1)
    with pytest.raises(UserError, match="say so with `at`"):
        recommender.recommend(items, times)
    with pytest.raises(UserError, match="3 times for 2 histories"):
        recommender.recommend_batch([(items, times)] * 2, at=[1, 2, 3])
    with pytest.raises(UserError, match="not trained to know when the next event happens"):
        recommenders("causal").recommend(items, times, at=int(times[-1]))


@pytest.mark.parametrize(
    ("items", "times", "k", "words"),
    [
        (["i1"], [1, 2], 10, "same length"),
        ("i1", [1, 2], 10, "same length"),
        (["i1"], ["today"], 10, "whole seconds"),
        (["i1"], [1.5], 10, "whole seconds"),
        (["i1"], [float("nan")], 10, "whole seconds"),
        (["i1"], [10**30], 10, "whole seconds"),
        (["i1"], [None], 10, "whole seconds"),
        (["i1"], [-5], 10, "negative timestamp -5"),
        (["i1", None], [1, 2], 10, "an item is None; ids are texts or whole numbers, so convert"),
        ([1.0], [1], 10, "an item is 1.0; ids are"),
        (["i1"], [1], 0, "k is 0"),
    ],
)
def test_mistakes(recommenders, items, times, k, words):
    with pytest.raises(UserError, match=words):
        recommenders("masked").recommend(items, times, k)


def test_a_k_beyond_the_catalogue(recommenders):
    found = recommenders("masked").recommend(["i1"], [1], 10**9)
    assert len(found.items) == N_ITEMS - 1


def test_titles(recommenders):
    catalogue = recommenders("masked").catalogue
    assert catalogue.title("i4") == "Title of i4"
    assert catalogue.title("i3") is None
    assert catalogue.title("new") is None


def test_a_run(tiny_workdir, recommenders):
    items, times = HISTORIES[4]
    assert Recommender.load(tiny_workdir).recommend(items, times) == recommenders(
        "causal"
    ).recommend(items, times)


def test_a_run_with_its_items_needs_no_dataset(tiny_data, tiny_workdir, tmp_path):
    run = shutil.copytree(tiny_workdir, tmp_path / "run")
    shutil.copyfile(tiny_data / "items.parquet", run / "items.parquet")
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"dataset": "gone"}))
    items, times = HISTORIES[4]
    found = Recommender.load(run).recommend(items, times)
    assert found == Recommender.load(tiny_workdir).recommend(items, times)


def test_another_dataset(tiny_data, tiny_workdir, tmp_path):
    """As many items are not enough: their ids could be in another order."""
    other = tiny_dataset(tmp_path / "other")
    (other / "sequences.arrow").rename(tmp_path / "sequences.arrow")  # which nobody reads
    assert Recommender.load(tiny_workdir, dataset=other).recommend(["i1"], [1]).items
    (tmp_path / "sequences.arrow").rename(other / "sequences.arrow")
    rename_items(other, lambda ids: ids[::-1])
    with pytest.raises(UserError, match=r"not the dataset that the run .* \(other items\)"):
        Recommender.load(tiny_workdir, dataset=other)


def test_many_threads(recommenders):
    """Requests of all shapes at once get what they get alone."""
    recommender = recommenders("causal")
    expected = [recommender.recommend(*history) for history in HISTORIES]
    wrong = []

    def ask(number):
        for _ in range(5):
            found = recommender.recommend(*HISTORIES[number], deny=["nothing"])
            if found != expected[number]:
                wrong.append((number, found))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(HISTORIES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
