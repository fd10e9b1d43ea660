"""Every kind of file gives the events that it holds."""

import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

KEEP_ALL = ("--k-core", "1")
# Ids keep their leading zeros; users and items are numbered by first appearance.
EVENTS = [("007", "0012", 3, 1000), ("b", "x", 5, 900), ("007", "x", 4, 500), ("b", "0012", 1, 901)]
EXPECTED = {"007": [("x", 500), ("0012", 1000)], "b": [("x", 900), ("0012", 901)]}


def rows(delimiter, *, header="", order=(0, 1, 2, 3), events=EVENTS):
    lines = [delimiter.join(str(event[column]) for column in order) for event in events]
    return "\n".join([header] * bool(header) + lines) + "\n"


@pytest.mark.parametrize("compressed", ["", pytest.param(".gz", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name, content",
    [
        ("u.data", rows("\t")),
        ("ratings.dat", rows("::")),
        ("ratings.csv", rows(",", header="userId,movieId,rating,timestamp")),
    ],
)
def test_movielens(run, histories, write, name, content, compressed):
    ds = run("movielens", "--source", write(name + compressed, content), *KEEP_ALL)
    assert histories(ds) == EXPECTED
    assert ds.item_ids.to_pylist() == ["0012", "x"]
    assert ds.item_counts.tolist() == [2, 2]


@pytest.mark.parametrize(
    "events, titles",
    [
        (("u.data", rows("\t")), ("u.item", "x|Amélie (2001)|...\n0012|Alien|...\n")),
        (("ratings.dat", rows("::")), ("movies.dat", "x::Amélie (2001)::Comedy\n0012::Alien::\n")),
        (
            ("ratings.csv", rows(",", header="userId,movieId,rating,timestamp")),
            ("movies.csv", 'movieId,title,genres\n0012,Alien,\nx,"Amélie (2001)",Comedy\n'),
        ),
    ],
)
@pytest.mark.parametrize("container", [pytest.param("folder", marks=pytest.mark.slow), "zip"])
def test_movielens_as_downloaded(run, histories, write, tmp_path, events, titles, container):
    encoding = "utf-8" if titles[0] == "movies.csv" else "latin-1"
    source = write(f"ml/{events[0]}", events[1]).parent
    write(f"ml/{titles[0]}", titles[1].encode(encoding))
    write("ml/README.txt", "not data\n")
    if container == "zip":
        source = tmp_path / "ml.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for path in (tmp_path / "ml").iterdir():
                archive.write(path, f"ml/{path.name}")
    ds = run("movielens", "--source", source, *KEEP_ALL)
    assert histories(ds) == EXPECTED
    table = pq.read_table(ds.directory / "items.parquet")
    assert table["title"].to_pylist() == ["Alien", "Amélie (2001)"]


USERS, ASINS = ("A39HTATAQ9V7YF", "A3JM6GV9MNOF9X"), ("0205616461", "B000000XYZ")
REVIEWS = [(USERS[0], ASINS[0], 5.0, 1000), (USERS[1], ASINS[1], 3.0, 2000)]
REVIEWED = {USERS[0]: [(ASINS[0], 1000)], USERS[1]: [(ASINS[1], 2000)]}


def json_lines(*keys, scale=1):
    lines = [
        json.dumps({"text": 'a "b"\n', **dict(zip(keys, (u, i, r, t * scale), strict=True))})
        for u, i, r, t in REVIEWS
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "name, content",
    [
        ("ratings_Beauty.csv", rows(",", events=REVIEWS)),
        ("All_Beauty.csv", rows(",", order=(1, 0, 2, 3), events=REVIEWS)),
        (
            "All_Beauty.csv.gz",
            rows(
                ",",
                header="user_id,parent_asin,rating,timestamp",
                events=[(u, i, r, t * 1000 + 999) for u, i, r, t in REVIEWS],
            ),
        ),
        ("Beauty_5.json.gz", json_lines("reviewerID", "asin", "overall", "unixReviewTime")),
        (
            "All_Beauty.jsonl",
            json_lines("user_id", "parent_asin", "rating", "timestamp", scale=1000),
        ),
    ],
    ids=["2014 csv", "2018 csv", "2023 csv", "2014 and 2018 json", "2023 jsonl"],
)
def test_amazon(run, histories, write, name, content):
    ds = run("amazon", "--source", write(name, content), *KEEP_ALL, "--min-rating", "1")
    assert histories(ds) == REVIEWED


LOG = "user_id,video_id,date,time_ms,is_click,is_rand\n"


def test_kuairand_of_several_logs(run, histories, write):
    write("log_standard_4_08_to_4_21_1k.csv", LOG + "0,17,20220408,1649400000500,1,0\n")
    write("log_standard_4_22_to_5_08_1k.csv", LOG + "0,17,20220422,1650600000100,0,0\n")
    path = write("log_random_4_22_to_5_08_1k.csv.gz", LOG + "0,18,20220422,1650600000100,0,1\n")
    in_papers = run("kuairand", "--source", path.parent, *KEEP_ALL)
    assert histories(in_papers) == {"0": [("17", 1649400000)]}
    both = run("kuairand", "--source", path.parent / "log_standard_*.csv", *KEEP_ALL)
    assert histories(both) == {"0": [("17", 1649400000), ("17", 1650600000)]}
    random = run("kuairand", "--source", path, "--where", "is_rand = 1", *KEEP_ALL)
    assert histories(random) == {"0": [("18", 1650600000)]}


def test_milliseconds_decide_the_order_and_seconds_are_written(run, histories, write):
    log = write("log.csv", LOG + "0,b,1,1649400000900,1,0\n0,a,1,1649400000100,1,0\n")
    exact = run("kuairand", "--source", log, *KEEP_ALL)
    assert histories(exact) == {"0": [("a", 1649400000), ("b", 1649400000)]}
    recbole = run("kuairand", "--source", log, *KEEP_ALL, "--order", "recbole")
    assert histories(recbole) == {"0": [("b", 1649400000), ("a", 1649400000)]}


STEAM_REVIEWS = r"""{u'username': u'Caf\xe9 \u2605', u'product_id': u'0725', u'date': u'1970-01-02'}
{u'product_id': u'10', u'username': u"it's", u'text': u"u'username': u'me'", u'date': u'1970-01-03'}
{'username': 'a\'b"c', 'product_id': '10', 'date': '1970-01-04', 'hours': 1.5}
{u'date': u'1970-01-05', u'username': u'\ud83d\ude00', u'product_id': u'0725'}
"""


def test_steam_reviews(run, histories, write):
    ds = run("steam", "--source", write("steam_reviews.json.gz", STEAM_REVIEWS), *KEEP_ALL)
    assert histories(ds) == {
        "Café ★": [("0725", 86_400)],
        "it's": [("10", 172_800)],
        "a'b\"c": [("10", 259_200)],
        "😀": [("0725", 345_600)],
    }


@pytest.mark.parametrize("item", [pytest.param("item_id", marks=pytest.mark.slow), "product_id"])
@pytest.mark.parametrize(
    "kind, times", [("token", ("1970-01-01", "1970-01-02")), ("float", ("0.0", "86400.0"))]
)
def test_steam_inter(run, histories, write, item, kind, times):
    header = f"user_id:token\t{item}:token\tplay_hours:float\ttimestamp:{kind}\n"
    content = header + f"u\ta\t1.5\t{times[1]}\nu\tb\t.5\t{times[0]}\n"
    ds = run("steam", "--source", write("steam.inter", content), *KEEP_ALL)
    assert histories(ds) == {"u": [("b", 0), ("a", 86_400)]}


INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


@pytest.mark.parametrize("source", [["--source"], []], ids=["flag", "positional"])
def test_recbole(run, histories, write, source):
    path = write("a.inter", INTER + rows("\t").replace("900\n", "9.00E+02\n"))
    assert histories(run("recbole", *source, path, *KEEP_ALL)) == EXPECTED


def test_recbole_with_other_names(run, histories, write):
    path = write("a.inter", "uid:token\tvid:token\tms:float\nu\tv\t1650812741436\n")
    flags = ("--user", "uid", "--item", "vid", "--time", "ms", "--time-unit", "ms")
    ds = run("recbole", "--source", path, *flags, *KEEP_ALL)
    assert histories(ds) == {"u": [("v", 1650812741)]}


HEADER = "user_id{0}item_id{0}rating{0}timestamp"


@pytest.mark.parametrize("end", [pytest.param("\n", marks=pytest.mark.slow), "\r\n"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("name", [pytest.param("log.csv", marks=pytest.mark.slow), "log.gz"])
def test_delimited_tables(run, histories, write, name, delimiter, end):
    content = "\ufeff" + rows(delimiter, header=HEADER.format(delimiter))
    ds = run("table", write(name, content.replace("\n", end)), *KEEP_ALL)
    assert histories(ds) == EXPECTED


def test_quotes_and_empty_lines(run, histories, write):
    content = 'timestamp,note,user_id,item_id\n5,"a, ""b""\nc","u,1",x\n\n6,,"u,1",é\n'
    ds = run("table", write("a.csv", content), *KEEP_ALL)
    assert histories(ds) == {"u,1": [("x", 5), ("é", 6)]}


@pytest.mark.parametrize("delimiter", ["::", ","])
def test_no_header(run, histories, write, delimiter):
    path = write("a.dat", rows(delimiter))
    flags = ("--columns", "user_id,item_id,rating,timestamp", "--delimiter", delimiter)
    assert histories(run("table", path, *flags, *KEEP_ALL)) == EXPECTED


def test_json_lines(run, histories, write):
    lines = [json.dumps({"who": u, "what.id": i, "timestamp": t}) for u, i, _, t in EVENTS]
    path = write("a.jsonl.gz", "\n".join(lines) + "\n\n")
    ds = run("table", path, "--user", "who", "--item", "what.id", *KEEP_ALL)
    assert histories(ds) == EXPECTED


@pytest.mark.parametrize("kind", ["string", "date", "timestamp", "double"])
def test_parquet(run, histories, tmp_path, kind):
    times = pa.array([event[3] * 86_400 for event in EVENTS], pa.int64())
    unit = "iso"
    if kind == "double":
        times, unit = times.cast(pa.float64()), "s"
    else:
        times = times.cast(pa.timestamp("s"))
        if kind != "timestamp":
            times = times.cast(pa.date32()).cast(pa.string() if kind == "string" else pa.date32())
    table = pa.table(
        {"user_id": [e[0] for e in EVENTS], "item_id": [e[1] for e in EVENTS], "timestamp": times}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    ds = run("table", tmp_path / "a.parquet", "--time-unit", unit, *KEEP_ALL)
    days = {
        user: [(item, t // 86_400) for item, t in events] for user, events in histories(ds).items()
    }
    assert days == EXPECTED


@pytest.mark.parametrize(
    "unit, values",
    [
        ("s", ["1650812741", "1650812741.9", "1.650812741E9"]),
        ("ms", ["1650812741436"]),
        ("us", ["1650812741436789"]),
        ("ns", ["1650812741436789123"]),
        (
            "iso",
            ["2022-04-24 15:05:41", "2022-04-24T15:05:41.436Z", "2022-04-24T17:05:41+02:00"],
        ),
    ],
)
def test_time_units(run, histories, write, unit, values):
    rows = "".join(f"u{number},i,{value}\n" for number, value in enumerate(values))
    path = write("a.csv", "user_id,item_id,timestamp\n" + rows)
    ds = run("table", path, "--time-unit", unit, *KEEP_ALL)
    assert histories(ds) == {f"u{number}": [("i", 1650812741)] for number in range(len(values))}
    assert ds.metadata["time_unit"] == "s"


def test_many_files_keep_their_order(run, histories, write):
    for day, item in (("02", "b"), ("01", "a"), ("10", "c")):
        columns = "timestamp,item_id,user_id" if day == "10" else "user_id,item_id,timestamp"
        row = f"7,{item},u" if day == "10" else f"u,{item},7"
        path = write(f"day{day}.csv", f"{columns}\n{row}\n")
    ds = run("table", path.parent / "day*.csv", *KEEP_ALL)
    assert histories(ds) == {"u": [("a", 7), ("b", 7), ("c", 7)]}
    assert [source["file"] for source in ds.metadata["sources"]] == [
        "day01.csv",
        "day02.csv",
        "day10.csv",
    ]


def test_condition(run, histories, write):
    content = "user_id,item_id,timestamp,event\nu,a,5,view\n,b,bad,\nu,c,6,buy\n"
    ds = run("table", write("a.csv", content), "--where", "event = 'buy'", *KEEP_ALL)
    assert histories(ds) == {"u": [("c", 6)]}


def test_a_column_called_like_ours_does_not_confuse(run, histories, write):
    path = write("a.csv", "time,user,item,broken,kept,uid\nx,y,z,1,2,u\n")
    flags = ("--user", "uid", "--item", "item", "--time", "broken")
    assert histories(run("table", path, *flags, *KEEP_ALL)) == {"u": [("z", 1)]}


@pytest.mark.slow  # test_result_does_not_depend_on_threads compares two runs
def test_same_bytes_on_every_run(run, write):
    random = np.random.default_rng(0)
    n = 20_000
    columns = (
        random.integers(300, size=n),
        random.integers(400, size=n),
        random.integers(99, size=n),
    )
    lines = [
        "user_id,item_id,timestamp",
        *(f"{u},{i},{t}" for u, i, t in zip(*columns, strict=True)),
    ]
    path = write("a.csv", "\n".join(lines) + "\n")
    contents = []
    for _ in range(3):
        directory = run("table", path).directory
        contents.append([file.read_bytes() for file in sorted(directory.iterdir())])
    assert contents[0] == contents[1] == contents[2]
