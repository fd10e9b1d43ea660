"""Whatever comes in: the right dataset, or one sentence and nothing changed.

Hypothesis makes logs in all formats, containers and names, damages some of them, and passes flags
of all kinds. What plain Python reads from the same bytes says what the right dataset is.
"""

import collections
import contextlib
import csv
import datetime
import gzip
import io
import itertools
import json
import os
import re
import signal
import tarfile
import tempfile
import time
import zipfile
from decimal import Decimal
from pathlib import Path

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from tim4rec_jax.data import open_dataset
from tim4rec_jax.data_prep.__main__ import main
from tim4rec_jax.errors import run_main

NAMES = ("user_id", "item_id", "timestamp", "rating")
DELIMITERS = {"csv": ",", "tsv": "\t", "inter": "\t", "dat": "::"}
SCALE = {"s": 10**9, "ms": 10**6}
LAST_NANOSECOND = 9_200_000_000 * 10**9
UNKNOWN = "the bytes may be read in two ways"


# ---------------------------------------------------------------- the contract


class _TooLong(BaseException):
    """Not an `Exception`, which a program may catch."""


def run(folder: Path, arguments: list[str]) -> tuple[int, str]:
    """Runs the command; checks what holds for each run; returns its code and its last line."""
    before = listing(folder)
    out, errors = io.StringIO(), io.StringIO()
    old = signal.signal(signal.SIGALRM, lambda *_: _raise(_TooLong(arguments)))
    signal.alarm(60)  # a hang; the processor's time is checked below
    start = time.process_time()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                code = run_main(lambda: main(arguments))
            except SystemExit as stop:
                code = stop.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert time.process_time() - start < 10, arguments
    said = errors.getvalue()
    note(said)
    if code == 0:
        assert not said
        kept = {name: content for name, content in listing(folder).items() if name in before}
        assert kept == before and not list(folder.glob(".*.partial"))
        return code, out.getvalue()
    assert code in (1, 2) and listing(folder) == before
    last = said.splitlines()[-1]
    assert said.startswith("error: ") and said == last + "\n" and len(last) <= 300, said
    assert all(letter.isprintable() for letter in last), last
    return code, last


def _raise(error: BaseException):
    raise error


def listing(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder, with the content of its files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if "out" not in path.relative_to(folder).parts[:1] or not path.exists()
    }


def histories(directory: Path) -> dict[str, list[tuple[str, int]]]:
    ds = open_dataset(directory)
    items = ds.item_ids.to_pylist()
    found = {}
    for row, user in enumerate(ds.user_ids.to_pylist()):
        start, length = ds.offsets[row : row + 1], ds.lengths[row : row + 1]
        indices = ds.items(start, length, int(length[0]))[0]
        times = ds.timestamps(start, length, int(length[0]))[0].tolist()
        found[user] = [(items[i - 1], t) for i, t in zip(indices, times, strict=True)]
    return found


# ------------------------------------------------- the same in plain Python, from the same bytes


def oracle(files: list[tuple[str, bytes]], flags: dict):
    """The histories that the preparation must find, None if it must refuse, or `UNKNOWN`.

    Args:
      files: kind and content of each file, not compressed.
      flags: `unit`, `skip`, `dedup`, `min_rating`, `since`, `until`, `k_core`, `order`.
    """
    events, row = [], itertools.count()
    for kind, content in files:
        rated = flags["min_rating"] is not None
        rows = read(kind, content, rated)
        if rows in (None, UNKNOWN):
            return rows
        parsed = [event(fields, flags["unit"], rated) if fields else None for fields in rows]
        parsed = mark_other_units(parsed, flags["unit"])
        bad = sum(one is None for one in parsed)
        if bad and not flags["skip"]:
            return None
        if 2 * bad > len(parsed):
            return UNKNOWN  # refused if most times are in another unit
        events += [(*one, next(row)) for one in parsed if one]
    if flags["unit"] == "ms" and all(5e8 <= one[2] // 10**6 <= 4.1e9 for one in events):
        return None  # they are seconds
    return sorted_histories(filtered(events, flags), flags["order"])


def read(kind: str, content: bytes, rated: bool):
    """The rows of a file as lists of texts; None for a row that cannot be read."""
    used = len(NAMES) if rated or kind not in ("csv", "tsv") else NAMES.index("rating")
    if kind == "parquet":
        try:
            table = pq.read_table(pa.BufferReader(content))
            rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
            same = table.schema.names == list(NAMES) and encoded("parquet", rows) == content
        except (pa.ArrowException, OSError, TypeError, ValueError):
            return UNKNOWN
        if not same:
            return UNKNOWN  # damaged: readers differ in what they forgive
        return [list(row) for row in rows]
    if b"\0" in content or b"\r" in content or len(content) < 4:
        return UNKNOWN
    lines = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff").split("\n")
    if kind == "jsonl":  # its first line names the columns
        whole = lines and json_fields(lines[0]) and set(NAMES) <= set(json.loads(lines[0]))
        return [json_fields(line) for line in lines if line] if whole else UNKNOWN
    header, *lines = lines
    if header != DELIMITERS[kind].join(
        f"{name}:token" if kind == "inter" else name for name in NAMES
    ):
        return UNKNOWN
    if kind in ("inter", "dat"):
        rows = [line.split(DELIMITERS[kind]) for line in lines if line]
    elif any('"' in line for line in lines) and not re.fullmatch(QUOTED, "\n".join(lines)):
        return UNKNOWN
    else:
        # Line ends in quotes belong to the field.
        text = io.StringIO("\n".join(lines), newline="")
        rows = [fields for fields in csv.reader(text, delimiter=DELIMITERS[kind]) if fields]
    return [fields if len(fields) == 4 and is_text(fields[:used]) else None for fields in rows]


# Fields that are quoted whole or not at all; DuckDB and Python differ on others.
_FIELD = r'("([^"]|"")*"|[^",\t\n]*)'
QUOTED = rf"{_FIELD}([,\t\n]{_FIELD})*"


def is_text(fields: list[str]) -> bool:
    return not any("\udc80" <= letter <= "\udcff" for field in fields for letter in field)


def json_fields(line: str):
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not is_text([line]):
        return None
    fields = [found.get(name) for name in NAMES]
    if any(isinstance(field, list | dict) for field in fields[:3]):
        return None
    return [None if f is None else f if isinstance(f, str) else json.dumps(f) for f in fields]


def event(fields, unit: str, rated: bool):
    """User, item, nanoseconds and rating; None for a bad row."""
    user, item, moment, rating = fields
    if not user or not item or not moment:
        return None
    ticks = iso(moment) if unit == "iso" else number(moment)
    if ticks is None or (stars := number(rating or "") if rated else 0) is None:
        return None
    if unit != "iso":
        ticks = int((ticks.quantize(Decimal("1e-9")) * SCALE[unit]).to_integral_value())
    return (user, item, ticks, float(stars)) if 0 <= ticks <= LAST_NANOSECOND else None


def number(text: str) -> Decimal | None:
    text = text.strip(" \t")
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII):
        return None
    value = Decimal(text)
    return value if value.adjusted() < 19 else None


def iso(text: str) -> int | None:
    text = text.strip(" \t")
    if re.fullmatch(r"\d{8}(\d{4}|\d{6})?", text, re.ASCII):
        days, clock = f"{text[:4]}-{text[4:6]}-{text[6:8]}", re.findall("..", text[8:])
        text = f"{days} {':'.join(clock)}" if clock else days
    found = re.fullmatch(DATE, text, re.ASCII)
    if not found:
        return None
    year, _, month, day, hour, minute, second, sign, *offset = found.groups()
    with contextlib.suppress(ValueError):
        clock = (int(part or 0) for part in (hour, minute, second))
        moment = datetime.datetime(int(year), int(month), int(day), *clock, tzinfo=datetime.UTC)
        hours, minutes = (int(part or 0) for part in offset)
        if hours > 15 or minutes > 59:
            return None
        shift = datetime.timedelta(hours=hours, minutes=minutes) * (-1 if sign == "-" else 1)
        return (moment - shift - EPOCH) // datetime.timedelta(seconds=1) * 10**9
    return None


DATE = (
    r"(\d{4})([-/])(\d{1,2})\2(\d{1,2})"
    r"(?:[ T](\d{1,2}):(\d\d)(?::(\d\d))?(?: ?(?:Z|UTC|([+-])(\d\d)(?::?(\d\d))?))?)?"
)
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def mark_other_units(events: list, unit: str) -> list:
    """Seconds among milliseconds are bad."""
    times = [one[2] for one in events if one]
    if unit != "ms" or not any(t >= 10**17 for t in times):
        return events
    return [None if one and 10**14 <= one[2] < 10**17 else one for one in events]


def filtered(events: list, flags: dict) -> list:
    keys = {
        "exact": lambda one: (one[0], one[1], one[2]),
        "first": lambda one: (one[0], one[1]),
        "last": lambda one: (one[0], one[1]),
    }
    if how := flags["dedup"]:
        chosen: dict = {}
        for one in sorted(events, key=lambda one: (one[2], one[4]), reverse=how == "last"):
            chosen.setdefault(keys[how](one), one)
        if how == "exact":
            chosen = {}
            for one in events:
                chosen.setdefault(keys[how](one), one)
        events = sorted(chosen.values(), key=lambda one: one[4])
    if flags["min_rating"] is not None:
        events = [one for one in events if one[3] >= flags["min_rating"]]
    if flags["since"]:
        events = [one for one in events if one[2] >= iso(flags["since"])]
    if flags["until"]:
        events = [one for one in events if one[2] < iso(flags["until"])]
    while True:
        users = collections.Counter(one[0] for one in events)
        items = collections.Counter(one[1] for one in events)
        k = flags["k_core"]
        kept = [one for one in events if users[one[0]] >= k and items[one[1]] >= k]
        if len(kept) == len(events):
            return kept
        events = kept


def sorted_histories(events: list, order: str):
    found = collections.defaultdict(list)
    for user, item, ticks, *_ in events:
        found[user].append((item, ticks // 10**9, ticks))
    key = (lambda one: np.float32(one[1])) if order == "recbole" else (lambda one: one[2])
    result = {u: [one[:2] for one in sorted(found[u], key=key)] for u in found}
    return result or None


# ---------------------------------------------------------------- what comes in

LETTERS = st.sampled_from("abXY01 ,;|\"'#[]{}()*?\\/%_-.:=~é★😀\u2028\ufeff\x1f\x7f")
IDS = st.one_of(
    st.sampled_from(["u", "v", "7", "007", "NULL", "null", "nan", "", " ", "[red]", "True", "1.0"]),
    st.text(LETTERS, min_size=1, max_size=6),
)
TIMES = {
    "s": ["1650812741", "1650812742", "1650812741.9", "1.650812743E9", " 1650812700 ", "+7", "0"],
    "ms": ["1650812741436", "1650812741437", "1650812742000", "1650812699999.5", "1.65e12"],
    "iso": [
        "2022-04-24",
        "2022-04-24T15:05:41",
        "2022-04-24 15:05:41Z",
        "2022-04-24T15:05:41+02:00",
        "20220424",
        "20220424150541",
    ],
}
BAD_TIMES = {
    "s": ["1_700_000_900", "", "soon", "nan", "inf", "-5", "0x10", "１", "9" * 40, "1650812741436"],
    "ms": ["1_700_000_900", "", "-1", "1e400", "1650812741"],
    "iso": ["", "2022-13-01", "epoch", "today", "infinity", "0001-01-01", "9999-12-31", "20221304"],
}
RATINGS = st.sampled_from(["1", "3", "4.5", "5", "3", "4", "nan", "", "x", "1_0"])
FILE_NAMES = st.sampled_from(
    [
        "a",
        "a[1]",
        "a*",
        "a?",
        "a#",
        'a"',
        "a'",
        "[red]a",
        "[!b]",
        " a",
        "a\nb",
        "-a",
        "ä",
        "a\\",
        "a\\[",
        "{a}",
    ]
)
KINDS = ("csv", "tsv", "jsonl", "parquet", "inter", "dat")


@st.composite
def logs(draw):
    """A folder of files, the flags, and what is expected of them."""
    kind = draw(st.sampled_from(KINDS))
    flags = {
        "unit": draw(st.sampled_from(["s", "ms", "iso"])),
        "skip": draw(st.booleans()),
        "dedup": draw(st.sampled_from([None, None, "exact", "first", "last"])),
        "min_rating": draw(st.sampled_from([None, None, 3.0])),
        "since": draw(st.sampled_from([None, None, "2022-04-24"])),
        "until": draw(st.sampled_from([None, None, "2022-04-24T15:05:42"])),
        "k_core": draw(st.sampled_from([1, 1, 1, 2])),
        "order": draw(st.sampled_from(["exact", "recbole"])),
    }
    good = st.sampled_from(TIMES[flags["unit"]])
    times = st.one_of(good, good, good, good, good, st.sampled_from(BAD_TIMES[flags["unit"]]))
    if not draw(st.booleans()):
        times = good  # else hardly any log is without a bad row
    few = draw(st.lists(IDS, min_size=1, max_size=4))
    ids = st.sampled_from(few)
    rows = st.lists(st.tuples(ids, ids, times, RATINGS), min_size=1, max_size=12)
    files = [(kind, encoded(kind, draw(rows))) for _ in range(draw(st.sampled_from([1, 1, 2, 3])))]
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(files) - 1))
        files[place] = (kind, damaged(draw, files[place][1]))
    size = {"min_size": len(files), "max_size": len(files)}
    # Members of archives are named without backslashes.
    names = draw(st.lists(FILE_NAMES, **size, unique_by=lambda name: name.replace("\\", "")))
    container = draw(st.sampled_from(["plain", "plain", "folder", "zip", "tar", "same names"]))
    packed = draw(st.booleans()) and kind != "parquet"
    return kind, files, names, container, packed, flags


def damaged(draw, content: bytes) -> bytes:
    at = draw(st.integers(0, len(content) - 1))
    how = draw(st.sampled_from(["cut", "flip", "insert"]))
    if how == "cut":
        return content[:at]
    if how == "flip":
        flipped = content[at] ^ (1 << draw(st.integers(0, 7)))
        return content[:at] + bytes([flipped]) + content[at + 1 :]
    return content[:at] + draw(st.binary(min_size=1, max_size=6)) + content[at:]


def encoded(kind: str, rows: list) -> bytes:
    """A file in which every id that the format can hold is as it is."""
    if kind == "parquet":
        columns = zip(*rows, strict=True)
        table = pa.table({n: pa.array(c, pa.string()) for n, c in zip(NAMES, columns, strict=True)})
        sink = io.BytesIO()
        pq.write_table(table, sink)
        return sink.getvalue()
    if kind == "jsonl":
        return "".join(
            json.dumps(dict(zip(NAMES, row, strict=True)), ensure_ascii=False) + "\n"
            for row in rows
        ).encode()
    delimiter = DELIMITERS[kind]
    header = [f"{name}:token" if kind == "inter" else name for name in NAMES]
    if kind in ("inter", "dat"):
        lines = [header, *([field.replace(delimiter, "") for field in row] for row in rows)]
        return "".join(delimiter.join(line) + "\n" for line in lines).encode()
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, delimiter=delimiter, lineterminator="\n")
    writer.writerows([header, *rows])
    return sink.getvalue().encode()


def lay(folder: Path, kind, files, names, container, packed) -> list[str]:
    """Writes the files beside others that must not be read; returns the sources."""
    ending = {"dat": "csv", "inter": "inter"}.get(kind, kind) + (".gz" if packed else "")
    bodies = [gzip.compress(body) if packed else body for _, body in files]
    for decoy in ("a1", "ab", "aa"):
        (folder / f"{decoy}.{ending}").write_bytes(encoded(kind, [("z", "z", "5", "5")]))
    if container in ("zip", "tar", "same names"):
        members = [f"{name.replace(chr(92), '')}.{ending}" for name in names]
        members = [f"{n}/e.{ending}" for n in range(len(files))] if "same" in container else members
        path = folder / ("all.tar" if container == "tar" else "all.zip")
        if container == "tar":
            with tarfile.open(path, "w") as archive:
                for member, body in zip(members, bodies, strict=True):
                    info = tarfile.TarInfo(member)
                    info.size = len(body)
                    archive.addfile(info, io.BytesIO(body))
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for member, body in zip(members, bodies, strict=True):
                    archive.writestr(member, body)
        return [str(path)]
    inside = folder / "user_id=9" if container == "folder" else folder
    inside.mkdir(exist_ok=True)
    paths = [inside / f"{name}.{ending}" for name in names]
    for path, body in zip(paths, bodies, strict=True):
        path.write_bytes(body)
    return [str(inside)] if container == "folder" else list(map(str, paths))


def check_log(case) -> None:
    kind, files, names, container, packed, flags = case
    note(repr(case))
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        sources = lay(folder, kind, files, names, container, packed)
        arguments = ["recbole" if kind == "inter" else "table"]
        arguments += ["--out", str(folder / "out"), "--source", *sources]
        arguments += ["--time-unit", flags["unit"], "--k-core", str(flags["k_core"])]
        arguments += ["--on-bad-row", "skip" if flags["skip"] else "error"]
        arguments += ["--order", flags["order"]]
        if kind == "dat":
            arguments += ["--delimiter", "::"]
        for flag in ("min_rating", "since", "until"):
            if flags[flag] is not None:
                arguments += [f"--{flag.replace('_', '-')}", str(flags[flag])]
        if flags["dedup"]:
            arguments += ["--deduplicate", flags["dedup"]]
        code, _ = run(folder, arguments)
        # Members of archives and files of folders are read in the order of their names.
        order = range(len(files))
        if container in ("zip", "tar", "folder"):
            order = sorted(order, key=lambda n: names[n].replace("\\", "") + "." + kind)
        expected = oracle([files[n] for n in order], flags)
        kinds = {None: "refused", UNKNOWN: "unknown"}
        is_dataset = isinstance(expected, dict)
        hypothesis.event(f"{kind}: {'a dataset' if is_dataset else kinds[expected]}, exit {code}")
        if expected == UNKNOWN:
            if code == 0:
                open_dataset(folder / "out")
        elif expected is None or (container in ("plain", "folder") and "a\\[" in names):
            assert code == 1  # no pattern of DuckDB matches such a name
        else:
            assert code == 0
            assert histories(folder / "out") == expected


# Nothing there waits for a disk.
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
few = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.reuse, Phase.generate],  # to make a case smaller takes minutes
)
many = settings(few, max_examples=1000)


@few
@given(logs())
def test_logs(case):
    check_log(case)


@pytest.mark.slow
@many
@given(logs())
def test_many_logs(case):
    check_log(case)
