"""The calls of `import tim4rec_jax as t4r`: tables of every library in, tables of it out."""

import datetime
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import duckdb
import jax
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from flax import nnx

import tim4rec_jax as t4r
from tests.training.tiny_run import LastItem
from tim4rec_jax import api, frames, prepared
from tim4rec_jax.commands.train import main as train_command
from tim4rec_jax.data_prep.__main__ import main as data_prep
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation.evaluate_run import evaluate_run
from tim4rec_jax.run import load_model
from tim4rec_jax.serving.__main__ import main as serve

FIRST = 1_700_000_000
N_USERS, N_EVENTS, N_ITEMS = 24, 8, 12
NAMES = {"user": "customer", "item": "sku", "time": "at"}
QUICK = {
    "model.name": f"{LastItem.__module__}:LastItem",
    "epochs": 1,
    "max_length": 8,
    "train.batch_size": 16,
    "eval.batch_size": 16,
}


def events(**columns):
    """A log as a practitioner has it: whole numbers as ids, dates, in no order."""
    user = np.repeat(np.arange(N_USERS), N_EVENTS)
    number = np.tile(np.arange(N_EVENTS), N_USERS)
    table = pd.DataFrame(
        {
            "customer": user + 1000,
            "sku": (user + number) % N_ITEMS + 70,
            "at": pd.to_datetime(FIRST + 3600 * number + user, unit="s"),
        }
    )
    return table.assign(**columns).sample(frac=1, random_state=0)


@pytest.fixture(scope="module")
def data():
    return t4r.prepare(events(), **NAMES)


@pytest.fixture(scope="module")
def model(data):
    return t4r.fit(data, "causal", **QUICK)


def rows(table):
    return table.to_pylist() if isinstance(table, pa.Table) else pl.DataFrame(table).to_dicts()


def test_the_calls_load_no_jax():
    program = "import tim4rec_jax as t4r, sys; t4r.prepare; sys.exit('jax' in sys.modules)"
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)
    assert {"prepare", "fit", "load"} <= set(dir(t4r))
    with pytest.raises(AttributeError, match="no attribute 'prepar'"):
        _ = t4r.prepar


def test_prepared(data):
    assert repr(data) == "<24 users, 12 items, 192 events>"
    user = data.dataset.user_ids.to_pylist().index("1003")
    start, length = data.dataset.offsets[user : user + 1], data.dataset.lengths[user : user + 1]
    times = data.dataset.timestamps(start, length, N_EVENTS)[0]
    assert times.tolist() == [FIRST + 3 + 3600 * number for number in range(N_EVENTS)]
    assert data.dataset.metadata["columns"] == NAMES | {"time_unit": "iso"}
    assert data.dataset.metadata["types"] == {"user": "int64", "item": "int64"}


def test_all_libraries_and_files_make_the_same_data(data, tmp_path):
    table = events()
    seconds = table["at"].astype("datetime64[s]").astype("int64")
    table.assign(at=seconds * 10**6).to_csv(tmp_path / "e.csv", index=False)
    pl.DataFrame(table).write_parquet(tmp_path / "e.parquet")
    kinds = {
        "floats": (table.assign(sku=table["sku"].astype(float)), {}),
        "texts": (table.assign(sku=table["sku"].astype(str)), {}),
        "categories": (table.assign(sku=table["sku"].astype(str).astype("category")), {}),
        "seconds": (table.assign(at=seconds), {}),
        "milliseconds": (table.assign(at=seconds * 1000), {"time_unit": "ms"}),
        "zone": (
            table.assign(at=table["at"].dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")),
            {},
        ),
        "polars": (pl.DataFrame(table), {}),
        "lazy": (pl.LazyFrame(table), {}),
        "pyarrow": (pa.Table.from_pandas(table), {}),
        "duckdb": (duckdb.from_arrow(pa.Table.from_pandas(table)), {}),
        "csv": (tmp_path / "e.csv", {"time_unit": "us"}),
        "glob": ([f"{tmp_path}/*.parquet"], {"time_unit": "iso"}),
    }
    for kind, (table, flags) in kinds.items():
        found = t4r.prepare(table, out=tmp_path / kind, **NAMES, **flags)
        for name in ("user_ids", "item_ids"):
            assert getattr(found.dataset, name) == getattr(data.dataset, name), kind
        for name in ("items", "timestamps"):
            ours, theirs = (getattr(each.chunks[0], name) for each in (found.dataset, data.dataset))
            assert np.array_equal(ours, theirs), kind


@pytest.mark.parametrize(
    ("columns", "flags", "words"),
    [
        ({}, {"user": "who"}, "no column 'who', only customer, sku, at; name yours with user="),
        ({}, {"overwrite": "no"}, "overwrite is 'no'; it must be True or False"),
        ({}, {"kcore": 3}, "kcore is no keyword of prepare; nearest: k_core"),
        ({}, {"k_core": 0}, "k_core: '0' is no whole number"),
        ({}, {"command": "x"}, "command is no keyword"),
        ({"at": FIRST * 1000}, {}, '192 rows; pass time_unit="ms"'),
        ({"at": None}, {}, "192 of 192 rows; pass time with the right column"),
        ({"at": 20_240_131}, {}, '(20240131), and so for 192 of 192 rows; pass time_unit="iso"'),
        ({"at": [None] + [FIRST] * 191}, {}, 'is empty; correct it or pass on_bad_row="skip"'),
        ({"sku": 1.5}, {}, "column 'sku' holds double"),
        ({"sku": True}, {}, "column 'sku' holds bool"),
        ({"customer": [1, "b"] * 96}, {}, "several types"),
        ({}, {"min_rating": 3}, "no column 'rating'"),
        ({}, {"where": "price > 3"}, "the condition where"),
    ],
)
def test_what_cannot_be_prepared(columns, flags, words):
    with pytest.raises(UserError) as raised:
        t4r.prepare(events(**columns), **NAMES | flags)
    assert words in str(raised.value)
    assert "/tmp" not in str(raised.value)
    assert not isinstance(raised.value.__cause__, UserError)  # a notebook shows one sentence


def test_columns_of_one_name():
    table = pd.DataFrame([[1, 2, 3]], columns=["customer", "sku", "sku"])
    with pytest.raises(UserError, match=r"the table cannot be read .*unique column names"):
        t4r.prepare(table, **NAMES)


def test_flags_of_the_command(tmp_path):
    table = events(rating=5, kind="buy")
    table.loc[table["customer"] == 1003, "kind"] = "view"
    table.loc[table["customer"] == 1004, "rating"] = 1
    table.loc[table["customer"] == 1005, "at"] = None
    flags = dict(where="kind = 'buy'", min_rating=2, on_bad_row="skip", out=tmp_path / "out")
    assert t4r.prepare(table, **NAMES, **flags).dataset.n_users == N_USERS - 3
    with pytest.raises(UserError, match="already holds a dataset; pass overwrite to replace"):
        t4r.prepare(table, **NAMES, out=tmp_path / "out")
    since = datetime.datetime.fromtimestamp(FIRST + 3 * 3600, datetime.UTC)
    found = t4r.prepare(
        table,
        **NAMES,
        out=tmp_path / "out",
        overwrite=True,
        since=since,
        k_core=1,
        on_bad_row="skip",
    )
    assert found.dataset.n_events == (N_USERS - 1) * (N_EVENTS - 3)


def test_recommendations_by_user_and_by_history(model):
    """Both ways, in the order asked for, with ids of the types that came in."""
    users = [1007, 1003]
    found = model.recommend(users=users, k=3)
    assert found.columns.tolist() == ["customer", "sku", "rank", "score", "fallback"]
    assert found["customer"].tolist() == [1007] * 3 + [1003] * 3
    assert found["rank"].tolist() == [1, 2, 3] * 2
    assert found["sku"].dtype == "int64"
    log = events()
    theirs = log[log["customer"].isin(users)]
    same = model.recommend(histories=theirs, k=3)
    by_user = dict(iter(same.groupby("customer")))
    for user, mine in found.groupby("customer"):
        assert by_user[user]["sku"].tolist() == mine["sku"].tolist()
        history = theirs[theirs["customer"] == user].sort_values("at")
        assert not set(mine["sku"]) & set(history["sku"])
        times = history["at"].astype("datetime64[s]").astype("int64")
        one = model.recommender.recommend(history["sku"].to_numpy(), times.to_numpy(), 3)
        assert one.items == mine["sku"].astype(str).tolist()
        assert one.scores == pytest.approx(mine["score"].tolist(), rel=1e-5)
    assert list(dict.fromkeys(same["customer"])) == list(dict.fromkeys(theirs["customer"]))
    array = model.recommend(users=np.array(users), k=3)
    pd.testing.assert_frame_equal(array, found)
    pd.testing.assert_frame_equal(model.recommend(users=pd.Series(users), k=3), found)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (pl.DataFrame, pl.DataFrame),
        (pl.LazyFrame, pl.DataFrame),
        (pa.Table.from_pandas, pa.Table),
        (lambda table: duckdb.from_arrow(pa.Table.from_pandas(table)), duckdb.DuckDBPyRelation),
    ],
)
def test_tables_come_back_as_they_came(model, make, kind):
    log = events()
    log = log[log["customer"] < 1004]
    found, expected = model.recommend(histories=make(log), k=2), model.recommend(histories=log, k=2)
    assert isinstance(found, kind)
    found = found.to_arrow_table() if kind is duckdb.DuckDBPyRelation else found
    assert rows(found) == rows(expected)


def test_users_and_items_that_nobody_knows(model):
    log = events()[:4].assign(customer=[5, 5, 6, 7], sku=[1, 70, 2, 71])
    found = model.recommend(histories=log, k=2)
    assert found["customer"].tolist() == [5, 5, 6, 6, 7, 7]
    assert found["fallback"].tolist() == [False, False, True, True, False, False]
    assert len(model.recommend(histories=log[:0], k=2)) == 0
    assert len(model.recommend(users=[], k=2)) == 0
    seen = model.recommend(histories=log, k=N_ITEMS, exclude_seen=False)
    assert len(seen) == 3 * N_ITEMS
    some = model.recommend(histories=log, k=N_ITEMS, allow=[75, 76, 99], deny=[76])
    assert set(some["sku"]) == {75}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either users= or histories="),
        ({"users": [1003], "histories": events()}, "either users= or histories="),
        ({"users": [1003, 7, 8]}, "2 of 3 users are not in .* the first is 7"),
        ({"users": "1003"}, "'1003' is one id"),
        ({"histories": [1, 2]}, "list is no table"),
        ({"histories": events(), "item": "what"}, "no column 'what'"),
        ({"histories": events(), "itme": "sku"}, "itme is no keyword"),
        ({"histories": events(at=FIRST * 1000)}, "plausible number of s since .*time_unit='ms'"),
        ({"histories": events(at=-1)}, "time -1, which"),
        ({"histories": events(at=None)}, "row 0 of the table has no 'at'"),
        ({"histories": events(at="noon")}, "'at' of the table, row 1: .*is no ISO date .noon"),
        ({"histories": events(at=True)}, "'at' holds bool; times are"),
        ({"histories": events(), "data": "folder"}, "leave it out with histories="),
        ({"histories": events(sku=None)}, "row 0 of the table has no 'sku'"),
        ({"histories": events(), "time_unit": "h"}, "time_unit is 'h'"),
        ({"users": [1003], "k": 0}, "k is 0"),
        ({"users": [1003], "allow": [75, None]}, "allow holds None; ids are"),
        ({"users": [1003], "at": 10**30}, "no date"),
        ({"users": [1003], "at": FIRST}, "not trained to know"),
        ({"users": [1003], "at": FIRST * 1000}, "time_unit='ms'"),
        ({"users": [1003], "at": "noon"}, "no date"),
        ({"users": [1003], "at": [FIRST, FIRST]}, "2 times for 1 users"),
    ],
)
def test_what_cannot_be_recommended(model, arguments, words):
    with pytest.raises(UserError, match=words):
        model.recommend(**arguments)


def test_moments():
    noon = datetime.datetime(2023, 11, 14, 12)
    for at in (noon, pd.Timestamp(noon), np.datetime64(noon), "2023-11-14 12:00", 1_699_963_200):
        assert frames.moments(at) == 1_699_963_200
    assert frames.moments([noon, noon]).tolist() == [1_699_963_200] * 2
    assert frames.moments(noon.date()) == 1_699_920_000


def test_evaluation_equals_that_of_the_training(model, data):
    assert model.evaluate() == model.evaluate(data=data) == model.metrics["test"]
    report = evaluate_run(model.run, exclude_seen=True)
    assert model.evaluate(exclude_seen=True) == report["metrics"]
    with pytest.raises(UserError, match="it must be test or valid"):
        model.evaluate("train")


def test_it_is_what_the_commands_do(model, tmp_path):
    """From a CSV file and a command line: the same parameters, bit for bit, and figures."""
    log = tmp_path / "log.csv"
    events().to_csv(log, index=False, date_format="%Y-%m-%dT%H:%M:%S")
    columns = ["--user=customer", "--item=sku", "--time=at", "--time-unit=iso"]
    data_prep(["table", "--source", str(log), *columns, "--out", str(tmp_path / "data")])
    settings = {"train.epochs" if name == "epochs" else name: QUICK[name] for name in QUICK}
    settings["data.max_length"] = settings.pop("max_length")
    words = [f"--config.{name}={value}" for name, value in settings.items()]
    words += ["--config=causal", f"--config.dataset={tmp_path / 'data'}"]
    train_command([*words, f"--workdir={tmp_path / 'run'}"])
    ours, theirs = (
        jax.tree.leaves(nnx.state(load_model(run)[1])) for run in (model.run, tmp_path / "run")
    )
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    report = evaluate_run(tmp_path / "run", accuracy_only=True)
    assert report["metrics"] == model.evaluate() == model.metrics["test"]
    # The run knows how the columns were named, in Python and on the command line.
    found = t4r.load(tmp_path / "run").recommend(histories=pd.read_csv(log, dtype=str), k=3)
    same = model.recommend(histories=events(), k=3)
    same = same.sort_values(["customer", "rank"], ignore_index=True)
    pd.testing.assert_frame_equal(
        found.sort_values(["customer", "rank"], ignore_index=True),
        same.astype({"customer": str, "sku": str}),
        check_dtype=False,
    )
    out = tmp_path / "top.csv"
    words = [f"--workdir={tmp_path / 'run'}", f"--events={log}", f"--out={out}", "--top-k=3"]
    serve(["batch", *words])
    written = pd.read_csv(out)
    assert written["user"].tolist() == same["customer"].tolist()
    assert written["item"].tolist() == same["sku"].tolist()


def test_a_filter_counts_for_all_users_however_it_is_given(model, monkeypatch):
    monkeypatch.setattr("tim4rec_jax.serving.compiled_model.MAX_ROWS", 5)
    users, denied = list(range(1000, 1012)), [70, 71, 72, 73]
    expected = model.recommend(users=users, k=3, deny=denied)
    found = model.recommend(users=users, k=3, deny=iter(denied))
    pd.testing.assert_frame_equal(found, expected)
    assert not set(found["sku"]) & set(denied)


def test_similar_items(model):
    found = model.similar_items([75, 70], k=3)
    assert found["sku"].tolist() == [75] * 3 + [70] * 3
    table = np.asarray(model.recommender.model.table)[1:]
    ids = model.recommender.catalogue.ids
    one = table[ids.index("75")]
    cosine = table @ one / np.linalg.norm(table, axis=1) / np.linalg.norm(one)
    best = [ids[item] for item in np.argsort(-cosine)[1:4]]
    assert found["similar"][:3].astype(str).tolist() == best
    assert found["score"][:3].tolist() == pytest.approx(np.sort(cosine)[-2:-5:-1].tolist())
    with pytest.raises(UserError, match="does not know the item 1"):
        model.similar_items([70, 1])
    for k in (0, True):
        with pytest.raises(UserError, match=f"k is {k!r}; it must be a whole number"):
            model.similar_items([70], k=k)


def test_the_empty_path_is_not_the_current_folder(model, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (
        t4r.load,
        t4r.fit,
        model.save,
        lambda path: t4r.prepare(events(), out=path, **NAMES),
        lambda path: t4r.fit(data, "causal", workdir=path, **QUICK),
    ):
        with pytest.raises(UserError, match="is no path; give "):
            call("")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="int is no path; give a path"):
        prepared.path_of(5)


def test_saved_and_loaded(model, tmp_path):
    model.save(tmp_path / "kept")
    loaded = t4r.load(tmp_path / "kept")
    pd.testing.assert_frame_equal(loaded.recommend([1003], k=3), model.recommend([1003], k=3))
    settings = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert settings["dataset"] == str(tmp_path / "kept" / "data")
    with pytest.raises(UserError, match="is not an empty folder"):
        model.save(tmp_path / "kept")
    shutil.move(tmp_path / "kept", tmp_path / "moved")
    assert t4r.load(tmp_path / "moved").evaluate("valid") == model.evaluate("valid")
    with pytest.raises(UserError, match="no run directory"):
        t4r.load(tmp_path / "kept")


def test_the_data_may_grow_after_the_training(model, tmp_path):
    """Another preparation counts the items differently, and the model goes by their ids."""
    model.save(tmp_path / "kept")
    shutil.rmtree(tmp_path / "kept" / "data")
    loaded = t4r.load(tmp_path / "kept")
    with pytest.raises(UserError, match="is not a prepared dataset"):
        loaded.recommend([1003])
    more = events().assign(sku=lambda table: table["sku"].where(table["customer"] != 1000, 300))
    grown = t4r.prepare(more[::-1], out=tmp_path / "kept" / "data", **NAMES)
    expected = model.recommend([1003], k=3)
    loaded = t4r.load(tmp_path / "kept")
    # It may as well be the log of another shop, whose users have the same numbers.
    with pytest.raises(UserError, match=r"is not the dataset that .* pass data='.*kept/data' if"):
        loaded.recommend([1003], k=3)
    for place in (grown, tmp_path / "kept" / "data"):
        pd.testing.assert_frame_equal(loaded.recommend([1003], k=3, data=place), expected)
    with pytest.raises(UserError, match=r"is not the dataset that .* pass data= with the data of"):
        loaded.evaluate()


def test_a_run_directory_that_is_there(model, data, tmp_path):
    """The same call again reads it; other data or settings are refused."""
    model.save(tmp_path / "run")
    again = t4r.fit(data, "causal", workdir=tmp_path / "run", **QUICK)
    assert again.metrics == model.metrics
    other = t4r.prepare(events()[::-1], **NAMES)
    with pytest.raises(UserError, match="is not the dataset that the run"):
        t4r.fit(other, "causal", workdir=tmp_path / "run", **QUICK)
    with pytest.raises(UserError, match=r"other settings: train\.batch_size \("):
        t4r.fit(data, "causal", workdir=tmp_path / "run", **QUICK | {"train.batch_size": 7})
    with pytest.raises(
        UserError, match=r"for more epochs, train\.epochs \(1 -> 2\): with .*cosine"
    ):
        t4r.fit(data, "causal", workdir=tmp_path / "run", **QUICK | {"epochs": 2})


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        ("causl", {}, "there is no file causl; by name there are beauty"),
        ("causal", {"epoch": 3}, r"epoch is not a setting of this model; nearest: train\.epochs"),
        ("causal", {"batch_size": 3}, r"may be eval\.batch_size or train\.batch_size"),
        ("causal", {"epochs": "3"}, r"train\.epochs is '3', which is of another type"),
        ("causal", {"epochs": -3}, r"train\.epochs is -3; it must be positive"),
        ("causal", {"dataset": "x"}, "dataset and prepare are no settings of fit"),
        ("causal", {"model.nv": 3}, "nv is not a setting of this model"),
        ("causal", {"name": "nosuch"}, r"model\.name is 'nosuch'"),
    ],
)
def test_settings_that_are_refused(data, config, settings, words):
    with pytest.raises(UserError, match=words):
        t4r.fit(data, config, **settings)


def test_settings_that_are_given_stay_as_they_are(data):
    config = api.load_config("causal").lock()
    with pytest.raises(UserError, match="must be positive"):
        t4r.fit(data, config, epochs=7, hidden_size=-1)
    assert (config.train.epochs, config.model.hidden_size, config.dataset) == (30, 64, "data/own")
    with pytest.raises(UserError, match="give a name, or settings"):
        t4r.fit(data, {"a": 1})


def test_settings_by_short_names():
    config = api.load_config("causal")
    api._change(config, {"name": "caser", "nv": np.int64(3), "epochs": 7, "eval.batch_size": 5})
    assert (config.model.name, config.model.nv, config.train.epochs) == ("caser", 3, 7)
    assert config.eval.batch_size == 5


def test_lengths_that_few_histories_have_are_padded_to_the_next():
    assert api._widths([8] * 14 + [16] * 6 + [30, 200]) == [16] * 20 + [256] * 2
    assert api._widths([8] * 40 + [14] * 40 + [200] * 40) == [8] * 40 + [16] * 40 + [256] * 40
    assert api._widths([1]) == [1]


def test_a_thread(model):
    found = []
    thread = threading.Thread(target=lambda: found.append(model.recommend([1003], k=3)))
    thread.start()
    thread.join()
    pd.testing.assert_frame_equal(found[0], model.recommend([1003], k=3))


def test_without_a_library_of_tables_arrow_comes_back(monkeypatch):
    monkeypatch.setattr(frames.importlib.util, "find_spec", lambda name: None)
    table = pa.table({"a": [1]})
    assert frames.like(table, "") is table
