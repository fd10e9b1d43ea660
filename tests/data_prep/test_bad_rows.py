"""A user's mistake is answered by one sentence that names file, row and remedy."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

HEADER = "user_id,item_id,timestamp\n"
GOOD = "u,i,5\n"
ITS_REMEDY = "correct it or pass --on-bad-row=skip"


@pytest.mark.parametrize(
    "row, problem",
    [
        (",i,5", "the user id is empty"),
        ("u,,5", "the item id is empty"),
        ("u,i,", "the time is empty"),
        ("u,i,soon", "the time is not a number (soon)"),
        ("u,i,nan", "the time is not a number (nan)"),
        ("u,i,-5", "the time is negative (-5)"),
        ("u,i", "the line has fewer fields than the 3 columns"),
        ("u,i,5,6", "the line has more fields than the 3 columns"),
        (b"u,caf\xe9,5", "the line holds bytes that are no UTF-8 (convert it with `iconv`)"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", pytest.param("a.csv.gz", marks=pytest.mark.slow)])
def test_csv(run, write, row, problem, name):
    row = row.encode() if isinstance(row, str) else row
    path = write(name, (HEADER + GOOD * 3).encode() + row + b"\n")
    assert run("table", path, fails=True) == f"{path}, line 5: {problem}; {ITS_REMEDY}"
    reason = problem.split(" (")[0]
    ds = run("table", path, "--on-bad-row", "skip", "--k-core", "1")
    assert ds.n_events == 3
    assert ds.metadata["bad_rows"] in ({reason: 1}, {"the line is not readable": 1})


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_quote_that_is_not_closed_is_never_skipped(run, write, on_bad_row):
    path = write("a.csv", HEADER + GOOD + 'u,"i,5\n' + GOOD)
    sentence = run("table", path, "--on-bad-row", on_bad_row, fails=True)
    assert sentence == (
        f"{path}, line 3: the line has a quote that is not closed; close it, the rows after it "
        "cannot be told apart"
    )


def test_mixed_line_ends(run, write):
    path = write("a.csv", HEADER + "u,i,5\r\n")
    for more in ((), ("--where", "item_id != 'x'")):
        assert "lines end in different ways" in run("table", path, *more, fails=True)


def test_lines_are_counted_as_an_editor_does(run, write):
    before = '"u\n1",i,5\n\n\n"u ""2""",i,6\n'  # four lines more than rows
    path = write("a.csv", HEADER + before + "u,i,soon\n")
    assert run("table", path, fails=True).startswith(f"{path}, line 7: the time is not a number")
    path = write("b.csv.gz", HEADER + before + "u,i\n")
    assert run("table", path, fails=True).startswith(f"{path}, line 7: the line has fewer fields")


def test_the_file_at_fault_is_named(run, write):
    write("a1.csv", HEADER + GOOD * 5)
    path = write("a2.csv", HEADER + GOOD + "u,i,soon\n")
    assert run("table", path.parent / "a*.csv", fails=True).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"user_id": "u", "item_id": "i"}', "the time is empty"),
        ('{"user_id": null, "item_id": "i", "timestamp": 5}', "the user id is empty"),
        ('{"user_id": "u", "item_', "the line is not valid JSON"),
    ],
)
def test_json(run, write, line, problem):
    good = json.dumps({"user_id": "u", "item_id": "i", "timestamp": 5})
    path = write("a.jsonl", f"{good}\n\n{good}\n{line}\n")
    assert run("table", path, fails=True) == f"{path}, line 4: {problem}; {ITS_REMEDY}"


def test_lines_of_fields(run, write):
    path = write("ratings.dat", "1::2::3::4\n\n1::2::3\n")
    expected = f"{path}, line 3: the line has 3 fields, not 4; {ITS_REMEDY}"
    assert run("movielens", "--source", path, fails=True) == expected
    path = write("a.inter", "user_id:token\titem_id:token\ttimestamp:float\nu\ti\t1\nu\ti\tx\n")
    assert run("recbole", path, fails=True).startswith(f"{path}, line 3: the time is not a number")


def test_steam_line_that_is_no_dictionary(run, write):
    good = "{u'username': u'a', u'product_id': u'1', u'date': u'2017-01-01'}\n"
    path = write("steam_reviews.json.gz", good + "nonsense\n")
    expected = f"{path}, line 2: the line is no dictionary; {ITS_REMEDY}"
    assert run("steam", "--source", path, fails=True) == expected


def test_parquet_rows(run, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"user_id": ["u", None], "item_id": ["i", "i"], "timestamp": [1, 2]}), path
    )
    assert run("table", path, fails=True) == f"{path}, row 2: the user id is empty; {ITS_REMEDY}"


@pytest.mark.parametrize(
    "times, unit, problem",
    [
        (
            ["1650812741", "1650812742", "1650812743436"],
            "s",
            "line 4: the time is in another unit than s (1650812743436)",
        ),
        (
            ["1650812741436", "1650812742436", "1650812743"],
            "ms",
            "line 4: the time is in another unit than ms (1650812743)",
        ),
    ],
)
def test_mixed_units(run, write, times, unit, problem):
    path = write("a.csv", HEADER + "".join(f"u,i,{time}\n" for time in times))
    flags = ("--time-unit", unit)
    assert run("table", path, *flags, fails=True) == f"{path}, {problem}; {ITS_REMEDY}"
    assert run("table", path, *flags, "--on-bad-row", "skip", "--k-core", "1").n_events == 2


@pytest.mark.parametrize(
    "time, unit, right",
    [
        ("1650812741436", "s", "ms"),
        ("1650812741436789", "ms", "us"),
        ("2022-04-24", "s", "iso"),
        ("1650812741", "iso", "s"),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["error", pytest.param("skip", marks=pytest.mark.slow)])
def test_wrong_unit(run, write, time, unit, right, on_bad_row):
    path = write("a.csv", HEADER + f"u,i,{time}\n" * 3)
    sentence = run("table", path, "--time-unit", unit, "--on-bad-row", on_bad_row, fails=True)
    assert sentence.startswith(f"{path}, line 2: the time is")
    assert sentence.endswith(f"--time-unit {right}")


@pytest.mark.parametrize("unit", ["s", "ms"])
@pytest.mark.parametrize("time", ["20240131", "202401311205", "20240131120509"])
def test_dates_written_as_numbers_are_no_times_since_1970(run, histories, write, time, unit):
    path = write("a.csv", HEADER + "u,i,5\n" + f"u,i,{time}\n" * 2)
    sentence = run("table", path, "--time-unit", unit, "--on-bad-row=skip", fails=True)
    assert sentence.startswith(f"{path}, line 3: the time is ")
    assert f"({time}), and so for 2 of 3 rows; give" in sentence
    assert sentence.endswith("the flag --time-unit iso")
    path = write("a.csv", HEADER + f"u,i,{time}\n")
    seconds = {8: 0, 12: 12 * 3600 + 300, 14: 12 * 3600 + 309}[len(time)]
    ds = run("table", path, "--time-unit", "iso", "--k-core", "1")
    assert histories(ds) == {"u": [("i", 1_706_659_200 + seconds)]}


def test_a_log_that_counts_from_its_own_start_may_have_times_like_dates(run, write):
    times = (20_240_131, 20_240_193, 20_241_501, 20_246_101)
    path = write("a.csv", HEADER + "".join(f"u,i,{time}\n" for time in times))
    assert run("table", path, "--k-core", "1").n_events == 4


@pytest.mark.parametrize("time", ["", "-5"])
def test_a_unit_is_suggested_only_for_what_another_unit_explains(run, write, time):
    path = write("a.csv", HEADER + f"u,i,{time}\n" * 3 + GOOD)
    assert run("table", path, fails=True).endswith(ITS_REMEDY)


@pytest.mark.parametrize(
    "rows, place, remedy",
    [
        ("u,i,soon\n" * 3, "line 2: the time is not a number (soon), and so for 3 of 3", "--time "),
        ("u,i,\n" * 3, "line 2: the time is empty, and so for 3 of 3", "--time-unit ("),
        (",i,5\n" * 3, "line 2: the user id is empty, and so for 3 of 3", "--user "),
        ("u,,5\nu,i,x\nu,i,y\n", "line 3: the time is not a number (x), and so for 2 of 3", "--t"),
        ("0,u,i,5\n" * 3, "more fields than the 3 columns, and so for 3 of 3", "the first line"),
    ],
)
def test_to_skip_all_rows_is_no_remedy(run, write, rows, place, remedy):
    path = write("a.csv", HEADER + rows)
    sentence = run("table", path, fails=True)
    assert place in sentence and remedy in sentence and "--on-bad-row" not in sentence
    sentence = run("table", path, "--on-bad-row", "skip", fails=True)
    assert sentence.startswith("all rows are bad, and none is left: for ")
    ds = run("table", path, write("b.csv", HEADER + GOOD), "--on-bad-row=skip", "--k-core=1")
    assert ds.n_events == 1


@pytest.mark.parametrize("date", ["infinity", "-infinity", "9999-12-31", "1969-12-31"])
def test_dates_out_of_range(run, write, date):
    path = write("a.csv", HEADER + "u,i,2020-01-01\n" * 3 + f"u,i,{date}\n")
    sentence = run("table", path, "--time-unit", "iso", fails=True)
    assert sentence.startswith(f"{path}, line 5: the time is ") and ITS_REMEDY in sentence


def test_small_times_are_a_clock_of_its_own(run, histories, write):
    path = write("a.csv", HEADER + "u,i,200000000\nu,i,0\n")  # two days in milliseconds
    ds = run("table", path, "--time-unit", "ms", "--k-core", "1")
    assert histories(ds) == {"u": [("i", 0), ("i", 200_000)]}


def test_ratings(run, write):
    path = write("a.csv", "user_id,item_id,timestamp,rating\nu,i,5,good\n")
    expected = f"{path}, line 2: the rating is not a number (good); {ITS_REMEDY}"
    assert run("table", path, "--min-rating", "3", fails=True) == expected
    assert run("table", path, "--k-core", "1").n_events == 1
    path = write("log.csv", "user_id,video_id,time_ms,is_rand\nu,i,5,0\n")
    expected = f"{path} has no ratings; leave out --min-rating"
    assert run("kuairand", "--source", path, "--min-rating", "3", fails=True) == expected


def test_missing_column(run, write):
    path = write("a.csv", "user,item_id,timestamp\nu,i,5\n")
    assert run("table", path, fails=True) == (
        f"{path}, line 1: no column 'user_id' (did you mean 'user'?), there are user, item_id, "
        "timestamp; name yours with --user, --item, --time, --rating"
    )
    path = write("log.csv", "user_id,video_id,time\nu,i,5\n")
    assert run("kuairand", "--source", path, fails=True) == (
        f"{path}, line 1: no column 'time_ms' (did you mean 'time'?), there are user_id, "
        "video_id, time; read other files with `python -m data_prep table`"
    )
    path = write("b.csv", "user_id,item_id,user_id\nu,i,5\n")
    expected = f"{path}: two columns are called 'user_id'; rename one of them"
    assert run("table", path, fails=True) == expected


def test_condition_that_fails(run, write):
    path = write("a.csv", HEADER + GOOD)
    for condition in ("evnt = 'buy'", "event ="):
        sentence = run("table", path, "--where", condition, fails=True)
        assert sentence.startswith(f"{path}: the condition --where {condition!r} fails (")
        assert sentence.endswith("columns are user_id, item_id, timestamp")


def test_nothing_left(run, write):
    path = write("a.csv", HEADER + GOOD * 4)
    assert run("table", path, fails=True) == (
        "nothing is left of the source: the step '5-core' leaves no event of 4; check the file "
        "and loosen the filters (--k-core, --min-rating, --since, --until, --where)"
    )
    sentence = run("table", write("b.csv", HEADER), fails=True)
    assert sentence.startswith(
        "nothing is left of the source: the step 'rows in the source' leaves no"
    )


def test_damaged_gzip(run, write):
    rows = "".join(f"u{n},i{n * 7 % 97},{n * n % 10_007}\n" for n in range(5_000))
    whole = gzip.compress((HEADER + rows).encode())
    for content in (whole[: len(whole) // 2], whole[:-4], whole[:15], flipped(whole)):
        path = write("a.csv", content)
        expected = f"{path} is a truncated or damaged gzip file; fetch it again"
        assert run("table", path, fails=True) == expected


def flipped(content):
    """With an error in the checksum at its end."""
    return content[:-8] + bytes(np.frombuffer(content[-8:-4], np.uint8) ^ 1) + content[-4:]


def test_damaged_archives(run, write):
    path = write("a.parquet", b"PAR1 and then nothing")
    assert "is a damaged Parquet file" in run("table", path, fails=True)
    path = write("a.tar.gz", b"nothing")
    assert "is a damaged archive" in run("kuairand", "--source", path, fails=True)
    path = write("folder/readme.txt", "nothing").parent
    assert run("movielens", "--source", path, fails=True) == (
        f"{path} holds no file called u.data or ratings.dat or ratings.csv; pass the file itself "
        "as --source"
    )


def test_files_that_are_something_else(run, write):
    path = write("a.csv", "")
    assert f"{path} is empty" in run("table", path, fails=True)
    path = write("a.json", "[{}]")
    assert f"{path} is one JSON array" in run("table", path, fails=True)
    path = write("a.txt", "hello\n")
    assert "not a MovieLens ratings file" in run("movielens", "--source", path, fails=True)
    assert "not a RecBole header" in run("recbole", path, fails=True)
    missing = path.with_name("none*.csv")
    expected = f"{missing}: no such file; check the path given as --source"
    assert run("table", missing, fails=True) == expected
