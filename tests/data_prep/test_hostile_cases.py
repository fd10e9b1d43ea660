"""Single hostile inputs, one for each way in which a file, a name or a flag once did harm."""

import gzip
import io
import json
import os
import re
import socket
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tim4rec_jax.data_prep import archives, events, flags, inspect, synthetic
from tim4rec_jax.data_prep.__main__ import main
from tim4rec_jax.errors import UsageError, UserError, run_main

HEADER = "user_id,item_id,timestamp\n"
ALL = ("--k-core", "1")
EVENTS = {"u": [("i", 5)], "v": [("j", 6)]}
FIRST, SECOND = HEADER + "u,i,5\n", HEADER + "v,j,6\n"


def slow(*values):
    """A further case of a kind, which only `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def table(*rows):
    columns = zip(*rows, strict=True)
    return pa.table(dict(zip(("user_id", "item_id", "timestamp"), columns, strict=True)))


# ---------------------------------------------------------------- no silent wrong result


def test_names_are_literal(run, histories, write):
    names = ["a[1].csv", "a*.csv", "a?.csv", "a\\.csv", "a'b\".csv", "[!a].csv", "a\nb.csv"]
    write("a1.csv", HEADER + "decoy,i,5\n")
    write("ab.csv", HEADER + "decoy,i,5\n")
    files = [write(name, f"{HEADER}u{number},i,5\n") for number, name in enumerate(names)]
    ds = run("table", "--source", *files, *ALL)
    assert histories(ds) == {f"u{number}": [("i", 5)] for number in range(len(names))}
    sentence = run("table", write("a\\[.csv", FIRST), fails=True)
    assert sentence.endswith("has a backslash beside one of * ? [ in its name; rename it")


def test_globs_are_expanded_once(run, histories, write):
    write("a[1].csv", FIRST)
    path = write("a[2].csv", SECOND)
    assert histories(run("table", path.parent / "a*.csv", *ALL)) == EVENTS


@pytest.mark.parametrize("name", ["user_id=9/a.parquet", "user_id=9/a.csv"])
def test_folders_are_no_columns(run, histories, write, tmp_path, name):
    path = write(name, FIRST)
    if name.endswith("parquet"):
        pq.write_table(table(("u", "i", 5)), path)
    assert histories(run("table", path, *ALL)) == {"u": [("i", 5)]}


def zipped(path, *members, **settings):
    with zipfile.ZipFile(path, "w", **settings) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two members of one name
        for name, content in members:
            archive.writestr(name, content)
    return path


def tarred(path, *members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content.startswith("->"):
                info.type, info.linkname = tarfile.SYMTYPE, content[2:]
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content.encode()))
    return path


def test_equal_names_in_archives(run, histories, tmp_path):
    archives = [
        zipped(tmp_path / "jan.zip", ("events.csv", FIRST)),
        zipped(tmp_path / "feb.zip", ("events.csv", SECOND)),
        zipped(tmp_path / "both.zip", ("train/e.csv", HEADER + "w,i,7\n"), ("test/e.csv", SECOND)),
        tarred(tmp_path / "b.tar", ("a/e.csv", HEADER + "x,i,7\n"), ("b/../../e.csv", SECOND)),
    ]
    ds = run("table", "--source", *archives, *ALL)
    assert histories(ds) == {"u": [("i", 5)], "v": [("j", 6)] * 3, "w": [("i", 7)], "x": [("i", 7)]}


def test_a_folder_of_several_formats_is_read_whole(run, histories, write, tmp_path, capsys):
    write("f/A.CSV", FIRST)
    write("f/readme.txt", "[/red]")
    pq.write_table(table(("v", "j", 6)), tmp_path / "f" / "b.parquet")
    main(["table", str(tmp_path / "f"), *ALL, "--out", str(tmp_path / "printed")])
    assert f"not read of {tmp_path / 'f'}: readme.txt" in capsys.readouterr().out
    assert histories(run("table", tmp_path / "f", *ALL)) == EVENTS


def test_the_same_file_is_not_counted_twice(run, write, tmp_path, monkeypatch):
    path = write("a.csv", FIRST)
    (tmp_path / "b.csv").symlink_to("a.csv")
    sentence = run("table", path.parent / "*.csv", path, fails=True)
    assert "are the same file, which would count twice; name it once" in sentence
    zipped(tmp_path / "c.zip", ("c.csv", FIRST))
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "c.zip"):
        sentence = run("table", name, name, fails=True)
        assert f"{name} and {name} are the same file" in sentence


def test_what_programs_keep_in_hidden_folders_is_not_read(run, histories, write, tmp_path):
    write("log/events.csv", FIRST)
    write("log/.ipynb_checkpoints/events-checkpoint.csv", FIRST)
    assert histories(run("table", tmp_path / "log", *ALL)) == {"u": [("i", 5)]}


def test_a_missing_id_of_json_is_not_called_nan(run, histories, write):
    rows = [("u", "i", 5), (float("nan"), "i", 6), ("NaN", "j", 7)]
    lines = [json.dumps(dict(zip(("user_id", "item_id", "timestamp"), row, strict=True)))
             for row in rows]  # fmt: skip
    path = write("a.jsonl", "\n".join(lines))
    assert "line 2: the user id is empty" in run("table", path, *ALL, fails=True)
    ds = run("table", path, *ALL, "--on-bad-row", "skip")
    assert histories(ds) == {"u": [("i", 5)], "NaN": [("j", 7)]}


def test_names_of_columns_are_not_replaced(run, write, tmp_path):
    pq.write_table(table(("u", "i", 5)), tmp_path / "a.parquet")
    columns = ("--columns", "item_id,user_id,timestamp")
    sentence = run("table", tmp_path / "a.parquet", *columns, fails=True)
    assert sentence.endswith("a.parquet names its columns itself; leave out --columns")
    sentence = run(
        "table", write("a.csv", "u,i,t,t\n"), "--user=u", "--item=i", "--time=t", fails=True
    )
    assert "two columns are called 't'" in sentence


def test_a_user_is_no_item(run, write):
    sentence = run("table", write("a.csv", FIRST), "--user", "item_id", fails=True)
    assert "'item_id' is named as the user and as the item; name yours with --user" in sentence


NUMBERS = [
    "1_000",
    "nan",
    "NaN",
    "inf",
    "-inf",
    "0x10",
    "1e400",
    "１",
    "٣",
    "1 000",
    "1,5",
    "5L",
    "e",
]


def test_numbers_are_decimal_everywhere():
    rows = [("u", "i", text) for text in NUMBERS]
    found, bad = events.read_events(table(*rows, ("u", "i", " 1e3 "), ("u", "i", "+7.")), **SKIP)
    assert found["time"].to_pylist() == [1000.0, 7.0]
    assert bad == {"the time is not a number": len(NUMBERS)}
    with pytest.raises(UsageError):
        flags.parser().parse_args(["table", "--min-rating", "1_0", "--out", "x"])


SKIP = {"on_bad_row": "skip"}
DATES = [
    "epoch",
    "today",
    "infinity",
    "2020-01-01T00:00:00+99:00",
    "2020-02-30",
    "20200230",
    "2020010112",
]


def test_dates_are_iso():
    rows = [("u", "i", date) for date in DATES]
    good = ["2020-01-01 00:00:30Z", "1970-1-1", "1970-01-02"]
    good += ["19700102", "19700102.0", "197001020001", "19700102000101"]
    rows += [("u", "i", date) for date in good]
    found, _ = events.read_events(table(*rows), time_unit="iso", **SKIP)
    assert found["time"].to_pylist() == [
        *(1_577_836_830.0, 0.0, 86_400.0),
        *(86_400.0, 86_400.0, 86_460.0, 86_461.0),
    ]


@pytest.mark.parametrize("rating", ["1e400", slow("nan"), slow(""), slow("1_0"), slow("inf")])
def test_ratings_that_are_none(run, histories, write, rating):
    content = f"user_id,item_id,timestamp,rating\nu,i,5,5\nu,j,6,{rating}\n"
    ds = run("table", write("a.csv", content), "--min-rating", 3, "--on-bad-row", "skip", *ALL)
    assert histories(ds) == {"u": [("i", 5)]}


@pytest.mark.parametrize("unit, tick", [("ms", 1), ("us", 1000), slow("us", 1), slow("ns", 1)])
def test_times_of_a_coarser_unit_do_not_pass(unit, tick):
    rows = [("u", "i", 1_650_812_741 * tick), ("u", "j", 1_650_812_742 * tick)]
    right = {1: "s", 1000: "ms"}[tick]
    with pytest.raises(UserError, match=rf"in 2022 if it is in {right}; .* --time-unit {right}"):
        events.read_events(table(*rows), time_unit=unit)


def test_times_of_other_kinds_are_doubted(run, write, capsys, tmp_path):
    path = write("a.csv", HEADER + "u,i,20200100\n")
    main(["table", str(path), *ALL, "--out", str(tmp_path / "printed")])
    assert "warning: all events are before 1973-03-03" in capsys.readouterr().out


def test_a_text_that_quotes_a_dictionary(run, histories, write):
    line = r"""{u'text': u"x', u'username': u'evil', ", 'n': [1, 2], u'username': u'real', """
    line += "u'product_id': u'1', u'date': u'1970-01-02'}\n"
    ds = run("steam", "--source", write("s.json", line), *ALL)
    assert histories(ds) == {"real": [("1", 86_400)]}


def test_titles_in_utf_8_and_in_latin_1(run, write):
    for number, encoding in enumerate(("utf-8", "latin-1")):
        folder = write(f"{number}/ratings.dat", "1::2::3::4\n").parent
        (folder / "movies.dat").write_bytes("2::Amélie::Comedy\n".encode(encoding))
        ds = run("movielens", "--source", folder, *ALL)
        assert pq.read_table(ds.directory / "items.parquet")["title"].to_pylist() == ["Amélie"]


# ---------------------------------------------------------------- one sentence


def broken_zip(path, at, value, where=b"PK\x01\x02"):
    content = bytearray(zipped(path, ("a.csv", FIRST)).read_bytes())
    place = content.find(where) + at
    content[place : place + len(value)] = value
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "at, value, sentence",
    [
        (8, b"\1", "a.csv is encrypted; unpack the archive yourself"),
        (10, b"\x61", "is encrypted or packed by an unknown method; unpack the archive yourself"),
        (24, struct.pack("<I", 2**32 - 2), "would unpack to 4.3 GB from"),
        (16, b"\0\0\0\0", "is a damaged archive; fetch it again"),
    ],
    ids=["encrypted", "method", "bomb", "checksum"],
)
def test_zips(run, tmp_path, at, value, sentence):
    path = broken_zip(tmp_path / "a.zip", at, value)
    if at == 10:
        broken = bytearray(path.read_bytes())
        broken[8] = value[0]
        path.write_bytes(broken)
    assert sentence in run("table", path, fails=True)


def test_what_does_not_fit_the_disk_is_said_before(monkeypatch, run, tmp_path):
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: _Usage)
    path = zipped(tmp_path / "a.zip", ("a.csv", FIRST))
    assert "the disk of --out has 0.0 GB left" in run("table", path, fails=True)


class _Usage:
    free = 10


def test_two_members_of_one_name(run, tmp_path):
    path = zipped(tmp_path / "a.zip", ("e.csv", FIRST), ("e.csv", SECOND))
    assert "holds two files called e.csv" in run("table", path, fails=True)


def test_tars(run, write, tmp_path):
    write("secret.csv", SECOND)
    path = tarred(tmp_path / "a.tar", ("e.csv", FIRST), ("f.csv", f"->{tmp_path}/secret.csv"))
    assert "f.csv is a link or a device; unpack" in run("table", path, fails=True)
    path = tarred(tmp_path / "b.tar", ("e.csv", FIRST), ("f.csv", SECOND))
    content = path.read_bytes()
    for broken in (content[:600], content[:1024], content[:1030] + b"?" + content[1031:]):
        path.write_bytes(broken)
        assert run("table", path, fails=True) == f"{path} is a damaged archive; fetch it again"


def special(tmp_path, kind):
    path = tmp_path / "a.csv"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.chdir(tmp_path)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("a.csv")
    elif kind == "link":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to("a.csv")
    else:
        return Path(kind)
    return path


@pytest.mark.parametrize("inside", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", ["pipe", "link", *map(slow, ("socket", "loop", "/dev/zero", "/proc/self/maps"))]
)
def test_what_is_no_file(run, tmp_path, monkeypatch, kind, inside):
    monkeypatch.chdir(tmp_path)
    path = special(tmp_path, kind)
    source = path.parent if inside and path.parent == tmp_path else path
    sentence = run("table", source, fails=True)
    assert re.search("is no file but|cannot be read: |is empty", sentence)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(run, write):
    path = write("a.csv", FIRST)
    path.chmod(0)
    assert "cannot be read: Permission denied" in run("table", path, fails=True)


def test_columns_that_are_the_same_for_sql(run, histories, write):
    path = write("a.csv", "user_id,User_ID,item_id,timestamp,#broken,#present\nu,w,i,5,x,\n")
    assert histories(run("table", path, *ALL)) == {"u": [("i", 5)]}
    assert histories(run("table", path, "--user", "User_ID", *ALL)) == {"w": [("i", 5)]}
    sentence = run("table", path, "--where", "user_id = 'u'", fails=True)
    assert "'user_id' and 'User_ID', which is the same name in --where" in sentence
    path = path.with_name("a.parquet")
    pq.write_table(pa.table({"A": [1], "a": [2], "b": [3], "t": [4]}), path)
    ds = run("table", path, "--user", "a", "--item", "b", "--time", "t", *ALL)
    assert histories(ds) == {"2": [("3", 4)]}


def test_names_of_columns_are_only_names(run, histories, write):
    path = write("a.csv", '"us""er",it\'em,t#,#user,[red],\nu,i,5,,,\n')
    names = ("--user", 'us"er', "--item", "it'em", "--time", "t#")
    for where in ((), ("--where", '"us""er" = \'u\'')):
        assert histories(run("table", path, *names, *where, *ALL)) == {"u": [("i", 5)]}
    line = json.dumps({'us"er': "u", "a/b~c": "i", "t\\": 5})
    path = write("a.jsonl", line + "\n")
    names = ("--user", 'us"er', "--item", "a/b~c", "--time", "t\\")
    assert histories(run("table", path, *names, *ALL)) == {"u": [("i", 5)]}


DEEP = "[" * 100_000 + "]" * 100_000
JSON = '{"user_id": "u", "item_id": "i", "timestamp": 5}\n'
STEAM = "{u'username': u'a', u'product_id': u'1', u'date': u'2017-01-01'}\n"


@pytest.mark.parametrize(
    "command, content, sentence",
    [
        ("table", HEADER + f"{'u' * 200_000},i,5\nu,i,soon\n", "line 3: the time is not a number"),
        ("table", f"{'u' * 200_000},i,5\n", "line 1: no column 'user_id'"),
        ("table", "u" * 2_000_000, "line 1: longer than a million bytes"),
        ("table", ",".join(map(str, range(50_000))) + "\n", "no column 'user_id', there are 0, 1"),
        ("table", HEADER + f"u,i,{'9' * 100_000}\n", "line 2: the time is not a number (999"),
        slow(
            "table", HEADER + f"u,{'i' * 2_100_000},5\n", "the line is longer than 2,000,000 bytes"
        ),
        ("table", f'{{"user_id": {DEEP}}}\n', "line 1: not valid JSON"),
        slow(
            "table", JSON + f'{{"user_id": {DEEP}, "item_id": 1, "timestamp": 5}}\n', "line 2: the"
        ),
        ("table", JSON + '{"user_id": {"a": 1}, "item_id": 1, "timestamp": 5}\n', "has a list or"),
        ("table", JSON + "[1]\n", "line 2: the line is no JSON object"),
        ("amazon", f'{{"reviewerID": {DEEP}}}\n', "line 1: not valid JSON"),
        slow("steam", f"{{'username': {DEEP}}}\n", "the user id is empty"),
        *(
            slow(
                "steam", STEAM + STEAM.replace("u'a'", f"u'a{escape}'"), "line 2: the user id has a"
            )
            for escape in (r"\u12", r"\U99999999", r"\N{nope}", r"\ud800")
        ),
        ("steam", STEAM + STEAM.replace("u'a'", r"u'a\x4'"), "line 2: the user id has a broken"),
        ("table", FIRST.encode("utf-16"), "is UTF-16 text; convert it with `iconv"),
        slow("table", FIRST.encode("utf-32"), "is UTF-32 text; convert it with `iconv"),
        slow("table", FIRST.encode("utf-16-le"), "line 1: not a text, it holds null bytes"),
        slow(
            "table", "usér_id,item_id\n".encode("latin-1"), "line 1: the line holds bytes that are"
        ),
        slow("table", b"\0" * 2000, "holds no file called"),
        slow("table", b"PK\x03\x04 and more", "is a damaged zip archive"),
        ("table", gzip.compress(b"PAR1", mtime=0), "is a Parquet file, perhaps in gzip"),
        slow(
            "table",
            gzip.compress(gzip.compress(b"x", mtime=0), mtime=0),
            "is packed with gzip twice",
        ),
        ("table", b"\x1f\x8b and more", "is a truncated or damaged gzip file"),
        ("table", '"user_id,item_id\n', "line 1: not a line of column names"),
        ("table", "x\x1b[31m\n\x00", r"there are x\x1b[31m;"),
    ],
)
def test_texts(run, write, command, content, sentence):
    assert sentence in run(command, "--source", write("a", content), fails=True)


@pytest.mark.parametrize("name", ["[/red] $x_{^$ a\x1b[2J\n名前", slow("$x_{^$")])
def test_names_are_no_markup(run, write, name, capsys, tmp_path):
    path = write("[/b] $_{1.csv", FIRST)
    out = ("--out", tmp_path / "[" / "red] [")  # a path that reads "[/red] ["
    ds = run("table", path, "--name", name, "--where", "user_id != '[/red]'", *out, *ALL)
    assert ds.name == name
    main(["inspect", str(ds.directory)])
    assert "\x1b[2J" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["synthetic", "--users", "1000000000000000"], "GB are free; ask for fewer"),
        (["synthetic", "--items", "99999999"], "GB are free; ask for fewer"),
        (["table", "--source", "a\0b"], r"a\x00b: no such file"),
        (["table", "--source", "x" * 5000], "no such file"),
        (["table", "--source", ""], "the empty name: no such file"),
        (["table", "--source", "a", "--name", "\udc80"], r"\udc80 is no UTF-8"),
        (["table", "--source", "a", "--memory-limit", "-5"], "is no size; write say 4GB"),
        (["table", "--source", "a", "--out", "x" * 300], "x: File name too long"),
        (["table", "--source", "a", "--out", "a\0b"], "it holds a null byte"),
        (["table", "--source", "a", "--out", "/proc/x"], "cannot be written: "),
        (["table", "--source", "a", "--where", "error('x')"], "the condition --where"),
    ],
)
def test_flags(run, write, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    write("a", FIRST)
    assert sentence in run(*arguments, fails=True)


@pytest.mark.parametrize(
    "flag, value",
    [
        *(
            (f"--{name}", value)
            for name in ("k-core", "shard-events")
            for value in ("²", "1_0", "0")
        ),
        *(("--k-core", value) for value in ("1e400", "nan", "-1", "9" * 5000, "10**12", "²", "0")),
        *(("--min-rating", value) for value in ("nan", "inf", "1e400", "1_0", "")),
        *(("--since", value) for value in ("0001-01-01", "9999-12-31", "x" * 999, "nan")),
        ("--delimiter", "\n"),
        ("--where", "(" * 3000),
        ("--out", ""),
    ],
)
def test_flags_that_the_parser_refuses(capsys, flag, value):
    words = ["table", "a", "--out", "b", f"{flag}={value}"]
    assert run_main(lambda: flags.parser().parse_args(words)) == 2
    said = capsys.readouterr().err
    assert flag in said and said.count("\n") == 1 and len(said) < 400


def test_seeds_of_any_size():
    arguments = flags.parser().parse_args(["synthetic", "--seed", str(10**18), "--out", "x"])
    assert synthetic.generate(2, 24, arguments.seed)[0].shape == (2, 30)


# ---------------------------------------------------------------- doubts of `inspect`


def test_exports_that_overlap_are_doubted(run, write):
    rows = [f"u{n % 7},i{n % 5},{n + 1}\n" for n in range(70)]
    one = write("1.csv", HEADER + "".join(rows[:40]))
    ds = run("table", one, write("2.csv", HEADER + "".join(rows[30:])), *ALL)
    [doubt] = [doubt for doubt in inspect.doubts(ds) if "copies" in doubt]
    assert doubt.startswith("10 of 80 events are copies of the event before")
    ds = run("table", one, *ALL, "--out", ds.directory.parent / "once")
    assert not [doubt for doubt in inspect.doubts(ds) if "copies" in doubt]


def log_of(write, rows):
    rows = "".join(f"{user},{item},{time}\n" for user, item, time in rows)
    return write("a.csv", HEADER + rows)


START = 1_600_000_000


def test_one_event_in_2099_is_told_and_does_not_ruin_the_plot(run, write, capsys):
    rows = [(f"u{n % 50}", "i", START + 1000 * n) for n in range(1000)]
    ds = run("table", log_of(write, [*rows, ("u1", "i", 4_080_000_000)]), *ALL)
    assert "warning: 1 of 1,001 events is far" in " ".join(shown(ds, capsys).split())
    figures = inspect.statistics(ds)
    assert (
        figures["usual"][0] == START and START + 999_000 <= figures["usual"][1] < START + 10**6 * 2
    )
    assert figures["busy"].sum() == 1000 and (figures["busy"] > 0).sum() >= 40
    assert "the last is of 2099-04-16; --until can leave" in " ".join(shown(ds, capsys).split())
    whole = run("table", log_of(write, rows), *ALL)
    assert inspect.usual_times(whole) == (START, START + 999_000)
    assert not inspect.doubts(whole)


def shown(ds, capsys):
    capsys.readouterr()
    main(["inspect", str(ds.directory)])
    return capsys.readouterr().out


def test_a_user_of_many_events_is_told(run, write, capsys):
    rows = [("bot", "i", START + n) for n in range(6000)]
    rows += [(f"u{n % 50}", "i", START + n) for n in range(500)]
    ds = run("table", log_of(write, rows), *ALL)
    said = " ".join(shown(ds, capsys).split())
    assert "warning: 1 user has 6,000 events, 92% of all; the id 'bot' may be of a program" in said


def test_an_id_that_stands_for_nobody_is_told_in_a_small_log_too(run, write):
    people = [(f"u{n % 50}", f"i{n % 7}", START + n) for n in range(500)]
    nobody = [("null", f"i{n % 7}", START + n) for n in range(500)]
    path = log_of(write, people + nobody)
    [doubt] = inspect.doubts(run("table", path, *ALL))
    assert doubt == (
        "1 user has 500 events, 50% of all; the id 'null' may be of a program, or stand for "
        "nobody; --where can leave out such users"
    )
    assert not inspect.doubts(run("table", path, "--where", "user_id != 'null'", *ALL))
    path = log_of(write, people + nobody + [("0", "i1", START + n) for n in range(400)])
    [doubt] = inspect.doubts(run("table", path, *ALL))
    assert doubt.startswith("2 users have 400 to 500 events each, 64% of all; they may be programs")
    assert "such as 'null'" in doubt


def test_a_few_users_with_much_of_a_small_log_are_no_doubt(run, write):
    rows = [(f"u{n % 3}", "i", START + n) for n in range(60)]
    rows += [("much", "i", START + n) for n in range(150)]
    assert not inspect.doubts(run("table", log_of(write, rows), *ALL))


@pytest.mark.parametrize("size", [1, 20, *(slow(size) for size in (2, 19, 21, 999, 1000, 1001))])
def test_usual_times_of_any_size(run, write, size):
    times = np.random.default_rng(size).integers(START, START + 10**7, size)
    ds = run("table", log_of(write, [("u", "i", time) for time in times]), *ALL)
    first, last = inspect.usual_times(ds)
    assert (first, last) == (times.min(), times.max())


def test_no_progress_bar_in_a_notebook(monkeypatch, write, tmp_path):
    """DuckDB's own needs ipywidgets, and so would rich's."""
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)  # what DuckDB takes for interactive
    with events.connect(tmp_path) as con:
        found = con.execute("SELECT current_setting('enable_progress_bar')").fetchall()
    assert found == [(False,)]
