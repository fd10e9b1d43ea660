"""Tables of items: what a column is, how bad rows are told, which items are in the catalogue."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tim4rec_jax.data import open_dataset
from tim4rec_jax.data.features import FEATURES_FILE, Categorical, Dense, FeatureTable
from tim4rec_jax.data_prep.features import Choices, fit, read_items
from tim4rec_jax.errors import LONGEST_SENTENCE, UserError

LOG = "user_id,item_id,timestamp\n" + "".join(
    f"u{user},i{(user + event) % 6},{1_600_000_000 + event}\n"
    for user in range(6)
    for event in range(6)
)
ITEMS = "item_id,genre,price,year\n" + "".join(
    f"i{n},{'a|b' if n % 2 else 'b'},{n}.5,{1990 + n % 2}\n" for n in range(6)
)


def read(table, tmp_path, **choices):
    return read_items(table, Choices(**choices), tmp_path)


def test_a_table_becomes_columns_beside_the_items(run, write):
    items = write("items.csv", ITEMS + "i9,c,,\n")
    ds = run(
        *("table", write("log.csv", LOG), "--item-features", items, "--feature-separator", "|")
    )
    genre, price, year = ds.features.features
    assert genre == Categorical("genre", ("b", "a")) and year.vocabulary == ("1990", "1991")
    numbers = np.array([float(item[1:]) + 0.5 for item in ds.item_ids.to_pylist()])
    assert price == Dense("price", (numbers.mean(),), (numbers.std(),))
    codes, weights, dense, values = ds.features.arrays()
    # Number 0 is nothing; then each column's unknown value and its vocabulary.
    assert values == 1 + (1 + 2) + (1 + 2) and codes.shape == (7, 3)
    np.testing.assert_allclose(dense[1:, 0], (numbers - numbers.mean()) / numbers.std(), rtol=1e-6)
    row = 1 + ds.item_ids.to_pylist().index("i3")
    assert codes[row].tolist() == [3, 2, 6] and weights[row].tolist() == [0.5, 0.5, 1]
    assert not codes[0].any() and not weights[0].any() and not dense[0].any()
    told = json.loads((ds.directory / "dataset.json").read_text())
    assert told["item_features"]["unused"] == 1 and "features" in told["content"]
    assert [source["file"] for source in told["sources"]] == ["log.csv", "items.csv"]


@pytest.mark.parametrize("features", [("genre",), ()])
def test_titles_are_shown_and_are_no_feature(run, write, features):
    columns = ["item_id", "name", *features]
    rows = [columns, *([f"i{n}", f"Film {n}", *"ab"[n % 2 :][: len(features)]] for n in range(6))]
    rows[3][1] = ""
    items = write("items.csv", "".join(",".join(row) + "\n" for row in rows))
    flags = ("--item-features", items, "--item-title", "name")
    ds = run("table", write("log.csv", LOG), *flags)
    table = pq.read_table(ds.directory / "items.parquet")
    titles = dict(zip(*(table.column(name).to_pylist() for name in ("item", "title")), strict=True))
    assert titles == {f"i{n}": f"Film {n}" if n != 2 else None for n in range(6)}
    if features:
        assert ds.metadata["item_features"]["title"] == "name"
    found = () if ds.features is None else [feature.name for feature in ds.features.features]
    assert tuple(found) == features


def test_spaces_belong_to_an_id_and_to_no_value(run, write):
    spaced = [text.replace("i3,", "  i3,") for text in (LOG, ITEMS.replace("a|b", " a|b "))]
    files = write("log.csv", spaced[0]), write("items.csv", spaced[1])
    ds = run("table", files[0], "--item-features", files[1])
    assert "  i3" in ds.item_ids.to_pylist()
    assert ds.metadata["item_features"]["items"] == 6
    assert "a|b" in ds.features.features[0].vocabulary


def test_items_without_events_follow_all_others(run, write):
    flags = ("--item-features", write("items.csv", ITEMS + "new,b,7.5,1990\n"), "--keep-items")
    ds = run("table", write("log.csv", LOG), *flags)
    without = run("table", write("log.csv", LOG), "--out", ds.directory.parent / "plain")
    assert ds.item_ids.to_pylist() == [*without.item_ids.to_pylist(), "new"]
    assert ds.item_counts.tolist() == [*without.item_counts.tolist(), 0]
    assert ds.metadata["steps"] == without.metadata["steps"]
    assert ds.all_events().items.tolist() == without.all_events().items.tolist()
    assert ds.features.columns()["price"][-1] == pytest.approx(7.5)


def test_an_item_dropped_by_the_filters_comes_back_without_events(run, write):
    log = LOG + "u0,rare,1600000100\n"
    items = write("items.csv", ITEMS + "rare,b,7.5,1990\n")
    ds = run("table", write("log.csv", log), "--item-features", items, "--keep-items")
    assert ds.item_ids.to_pylist()[-1] == "rare" and ds.item_counts[-1] == 0
    assert ds.n_events == 36


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("i0,b,1.5,1990\ni0,b,1.5,1990\n", "line 3: the item 'i0' has a row already"),
        (",b,1.5,1990\n", "line 2: the item id is empty"),
        ("i0,b,1.5,1990\ni1,b,1e999,1991\n", "line 3: the value of 'price' is not finite"),
        ("i0,b,1e200,1990\n", "line 2: the value of 'price' is more than float32 holds"),
        ("i0,b,1.5\n", "line 2: 3 fields for 4 columns"),
        ('i0,"b,1.5,1990\n', "quote"),
        ("x0,b,1.5,1990\nx1,a,2.5,1991\n", "its ids begin with 'x0', 'x1'"),
        ("i0,b,1.5,1990\n", "no item feature is left"),
    ],
)
def test_a_bad_table_is_told_in_a_sentence(run, write, rows, says):
    items = write("items.csv", "item_id,genre,price,year\n" + rows)
    said = run("table", write("log.csv", LOG), "--item-features", items, fails=True)
    assert says in said and len(said) <= LONGEST_SENTENCE


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--keep-items"], "--keep-items needs a table of items"),
        (["--item-features", "nothing.csv"], "nothing.csv: no such file"),
        (["--item-features", "ITEMS", "--feature-columns", "genere"], "no column 'genere'"),
        (["--item-features", "ITEMS", "--dense-features", "genre"], "'genre' is no number"),
    ],
)
def test_a_flag_that_cannot_be_followed(run, write, flags, says):
    items = str(write("items.csv", ITEMS))
    flags = [items if flag == "ITEMS" else flag for flag in flags]
    assert says in run("table", write("log.csv", LOG), *flags, fails=True)


def test_bad_rows_are_left_out_and_counted(run, write):
    more = "i3,a,1.5,1990\n,a,1.5,1990\nj,a,1e200,1990\n"
    items = write("items.csv", ITEMS + more)
    ds = run(*("table", write("log.csv", LOG), "--item-features", items, "--on-bad-row", "skip"))
    told = ds.metadata["item_features"]
    assert told["bad_rows"] == {
        "the item has a row already": 1,
        "the item id is empty": 1,
        "the value of 'price' is more than float32 holds": 1,
    }
    assert ds.features.columns()["price"][ds.item_ids.to_pylist().index("i3")] == pytest.approx(3.5)


def test_types_decide_what_a_column_is(tmp_path):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(8, dtype=np.float32)), 2)
    table = pa.table(
        {
            "item_id": [1, 2, 3, 4],
            "whole": [7, 7, None, 8],
            "truth": [True, False, True, None],
            "tags": [["x", "y", "x"], [], None, ["y", None]],
            "price": pa.array([1.0, None, np.nan, 3.0]),
            "vector": vectors,
            "word": pa.array(["a", "b", "a", "b"]).dictionary_encode(),
        }
    )
    columns = read(table, tmp_path).columns
    assert columns["whole"].to_pylist() == [["7"], ["7"], [], ["8"]]
    assert columns["truth"].to_pylist() == [["True"], ["False"], ["True"], []]
    assert columns["tags"].to_pylist() == [["x", "y"], [], [], ["y"]]
    assert columns["word"].to_pylist() == [["a"], ["b"], ["a"], ["b"]]
    np.testing.assert_array_equal(columns["price"], [[1], [np.nan], [np.nan], [3]])
    np.testing.assert_array_equal(columns["vector"], np.arange(8).reshape(4, 2))
    assert (
        read(table, tmp_path, columns=("whole",), dense=("whole",)).columns["whole"].shape[1] == 1
    )


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array([[1.0, 2.0], [1.0]]), "has another length"),
        (pa.array([[1.0, np.inf], [1.0, 2.0]]), "not finite"),
        (pa.array([[1.0, None], [1.0, 2.0]]), "not finite"),
        (pa.array([{"a": 1}, None]), "has the type struct"),
        (pa.array([b"1", b"2"]), "has the type binary"),
        (pa.array([[str(n) for n in range(101)], []]), "101 values"),
    ],
)
def test_values_that_no_map_can_take(tmp_path, column, says):
    with pytest.raises(UserError, match=says):
        read(pa.table({"item_id": ["a", "b"], "f": column}), tmp_path)


def test_json_lines_may_hold_lists_and_mixed_values(write, tmp_path):
    lines = [
        {"item_id": 1, "tags": ["a", "b"], "code": 5, "at": [0.5, 1]},
        {"item_id": "2", "code": "x", "at": [2, 3.5]},
    ]
    path = write("items.jsonl", "\n".join(map(json.dumps, lines)))
    found = read([str(path)], tmp_path)
    assert found.ids == ["1", "2"]
    assert found.columns["tags"].to_pylist() == [["a", "b"], []]
    assert found.columns["code"].to_pylist() == [["5"], ["x"]]
    np.testing.assert_array_equal(found.columns["at"], [[0.5, 1], [2, 3.5]])


def test_what_tells_nothing_is_left_out():
    columns = {
        "title": pa.array([["t1"], ["t2"], ["t3"]], pa.list_(pa.string())),
        "same": pa.array([["s"], ["s"], ["s"]], pa.list_(pa.string())),
        "flat": np.full((3, 1), 7.0),
        "kind": pa.array([["a"], ["a", "b"], []], pa.list_(pa.string())),
    }
    features, notes = fit(columns, 2)
    assert features.features == (Categorical("kind", ("a",)),)
    assert [note.split("'")[1] for note in notes] == ["title", "same", "flat"]


@pytest.mark.parametrize("values", [["3,5", "3,5", "4", None], ["-1,25", "1,5e3", "7,", None]])
def test_numbers_with_decimal_commas_are_told(run, write, values):
    rows = "".join(f"i{n};{values[n % 4] or ''};{'ab'[n % 2]}\n" for n in range(6))
    items = write("items.csv", "item_id;price;kind\n" + rows)
    ds = run("table", write("log.csv", LOG), "--item-features", items)
    [told] = [note for note in ds.metadata["item_features"]["notes"] if "commas" in note]
    assert told.startswith("the column 'price' holds names, and all look like numbers with decimal")
    assert f"({values[0]})" in told


@pytest.mark.parametrize("values", [["a,5", "3,5"], ["1,2,3", "3,5"], ["3", "4"]])
def test_names_with_commas_are_no_numbers(values):
    column = pa.array([[values[0]]] * 2 + [[values[1]]] * 2 + [[]], pa.list_(pa.string()))
    assert not fit({"kind": column}, 2)[1]


def test_columns_of_another_dataset_are_encoded_as_these():
    columns = {
        "kind": pa.array([["a"], ["b", "z"], None, ["b"]], pa.list_(pa.string())),
        "size": np.array([[1.0, 2.0], [np.nan, np.nan], [3.0, 4.0], [5.0, 0.0]]),
    }
    features, _ = fit(columns, 1)
    again = FeatureTable.encoded(features.features, features.columns())
    assert again.digest() == features.digest()
    other = {"kind": pa.array([["new", "a"]], pa.list_(pa.string())), "size": np.full((1, 2), 3.0)}
    codes, weights, dense, _ = FeatureTable.encoded(features.features, other).arrays()
    kind, size = features.features
    assert codes[1].tolist() == [2 + kind.vocabulary.index("a")] and weights[1].tolist() == [1]
    np.testing.assert_allclose(dense[1], (3 - np.array(size.mean)) / size.std, rtol=1e-6)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "other"])
def test_damage_is_noticed(run, write, damage):
    items = write("items.csv", ITEMS)
    ds = run("table", write("log.csv", LOG), "--item-features", items)
    path = ds.directory / FEATURES_FILE
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-40])
    elif damage == "flipped":
        place = content.index(np.float32(ds.features.table["price"][0].as_py()[0]).tobytes())
        path.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    else:
        pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(UserError, match=FEATURES_FILE):
        open_dataset(ds.directory)
