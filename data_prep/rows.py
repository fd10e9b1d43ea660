"""Reports bad rows: an error that names the first one, or a count of all."""

import collections
import csv
import gzip
import sys
from pathlib import Path

import duckdb

from data_prep.layout import Layout
from data_prep.read import LAST_SECOND, NANOSECONDS
from data_prep.text import is_gzip, open_text
from tim4rec_jax.errors import UserError

UNREADABLE = "the line is not readable"
_REMEDY = "correct it or pass --on-bad-row=skip"


def check(
    con: duckdb.DuckDBPyConnection, path: Path, layout: Layout, first: int, *, skip: bool
) -> collections.Counter[str]:
    """Checks the rows that `read.append` has just added.

    Args:
      con: holds the table `raw`.
      path: the file they come from.
      layout: how it was read.
      first: number of the first row of this file in `raw`.
      skip: whether bad rows are counted instead of raising an error.

    Returns:
      The number of bad rows for each reason.

    Raises:
      UserError: a row is bad and `skip` is False, or most times are in another unit.
    """
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
