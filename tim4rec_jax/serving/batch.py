"""`python -m tim4rec_jax.serving batch`: histories of any number of users, Parquet to Parquet."""

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
from tim4rec_jax.evaluation.files import whole_file
from tim4rec_jax.serving import command
from tim4rec_jax.serving.history import Events
from tim4rec_jax.serving.parquet_events import ParquetEvents
from tim4rec_jax.serving.recommender import Recommender


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
        with whole_file(flags.out) as file, pq.ParquetWriter(file, schema) as writer:
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
