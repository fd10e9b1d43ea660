"""Reads event files of any layout into DuckDB and checks every row.

A bad row ends in an error that names it, or is counted and left out.
"""

import ast
import collections
import csv
import gzip
import sys
from pathlib import Path
from typing import NamedTuple

import duckdb
import pyarrow as pa

from tim4rec_jax.data_prep.database import quote_name, quote_text
from tim4rec_jax.data_prep.files import damaged_gzip, is_gzip, open_text
from tim4rec_jax.data_prep.layout import Layout
from tim4rec_jax.errors import UserError

NANOSECONDS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
# Until they are written, times are 64-bit nanoseconds, which end in the year 2262.
LAST_SECOND = 9_200_000_000
# Fields of a Python dictionary, as `repr` writes them under Python 2 (u'...') or 3.
_LITERAL = r"""'{key}': u?('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
UNREADABLE = "the line is not readable"
_REMEDY = "correct it or pass --on-bad-row=skip"


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
    con: duckdb.DuckDBPyConnection, path: Path, layout: Layout, *, skip: bool
) -> collections.Counter[str]:
    """Appends all rows of one file to the table `raw` and checks them.

    Args:
      con: holds the table `raw`.
      path: the file.
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
    _append(con, path, layout, first)
    unreadable, sentence = _unreadable(con, path, layout)
    if unreadable and not skip:
        raise UserError(f"{sentence}; {_REMEDY}")
    _mark_coarser_times(con, layout, first)
    bad = con.execute(
        "SELECT problem, min(rowid), arg_min(value, rowid), count(*) FROM raw "
        "WHERE rowid >= ? AND problem IS NOT NULL GROUP BY problem ORDER BY min(rowid)",
        [first],
    ).fetchall()
    kept = con.execute("SELECT count(*) FROM raw WHERE rowid >= ? AND kept", [first]).fetchall()
    for problem, row, value, count in bad:
        unit = _guess_unit(value, layout.time_unit) if problem.startswith("the time") else None
        if unit and 2 * count > kept[0][0]:
            raise UserError(
                f"{_place(path, layout, row - first)}: {problem} ({value}), and so for {count:,} "
                f"of {kept[0][0]:,} rows; read the file with `python -m data_prep table` and "
                f"--time-unit {unit}"
            )
    if bad and not skip:
        problem, row, value, _ = bad[0]
        shown = "" if value is None else f" ({value})"
        raise UserError(f"{_place(path, layout, row - first)}: {problem}{shown}; {_REMEDY}")
    counts = collections.Counter({problem: count for problem, _, _, count in bad})
    if unreadable:
        counts[UNREADABLE] = unreadable
    return counts


def _append(con: duckdb.DuckDBPyConnection, path: Path, layout: Layout, first: int) -> None:
    """Appends all rows to `raw`; lines that cannot be read go to the table `reject_errors`."""
    con.execute("DROP TABLE IF EXISTS reject_errors; DROP TABLE IF EXISTS reject_scans")
    try:
        con.execute(f"INSERT INTO raw {_checked_rows(path, layout)}")
    except duckdb.IOException as error:
        if "GZIP" not in str(error):
            raise
        raise damaged_gzip(path) from error
    except duckdb.InvalidInputException as error:
        raise UserError(
            f"{path}: lines end in different ways, or a quote is out of place; convert the file "
            "with `dos2unix`"
        ) from error
    except (duckdb.ProgrammingError, duckdb.DataError) as error:
        if layout.where is None:
            raise
        raise UserError(
            f"{path}: the condition --where {layout.where!r} fails "
            f"({str(error).splitlines()[0]}); columns are {', '.join(layout.columns)}"
        ) from error
    if layout.kind == "literal":
        _unescape(con, first)


def _checked_rows(path: Path, layout: Layout) -> str:
    """Returns the SELECT that computes the columns of `raw`."""
    if layout.time_unit == "iso":
        parse = "TRY_CAST(time AS TIMESTAMPTZ)"
        ticks = "CASE WHEN number BETWEEN '1970-01-01' AND '2261-12-31' THEN epoch_ns(number) END"
        far = "the time is past the year 2261"
        wrong, negative = "the time is no ISO date", "number < '1970-01-01'"
    else:
        scale = NANOSECONDS[layout.time_unit]
        parse = "TRY_CAST(time AS DECIMAL(28, 9))"
        limit = LAST_SECOND * NANOSECONDS["s"] // scale
        ticks = f"CASE WHEN number BETWEEN 0 AND {limit} THEN CAST(number * {scale} AS BIGINT) END"
        far = f"the time is in another unit than {layout.time_unit}"
        wrong, negative = "the time is not a number", "number < 0"
    user, item, seen_at = map(quote_name, (layout.user, layout.item, layout.time))
    rating = quote_name(layout.rating) if layout.rating else "NULL"
    return f"""
      SELECT "user", item, {ticks} AS ticks, TRY_CAST(rating AS DOUBLE), kept, CASE
          WHEN kept IS NOT TRUE THEN NULL
          WHEN broken IS NOT NULL THEN broken
          WHEN "user" IS NULL THEN 'the user id is empty'
          WHEN item IS NULL THEN 'the item id is empty'
          WHEN time IS NULL THEN 'the time is empty'
          WHEN number IS NULL THEN {quote_text(wrong)}
          WHEN {negative} THEN 'the time is negative'
          WHEN ticks IS NULL THEN {quote_text(far)}
          WHEN {layout.rating is not None} AND TRY_CAST(rating AS DOUBLE) IS NULL
            THEN 'the rating is not a number'
        END AS problem,
        CASE WHEN problem LIKE 'the time%' THEN time WHEN problem LIKE 'the rating%' THEN rating END
      FROM (SELECT *, {parse} AS number FROM (
        SELECT nullif({user}, '') AS "user", nullif({item}, '') AS item,
          nullif({seen_at}, '') AS time, {rating} AS rating, "#broken" AS broken,
          CASE WHEN "#present" THEN coalesce(({layout.where or "TRUE"}), FALSE) END AS kept
        FROM ({_fields(path, layout)})
      ))"""


def _fields(path: Path, layout: Layout) -> str:
    """Returns the SELECT of the columns as text.

    `#present` is False for an empty line, and `#broken` says why a line cannot be read.
    """
    if layout.kind == "parquet":
        columns = ", ".join(f"CAST({c} AS VARCHAR) AS {c}" for c in map(quote_name, layout.columns))
        source = f"read_parquet({quote_text(path)})"
        return f'SELECT {columns}, TRUE AS "#present", NULL AS "#broken" FROM {source}'
    if layout.kind == "csv":
        quoted = f"delim = {quote_text(layout.delimiter)}, quote = '\"', escape = '\"'"
        rows = _read_csv(path, layout.columns, f"{quoted}, strict_mode = true", layout.header)
        return f'SELECT *, TRUE AS "#present", NULL AS "#broken" FROM {rows}'
    # Text files do not contain this delimiter, so each line is read as one field.
    whole = "delim = '\x1f', quote = '', escape = '', strict_mode = false"
    rows = _read_csv(path, ("line",), whole, layout.header)
    columns = layout.columns
    if layout.kind == "split":
        line = _split(layout)
    else:
        if not layout.where:  # then long texts need not be parsed
            used = (layout.user, layout.item, layout.time, layout.rating)
            columns = tuple(column for column in columns if column in used)
        line = (_json if layout.kind == "json" else _literal)(columns)
    fields = [line.field.format(f"fields[{number}]") for number in range(1, len(columns) + 1)]
    named = [
        f"{field} AS {quote_name(column)}" for field, column in zip(fields, columns, strict=True)
    ]
    return f"""
          SELECT {", ".join(named)}, coalesce(line != '', FALSE) AS "#present",
            CASE WHEN {line.broken} END AS "#broken"
          FROM (SELECT line, {line.cut} AS fields
            FROM (SELECT rtrim(line, chr(13)) AS line FROM {rows}))
        """


class _Line(NamedTuple):
    """SQL that takes a line apart.

    Attributes:
      cut: makes the list `fields` of the text in `line`.
      field: makes the value of the field that is inserted for `{0}`.
      broken: the rest of a CASE: the condition of a broken line, THEN, and the reason.
    """

    cut: str
    field: str
    broken: str


def _split(layout: Layout) -> _Line:
    """A line of fields with delimiters between them."""
    n = len(layout.columns)
    broken = f"len(fields) != {n} THEN 'the line has ' || len(fields) || ' fields, not {n}'"
    return _Line(f"string_split(line, {quote_text(layout.delimiter)})", "{0}", broken)


def _json(keys: tuple[str, ...]) -> _Line:
    """A line that is a JSON object."""
    paths = ", ".join(quote_text(f"$.{quote_name(key)}") for key in keys)
    cut = f"CASE WHEN json_valid(line) THEN json_extract_string(line, [{paths}]) END"
    return _Line(cut, "{0}", "fields IS NULL THEN 'the line is not valid JSON'")


def _literal(keys: tuple[str, ...]) -> _Line:
    """A line that is a Python dictionary.

    Fields with escapes keep their quotes, and `_unescape` reads them.
    """
    patterns = [quote_text(_LITERAL.format(key=key)) for key in keys]
    cut = ", ".join(f"regexp_extract(line, {pattern}, 1)" for pattern in patterns)
    bare = "CASE WHEN contains({0}, chr(92)) THEN {0} ELSE substr({0}, 2, len({0}) - 2) END"
    return _Line(f"[{cut}]", bare, "line NOT LIKE '{%}' THEN 'the line is no dictionary'")


def _read_csv(path: Path, columns: tuple[str, ...], quoting: str, header: bool) -> str:
    types = ", ".join(f"{quote_text(column)}: 'VARCHAR'" for column in columns)
    compression = "gzip" if is_gzip(path) else "none"
    return (
        f"read_csv({quote_text(path)}, auto_detect = false, header = false, skip = {int(header)}, "
        f"columns = {{{types}}}, {quoting}, store_rejects = true, "
        f"compression = {quote_text(compression)})"
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
            meanings = [_evaluate(literal) for literal in literals]
            con.register("meanings", pa.table({"literal": literals, "meaning": meanings}))
            con.execute(
                f"UPDATE raw SET {quote_name(column)} = meaning FROM meanings "
                f"WHERE raw.{quote_name(column)} = literal AND raw.rowid >= {first}"
            )
            con.unregister("meanings")


def _evaluate(literal: str) -> str:
    # Narrow builds of Python 2 wrote characters beyond U+FFFF as two halves: join them.
    value = ast.literal_eval(literal)
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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


def _guess_unit(value: str | None, unit: str) -> str | None:
    """Returns the unit in which a time gives a date between 1973 and 2261, if not `unit`."""
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        return None if unit == "iso" else "iso"
    for candidate, tick in NANOSECONDS.items():
        if 1e8 < number * tick / NANOSECONDS["s"] < LAST_SECOND:
            return candidate if candidate != unit else None
    return None


def _unreadable(con: duckdb.DuckDBPyConnection, path: Path, layout: Layout) -> tuple[int, str]:
    """Counts the lines that DuckDB's CSV reader refused, and describes the first."""
    if layout.kind == "parquet":
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
        "INVALID ENCODING": "the line holds bytes that are no UTF-8 (convert it with `iconv`)",
    }
    sentence = f"{path}, line {_line_of_byte(path, byte)}: {reasons.get(kind, message)}"
    if any(kind == "UNQUOTED VALUE" for _, _, kind, _ in refused):
        # The rows up to the next quote, possibly to the end of the file, are lost with it.
        raise UserError(f"{sentence}; close it, the rows after it cannot be told apart")
    return len(refused), sentence


def _line_of_byte(path: Path, byte: int) -> int:
    """Returns the number of the line that holds a byte; line ends in quotes count as well."""
    line = 1
    with gzip.open(path) if is_gzip(path) else open(path, "rb") as file:
        while byte > 0:
            block = file.read(min(byte, 1 << 20))
            line += block.count(b"\n")
            byte -= len(block)
    return line


def _place(path: Path, layout: Layout, row: int) -> str:
    """Names a row of a file, counted from 0, by the line number that an editor shows."""
    if layout.kind == "parquet":
        return f"{path}, row {row + 1}"
    if layout.kind != "csv":
        return f"{path}, line {row + 1 + layout.header}"
    # Quoted fields may hold line ends, and empty lines are no rows. So we read up to the row.
    csv.field_size_limit(sys.maxsize)
    with open_text(path) as file:
        reader = csv.reader(file, delimiter=layout.delimiter)
        rows = (fields for fields in reader if fields)
        for _ in range(row + layout.header):
            next(rows)
        start = reader.line_num + 1
        while not next(rows):
            start = reader.line_num + 1
    return f"{path}, line {start}"
