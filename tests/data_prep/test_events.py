"""Events for recommendations are read as those of the preparation, from files and from tables."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tim4rec_jax.data_prep.events import read_events
from tim4rec_jax.errors import UserError

COLUMNS = {"user_id": ["v", "u", "u"], "item_id": ["a", "b", "a"], "timestamp": [9, 7, 8]}
EXPECTED = [("v", "a", 9.0), ("u", "b", 7.0), ("u", "a", 8.0)]


def rows(table):
    assert table.schema.names == ["user", "item", "time"]
    return list(zip(*table.to_pydict().values(), strict=True))


def test_a_file_and_a_table_give_the_same(write, tmp_path):
    lines = "".join(f"{u},{i},{t}\n" for u, i, t in EXPECTED)
    path = write("a.csv", "user_id,item_id,timestamp\n" + lines)
    pq.write_table(pa.table(COLUMNS), tmp_path / "a.parquet")
    for inputs in ([str(path)], [str(tmp_path / "a.parquet")], pa.table(COLUMNS)):
        table, bad = read_events(inputs)
        assert rows(table) == EXPECTED and bad == {}


@pytest.mark.parametrize("kind", ["s", "ms", "us", "ns"])
def test_dates_by_type_need_no_unit(kind):
    times = pa.array([1_650_812_741], pa.int64()).cast(pa.timestamp("s")).cast(pa.timestamp(kind))
    table, _ = read_events(pa.table({"user_id": [1], "item_id": [2], "timestamp": times}))
    assert rows(table) == [("1", "2", 1_650_812_741.0)]


def test_other_names_units_and_bad_rows():
    table = pa.table({"who": ["u", None, "w"], "what": [1, 2, 3], "at": [1_500, 2, None]})
    names = {"user": "who", "item": "what", "time": "at", "time_unit": "ms"}
    with pytest.raises(UserError, match="the table, row 2: the user id is empty; correct it"):
        read_events(table, **names)
    found, bad = read_events(table, **names, on_bad_row="skip")
    assert rows(found) == [("u", "1", 1.5)]
    assert bad == {"the user id is empty": 1, "the time is empty": 1}


def test_a_missing_id_of_a_frame_is_not_called_nan():
    table = pa.table({"user_id": [1.0, float("nan")], "item_id": [1, 2], "timestamp": [1, 2]})
    with pytest.raises(UserError, match="row 2: the user id is empty"):
        read_events(table)


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_floats_that_are_whole_numbers_are_ids_without_a_fraction(tmp_path, kind):
    """As `frames.ids` makes them of a table in memory."""
    items = [105.0, 106.5, -0.0, 2.0**40, 2.0**70, float("inf")]
    columns = {"user_id": pa.array([7.0] * 6, kind), "item_id": pa.array(items, kind)}
    table = pa.table(columns | {"timestamp": [1] * 6})
    pq.write_table(table, tmp_path / "a.parquet")
    for inputs in (table, [str(tmp_path / "a.parquet")]):
        found, _ = read_events(inputs)
        assert set(found["user"].to_pylist()) == {"7"}
        words = found["item"].to_pylist()
        assert words[:4] == ["105", "106.5", "0", str(2**40)]
        assert [float(word) for word in words[4:]] == pytest.approx(items[4:])


@pytest.mark.parametrize("ids", [[[1]], [{"a": 1}], [b"\xff"]])
def test_ids_are_texts_or_numbers(ids):
    table = pa.table({"user_id": ids, "item_id": [1], "timestamp": [1]})
    with pytest.raises(UserError, match=r"the column 'user_id' has the type .*; make it a text"):
        read_events(table)
