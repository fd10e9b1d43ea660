"""Reads event files of any layout into DuckDB and checks every row.

A bad row ends in an error that names it, or is counted and left out.
"""

import ast
import collections
import csv
import re
import sys
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import duckdb
import pyarrow as pa

from tim4rec_jax.data_prep.database import quote_name, quote_path, quote_text
from tim4rec_jax.data_prep.files import SourceFile, damaged_gzip, is_gzip, open_bytes, open_text
from tim4rec_jax.data_prep.layout import Layout, listed, schema
from tim4rec_jax.errors import UserError, first_line, one_line

NANOSECONDS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
# Until they are written, times are 64-bit nanoseconds, which end in the year 2262.
LAST_SECOND = 9_200_000_000
# Of a time the blanks around it are trimmed before.
NUMBER = r"[ \t]*[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?[ \t]*"
DATE = (
    r"[0-9]{4,6}[-/][0-9]{1,2}[-/][0-9]{1,2}([ T][0-9]{1,2}:[0-9]{2}(:[0-9]{2}([.][0-9]+)?)?"
    r"( ?(Z|UTC|[+-](0[0-9]|1[0-5])(:?[0-9]{2})?))?)?"
)
# Dates without separators, as data warehouses write them: the day, perhaps with hour, minute and
# second. Tables of pandas make floats of them where one is missing.
_COMPACT_DATE = r"[0-9]{8}([0-9]{4}|[0-9]{6})?([.]0)?"
# A number that looks like one. Of the seconds of a log that counts from its own start, one in 27
# does, and only around day 230.
_DATE_LIKE = (
    r"(19|20)[0-9]{2}(0[1-9]|1[0-2])(0[1-9]|[12][0-9]|3[01])"
    r"(([01][0-9]|2[0-3])[0-5][0-9]([0-5][0-9])?)?"
)
# Dates of which a log is more likely than of others: 1985 to 2100, in seconds.
_OUR_DAYS = (5e8, 4.1e9)
_SHOWN = 60  # characters of a wrong value
_TABLE = "table in memory"
# A field of a Python dictionary, after other fields, as `repr` writes them under Python 2 (u'...')
# or 3. The fields before it are read too, because a text may quote a dictionary.
_TEXT = r"""u?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_LITERAL = rf"""^\{{{{(?:{_TEXT}: (?:{_TEXT}|[^'"]+?), )*?u?'{{key}}': u?({_TEXT[2:]})"""
UNREADABLE = "the line is not readable"
_REMEDY = "correct it or pass --on-bad-row=skip"
GIVE_FLAG = "give `table` or `batch` the flag "  # other commands know the unit
# What corrects a problem of all rows of a file, of which none would be left without the bad ones.
_REMEDIES_OF_ALL = {
    "the time": f"{GIVE_FLAG}--time with the right column, or the right --time-unit (iso for dates "
    "such as 2022-04-24)",
    "the user": f"{GIVE_FLAG}--user with the right column",
    "the item": f"{GIVE_FLAG}--item with the right column",
    "the rating": f"{GIVE_FLAG}--rating with the right column, or leave out --min-rating",
    "the line has a list": f"{GIVE_FLAG}--user, --item or --time with another column",
    "the line": "correct the first line, the delimiter or the encoding",
}


def create(con: duckdb.DuckDBPyConnection) -> None:
    """Makes the empty table `raw`, which `read_file` fills with a row for each row of the files.

    `time` is in nanoseconds. `kept` is False where the layout's condition fails, and null for an
    empty line. `problem` says what is wrong with a row, and `value` quotes the wrong field.
    """
    con.execute(
        'CREATE TABLE raw ("user" VARCHAR, item VARCHAR, time BIGINT, rating DOUBLE, '
        "kept BOOLEAN, problem VARCHAR, value VARCHAR)"
    )


def read_file(
    con: duckdb.DuckDBPyConnection, file: SourceFile, layout: Layout, *, skip: bool
) -> collections.Counter[str]:
    """Appends all rows of one file to the table `raw` and checks them.

    Args:
      con: holds the table `raw`.
      file: the file or table.
      layout: its layout.
      skip: whether bad rows are counted instead of raising an error.

    Returns:
      The number of bad rows for each reason. Lines that DuckDB cannot read at all are not in `raw`;
      they are counted as `UNREADABLE`.

    Raises:
      UserError: the file is damaged, the layout's condition is no valid SQL, a row is bad and
        `skip` is False, or most times are in another unit.
    """
    first = con.execute("SELECT count(*) FROM raw").fetchall()[0][0]
    _append(con, file, layout, first)
    unreadable, sentence = _unreadable(con, file, layout)
    if unreadable and not skip:
        [[read]] = con.execute("SELECT count(kept) FROM raw WHERE rowid >= ?", [first]).fetchall()
        all_bad = not read and unreadable > 1
        of_all = _remedy_of_all(UNREADABLE, unreadable, unreadable)
        raise UserError(f"{sentence}{of_all if all_bad else f'; {_REMEDY}'}")
    _mark_coarser_times(con, layout, first)
    bad = con.execute(
        "SELECT problem, min(rowid), arg_min(value, rowid), count(*) FROM raw "
        "WHERE rowid >= ? AND problem IS NOT NULL GROUP BY problem ORDER BY min(rowid)",
        [first],
    ).fetchall()
    [[rows]] = con.execute("SELECT count(*) FROM raw WHERE rowid >= ? AND kept", [first]).fetchall()
    for problem, row, value, count in [*bad, *_dates_as_numbers(con, layout, first)]:
        unit = _guess_unit(value, layout.time_unit) if problem.startswith("the time") else None
        if unit and 2 * count > rows:
            raise UserError(
                f"{_place(file, layout, row - first)}: {problem} ({value}), and so for {count:,} "
                f"of {rows:,} rows; {_other_unit(unit)}"
            )
    if bad and not skip:
        all_bad = sum(count for _, _, _, count in bad) == rows
        problem, row, value, count = max(bad, key=lambda one: one[3]) if all_bad else bad[0]
        shown = "" if value is None else f" ({value})"
        remedy = _remedy_of_all(problem, count, rows) if all_bad and rows > 1 else f"; {_REMEDY}"
        raise UserError(f"{_place(file, layout, row - first)}: {problem}{shown}{remedy}")
    counts = collections.Counter({problem: count for problem, _, _, count in bad})
    if unreadable:
        counts[UNREADABLE] = unreadable
    return counts


def _remedy_of_all(problem: str, count: int, rows: int) -> str:
    """Returns the end of the sentence about a problem of most rows where no row is good."""
    found = next(text for start, text in _REMEDIES_OF_ALL.items() if problem.startswith(start))
    return f", and so for {count:,} of {rows:,} rows; {found}"


def _append(con: duckdb.DuckDBPyConnection, file: SourceFile, layout: Layout, first: int) -> None:
    """Appends all rows to `raw`; lines that cannot be read go to the table `reject_errors`."""
    con.execute("DROP TABLE IF EXISTS reject_errors; DROP TABLE IF EXISTS reject_scans")
    if file.table is not None:
        con.register(_TABLE, file.table)
    try:
        con.execute(f"INSERT INTO raw {_checked_rows(file, layout)}")
    except duckdb.IOException as error:
        if "GZIP" in str(error):
            raise damaged_gzip(file) from error
        if layout.kind == "parquet" and "No space left" not in str(error):
            raise _damaged(file, layout, error) from error
        raise
    except (duckdb.OutOfMemoryException, duckdb.InterruptException):
        raise
    except (duckdb.ProgrammingError, duckdb.DataError, duckdb.InternalError) as error:
        of_file = isinstance(error, duckdb.InvalidInputException) and "CSV" in str(error)
        if layout.where is None or of_file:
            raise _damaged(file, layout, error) from error
        raise UserError(
            f"{file}: the condition --where {one_line(layout.where, 60)!r} fails "
            f"({one_line(str(error).splitlines()[0], 80)}); columns are {listed(layout.columns)}"
        ) from error
    finally:
        if file.table is not None:
            con.unregister(_TABLE)
    if layout.kind == "literal":
        _unescape(con, first)


def _damaged(file: SourceFile, layout: Layout, error: Exception) -> UserError:
    """Returns the error for a file that DuckDB cannot read to its end."""
    if layout.kind in ("csv", "split", "json", "literal"):
        return UserError(
            f"{file}: lines end in different ways, or a quote is out of place; convert the file "
            "with `dos2unix`"
        )
    what = "a table that cannot be read" if file.table is not None else "a damaged Parquet file"
    return UserError(f"{file} is {what} ({first_line(error)}); make it again")


def _checked_rows(file: SourceFile, layout: Layout) -> str:
    """Returns the SELECT that computes the columns of `raw`."""
    if layout.time_unit == "iso":
        parse = (
            f"CASE WHEN regexp_full_match(time, {quote_text(_COMPACT_DATE)}) THEN "
            "try_strptime(regexp_replace(time, '[.]0$', ''), "
            "['%Y%m%d%H%M%S', '%Y%m%d%H%M', '%Y%m%d'])::TIMESTAMPTZ "
            f"ELSE {_if_matches('time', DATE, 'TIMESTAMPTZ')} END"
        )
        ticks = "CASE WHEN number BETWEEN '1970-01-01' AND '2261-12-31' THEN epoch_ns(number) END"
        far = "the time is past the year 2261"
        wrong, negative = "the time is no ISO date", "number < '1970-01-01'"
    else:
        scale = NANOSECONDS[layout.time_unit]
        parse = _if_matches("time", NUMBER, "DECIMAL(28, 9)")
        limit = LAST_SECOND * NANOSECONDS["s"] // scale
        ticks = f"CASE WHEN number BETWEEN 0 AND {limit} THEN CAST(number * {scale} AS BIGINT) END"
        far = f"the time is in another unit than {layout.time_unit}"
        wrong, negative = "the time is not a number", "number < 0"
    rated = layout.rating is not None
    return f"""
      SELECT "user", item, {ticks} AS ticks, stars, kept, CASE
          WHEN kept IS NOT TRUE THEN NULL
          WHEN broken IS NOT NULL THEN broken
          WHEN "user" IS NULL THEN 'the user id is empty'
          WHEN item IS NULL THEN 'the item id is empty'
          WHEN time IS NULL THEN 'the time is empty'
          WHEN number IS NULL THEN {quote_text(wrong)}
          WHEN {negative} THEN 'the time is negative'
          WHEN ticks IS NULL THEN {quote_text(far)}
          WHEN {rated} AND isfinite(stars) IS NOT TRUE THEN 'the rating is not a number'
        END AS problem,
        left(CASE WHEN problem LIKE 'the time%' THEN time
          WHEN problem LIKE 'the rating%' THEN rating END, {_SHOWN})
      FROM (SELECT *, {parse} AS number, {_if_matches("rating", NUMBER, "DOUBLE")} AS stars FROM (
        SELECT nullif("user", '') AS "user", nullif(item, '') AS item, rating, broken,
          nullif(trim(time, chr(32) || chr(9)), '') AS time, kept
        FROM ({_named(file, layout)})
      ))"""


def _if_matches(column: str, pattern: str, kind: str) -> str:
    """SQL that turns a text into a value of a type, or into null if it is none.

    DuckDB alone would take `1_000`, `nan`, `epoch` and more, which other readers do not.
    """
    matches = f"regexp_full_match({column}, {quote_text(pattern)})"
    return f"CASE WHEN {matches} THEN TRY_CAST({column} AS {kind}) END"


def _named(file: SourceFile, layout: Layout) -> str:
    """Returns the SELECT of `user`, `item`, `time`, `rating`, `broken` and `kept`, as text.

    `kept` is null for an empty line, and `broken` says why a line cannot be read.
    """
    names = {"user": layout.user, "item": layout.item, "time": layout.time, "rating": layout.rating}
    places = {
        name: "NULL::VARCHAR" if column is None else f"c{layout.columns.index(column)}"
        for name, column in names.items()
    }
    fields = _fields(file, layout)
    if layout.where is None:
        chosen = ", ".join(f'{place} AS "{name}"' for name, place in places.items())
        return f"SELECT {chosen}, broken, CASE WHEN present THEN TRUE END AS kept FROM ({fields})"
    # The condition may name any column of the source, which must not hide ours.
    ours = "#"
    while any(column.startswith(ours) for column in layout.columns):
        ours += "#"
    places |= {"broken": "broken", "present": "present"}
    columns = [
        f"c{number} AS {quote_name(column or f'column {number + 1}')}"
        for number, column in enumerate(layout.columns)
    ]
    hidden = [f'{place} AS "{ours}{name}"' for name, place in places.items()]
    chosen = ", ".join(f'"{ours}{name}" AS "{name}"' for name in (*names, "broken"))
    return f"""
        SELECT {chosen},
          CASE WHEN "{ours}present" THEN coalesce(({layout.where}), FALSE) END AS kept
        FROM (SELECT {", ".join((*columns, *hidden))} FROM ({fields}))"""


def _fields(file: SourceFile, layout: Layout) -> str:
    """Returns the SELECT of the columns as text, called `c0`, `c1` and so on, which SQL can take.

    `present` is False for an empty line, and `broken` says why a line cannot be read.
    """
    numbers = range(len(layout.columns))
    if layout.kind in ("parquet", "arrow"):
        rows = f"read_parquet({quote_path(file.path)}, hive_partitioning = false)"
        rows = quote_name(_TABLE) if layout.kind == "arrow" else rows
        floats = [pa.types.is_floating(kind) for kind in schema(file).types]
        columns = [
            # Tables mark a missing number by NaN, and make floats of whole numbers with gaps.
            f"CASE WHEN isnan(c{n}) THEN NULL WHEN c{n} = trunc(c{n}) THEN "
            f"coalesce(CAST(TRY_CAST(c{n} AS BIGINT) AS VARCHAR), CAST(c{n} AS VARCHAR)) "
            f"ELSE CAST(c{n} AS VARCHAR) END AS c{n}"
            if floats[n] and layout.columns[n] in (layout.user, layout.item)
            else f"CAST(c{n} AS VARCHAR) AS c{n}"
            for n in numbers
        ]
        called = ", ".join(f"c{n}" for n in numbers)
        return (
            f"SELECT {', '.join(columns)}, TRUE AS present, NULL AS broken "
            f"FROM {rows} AS source({called})"
        )
    if layout.kind == "csv":
        quoted = f"delim = {quote_text(layout.delimiter)}, quote = '\"', escape = '\"'"
        names = [f"c{n}" for n in numbers]
        rows = _read_csv(file, names, f"{quoted}, strict_mode = true", layout.header)
        return f"SELECT *, TRUE AS present, NULL AS broken FROM {rows}"
    # Without a delimiter, each line is one field.
    whole = "delim = '', quote = '', escape = '', strict_mode = false"
    rows = _read_csv(file, ["line"], whole, layout.header)
    used = [
        n
        for n in numbers
        if layout.where
        or layout.columns[n] in (layout.user, layout.item, layout.time, layout.rating)
    ]
    if layout.kind == "split":
        line = _split(layout)
        used = list(numbers)
    else:  # long texts that nobody uses need not be parsed
        keys = tuple(layout.columns[n] for n in used)
        line = (_json if layout.kind == "json" else _literal)(keys)
    values = [field.format(f"fields[{place}]") for place, field in enumerate(line.fields, 1)]
    named = [f"{value} AS c{n}" for value, n in zip(values, used, strict=True)]
    return f"""
          SELECT {", ".join(named)}, coalesce(line != '', FALSE) AS present,
            CASE WHEN {line.broken} END AS broken
          FROM (SELECT line, {line.cut} AS fields
            FROM (SELECT rtrim(line, chr(13)) AS line FROM {rows}))
        """


class _Line(NamedTuple):
    """SQL that takes a line apart.

    Attributes:
      cut: makes the list `fields` of the text in `line`.
      fields: for each field what makes its value; the field is inserted for `{0}`.
      broken: the rest of a CASE: the condition of a broken line, THEN, and the reason.
    """

    cut: str
    fields: list[str]
    broken: str


def _split(layout: Layout) -> _Line:
    """A line of fields with delimiters between them."""
    n = len(layout.columns)
    broken = f"len(fields) != {n} THEN 'the line has ' || len(fields) || ' fields, not {n}'"
    return _Line(f"string_split(line, {quote_text(layout.delimiter)})", ["{0}"] * n, broken)


def _json(keys: tuple[str, ...]) -> _Line:
    """A line that is a JSON object, with texts and numbers in it."""
    paths = [quote_text("/" + key.replace("~", "~0").replace("/", "~1")) for key in keys]
    cut = f"CASE WHEN json_valid(line) THEN json_extract_string(line, [{', '.join(paths)}]) END"
    nested = " OR ".join(
        f"left(fields[{place}], 1) IN ('{{', '[') "
        f"AND json_type(line, {path}) IN ('OBJECT', 'ARRAY')"
        for place, path in enumerate(paths, 1)
    )
    broken = (
        "fields IS NULL THEN 'the line is not valid JSON' "
        "WHEN left(ltrim(line), 1) != '{' THEN 'the line is no JSON object' "
        f"WHEN {nested} THEN 'the line has a list or an object in place of a text or a number'"
    )
    # Python writes a missing number as NaN without quotes, which a text may be as well.
    fields = [
        f"CASE WHEN {{0}} = 'NaN' AND json_type(line, {path.replace('{', '{{').replace('}', '}}')})"
        " = 'DOUBLE' THEN NULL ELSE {0} END"
        for path in paths
    ]
    return _Line(cut, fields, broken)


def _literal(keys: tuple[str, ...]) -> _Line:
    """A line that is a Python dictionary.

    Fields with escapes keep their quotes, and `_unescape` reads them.
    """
    patterns = [quote_text(_LITERAL.format(key=re.escape(key))) for key in keys]
    cut = ", ".join(f"regexp_extract(line, {pattern}, 1)" for pattern in patterns)
    bare = "CASE WHEN contains({0}, chr(92)) THEN {0} ELSE substr({0}, 2, len({0}) - 2) END"
    return _Line(
        f"[{cut}]", [bare] * len(keys), "line NOT LIKE '{%}' THEN 'the line is no dictionary'"
    )


def _read_csv(file: SourceFile, columns: list[str], quoting: str, header: bool) -> str:
    types = ", ".join(f"{quote_text(column)}: 'VARCHAR'" for column in columns)
    compression = "gzip" if is_gzip(file.path) else "none"
    return (
        f"read_csv({quote_path(file.path)}, auto_detect = false, header = false, "
        f"skip = {int(header)}, columns = {{{types}}}, {quoting}, store_rejects = true, "
        f"hive_partitioning = false, compression = {quote_text(compression)})"
    )


def _unescape(con: duckdb.DuckDBPyConnection, first: int) -> None:
    r"""Replaces ids that Python wrote with escapes (\xe9, \u2605, \') by their text."""
    for column in ("user", "item"):
        quoted = con.execute(
            f"SELECT DISTINCT {quote_name(column)} FROM raw "
            f"WHERE rowid >= {first} AND contains({quote_name(column)}, chr(92))"
        ).fetchall()
        if quoted:
            literals = [literal for (literal,) in quoted]
            meanings = pa.array([_evaluate(literal) for literal in literals], pa.string())
            con.register("meanings", pa.table({"literal": literals, "meaning": meanings}))
            con.execute(
                f"UPDATE raw SET {quote_name(column)} = meaning, problem = CASE "
                f"WHEN meaning IS NULL AND kept THEN 'the {column} id has a broken escape' "
                f"ELSE problem END FROM meanings "
                f"WHERE raw.{quote_name(column)} = literal AND raw.rowid >= {first}"
            )
            con.unregister("meanings")


def _evaluate(literal: str) -> str | None:
    # Narrow builds of Python 2 wrote characters beyond U+FFFF as two halves: join them.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that mean nothing, such as \d
            value = ast.literal_eval(literal)
        return value.encode("utf-16", "surrogatepass").decode("utf-16")
    except (SyntaxError, ValueError):
        return None


def _mark_coarser_times(con: duckdb.DuckDBPyConnection, layout: Layout, first: int) -> None:
    """Marks times of a coarser unit, for example seconds among milliseconds.

    If all times are small, they are taken as they are: a log may count from its own start.
    """
    if layout.time_unit in ("s", "iso"):
        return
    early, tick = 100_000_000, NANOSECONDS[layout.time_unit]  # 1973 in seconds
    unix = f"time >= {early * NANOSECONDS['s']}"
    coarse = f"time < {early * NANOSECONDS['s']} AND time >= {early * tick}"
    has_both = con.execute(
        f"SELECT count(*) FILTER ({unix}) > 0 AND count(*) FILTER ({coarse}) > 0 "
        f"FROM raw WHERE rowid >= {first} AND kept"
    ).fetchall()[0][0]
    if has_both:
        con.execute(
            f"UPDATE raw SET problem = 'the time is in another unit than {layout.time_unit}', "
            f"value = time // {tick} WHERE rowid >= {first} AND kept AND problem IS NULL "
            f"AND {coarse}"
        )


def _dates_as_numbers(
    con: duckdb.DuckDBPyConnection, layout: Layout, first: int
) -> list[tuple[str, int, str, int]]:
    """Finds good times that are rather dates such as 20240131, which as seconds are in August 1970.

    Returns:
      Nothing, or one problem: what it is, its first row, the time of that, and how many have it.
    """
    if layout.time_unit == "iso":
        return []
    tick = NANOSECONDS[layout.time_unit]
    late = 210_000_000_000 * NANOSECONDS["ms"]  # in 1976, and what 2099-12-31 23:59 is at most
    return con.execute(
        "SELECT 'the time is a date written as a number', min(rowid), arg_min(text, rowid), "
        f"count(*) FROM (SELECT rowid, (time // {tick})::VARCHAR AS text FROM raw WHERE "
        f"rowid >= ? AND time < {late} AND time % {tick} = 0 AND kept AND problem IS NULL) "
        f"WHERE regexp_full_match(text, {quote_text(_DATE_LIKE)}) HAVING count(*) > 0",
        [first],
    ).fetchall()


def count(con: duckdb.DuckDBPyConnection) -> tuple[int, int, int]:
    """Counts the rows of `raw`, those that meet the condition, and those of them that are good."""
    return con.execute(
        "SELECT count(kept), count(*) FILTER (kept), count(*) FILTER (kept AND problem IS NULL) "
        "FROM raw"
    ).fetchall()[0]


def span(con: duckdb.DuckDBPyConnection) -> tuple[int | None, int | None]:
    """Returns the first and the last time of the good rows of `raw`, in nanoseconds."""
    return con.execute(
        "SELECT min(time), max(time) FROM raw WHERE kept AND problem IS NULL"
    ).fetchall()[0]


def refuse_coarser_times(first: int | None, last: int | None, units: Collection[str]) -> None:
    """Refuses a log in which each time would be a date of our days in a coarser unit.

    Seconds that are read as milliseconds all lie in January 1970. A log that counts from its own
    start has events near that start, which are no such dates.

    Args:
      first: the first time of all good rows, in nanoseconds; None if there are none.
      last: the last one.
      units: the `Layout.time_unit` of all files.

    Raises:
      UserError: the times are in another unit.
    """
    if len(set(units)) != 1 or (unit := next(iter(units))) in ("s", "iso"):
        return
    for coarser, scale in NANOSECONDS.items():
        if first is None or last is None or scale <= NANOSECONDS[unit]:
            return
        ticks = first // NANOSECONDS[unit]
        start, end = (tick // NANOSECONDS[unit] * scale / 1e9 for tick in (first, last))
        if _OUR_DAYS[0] <= start and end <= _OUR_DAYS[1]:
            raise UserError(
                f"the times are in another unit than {unit}: the first, {ticks}, is in January "
                f"1970, or in {time.gmtime(start).tm_year} if it is in {coarser}; "
                f"{_other_unit(coarser)}"
            )


def _other_unit(unit: str) -> str:
    return f"{GIVE_FLAG}--time-unit {unit}"


def _guess_unit(value: str | None, unit: str) -> str | None:
    """Returns the unit in which a time gives a date between 1973 and 2261, if not `unit`."""
    if value is None:
        return None
    if unit != "iso" and re.fullmatch(_DATE_LIKE, value):
        return "iso"
    if not re.fullmatch(NUMBER, value):
        return "iso" if unit != "iso" and re.fullmatch(DATE, value) else None
    number = float(value)
    for candidate, tick in NANOSECONDS.items():
        if 1e8 < number * tick / NANOSECONDS["s"] < LAST_SECOND:
            return candidate if candidate != unit else None
    return None


def _unreadable(
    con: duckdb.DuckDBPyConnection, file: SourceFile, layout: Layout
) -> tuple[int, str]:
    """Counts the lines that DuckDB's CSV reader refused, and describes the first."""
    if layout.kind in ("parquet", "arrow"):
        return 0, ""
    refused = con.execute(
        "SELECT DISTINCT ON (line) line, line_byte_position, error_type::VARCHAR, error_message "
        "FROM reject_errors ORDER BY line"
    ).fetchall()
    if not refused:
        return 0, ""
    _, byte, kind, message = refused[0]
    reasons = {
        "MISSING COLUMNS": f"the line has fewer fields than the {len(layout.columns)} columns",
        "TOO MANY COLUMNS": f"the line has more fields than the {len(layout.columns)} columns",
        "UNQUOTED VALUE": "the line has a quote that is not closed",
        "LINE SIZE OVER MAXIMUM": "the line is longer than 2,000,000 bytes",
        "INVALID ENCODING": "the line holds bytes that are no UTF-8 (convert it with `iconv`)",
    }
    sentence = f"{file}, line {_line_of_byte(file.path, byte)}: {reasons.get(kind, message)}"
    if any(kind == "UNQUOTED VALUE" for _, _, kind, _ in refused):
        # The rows up to the next quote, possibly to the end of the file, are lost with it.
        raise UserError(f"{sentence}; close it, the rows after it cannot be told apart")
    return len(refused), sentence


def _line_of_byte(path: Path, byte: int) -> int:
    """Returns the number of the line that holds a byte; line ends in quotes count as well."""
    line = 1
    with open_bytes(path) as content:
        while byte > 0:
            block = content.read(min(byte, 1 << 20))
            line += block.count(b"\n")
            byte -= len(block)
    return line


def _place(file: SourceFile, layout: Layout, row: int) -> str:
    """Names a row of a file, counted from 0, by the line number that an editor shows."""
    if layout.kind in ("parquet", "arrow"):
        return f"{file}, row {row + 1}"
    if layout.kind != "csv":
        return f"{file}, line {row + 1 + layout.header}"
    # Quoted fields may hold line ends, and empty lines are no rows. So we read up to the row.
    csv.field_size_limit(sys.maxsize)
    with open_text(file.path) as lines:
        reader = csv.reader(lines, delimiter=layout.delimiter)
        rows = (fields for fields in reader if fields)
        for _ in range(row + layout.header):
            next(rows)
        start = reader.line_num + 1
        while not next(rows):
            start = reader.line_num + 1
    return f"{file}, line {start}"
