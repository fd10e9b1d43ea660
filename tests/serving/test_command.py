"""`python -m tim4rec_jax.serving recommend` and `batch`."""

import fcntl
import gzip
import io
import json
import os
import sys

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from tests.data.small_dataset import random_histories
from tests.serving.tiny_run import LENGTHS
from tim4rec_jax.errors import run_main
from tim4rec_jax.serving import Recommendations, Recommender
from tim4rec_jax.serving.__main__ import main

HISTORIES = [
    ([f"i{item}" for item in items], times.tolist()) for items, times in random_histories(LENGTHS)
]


@pytest.fixture
def run(monkeypatch, capsys, recommenders):
    """Runs the command line over an untrained model; gives exit code, output and errors."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # leave the process's settings alone
    monkeypatch.setattr(Recommender, "load", lambda workdir, **_: recommenders("causal"))

    def run(*flags):
        code = run_main(lambda: main([*map(str, flags)]))
        return code, *capsys.readouterr()

    return run


def test_a_history_as_json(run, recommenders):
    items, times = HISTORIES[3]
    history = ",".join(f"{item}@{time}" for item, time in zip(items, times, strict=True))
    code, printed, _ = run("recommend", "--workdir=run", "--history", history, "-k", 4, "--json")
    found, expected = json.loads(printed), recommenders("causal").recommend(items, times, 4)
    assert code == 0
    assert (found["items"], found["scores"]) == (expected.items, expected.scores)
    assert found["titles"] == [
        None if item == "i3" else f"Title of {item}" for item in expected.items
    ]
    events = history.split(",")
    assert run("recommend", "--workdir=run", "--history", *events, "-k4", "--json")[1] == printed


def test_a_history_as_a_table(run, tmp_path, recommenders):
    file = tmp_path / "history.csv"
    file.write_text('timestamp,item,price\n30,"i7",1\n10,i8,2\n20,"of, old",3\n')
    flags = ["recommend", "--workdir=run", "--file", file]
    code, _, error = run(*flags)
    assert (code, error.count("\n")) == (1, 1)
    assert "event 2 (item i8, time 10) is earlier than the one before" in error
    code, printed, _ = run(*flags, "--sort", "--top-k=3")
    assert code == 0
    for item in recommenders("causal").recommend(["i8", "i7"], [10, 30], 3).items:
        assert item in printed
    assert "1 event left out, of items" in printed


def test_odd_ids_are_printed_as_they_are(run, monkeypatch, recommenders):
    recommender = recommenders("causal")
    found = Recommendations([":apple:", "[red]", "\\[b]"], [3.0, 2.0, 1.0])
    monkeypatch.setattr(recommender, "recommend", lambda *_, **__: found)
    _, printed, _ = run("recommend", "--workdir=run", "--history", "i7@10")
    assert [line.split()[1] for line in printed.splitlines()[-4:] if line.strip()] == found.items


def test_ids_of_filters_that_nobody_knows_are_told(run, tmp_path):
    (tmp_path / "ids").write_text('"i1"\ni2\n')
    flags = ["recommend", "--workdir=run", "--history", "i7@10"]
    code, _, error = run(*flags, "--deny", tmp_path / "ids")
    assert code == 0
    assert error == (
        "note: 1 of the 2 ids of --deny are not known to the model, the first is '\"i1\"'\n"
    )
    (tmp_path / "ids").write_text("typo\n")
    code, _, error = run(*flags, "--allow", tmp_path / "ids")
    assert code == 1 and "1 of the 1 ids of --allow are not known to the model" in error


def test_standard_input_and_filters(run, monkeypatch, tmp_path):
    (tmp_path / "some").write_text("\ufeffi1\ni2\n\ni4\n")
    (tmp_path / "others").write_text("\ufeffi4\n")
    flags = ["recommend", "--workdir=run", "--allow", tmp_path / "some", "--json"]
    flags += ["--deny", tmp_path / "others"]
    found = []
    for more in ([], ["--file=-", "--include-seen"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("item,timestamp\ni1,5\n"))
        found.append(json.loads(run(*flags, *more)[1])["items"])
    assert found[0] == ["i2"]
    assert sorted(found[1]) == ["i1", "i2"]


@pytest.mark.parametrize("header", ["item,timestamp", '"item","timestamp"'])
def test_the_mark_of_utf_8_is_no_part_of_a_name(run, tmp_path, header, monkeypatch):
    (tmp_path / "h.csv").write_text(f"{header}\ni1,5\n", encoding="utf-8-sig")
    flags = ["recommend", "--workdir=run", "--json"]
    expected = run(*flags, "--history", "i1@5")[1]
    assert json.loads(expected)["items"]
    for file in ("-", tmp_path / "h.csv"):
        with open(tmp_path / "h.csv", encoding="utf-8") as given:
            monkeypatch.setattr(sys, "stdin", given)
            assert run(*flags, "--file", file) == (0, expected, "")


def test_an_empty_history_on_standard_input(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, _, error = run("recommend", "--workdir=run", "--file=-")
    assert code == 1 and "standard input is not a CSV file with the columns" in error


def test_ids_with_commas(run, monkeypatch):
    """A comma separates events only where a time stands before it."""
    asked = []

    def recommend(self, items, timestamps, **_):
        asked.append((items, timestamps))
        return Recommendations([], [])

    monkeypatch.setattr(Recommender, "recommend", recommend)
    events = ["--event", "a@5,b", "7", "--event", "x y", "8"]
    for flags in (["--history", "of, old@5,i2@6", "i,3@7"], ["--history", "i1@5,"], events):
        assert run("recommend", "--workdir=run", *flags)[0] == 0
    assert asked == [
        (["of, old", "i2", "i,3"], [5, 6, 7]),
        (["i1"], [5]),
        (["a@5,b", "x y"], [7, 8]),
    ]


def test_without_a_known_event(run):
    code, printed, _ = run("recommend", "--workdir=run", "--history", "new@5")
    assert code == 0
    assert "these are the most popular items" in printed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "COMMAND"),
        (["recommend", "--history", "i1@5"], "--workdir"),
        (["recommend", "--workdir=run", "--history", "i1"], "'i1' is not"),
        (["recommend", "--workdir=run", "--history", "i1@5,@7"], "'@7' is not"),
        (["recommend", "--workdir=run", "--history", "i1@noon"], "ITEM@TIME"),
        (["recommend", "--workdir=run", "--history", "i1@1_000"], "ITEM@TIME"),
        (["recommend", "--workdir=run", "--history", "i1@1600000000000"], "milliseconds"),
        (["recommend", "--workdir=run", "--event", "i1", "noon"], "--event takes ITEM TIME"),
        (["recommend", "--workdir=run", "--event", "i1", "1600000000000"], "milliseconds"),
        (["recommend", "--workdir=run", "--file", "no.csv"], "no file no.csv"),
        (["recommend", "--workdir=run", "--file", "bad.csv"], "columns item and timestamp"),
        (["recommend", "--workdir=run", "--file", "pipe"], "(it is no file)"),
        (["recommend", "--workdir=run", "--history", "i1@5", "--allow=pipe"], "(it is no file)"),
        (["recommend", "--workdir=run", "--history", "i1@5", "--deny=pipe"], "(it is no file)"),
        (["export", "--workdir=run", "--out="], "argument --out: it is empty"),
        (["recommend", "--workdir=run", "--file", "half.csv"], "line 3 has not"),
        (["recommend", "--workdir=run", "--history", "i1@5", "--allow=no.txt"], "no.txt"),
        (["recommend", "--workdir=run", "--history", "i1@5", "-k0"], "k is 0"),
        (["recommend", "--workdir=run", "--history", "i1@5", "--at=9"], "not trained to know"),
        (["batch", "--workdir=run", "--events=no.parquet", "--out=o"], "no.parquet"),
        (["batch", "--workdir=run", "--events=bad.csv", "--out=o"], "bad.csv"),
        (["batch", "--workdir=run", "--events=e.parquet", "--out=no/o"], "folder no does not"),
        (["batch", "--workdir=run", "--events=e.parquet", "--out=."], "is a folder"),
        (["batch", "--workdir=run", "--events=e.parquet", "--out=o", "--user=u"], "no column 'u'"),
        (
            ["batch", "--workdir=run", "--events=e.parquet", "--out=o", "--timestamp=item"],
            "time is not a number",
        ),
        (["batch", "--workdir=run", "--events=e.parquet", "--out=o", "--memory-limit=x"], "size"),
        (
            ["batch", "--workdir=run", "--events=null.parquet", "--out=o"],
            "row 2: the item id",
        ),
        (["batch", "--workdir=run", "--events=ms.parquet", "--out=o"], "--time-unit ms"),
        (["batch", "--workdir=run", "--events=none.parquet", "--out=o"], "no events"),
        (["batch", "--workdir=run", "--events=e.parquet", "--out=o", "--on-unknown=error"], "new"),
    ],
)
def test_mistakes(run, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    (tmp_path / "half.csv").write_text("item,timestamp\ni1,5\ni2\n")
    write_events("e.parquet", [("a", "i1", 5), ("a", "new", 6)])
    write_events("null.parquet", [("a", "i1", 5), ("a", None, 6)])
    write_events("ms.parquet", [("a", "i1", 1_600_000_000_000)])
    write_events("none.parquet", [])
    code, _, error = run(*flags)
    assert code == (2 if "--help`" in error else 1)
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "o"))]


def write_events(path, events, user_type=None, names=("user", "item", "timestamp")):
    columns = list(zip(*events, strict=True)) or [(), (), ()]
    arrays = [
        pa.array(column, kind)
        for column, kind in zip(
            columns, (user_type or pa.string(), pa.string(), pa.int64()), strict=True
        )
    ]
    pq.write_table(pa.table(arrays, list(names)), path)


def test_all_users_of_a_file(run, tmp_path, recommenders, monkeypatch):
    """Rows in any order, users in several pieces of the stream; ids keep their type.

    DuckDB streams 2,048 events at a time, however few are asked for.
    """
    monkeypatch.setattr("tim4rec_jax.serving.batch_job._STREAM_EVENTS", 16)
    histories = [
        ([f"i{item}" for item in items], times.tolist())
        for items, times in random_histories([33] * 64 + LENGTHS)
    ]
    histories[5] = (["new", "newer"], [1, 2])
    histories[6] = (["i1", "new", "i2", "i3"], [1, 2, 3, 4])
    events = [
        (1000 + user, item, time)
        for user, (items, times) in enumerate(histories)
        for item, time in zip(items, times, strict=True)
    ]
    mixed = [events[row] for row in np.random.default_rng(0).permutation(len(events))]
    names = ("who", "what", "when")
    write_events(tmp_path / "in.parquet", mixed, pa.int64(), names)
    flags = ["--workdir=run", "--events", tmp_path / "in.parquet", "--out", tmp_path / "o.parquet"]
    flags += ["--user=who", "--item=what", "--timestamp=when", "--top-k=3"]
    code, printed, _ = run("batch", *flags)
    assert code == 0
    assert "recommendations to 72 users" in printed
    assert "skipped 3 events" in printed
    assert "1 users had no known event" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "o.parquet"]
    table = pq.read_table(tmp_path / "o.parquet")
    assert table.schema.types == [pa.int64(), pa.int32(), pa.string(), pa.float32(), pa.bool_()]
    # Equal times stay in the order of the file.
    histories = [([], []) for _ in histories]
    for user, item, time in sorted(mixed, key=lambda event: event[2]):
        histories[user - 1000][0].append(item)
        histories[user - 1000][1].append(time)
    expected = [
        found
        for part in (histories[:64], histories[64:])
        for found in recommenders("causal").recommend_batch(part, 3)
    ]
    rows = table.to_pylist()
    assert [row["user"] for row in rows[::3]] == [1000 + user for user in range(72)]
    for user, found in enumerate(expected):
        mine = rows[3 * user : 3 * user + 3]
        assert [row["rank"] for row in mine] == [1, 2, 3]
        assert [row["item"] for row in mine] == found.items
        assert [row["score"] for row in mine] == pytest.approx(found.scores, rel=1e-4, abs=1e-4)
        assert [row["fallback"] for row in mine] == [found.fallback] * 3
    assert [found.fallback for found in expected].count(True) == 1


@pytest.mark.parametrize(
    ("second", "users"),
    [
        ("csv", ["01", "1", "7"]),
        (pa.string(), ["01", "1", "7"]),
        (pa.int64(), [1, 7, 3_000_000_000]),
    ],
)
def test_users_of_several_files(run, tmp_path, second, users):
    """In the order of texts, unless all files hold whole numbers."""
    write_events(tmp_path / "a.parquet", [(7, "i1", 5), (1, "i1", 5)], pa.int32())
    other = 3_000_000_000 if second == pa.int64() else "01"
    if second == "csv":
        (tmp_path / "b.csv").write_text("user,item,timestamp\n01,i2,6\n1,i2,6\n")
    else:
        one = 1 if second == pa.int64() else "1"
        write_events(tmp_path / "b.parquet", [(other, "i2", 6), (one, "i2", 6)], second)
    files = sorted(tmp_path.iterdir())
    code, _, error = run("batch", "--workdir=run", "--events", *files, "--top-k=1",
                         "--out", tmp_path / "out.parquet")  # fmt: skip
    assert code == 0, error
    assert pq.read_table(tmp_path / "out.parquet")["user"].to_pylist() == users


def test_timestamps_of_parquet(run, tmp_path):
    """Columns of type TIMESTAMP are whole seconds since 1970, UTC."""
    write_events(tmp_path / "s.parquet", [("a", "i1", 86_400), ("a", "i2", 86_405)])
    table = pq.read_table(tmp_path / "s.parquet")
    times = table["timestamp"].cast(pa.timestamp("s")).cast(pa.timestamp("ms"))
    pq.write_table(table.set_column(2, "timestamp", times), tmp_path / "t.parquet")
    for name in "st":
        flags = ["--events", tmp_path / f"{name}.parquet", "--out", tmp_path / f"{name}.out"]
        assert run("batch", "--workdir=run", *flags)[0] == 0
    assert pq.read_table(tmp_path / "t.out") == pq.read_table(tmp_path / "s.out")


def test_whatever_the_preparation_reads(run, tmp_path):
    """Formats, units, names of columns and bad rows are those of `data_prep table`."""
    histories = HISTORIES[:4]
    rows = [
        (f"u{user}", item, time)
        for user, (items, times) in enumerate(histories)
        for item, time in zip(items, times, strict=True)
    ]
    write_events(tmp_path / "old.parquet", rows)
    write_events(tmp_path / "new.parquet", rows, names=("user_id", "item_id", "timestamp"))
    with gzip.open(tmp_path / "e.csv.gz", "wt") as file:
        file.write("who;item_id;timestamp\n")
        file.writelines(f"{user};{item};{1000 * time}\n" for user, item, time in rows)
        file.write(";i1;5000\nu1;i2;soon\n")
    lines = [json.dumps({"user": u, "item": i, "timestamp": f"{t}.75"}) for u, i, t in rows]
    (tmp_path / "e.jsonl").write_text("\n".join(lines))
    flags = {
        "old.parquet": [],
        "new.parquet": [],
        "e.csv.gz": ["--user=who", "--time-unit=ms", "--on-bad-row=skip"],
        "e.jsonl": ["--time=timestamp"],
    }
    found = {}
    for name, more in flags.items():
        out = tmp_path / f"{name}.out"
        code, printed, error = run(
            "batch", "--workdir=run", "--events", tmp_path / name, "--out", out, *more
        )
        assert (code, error) == (0, "")
        found[name] = pq.read_table(out)
        assert printed.count("skipped 1 rows: the ") == (2 if name == "e.csv.gz" else 0)
    for table in found.values():
        assert table == found["old.parquet"]
    flags = ["--events", tmp_path / "old.parquet", "--out", tmp_path / "out.csv"]
    assert run("batch", "--workdir=run", *flags)[0] == 0
    written = pa_csv.read_csv(tmp_path / "out.csv")
    assert written.column_names == table.column_names
    assert (
        written["item"] == table["item"]
        and written["rank"].to_pylist() == table["rank"].to_pylist()
    )


def test_what_a_killed_job_left_is_cleared(run, tmp_path):
    """What a living job holds, and what is not ours, stays."""
    write_events(tmp_path / "in.parquet", [("a", "i1", 5)])
    for name in (".sorting-killed", ".sorting-living", ".sorting-algorithms", ".sorting"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "work.duckdb").write_text("")
    for name in (".sorting-killed", ".sorting-living"):
        (tmp_path / name / ".made-by-tim4rec-jax").touch()
    living = os.open(tmp_path / ".sorting-living", os.O_RDONLY)
    fcntl.flock(living, fcntl.LOCK_EX)
    flags = ["--events", tmp_path / "in.parquet", "--out", tmp_path / "o"]
    assert run("batch", "--workdir=run", *flags)[0] == 0
    os.close(living)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".sorting", ".sorting-algorithms", ".sorting-living", "in.parquet", "o"]


def test_users_without_a_row_are_no_users_served(run, tmp_path):
    events = [("a", "i1", 5), ("b", "i2", 5), ("c", "new", 5), ("d", "newer", 6)]
    write_events(tmp_path / "in.parquet", events)
    flags = ["--workdir=run", "--events", tmp_path / "in.parquet", "--out", tmp_path / "o.parquet"]
    (tmp_path / "ids").write_text("i1\n")
    code, printed, _ = run("batch", *flags, "--allow", tmp_path / "ids")
    assert code == 0
    assert pq.read_table(tmp_path / "o.parquet")["user"].to_pylist() == ["b", "c", "d"]
    assert "3 recommendations to 3 users in" in printed
    assert "1 users got none: --allow, --deny" in printed
    assert "2 users had no known event and got" in printed
    write_events(tmp_path / "in.parquet", events[:1])
    printed = run("batch", *flags, "--allow", tmp_path / "ids")[1]
    assert "0 recommendations to 0 users in" in printed and "1 users got none" in printed


def test_a_column_that_is_missing_is_named_with_flags_of_this_command(run, tmp_path):
    (tmp_path / "in.csv").write_text("who,item,timestamp\na,i1,5\n")
    flags = ["--workdir=run", "--events", tmp_path / "in.csv", "--out", tmp_path / "o.parquet"]
    assert run("batch", *flags)[2].endswith("; name yours with --user, --item, --time\n")


@pytest.mark.parametrize(
    "error",
    [
        duckdb.IOException('Could not write file "/x/work.duckdb": No space left on device'),
        duckdb.OutOfMemoryException("failed: set by the 'max_temp_directory_size' setting"),
    ],
)
def test_a_full_disk_under_the_sorting_names_the_output(run, tmp_path, monkeypatch, error):
    def fail(*args, **settings):
        raise error

    monkeypatch.setattr("tim4rec_jax.serving.batch_job.load_events", fail)
    write_events(tmp_path / "in.parquet", [("a", "i1", 5)])
    out = tmp_path / "o.parquet"
    said = run("batch", "--workdir=run", "--events", tmp_path / "in.parquet", "--out", out)[2]
    assert said == (
        f"error: the disk that {out} is on is full, which the sorting of the events needs too; "
        "make room there or choose another --out\n"
    )


def test_a_failure_leaves_the_old_file(run, tmp_path, monkeypatch):
    out = tmp_path / "o.parquet"
    out.write_text("before")
    write_events(tmp_path / "in.parquet", [("a", "i1", 5)])

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fail)
    code, _, error = run(
        "batch", "--workdir=run", "--events", tmp_path / "in.parquet", "--out", out
    )
    assert (code, error) == (1, f"error: {out} cannot be written: No space left on device\n")
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "o.parquet"]
