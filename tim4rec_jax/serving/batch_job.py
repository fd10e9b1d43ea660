"""Events in Parquet files, in any order and larger than memory, user by user."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tim4rec_jax.errors import UserError
from tim4rec_jax.files import atomic_write
from tim4rec_jax.serving import command
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.history import Events
from tim4rec_jax.serving.recommender import Recommender

# ---- serving.parquet_events
# Events in Parquet files, in any order and larger than memory, user by user.

_STREAM_EVENTS = 1 << 17  # read at once
_LAST_SECOND = 9_200_000_000  # later times are in another unit
_ROW = "file_row_number"


class ParquetEvents:
    """Events of many users.

    Attributes:
        count: how many there are.
        user_type: as in the files.
    """

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        path: str,
        columns: tuple[str, str, str],
        catalogue: Catalogue,
        *,
        allow_unknown: bool,
    ):
        """Checks all events.

        Args:
            con: sorts them.
            path: of the file, or a glob.
            columns: names of user, item and time.
            catalogue: items known.
            allow_unknown: whether there may be others.

        Raises:
            UserError: a column is missing, or an event that cannot be used, with file and row.
        """
        self._con = con
        user, item, timestamp = map(_name, columns)
        files = f"read_parquet({_text(path)}, filename = '#file', file_row_number = true)"
        types = {name: kind for name, kind, *_ in con.sql(f"DESCRIBE FROM {files}").fetchall()}
        for column in columns:
            if column not in types:
                known = ", ".join(name for name in types if name not in ("#file", _ROW))
                raise UserError(
                    f"{path} has no column {column}, only {known}; name yours with --user, --item, "
                    "--timestamp"
                )
        seconds = _seconds(timestamp, types[columns[2]], path)
        con.execute(
            f"CREATE VIEW events AS SELECT {user} AS user, CAST({item} AS VARCHAR) AS item, "
            f'{seconds} AS time, "#file" AS file, {_ROW} AS number FROM {files}'
        )
        ids = pa.array(catalogue.ids)
        con.register("items", pa.table({"item": ids, "place": np.arange(1, len(ids) + 1)}))
        self._check(allow_unknown)
        # RecBole rounds times before it sorts.
        rounded = catalogue.metadata["order"] == "recbole"
        self._order = f"user, time{'::FLOAT' if rounded else ''}, file, number"
        users = con.sql("SELECT user FROM events LIMIT 0").to_arrow_table()
        self.user_type = users.schema.field("user").type

    def _check(self, allow_unknown: bool) -> None:
        """Counts the events and makes sure that each has what it needs."""
        [self.count] = self._con.sql("SELECT count(*) FROM events").fetchall()[0]
        if not self.count:
            raise UserError("there are no events to recommend from")
        wrong = (
            f"user IS NULL OR item IS NULL OR time IS NULL OR time NOT BETWEEN 0 AND {_LAST_SECOND}"
        )
        if bad := self._con.sql(f"FROM events WHERE {wrong} LIMIT 1").fetchall():
            user, item, seconds, file, number = bad[0]
            fields = {"user": user, "item": item, "time": seconds}
            empty = [name for name, value in fields.items() if value is None]
            reason = f"has no {empty[0]}" if empty else f"has the time {seconds}"
            raise UserError(
                f"{file}: row {number} {reason}; every event needs a user, an item, and a time in "
                "whole seconds since 1970"
            )
        unknown = "FROM events ANTI JOIN items USING (item) LIMIT 1"
        if not allow_unknown and (bad := self._con.sql(unknown).fetchall()):
            _, item, _, file, number = bad[0]
            raise UserError(
                f"{file}: row {number} has item {item!r}, which the model does not know; pass "
                "--on-unknown skip to leave such events out"
            )

    def histories(self) -> Iterator[tuple[pa.Array, Events, int]]:
        """Yields users, their known events, and how many events were not known."""
        stream = self._con.sql(
            "SELECT user, coalesce(place, 0)::INTEGER AS item, time FROM events "
            f"LEFT JOIN items USING (item) ORDER BY {self._order}"
        ).to_arrow_reader(_STREAM_EVENTS)
        held = stream.schema.empty_table()
        for batch in stream:
            held = pa.concat_tables([held, pa.table(batch)]).combine_chunks()
            last = _starts(held)[-1]  # this user's events may go on
            if last:
                yield _split(held.slice(0, last))
                held = held.slice(last)
        yield _split(held)


def _seconds(column: str, kind: str, path: str) -> str:
    if kind.endswith("INT") or kind in ("INTEGER", "UINTEGER"):
        return f"TRY_CAST({column} AS BIGINT)"
    if kind.startswith("TIMESTAMP") or kind == "DATE":
        return f"CAST(floor(epoch({column})) AS BIGINT)"
    raise UserError(
        f"{path}: the column {column} has type {kind}; times must be whole seconds since 1970 or "
        "timestamps"
    )


def _starts(table: pa.Table) -> np.ndarray:
    """Where each user's events start."""
    codes = table.column("user").combine_chunks().dictionary_encode().indices.to_numpy()
    return np.append(0, np.flatnonzero(np.diff(codes)) + 1)


def _split(table: pa.Table) -> tuple[pa.Array, Events, int]:
    starts = _starts(table)
    items, times = table.column("item").to_numpy(), table.column("time").to_numpy()
    known = items > 0
    before = np.append(0, np.cumsum(known))
    events = Events(items[known], times[known], before[np.append(starts, len(items))])
    users = table.column("user").combine_chunks().take(pa.array(starts))
    return users, events, int(len(items) - known.sum())


def _name(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


# ---- serving.batch
# `python -m tim4rec_jax.serving batch`: histories of any number of users, Parquet to Parquet.


def add_command(subparsers: Any) -> None:
    """Adds `batch` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "batch",
        help="recommend to all users of a Parquet file",
        description="Reads events in any order, writes the best items of every user: user, rank, "
        "item, score, fallback (no event was known: popular items). Larger than memory.",
    )
    add = parser.add_argument
    add("--events", required=True, metavar="FILE", help="Parquet; a glob takes several files")
    add("--out", type=Path, required=True, metavar="FILE", help="the Parquet file to write")
    command.add_shared_flags(parser)
    for column in ("user", "item", "timestamp"):
        add(f"--{column}", default=column, metavar="COLUMN", help=f"default: {column}")
    add(
        "--on-unknown",
        choices=("skip", "error"),
        default="skip",
        help="what to do about items that the model does not know (default: skip and count)",
    )
    add("--memory-limit", default="2GB", metavar="SIZE", help="for sorting (default: 2GB)")
    parser.set_defaults(run=_run)


def _run(flags: argparse.Namespace) -> None:
    if not flags.out.parent.is_dir():
        raise UserError(f"--out: the folder {flags.out.parent} does not exist")
    if flags.out.is_dir():
        raise UserError(f"--out: {flags.out} is a folder, not a file")
    recommender, options = command.load(flags)
    started, console = time.perf_counter(), Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    columns, counts = (flags.user, flags.item, flags.timestamp), Counter[str]()
    with _reading(flags), _connect(flags) as con, bar:
        task = bar.add_task("sorting", total=None)
        source = ParquetEvents(
            con,
            flags.events,
            columns,
            recommender.catalogue,
            allow_unknown=flags.on_unknown == "skip",
        )
        schema, ids = _schema(source), pa.array(recommender.catalogue.ids)
        with atomic_write(flags.out) as file, pq.ParquetWriter(file, schema) as writer:
            for users, events, unknown in source.histories():
                bar.update(task, description="recommending", total=source.count)
                scores, items = _rank_by_length(recommender, events, options)
                fallback = np.diff(events.offsets) == 0
                table = _table(schema, ids, users, scores, items, fallback)
                writer.write_table(table)
                counts["users"] += len(users)
                counts["rows"] += len(table)
                counts["unknown"] += unknown
                counts["fallback"] += int(fallback.sum())
                bar.advance(task, len(events.items) + unknown)
    _print_summary(flags.out, counts, time.perf_counter() - started)


def _rank_by_length(recommender: Recommender, events: Events, options: dict):
    """`Ranker.rank`, histories of similar length together: they are padded less."""
    lengths = np.diff(events.offsets)
    order = np.argsort(lengths, kind="stable")
    offsets = np.append(0, np.cumsum(lengths[order]))
    places = np.arange(offsets[-1]) + np.repeat(
        events.offsets[order] - offsets[:-1], lengths[order]
    )
    sorted_events = Events(events.items[places], events.timestamps[places], offsets)
    scores, items = recommender.ranker.rank(sorted_events, **options)
    back = np.argsort(order)
    return scores[back], items[back]


def _schema(source: ParquetEvents) -> pa.Schema:
    return pa.schema(
        [
            pa.field("user", source.user_type),
            ("rank", pa.int32()),
            ("item", pa.string()),
            ("score", pa.float32()),
            ("fallback", pa.bool_()),
        ]
    )


def _table(schema: pa.Schema, ids: pa.Array, users, scores, items, fallback) -> pa.Table:
    row, rank = np.nonzero(items)
    columns = [
        users.take(pa.array(row)),
        (rank + 1).astype(np.int32),
        ids.take(pa.array(items[row, rank] - 1)),
        scores[row, rank].astype(np.float32),
        fallback[row],
    ]
    return pa.table(columns, schema=schema)


@contextlib.contextmanager
def _connect(flags: argparse.Namespace) -> Iterator[duckdb.DuckDBPyConnection]:
    with (
        tempfile.TemporaryDirectory(prefix=".sorting-", dir=flags.out.parent) as spill,
        contextlib.closing(duckdb.connect(config={"temp_directory": spill})) as con,
    ):
        con.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
        try:
            con.execute("SET memory_limit = ?", [flags.memory_limit])
        except duckdb.Error as error:
            raise UserError(f"--memory-limit {flags.memory_limit} is no size; write 4GB") from error
        yield con


@contextlib.contextmanager
def _reading(flags: argparse.Namespace) -> Iterator[None]:
    """What DuckDB and Arrow raise about the files, as one sentence."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"sorting needs more than {flags.memory_limit}; pass a higher --memory-limit"
        ) from error
    except (duckdb.Error, pa.ArrowException) as error:
        raise UserError(f"--events {flags.events}: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        if str(error) == "Query interrupted":  # what DuckDB makes of Ctrl-C
            raise KeyboardInterrupt from error
        raise


def _print_summary(out: Path, counts: Counter[str], seconds: float) -> None:
    rate = counts["users"] / seconds
    print(
        f"wrote {out}: {counts['rows']:,} recommendations to {counts['users']:,} users in "
        f"{seconds:,.1f} s ({rate:,.0f} users/s)"
    )
    if counts["unknown"]:
        print(f"skipped {counts['unknown']:,} events: the model does not know their items")
    if counts["fallback"]:
        print(
            f"{counts['fallback']:,} users had no known event and got the most popular items "
            "(column fallback)"
        )
