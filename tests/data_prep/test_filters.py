"""What is kept, and in which order, against the same thing said in plain Python."""

import collections
import contextlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tim4rec_jax.data import open_dataset
from tim4rec_jax.data_prep import filters, read, writer
from tim4rec_jax.data_prep.database import connect
from tim4rec_jax.data_prep.duckdb_engine import DuckDBEngine
from tim4rec_jax.data_prep.engine import Reading

HEADER = "user_id,item_id,timestamp,rating\n"
# Few users, items and times: many ties, and cores that take several rounds.
EVENT = st.tuples(st.sampled_from("abcde"), st.sampled_from("vwxyz"), st.integers(0, 6))
few = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def core(events, k):
    """Removes one offending event at a time: another way to the same fixed point."""
    events = list(events)
    while True:
        users = collections.Counter(user for user, _, _ in events)
        items = collections.Counter(item for _, item, _ in events)
        bad = [e for e in events if users[e[0]] < k or items[e[1]] < k]
        if not bad:
            return events
        events.remove(bad[0])


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    with contextlib.closing(connect(tmp_path_factory.mktemp("database"))) as con:
        yield con


@few
@given(
    st.lists(EVENT, min_size=1, max_size=60),
    st.integers(1, 4),
    st.sampled_from(sorted(writer.ORDERS)),
)
def test_k_core_and_order(tmp_path_factory, database, histories, events, k, order):
    # Near 1.65e9 float32 has steps of 128: 40 s apart, some times fall together and some do not.
    events = [(user, item, 1_650_000_000 + 40 * time) for user, item, time in events]
    kept = core(events, k)
    work = tmp_path_factory.mktemp("work")
    rows = [(user, item, time * 10**9) for user, item, time in events]
    for table in ("raw", "events", "users", "items", "user_index", "item_index"):
        database.execute(f"DROP TABLE IF EXISTS {table}")
    read.create(database)
    engine = DuckDBEngine(database.cursor())  # which is closed in the end
    database.executemany("INSERT INTO raw VALUES (?, ?, ?, NULL, TRUE, NULL, NULL)", rows)
    reading = Reading(len(rows), len(rows), len(rows), collections.Counter(), [])
    if not kept:
        message = f"'{k}-core' leaves no event of {len(events)}"
        with pytest.raises(filters.UserError, match=message):
            filters.apply(engine, filters.Filters(k_core=k), reading)
        return
    filters.apply(engine, filters.Filters(k_core=k), reading)
    (work / "out").mkdir()
    writer.write(engine, work / "out", {"name": "x"}, order=order)
    key = {"exact": lambda event: event[2], "recbole": lambda event: np.float32(event[2])}[order]
    expected = collections.defaultdict(list)
    for user, item, time in kept:
        expected[user].append((user, item, time))
    found = open_dataset(work / "out")
    assert histories(found) == {
        user: [event[1:] for event in sorted(expected[user], key=key)] for user in expected
    }
    assert found.user_ids.to_pylist() == list(expected)
    assert found.item_ids.to_pylist() == list(dict.fromkeys(item for _, item, _ in kept))


# The first row is not the earliest of its item, and ties differ by their rating.
REPEATS = HEADER + "u,a,7,2\nu,b,6,4\nu,c,6,5\nu,a,5,1\nu,a,5,3\nu,b,6,5\nu,c,6,4\n"


@pytest.mark.parametrize(
    "keep, expected",
    [
        ("exact", [("a", 5), ("b", 6), ("c", 6), ("a", 7)]),
        ("first", [("a", 5), ("b", 6), ("c", 6)]),
        ("last", [("b", 6), ("c", 6), ("a", 7)]),
    ],
)
def test_deduplicate(run, histories, write, keep, expected):
    path = write("a.csv", REPEATS)
    assert histories(run("table", path, "--deduplicate", keep, "--k-core", 1)) == {"u": expected}


@pytest.mark.parametrize(("keep", "item"), [("exact", "c"), ("first", "c"), ("last", "b")])
def test_of_a_tie_the_first_row_is_kept_or_the_last(run, histories, write, keep, item):
    """Only the row that is kept must have the rating; the filter of ratings comes afterwards."""
    flags = ("--deduplicate", keep, "--min-rating", "5", "--k-core", "1")
    assert histories(run("table", write("a.csv", REPEATS), *flags)) == {"u": [(item, 6)]}


def test_dates_are_utc_and_half_open(run, histories, write):
    times = ["2019-12-31T23:59:59", "2020-01-01", "2020-01-31T23:59:59Z", "2020-02-01"]
    rows = "".join(f"u,{number},{time},1\n" for number, time in enumerate(times))
    flags = ("--time-unit", "iso", "--since", "2020-01-01", "--until", "2020-02-01")
    ds = run("table", write("a.csv", HEADER + rows), *flags, "--k-core", "1")
    assert [item for item, _ in histories(ds)["u"]] == ["1", "2"]


def test_steps_are_told(run, write, capsys):
    rows = [
        "u,a,1,5",
        "u,a,1,5",
        "u,a,2,1",
        "u,a,9,5",
        "u,a,3,5",
        "v,a,4,5",
        "u,b,bad,5",
        "u,c,bad,5",
        "u,b",
    ]
    flags = ("--on-bad-row", "skip", "--deduplicate", "exact", "--min-rating", "2")
    flags += ("--until", "1970-01-01T00:00:08", "--k-core", "2", "--name", "shop")
    flags += ("--where", "item_id != 'c'")
    ds = run("table", write("a.csv", HEADER + "\n".join(rows) + "\n"), *flags)
    assert ds.name == "shop"
    metadata = json.loads((ds.directory / "dataset.json").read_text())
    assert [tuple(step.values()) for step in metadata["steps"]] == [
        ("rows in the source", 9, None, None),
        ("where item_id != 'c'", 8, None, None),
        ("bad rows skipped", 6, 2, 1),
        ("duplicates (exact)", 5, 2, 1),
        ("rating >= 2", 4, 2, 1),
        ("until 1970-01-01 00:00:08+00:00", 3, 2, 1),
        ("2-core", 2, 1, 1),
    ]
    assert metadata["bad_rows"] == {
        "the time is not a number": 1,
        "the line is not readable": 1,
    }
    assert metadata["filters"]["k_core"] == 2


def test_table_of_steps_is_printed(run, write, capsys):
    from tim4rec_jax.data_prep.__main__ import main

    path = write("a.csv", HEADER + "u,a,1,5\nu,b,2,5\nu,a,3,5\n")
    main(["table", str(path), "--k-core", "2", "--out", str(path.parent / "printed")])
    shown = capsys.readouterr().out
    assert "rows in the source" in shown and "2-core" in shown and "events removed" in shown
