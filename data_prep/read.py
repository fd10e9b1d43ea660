"""Reads event files of any layout into DuckDB, every row checked."""

import ast
from pathlib import Path

import duckdb
import pyarrow as pa

from data_prep.layout import Layout
from data_prep.text import damaged_gzip, is_gzip, name, text
from tim4rec_jax.errors import UserError

NANOSECONDS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
# Times are held as 64 bits of nanoseconds until they are written, so they end in 2262.
LAST_SECOND = 9_200_000_000
# Fields of a Python dictionary, as `repr` writes them under Python 2 (u'...') or 3.
_LITERAL = r"""'{key}': u?('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""


def create(con: duckdb.DuckDBPyConnection) -> None:
    """Makes the empty table `raw` that `append` fills, one row per row of the files, in order.

    `time` is in nanoseconds; `kept` is False where the layout's condition fails; `problem` says
    what is wrong with a row, and `value` quotes the offending field.
    """
    con.execute(
        'CREATE TABLE raw ("user" VARCHAR, item VARCHAR, time BIGINT, rating DOUBLE, '
        "kept BOOLEAN, problem VARCHAR, value VARCHAR)"
    )


def append(con: duckdb.DuckDBPyConnection, path: Path, layout: Layout) -> None:
    """Appends all rows of one file to `raw`; what cannot be parsed at all goes to `reject_errors`.

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
    """SELECT of the columns of `raw`."""
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
          WHEN NOT kept THEN NULL
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
          coalesce("#present" AND ({layout.where or "TRUE"}), FALSE) AS kept
        FROM ({_fields(path, layout)})
      ))"""


def _fields(path: Path, layout: Layout) -> str:
    """SELECT of all columns as text, `#present` (False: an empty line) and `#broken` (why)."""
    columns = [name(column) for column in layout.columns]
    if layout.kind == "parquet":
        cast = ", ".join(f"CAST({column} AS VARCHAR) AS {column}" for column in columns)
        source = f"read_parquet({text(path)})"
        return f'SELECT {cast}, TRUE AS "#present", NULL AS "#broken" FROM {source}'
    if layout.kind == "csv":
        quoted = f"delim = {text(layout.delimiter)}, quote = '\"', escape = '\"'"
        rows = _read_csv(path, layout.columns, f"{quoted}, strict_mode = true", layout.header)
        return f'SELECT *, TRUE AS "#present", NULL AS "#broken" FROM {rows}'
    # A delimiter that text files do not hold: each line is one field.
    whole_line = "delim = '\x1f', quote = '', escape = '', strict_mode = false"
    whole = _read_csv(path, ("line",), whole_line, layout.header)
    lines = f"SELECT rtrim(line, chr(13)) AS line FROM {whole}"
    if layout.kind == "split":
        fields = f"string_split(line, {text(layout.delimiter)})"
        picked = [f"fields[{number}]" for number in range(1, len(columns) + 1)]
        broken = (
            f"CASE WHEN len(fields) != {len(columns)} THEN 'the line has ' || len(fields) || "
            f"' fields where {len(columns)} are expected' END"
        )
    elif layout.kind == "json":
        keys = ", ".join(text(f"$.{column}") for column in columns)
        fields = f"CASE WHEN json_valid(line) THEN json_extract_string(line, [{keys}]) END"
        picked = [f"fields[{number}]" for number in range(1, len(columns) + 1)]
        broken = "CASE WHEN fields IS NULL THEN 'the line is not valid JSON' END"
    else:
        patterns = [text(_LITERAL.format(key=column)) for column in layout.columns]
        fields = f"[{', '.join(f'regexp_extract(line, {pattern}, 1)' for pattern in patterns)}]"
        # Without its quotes; what holds an escape keeps them for `_unescape`.
        picked = [
            f"CASE WHEN contains(fields[{number}], chr(92)) THEN fields[{number}] "
            f"ELSE substr(fields[{number}], 2, len(fields[{number}]) - 2) END"
            for number in range(1, len(columns) + 1)
        ]
        broken = "CASE WHEN line NOT LIKE '{%}' THEN 'the line is no dictionary' END"
    aliased = ", ".join(f"{pick} AS {column}" for pick, column in zip(picked, columns, strict=True))
    return f"""SELECT {aliased}, coalesce(line != '', FALSE) AS "#present", {broken} AS "#broken"
        FROM (SELECT line, {fields} AS fields FROM ({lines}))"""


def _read_csv(path: Path, columns: tuple[str, ...], quoting: str, header: bool) -> str:
    types = ", ".join(f"{text(column)}: 'VARCHAR'" for column in columns)
    compression = "gzip" if is_gzip(path) else "none"
    return (
        f"read_csv({text(path)}, auto_detect = false, header = false, skip = {int(header)}, "
        f"columns = {{{types}}}, {quoting}, store_rejects = true, "
        f"compression = {text(compression)})"
    )


def _unescape(con: duckdb.DuckDBPyConnection, first: int) -> None:
    r"""Replaces ids that Python wrote with escapes (\xe9, \u2605, \') by what they mean."""
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
