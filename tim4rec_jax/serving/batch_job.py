"""Recommends to all users of a log, which may be larger than memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from argparse import Namespace as Flags
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tim4rec_jax.data_prep.database import connect
from tim4rec_jax.data_prep.events import TimeUnit, find, load_events
from tim4rec_jax.data_prep.failures import one_sentence
from tim4rec_jax.data_prep.layout import schema, sniff
from tim4rec_jax.data_prep.sources import SOURCES
from tim4rec_jax.errors import UserError
from tim4rec_jax.files import table_writer
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.history import Events
from tim4rec_jax.serving.recommender import Recommender

_STREAM_EVENTS = 1 << 17  # how many events are read at once
_PREFIX = ".sorting-"
_MARK = ".made-by-tim4rec-jax"  # lies in each folder for sorting that is ours
# The columns that are looked for where none is named, after those of the training's data.
_NAMES = {"user": ("user_id", "user"), "item": ("item_id", "item"), "time": ("timestamp",)}


class Columns(NamedTuple):
    """The columns of the files.

    Attributes:
        user: the name of the column with the user id; `None` takes the name that the data of the
            training had, `user_id` or `user`, whichever the file has.
        item: likewise, its name there, `item_id` or `item`.
        time: likewise, its name there or `timestamp`.
        time_unit: of the times: since 1970, or iso for dates; `None` takes that of the training's
            data.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    time_unit: TimeUnit | None = None


@dataclass
class Summary:
    """What `recommend_all` has done.

    Attributes:
        users: the number of users with a row or more.
        rows: the number of rows written.
        without: the number of users without a row, for whom the filters left no item.
        unknown: the number of events left out because the model does not know their items.
        fallback: how many of `users` have no known event.
        bad_rows: the number of rows left out, by reason.
    """

    users: int = 0
    rows: int = 0
    without: int = 0
    unknown: int = 0
    fallback: int = 0
    bad_rows: dict[str, int] = field(default_factory=dict)


def recommend_all(
    recommender: Recommender,
    events: Sequence[str],
    out: Path,
    columns: Columns,
    *,
    allow_unknown: bool = True,
    on_bad_row: Literal["error", "skip"] = "error",
    memory_limit: str = "2GB",
    **options: Any,
) -> Summary:
    """Writes the best items of every user, with a progress bar on standard error.

    The file has one row per user and item: `user` (whole numbers if the events are a Parquet file
    with whole numbers, texts otherwise), `rank` (1 is best), `item`, `score`, and `fallback`, which
    says that no event of the user was known, so that the items are the most popular ones. Users
    are in rising order.

    Args:
        recommender: the model.
        events: files with events in any order, as `python -m data_prep table` takes them: CSV,
            TSV, JSON lines or Parquet, plain or gzip, globs of them.
        out: the file to write, CSV if its name ends in `.csv`, else Parquet. It appears under its
            name only when it is complete.
        columns: the names of the columns of the events.
        allow_unknown: whether there may be items that the model does not know; they are left out.
        on_bad_row: whether a row that cannot be used is an error, or is left out and counted.
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
    with (
        one_sentence(
            out,
            full=", which the sorting of the events needs too",
            memory=f"sorting needs more than {memory_limit}; pass a higher --memory-limit",
            unreadable="the events cannot be read: {message}",
        ),
        _workspace(out.parent) as work,
        contextlib.closing(connect(work, memory_limit)) as con,
        bar,
    ):
        task = bar.add_task("sorting", total=None)
        source = SortedEvents(
            con,
            work,
            events,
            columns,
            catalogue,
            allow_unknown=allow_unknown,
            on_bad_row=on_bad_row,
        )
        summary.bad_rows = source.bad_rows
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
        with table_writer(out, schema) as writer:
            for part in source.parts():
                bar.update(task, description="recommending", total=source.count)
                scores, items = _rank_by_length(recommender, part.events, options)
                fallback = np.diff(part.events.offsets) == 0
                row, place = np.nonzero(items)  # item 0 fills up where no item was left
                arrays = [
                    part.users.cast(source.user_type).take(pa.array(row)),
                    (place + 1).astype(np.int32),
                    ids.take(pa.array(items[row, place] - 1)),
                    scores[row, place].astype(np.float32),
                    fallback[row],
                ]
                writer.write_table(pa.table(arrays, schema=schema))
                served = (items > 0).any(axis=1)
                summary.users += int(served.sum())
                summary.rows += len(row)
                summary.without += int((~served).sum())
                summary.unknown += part.unknown
                summary.fallback += int((fallback & served).sum())
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


class SortedEvents:
    """The events of files, sorted by user and time, part by part.

    Attributes:
        count: the number of events.
        user_type: the type of the user ids: whole numbers if all files are Parquet and have such,
            and texts otherwise.
        bad_rows: the number of rows left out, by reason.
    """

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        work: Path,
        files: Sequence[str],
        columns: Columns,
        catalogue: Catalogue,
        *,
        allow_unknown: bool,
        on_bad_row: Literal["error", "skip"],
    ):
        """Reads and checks all events.

        Args:
            con: the database that sorts the events.
            work: a folder for temporary files.
            files: paths and globs, as `python -m data_prep table` takes them.
            columns: the names of the columns.
            catalogue: the items that the model knows.
            allow_unknown: whether there may be other items.
            on_bad_row: whether a row that cannot be used is an error, or is left out.

        Raises:
            UserError: a column is missing, or an event cannot be used; the message names file and
                row.
        """
        self._con = con
        remembered = catalogue.metadata.get("columns", {})
        columns, self.user_type = _look_into(files, columns, remembered, work / "first")
        self.bad_rows = load_events(
            con,
            work,
            files,
            user=str(columns.user),
            item=str(columns.item),
            time=str(columns.time),
            time_unit=columns.time_unit or remembered.get("time_unit", "s"),
            on_bad_row=on_bad_row,
        )
        ids = pa.array(catalogue.ids)
        con.register("items", pa.table({"item": ids, "place": np.arange(1, len(ids) + 1)}))
        [self.count] = con.sql("SELECT count(*) FROM events").fetchall()[0]
        if not self.count:
            raise UserError("there are no events to recommend from")
        unknown = "SELECT item FROM events ANTI JOIN items USING (item) LIMIT 1"
        if not allow_unknown and (found := con.sql(unknown).fetchall()):
            raise UserError(
                f"the events hold the item {found[0][0]!r}, which the model does not know; pass "
                "--on-unknown skip to leave such events out"
            )
        # RecBole rounds times to float32 before it sorts.
        rounded = catalogue.metadata["order"] == "recbole"
        whole = pa.types.is_integer(self.user_type)
        self._user = '"user"::HUGEINT' if whole else '"user"'
        self._order = f'{self._user}, time{"::FLOAT" if rounded else ""}, "row"'

    def parts(self) -> Iterator[Part]:
        """Yields all users, some of them at a time."""
        stream = self._con.sql(
            'SELECT "user", coalesce(place, 0)::INTEGER AS item, floor(time)::BIGINT AS time '
            f"FROM events LEFT JOIN items USING (item) ORDER BY {self._order}"
        ).to_arrow_reader(_STREAM_EVENTS)
        held = stream.schema.empty_table()
        for batch in stream:
            held = pa.concat_tables([held, pa.table(batch)]).combine_chunks()
            last = _starts(held)[-1]  # the events of the last user may go on
            if last:
                yield _part(held.slice(0, last))
                held = held.slice(last)
        yield _part(held)


def _look_into(
    paths: Sequence[str], columns: Columns, remembered: dict[str, str], work: Path
) -> tuple[Columns, pa.DataType]:
    """The columns by name, as the first file has them, and the type of the user ids of all."""
    source = SOURCES["table"]
    work.mkdir()
    files = find(paths, source, work).events
    flags = {name: "" for name in ("user", "item", "time", "time_unit", "delimiter", "columns")}
    layout = source.layout(files[0], Flags(**flags, rating=None, where=None))
    wanted = {
        name: [remembered[name], *names] if name in remembered else names
        for name, names in _NAMES.items()
        if getattr(columns, name) is None
    }
    chosen = columns._replace(
        **{
            name: next((each for each in names if each in layout.columns), names[0])
            for name, names in wanted.items()
        }
    )
    kinds = set()
    for file in files:
        known = schema(file) if sniff(file) == "parquet" else pa.schema([])
        place = known.get_field_index(str(chosen.user))
        kinds.add(known.types[place] if place >= 0 else pa.string())
    if not all(map(pa.types.is_integer, kinds)):
        return chosen, pa.string()
    if len(kinds) == 1:
        return chosen, kinds.pop()
    if all(map(pa.types.is_unsigned_integer, kinds)):
        return chosen, pa.uint64()
    return chosen, pa.string() if pa.uint64() in kinds else pa.int64()


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


@contextlib.contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`. What killed jobs have left there is removed.

    A folder of somebody else with such a name stays.
    """
    for left in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left) if (left / _MARK).is_file() else left.rmdir()
    with contextlib.ExitStack() as stack:
        work = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        stack.enter_context(_locked(work))
        (work / _MARK).touch()
        yield work


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which the system releases when the process ends.

    Raises:
        OSError: a living process holds it, or it is no folder of ours.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)
