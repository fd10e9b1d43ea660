"""Recommends to all users of Parquet files, which may be larger than memory."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tim4rec_jax.errors import UserError
from tim4rec_jax.files import atomic_write
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.history import Events
from tim4rec_jax.serving.recommender import Recommender

_STREAM_EVENTS = 1 << 17  # how many events are read at once
_LAST_SECOND = 9_200_000_000  # a later time is not in seconds
_ROW = "file_row_number"


class Columns(NamedTuple):
    """The names of the columns of the files."""

    user: str
    item: str
    timestamp: str


@dataclass
class Summary:
    """What `recommend_all` has done.

    Attributes:
        users: the number of users.
        rows: the number of rows written.
        unknown: the number of events left out because the model does not know their items.
        fallback: the number of users without a known event.
    """

    users: int = 0
    rows: int = 0
    unknown: int = 0
    fallback: int = 0


def recommend_all(
    recommender: Recommender,
    events: str,
    out: Path,
    columns: Columns,
    *,
    allow_unknown: bool = True,
    memory_limit: str = "2GB",
    **options: Any,
) -> Summary:
    """Writes the best items of every user, with a progress bar on standard error.

    The file has one row per user and item: `user` (typed as in the events), `rank` (1 is best),
    `item`, `score`, and `fallback`, which says that no event of the user was known, so that the
    items are the most popular ones. Users are in rising order.

    Args:
        recommender: the model.
        events: a Parquet file, or a glob of several, with events in any order. Times are whole
            seconds since 1970, or of the type TIMESTAMP or DATE.
        out: the Parquet file to write. It appears under its name only when it is complete.
        columns: the names of the columns of the events.
        allow_unknown: whether there may be items that the model does not know; they are left out.
        memory_limit: how much memory the sorting of the events may take, as DuckDB reads it.
        options: the arguments of `Ranker.rank`.

    Raises:
        UserError: an event or a file cannot be used, or `out` cannot be written.
    """
    catalogue, console, summary = recommender.catalogue, Console(stderr=True), Summary()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with _one_sentence(events, memory_limit), _connect(out.parent, memory_limit) as con, bar:
        task = bar.add_task("sorting", total=None)
        source = ParquetEvents(con, events, columns, catalogue, allow_unknown=allow_unknown)
        schema = pa.schema(
            [
                pa.field("user", source.user_type),
                ("rank", pa.int32()),
                ("item", pa.string()),
                ("score", pa.float32()),
                ("fallback", pa.bool_()),
            ]
        )
        ids = pa.array(catalogue.ids)
        with atomic_write(out) as file, pq.ParquetWriter(file, schema) as writer:
            for part in source.parts():
                bar.update(task, description="recommending", total=source.count)
                scores, items = _rank_by_length(recommender, part.events, options)
                fallback = np.diff(part.events.offsets) == 0
                row, place = np.nonzero(items)  # item 0 fills up where no item was left
                arrays = [
                    part.users.take(pa.array(row)),
                    (place + 1).astype(np.int32),
                    ids.take(pa.array(items[row, place] - 1)),
                    scores[row, place].astype(np.float32),
                    fallback[row],
                ]
                writer.write_table(pa.table(arrays, schema=schema))
                summary.users += len(part.users)
                summary.rows += len(row)
                summary.unknown += part.unknown
                summary.fallback += int(fallback.sum())
                bar.advance(task, len(part.events.items) + part.unknown)
    return summary


def _rank_by_length(
    recommender: Recommender, events: Events, options: dict
) -> tuple[Float[np.ndarray, "B k"], Int[np.ndarray, "B k"]]:
    """Does `Ranker.rank` with histories of similar length together, which need less padding."""
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


class Part(NamedTuple):
    """Some users of the files, with all of their events.

    Attributes:
        users: the ids of B users.
        events: their known events.
        unknown: the number of their events whose items the model does not know.
    """

    users: pa.Array
    events: Events
    unknown: int


class ParquetEvents:
    """The events of Parquet files, sorted by user and time, part by part.

    Attributes:
        count: the number of events.
        user_type: the type of the user ids in the files.
    """

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        path: str,
        columns: Columns,
        catalogue: Catalogue,
        *,
        allow_unknown: bool,
    ):
        """Checks all events.

        Args:
            con: the database that sorts the events.
            path: the file, or a glob.
            columns: the names of the columns.
            catalogue: the items that the model knows.
            allow_unknown: whether there may be other items.

        Raises:
            UserError: a column is missing, or an event cannot be used; the message names file and
                row.
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
        seconds = _seconds(timestamp, types[columns.timestamp], path)
        con.execute(
            f"CREATE VIEW events AS SELECT {user} AS user, CAST({item} AS VARCHAR) AS item, "
            f'{seconds} AS time, "#file" AS file, {_ROW} AS number FROM {files}'
        )
        ids = pa.array(catalogue.ids)
        con.register("items", pa.table({"item": ids, "place": np.arange(1, len(ids) + 1)}))
        self._check(allow_unknown)
        # RecBole rounds times to float32 before it sorts.
        rounded = catalogue.metadata["order"] == "recbole"
        self._order = f"user, time{'::FLOAT' if rounded else ''}, file, number"
        users = con.sql("SELECT user FROM events LIMIT 0").to_arrow_table()
        self.user_type = users.schema.field("user").type

    def _check(self, allow_unknown: bool) -> None:
        """Counts the events, and makes sure that each has what it needs."""
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

    def parts(self) -> Iterator[Part]:
        """Yields all users, some of them at a time."""
        stream = self._con.sql(
            "SELECT user, coalesce(place, 0)::INTEGER AS item, time FROM events "
            f"LEFT JOIN items USING (item) ORDER BY {self._order}"
        ).to_arrow_reader(_STREAM_EVENTS)
        held = stream.schema.empty_table()
        for batch in stream:
            held = pa.concat_tables([held, pa.table(batch)]).combine_chunks()
            last = _starts(held)[-1]  # the events of the last user may go on
            if last:
                yield _part(held.slice(0, last))
                held = held.slice(last)
        yield _part(held)


def _seconds(column: str, kind: str, path: str) -> str:
    """The SQL expression for whole seconds since 1970, of a column of this type."""
    if kind.endswith("INT") or kind in ("INTEGER", "UINTEGER"):
        return f"TRY_CAST({column} AS BIGINT)"
    if kind.startswith("TIMESTAMP") or kind == "DATE":
        return f"CAST(floor(epoch({column})) AS BIGINT)"
    raise UserError(
        f"{path}: the column {column} has type {kind}; times must be whole seconds since 1970 or "
        "timestamps"
    )


def _starts(table: pa.Table) -> np.ndarray:
    """The rows where the events of each user start."""
    codes = table.column("user").combine_chunks().dictionary_encode().indices.to_numpy()
    return np.append(0, np.flatnonzero(np.diff(codes)) + 1)


def _part(table: pa.Table) -> Part:
    starts = _starts(table)
    items, times = table.column("item").to_numpy(), table.column("time").to_numpy()
    known = items > 0
    before = np.append(0, np.cumsum(known))
    events = Events(items[known], times[known], before[np.append(starts, len(items))])
    users = table.column("user").combine_chunks().take(pa.array(starts))
    return Part(users, events, int(len(items) - known.sum()))


def _name(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


@contextlib.contextmanager
def _connect(folder: Path, memory_limit: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database that sorts in a temporary folder inside `folder`."""
    with (
        tempfile.TemporaryDirectory(prefix=".sorting-", dir=folder) as spill,
        contextlib.closing(duckdb.connect(config={"temp_directory": spill})) as con,
    ):
        con.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
        try:
            con.execute("SET memory_limit = ?", [memory_limit])
        except duckdb.Error as error:
            raise UserError(f"--memory-limit {memory_limit} is no size; write 4GB") from error
        yield con


@contextlib.contextmanager
def _one_sentence(events: str, memory_limit: str) -> Iterator[None]:
    """Turns what DuckDB and Arrow raise about the files into one sentence."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"sorting needs more than {memory_limit}; pass a higher --memory-limit"
        ) from error
    except (duckdb.Error, pa.ArrowException) as error:
        raise UserError(f"--events {events}: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        if str(error) == "Query interrupted":  # what DuckDB makes of Ctrl-C
            raise KeyboardInterrupt from error
        raise
