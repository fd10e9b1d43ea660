"""Tables of the user's, read for recommendations."""

import numpy as np
import pyarrow as pa
import pytest

from tim4rec_jax import frames

NAMES = {"user": "user", "item": "item", "time": "time"}
SECOND = 1_700_000_000


@pytest.mark.parametrize("unit", ["ms", "us", "ns", "datetime"])
def test_the_events_of_a_second_are_in_the_order_of_their_times(unit):
    per_second = {"ms": 10**3, "us": 10**6, "ns": 10**9, "datetime": 10**9}[unit]
    times = [SECOND * per_second + rest for rest in (3, 2, 1)]
    if unit == "datetime":
        times = np.array(times).astype("datetime64[ns]")
    table = pa.table({"user": ["u"] * 3, "item": ["c", "b", "a"], "time": times})
    names = NAMES | {"time_unit": "s" if unit == "datetime" else unit}
    found = frames.histories(table, names, pa.array(["a", "b", "c"]), rounded=False)
    assert found.items.tolist() == [1, 2, 3]
    assert found.times.tolist() == [SECOND] * 3 and found.times.dtype == np.int64
