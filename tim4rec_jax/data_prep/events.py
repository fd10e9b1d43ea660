"""Reads tables of events as `data_prep table` does, without a dataset: for recommendations.

The columns, units of time and bad rows are those of the preparation, because it is the same code.
"""

import argparse
import collections
import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import duckdb
import pyarrow as pa
from rich.console import Console
from rich.text import Text

from tim4rec_jax.data_prep import files, read
from tim4rec_jax.data_prep.database import connect
from tim4rec_jax.data_prep.layout import check_columns
from tim4rec_jax.data_prep.sources import SOURCES, Source
from tim4rec_jax.errors import UserError, one_line

TimeUnit = Literal["s", "ms", "us", "ns", "iso"]


def read_events(
    inputs: Sequence[str] | pa.Table,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str = "timestamp",
    time_unit: TimeUnit = "s",
    on_bad_row: Literal["error", "skip"] = "error",
    where: str | None = None,
    memory_limit: str | None = None,
    folder: Path | None = None,
) -> tuple[pa.Table, dict[str, int]]:
    """Reads events from files or from a table in memory.

    `load_events` does the same into a database, for events that do not fit into memory.

    Args:
      inputs: paths and globs of CSV, TSV, JSON lines or Parquet files, plain or gzip, folders and
        zip or tar archives of them; or a table.
      user: name of the column with the user id.
      item: name of the column with the item id.
      time: name of the column with the time.
      time_unit: of numbers, since 1970; or `iso` for dates in a text. A column of the type date or
        timestamp needs no unit.
      on_bad_row: `error` stops at a bad row, and `skip` leaves it out and counts it.
      where: an SQL condition on the columns of the source.
      memory_limit: how much DuckDB may take, such as "4GB"; default 80 % of all.
      folder: where temporary files go; default: the system's folder for them.

    Returns:
      A table with the columns `user` (string), `item` (string) and `time` (float64, seconds since
      1970, never negative), in the order of the source; and the number of bad rows by reason.

    Raises:
      UserError: a file, column or row cannot be used. The message names it and the remedy.
    """
    with (
        tempfile.TemporaryDirectory(prefix=".reading-", dir=folder) as work,
        contextlib.closing(connect(Path(work), memory_limit)) as con,
    ):
        bad = load_events(
            con,
            Path(work),
            inputs,
            user=user,
            item=item,
            time=time,
            time_unit=time_unit,
            on_bad_row=on_bad_row,
            where=where,
        )
        return con.sql('SELECT "user", item, time FROM events ORDER BY "row"').to_arrow_table(), bad


def load_events(
    con: duckdb.DuckDBPyConnection,
    work: Path,
    inputs: Sequence[str] | pa.Table,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str = "timestamp",
    time_unit: TimeUnit = "s",
    on_bad_row: Literal["error", "skip"] = "error",
    where: str | None = None,
) -> dict[str, int]:
    """Makes the view `events` of a database: `row`, `user`, `item` and `time`.

    `row` (BIGINT) rises in the order of the source and is null for none. `user` and `item` are
    VARCHAR, `time` is DOUBLE, in seconds since 1970.

    Args:
      con: an open database, as `database.connect` makes it, with no table `raw` or `events`.
      work: a folder for members of archives.
      inputs: as for `read_events`, and so are all others.
      user: name of the column with the user id.
      item: name of the column with the item id.
      time: name of the column with the time.
      time_unit: of the times.
      on_bad_row: whether bad rows are left out.
      where: an SQL condition on the columns of the source.

    Returns:
      The number of bad rows by reason.

    Raises:
      UserError: as for `read_events`.
    """
    flags = argparse.Namespace(
        user=user,
        item=item,
        time=time,
        rating=None,
        time_unit=time_unit,
        on_bad_row=on_bad_row,
        where=where,
        min_rating=None,
        delimiter=None,
        columns=None,
    )
    source = SOURCES["table"]
    found = find(inputs, source, work)
    bad = read_all(con, source, found.events, flags)
    con.execute(
        'CREATE VIEW events AS SELECT rowid AS "row", "user", item, time / 1e9 AS time '
        "FROM raw WHERE kept AND problem IS NULL"
    )
    return dict(bad)


def find(inputs: Sequence[str] | pa.Table, source: Source, work: Path) -> files.Found:
    """Returns the files that the user names (see `files.find_files`), or the table."""
    if isinstance(inputs, pa.Table):
        return files.Found([files.SourceFile("the table", table=inputs)], [], {})
    return files.find_files(inputs, source.members, source.titles, work)


def read_all(
    con: duckdb.DuckDBPyConnection,
    source: Source,
    sources: Sequence[files.SourceFile],
    flags: argparse.Namespace,
    console: Console | None = None,
) -> collections.Counter[str]:
    """Reads all files into the new table `raw`, and returns the number of bad rows by reason.

    Args:
      con: the database.
      source: the family of the files.
      sources: the files.
      flags: of the command line: columns, unit of time, what to do with bad rows.
      console: where progress is shown.

    Raises:
      UserError: see `read_one` and `read.refuse_coarser_times`.
    """
    bad: collections.Counter[str] = collections.Counter()
    units = []
    read.create(con)
    with (console or Console(quiet=True)).status("") as status:
        for file in sources:
            status.update(Text(one_line(f"reading {file}")))
            found, unit = read_one(con, source, file, flags)
            units.append(unit)
            bad += found
    read.refuse_coarser_times(*read.span(con), units)
    return bad


def read_one(
    con: duckdb.DuckDBPyConnection,
    source: Source,
    file: files.SourceFile,
    flags: argparse.Namespace,
) -> tuple[collections.Counter[str], str]:
    """Reads a file into the table `raw`, which is there.

    Args:
      con: the database.
      source: the family of the file.
      file: the file.
      flags: as for `read_all`.

    Returns:
      The number of bad rows by reason, and the unit of the times.

    Raises:
      UserError: see `layout.check_columns` and `read.read_file`.
    """
    layout = _layout(source, file, flags)
    return read.read_file(con, file, layout, skip=flags.on_bad_row == "skip"), layout.time_unit


def _layout(source: Source, file: files.SourceFile, flags: argparse.Namespace):
    layout = source.layout(file, flags)
    if flags.min_rating is None:
        layout = dataclasses.replace(layout, rating=None)
    elif layout.rating is None:
        raise UserError(f"{file} has no ratings; leave out --min-rating")
    remedy = "name yours with --user, --item, --time, --rating"
    if not hasattr(flags, "user"):
        remedy = "read other files with `python -m data_prep table`"
    elif flags.rating is None:  # `batch` reads no ratings
        remedy = "name yours with --user, --item, --time"
    return check_columns(file, layout, remedy)
