"""Reads event files of any layout into DuckDB and checks every row."""

import ast
from pathlib import Path

import duckdb
import pyarrow as pa

from data_prep.layout import Layout
from data_prep.text import damaged_gzip, is_gzip, name, text
from tim4rec_jax.errors import UserError

NANOSECONDS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
# Until they are written, times are 64-bit nanoseconds, which end in the year 2262.
LAST_SECOND = 9_200_000_000
# Fields of a Python dictionary, as `repr` writes them under Python 2 (u'...') or 3.
_LITERAL = r"""'{key}': u?('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""


def create(con: duckdb.DuckDBPyConnection) -> None:
    """Makes the empty table `raw`, which `append` fills with a row for each row of the files.

    `time` is in nanoseconds. `kept` is False where the layout's condition fails, and null for an
    empty line. `problem` says what is wrong with a row, and `value` quotes the wrong field.
    """
    con.execute(
        'CREATE TABLE raw ("user" VARCHAR, item VARCHAR, time BIGINT, rating DOUBLE, '
        "kept BOOLEAN, problem VARCHAR, value VARCHAR)"
    )


def append(con: duckdb.DuckDBPyConnection, path: Path, layout: Layout) -> None:
    """Appends all rows of one file to `raw`; unreadable lines go to the table `reject_errors`.

    Raises:
      UserError: the file is damaged, or the layout's condition is no valid SQL.
    """
    con.execute("DROP TABLE IF EXISTS reject_errors; DROP TABLE IF EXISTS reject_scans")
    first = con.execute("SELECT count(*) FROM raw").fetchall()[0][0]
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
    rating = name(layout.rating) if layout.rating else "NULL"
    return f"""
      SELECT "user", item, {ticks} AS ticks, TRY_CAST(rating AS DOUBLE), kept, CASE
          WHEN kept IS NOT TRUE THEN NULL
          WHEN broken IS NOT NULL THEN broken
          WHEN "user" IS NULL THEN 'the user id is empty'
          WHEN item IS NULL THEN 'the item id is empty'
          WHEN time IS NULL THEN 'the time is empty'
          WHEN number IS NULL THEN {text(wrong)}
          WHEN {negative} THEN 'the time is negative'
          WHEN ticks IS NULL THEN {text(far)}
          WHEN {layout.rating is not None} AND TRY_CAST(rating AS DOUBLE) IS NULL
            THEN 'the rating is not a number'
        END AS problem,
        CASE WHEN problem LIKE 'the time%' THEN time WHEN problem LIKE 'the rating%' THEN rating END
      FROM (SELECT *, {parse} AS number FROM (
        SELECT nullif({name(layout.user)}, '') AS "user", nullif({name(layout.item)}, '') AS item,
          nullif({name(layout.time)}, '') AS time, {rating} AS rating, "#broken" AS broken,
          CASE WHEN "#present" THEN coalesce(({layout.where or "TRUE"}), FALSE) END AS kept
        FROM ({_fields(path, layout)})
      ))"""


def _fields(path: Path, layout: Layout) -> str:
    """Returns the SELECT of the columns as text.

    `#present` is False for an empty line, and `#broken` says why a line cannot be read.
    """
    if layout.kind == "parquet":
        columns = ", ".join(f"CAST({c} AS VARCHAR) AS {c}" for c in map(name, layout.columns))
        source = f"read_parquet({text(path)})"
        return f'SELECT {columns}, TRUE AS "#present", NULL AS "#broken" FROM {source}'
    if layout.kind == "csv":
        quoted = f"delim = {text(layout.delimiter)}, quote = '\"', escape = '\"'"
        rows = _read_csv(path, layout.columns, f"{quoted}, strict_mode = true", layout.header)
        return f'SELECT *, TRUE AS "#present", NULL AS "#broken" FROM {rows}'
    # Text files do not contain this delimiter, so each line is read as one field.
    whole = "delim = '\x1f', quote = '', escape = '', strict_mode = false"
    rows = _read_csv(path, ("line",), whole, layout.header)
    columns = layout.columns
    if layout.kind == "split":
        cut, picked, broken = _split(layout)
    else:
        if not layout.where:  # then long texts need not be parsed
            used = (layout.user, layout.item, layout.time, layout.rating)
            columns = tuple(column for column in columns if column in used)
        cut, picked, broken = (_json if layout.kind == "json" else _literal)(columns)
    fields = [picked.format(f"fields[{number}]") for number in range(1, len(columns) + 1)]
    named = [f"{field} AS {name(column)}" for field, column in zip(fields, columns, strict=True)]
    return f"""
          SELECT {", ".join(named)}, coalesce(line != '', FALSE) AS "#present",
            CASE WHEN {broken} END AS "#broken"
          FROM (SELECT line, {cut} AS fields FROM (SELECT rtrim(line, chr(13)) AS line FROM {rows}))
        """


def _split(layout: Layout) -> tuple[str, str, str]:
    """Returns SQL that cuts a line into `fields`, picks a field, and finds broken lines."""
    n = len(layout.columns)
    broken = f"len(fields) != {n} THEN 'the line has ' || len(fields) || ' fields, not {n}'"
    return f"string_split(line, {text(layout.delimiter)})", "{}", broken


def _json(keys: tuple[str, ...]) -> tuple[str, str, str]:
    """Returns the same as `_split` for a JSON object in each line."""
    paths = ", ".join(text(f"$.{name(key)}") for key in keys)
    cut = f"CASE WHEN json_valid(line) THEN json_extract_string(line, [{paths}]) END"
    return cut, "{}", "fields IS NULL THEN 'the line is not valid JSON'"


def _literal(keys: tuple[str, ...]) -> tuple[str, str, str]:
    """Returns the same as `_split` for a Python dictionary in each line.

    Fields with escapes keep their quotes, and `_unescape` reads them.
    """
    patterns = [text(_LITERAL.format(key=key)) for key in keys]
    cut = ", ".join(f"regexp_extract(line, {pattern}, 1)" for pattern in patterns)
    bare = "CASE WHEN contains({0}, chr(92)) THEN {0} ELSE substr({0}, 2, len({0}) - 2) END"
    return f"[{cut}]", bare, "line NOT LIKE '{%}' THEN 'the line is no dictionary'"


def _read_csv(path: Path, columns: tuple[str, ...], quoting: str, header: bool) -> str:
    types = ", ".join(f"{text(column)}: 'VARCHAR'" for column in columns)
    compression = "gzip" if is_gzip(path) else "none"
    return (
        f"read_csv({text(path)}, auto_detect = false, header = false, skip = {int(header)}, "
        f"columns = {{{types}}}, {quoting}, store_rejects = true, "
        f"compression = {text(compression)})"
    )


def _unescape(con: duckdb.DuckDBPyConnection, first: int) -> None:
    r"""Replaces ids that Python wrote with escapes (\xe9, \u2605, \') by their text."""
    for column in ("user", "item"):
        quoted = con.execute(
            f"SELECT DISTINCT {name(column)} FROM raw "
            f"WHERE rowid >= {first} AND contains({name(column)}, chr(92))"
        ).fetchall()
        if quoted:
            literals = [literal for (literal,) in quoted]
            meanings = [_evaluate(literal) for literal in literals]
            con.register("meanings", pa.table({"literal": literals, "meaning": meanings}))
            con.execute(
                f"UPDATE raw SET {name(column)} = meaning FROM meanings "
                f"WHERE raw.{name(column)} = literal AND raw.rowid >= {first}"
            )
            con.unregister("meanings")


def _evaluate(literal: str) -> str:
    # Narrow builds of Python 2 wrote characters beyond U+FFFF as two halves: join them.
    value = ast.literal_eval(literal)
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
