"""Tables of the user's, read for recommendations."""

import numpy as np
import pyarrow as pa
import pytest

from tim4rec_jax import frames
from tim4rec_jax.errors import UserError

NAMES = {"user": "user", "item": "item", "time": "time"}
SECOND = 1_700_000_000


@pytest.mark.parametrize("unit", ["ms", "us", "ns", "datetime"])
def test_the_events_of_a_second_are_in_the_order_of_their_times(unit):
    per_second = {"ms": 10**3, "us": 10**6, "ns": 10**9, "datetime": 10**9}[unit]
    # The end of a second belongs to it, as in a dataset: times are not rounded to the nearest one.
    times = [(SECOND + 1) * per_second - rest for rest in (1, 2, 3)]
    if unit == "datetime":
        times = np.array(times).astype("datetime64[ns]")
    table = pa.table({"user": ["u"] * 3, "item": ["c", "b", "a"], "time": times})
    names = NAMES | {"time_unit": "s" if unit == "datetime" else unit}
    found = frames.histories(table, names, pa.array(["a", "b", "c"]), rounded=False)
    assert found.items.tolist() == [1, 2, 3]
    assert found.times.tolist() == [SECOND] * 3 and found.times.dtype == np.int64


@pytest.mark.parametrize(
    ("unit", "texts"),
    [
        ("iso", ["2023-11-14 22:13:21", "2023-11-14T23:13:20.5+01:00", "2023/11/14 22:13:20.25Z"]),
        ("ms", ["1700000001000", "1700000000500", "1700000000250"]),
    ],
)
def test_times_that_are_texts_count_as_in_the_preparation(unit, texts):
    table = pa.table({"user": ["u"] * 3, "item": ["c", "b", "a"], "time": texts})
    names = NAMES | {"time_unit": unit}
    found = frames.histories(table, names, pa.array(["a", "b", "c"]), rounded=False)
    assert found.items.tolist() == [1, 2, 3]
    assert found.times.tolist() == [SECOND, SECOND, SECOND + 1]


def test_numbers_are_seconds_where_texts_would_be_dates():
    table = pa.table({"user": ["u"], "item": ["a"], "time": [SECOND]})
    found = frames.histories(table, NAMES | {"time_unit": "iso"}, pa.array(["a"]), rounded=False)
    assert found.times.tolist() == [SECOND]


def test_dates_written_as_numbers_are_no_times_since_1970():
    names = NAMES | {"time_unit": "s"}

    def read(times):
        table = pa.table({"user": ["u"] * 3, "item": ["a"] * 3, "time": times})
        return frames.histories(table, names, pa.array(["a"]), rounded=False).times.tolist()

    for times in ([20_240_131, 20_240_201, 5], [5.0, 20_240_131.0, 20_240_131.0]):
        with pytest.raises(UserError, match=r"has the time 20240131.*and so have 2 of 3 rows"):
            read(times)
    day = np.datetime64("1970-08-23T06:15:31", "s")
    assert read([day] * 3) == [20_240_131] * 3
    assert read([20_240_131, 20_240_193, 20_241_501]) == [20_240_131, 20_240_193, 20_241_501]


@pytest.mark.parametrize("number", [int, float, str])
def test_times_of_a_coarser_unit_are_refused_as_in_the_preparation(number):
    def read(unit, *times):
        columns = {"user": ["u"] * 2, "item": ["a"] * 2, "time": list(map(number, times))}
        names = NAMES | {"time_unit": unit}
        found = frames.histories(pa.table(columns), names, pa.array(["a"]), rounded=False)
        return found.times.tolist()

    for unit in ("ms", "us", "ns"):
        with pytest.raises(UserError, match=rf"in another unit than {unit}: the first, {SECOND}, "):
            read(unit, SECOND, SECOND + 86_400)
    if number is not str:
        with pytest.raises(UserError, match=r"or in 2023 if it is in s; pass time_unit='s'$"):
            read("ms", SECOND, SECOND + 86_400)
    # A log that counts from its own start has events near it.
    assert read("ms", 5_000, SECOND) == [5, SECOND // 1000]
    assert read("s", SECOND, SECOND + 1) == [SECOND, SECOND + 1]


# Unknown items, users whose events lie apart, and times of which the first two are one float32.
TABLE = pa.table(
    {
        "user": [7, 5, 7, 6, 5, 7, 5],
        "item": ["c", "a", "new", "new", "b", "a", "c"],
        "time": [SECOND + 9, SECOND + 5, SECOND, SECOND, SECOND + 1, SECOND + 500, SECOND + 400],
    }
)


@pytest.mark.parametrize(
    ("rounded", "of_5"), [(False, [2, 1, 3]), (True, [1, 2, 3])], ids=["exact", "as RecBole"]
)
def test_histories_of_chosen_users(rounded, of_5):
    """A user must get the own events only, in the order that the model was trained with."""
    found = frames.histories(
        TABLE, NAMES | {"time_unit": "s"}, pa.array(["a", "b", "c"]), rounded=rounded
    )
    assert found.users.to_pylist() == ["7", "5", "6"] and found.lengths.tolist() == [2, 3, 0]
    items, times, ends = found.of(np.array([1, 2, 0]))
    assert items.tolist() == [*of_5, 3, 1] and ends.tolist() == [0, 3, 3, 5]
    assert (times[2:] - SECOND).tolist() == [400, 9, 500]
