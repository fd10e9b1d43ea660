"""Prepares a dataset from source files, from start to end."""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

import tim4rec_jax
from tim4rec_jax.data_prep import events, features, files, filters, writer
from tim4rec_jax.data_prep.database import connect
from tim4rec_jax.data_prep.duckdb_engine import DuckDBEngine
from tim4rec_jax.data_prep.engine import Engine
from tim4rec_jax.data_prep.sources import SOURCES, read_titles
from tim4rec_jax.errors import UserError, one_line


def prepare(
    name: str,
    flags: argparse.Namespace,
    inputs: Sequence[str] | pa.Table,
    folder: Path,
    console: Console,
) -> dict:
    """Reads, filters and writes a dataset to `folder`.

    Args:
      name: a key of `SOURCES`, the family of files to read.
      flags: of the command line: filters, order, what to do with bad rows.
      inputs: paths or globs of the files, or a table.
      folder: an empty folder. Temporary files are written beside it.
      console: where progress is shown.

    Returns:
      The content of dataset.json.

    Raises:
      UserError: see `files.find_files`, `Engine.read` and `filters.apply`; or the engine is not
        there.
    """
    source, work = SOURCES[name], folder.parent
    table = _item_table(flags, work)
    found = events.find(inputs, source, work)
    _print_left_out(found, console)
    settings = filters.Filters(
        flags.deduplicate, flags.min_rating, flags.since, flags.until, flags.k_core
    )
    where = getattr(flags, "where", None)
    with _engine(flags, work) as engine:
        reading = engine.read(source, found.events, flags, console)
        sources = [files.fingerprint(file) for file in (table.sources if table else ())]
        with console.status("filtering") as status:
            steps = filters.apply(engine, settings, reading, where=where)
            status.update("writing")
            metadata = {
                "name": flags.name,
                "filters": dataclasses.asdict(settings) | {"where": where},
                "steps": [dataclasses.asdict(step) for step in steps],
                "bad_rows": dict(reading.bad),
                "sources": reading.sources + sources,
                "prepared_by": f"tim4rec-jax {tim4rec_jax.__version__}",
            }
            if name == "table":  # the user's own names, which recommendations then have too
                named = ("user", "item", "time", "time_unit")
                metadata["columns"] = {each: getattr(flags, each) for each in named}
            return writer.write(
                engine,
                folder,
                metadata,
                order=flags.order,
                shard_events=flags.shard_events,
                stable_ids=flags.stable_ids,
                titles=read_titles(found.titles),
                item_table=table,
                min_count=flags.feature_min_count,
                keep_items=flags.keep_items,
            )


@contextlib.contextmanager
def _engine(flags: argparse.Namespace, work: Path) -> Iterator[Engine]:
    if flags.engine == "spark":
        # Here and not above, because it is an extra.
        from tim4rec_jax.data_prep.spark_engine import spark_engine

        with spark_engine(work, flags.memory_limit) as engine:
            yield engine
    else:
        with contextlib.closing(connect(work, flags.memory_limit)) as con:
            yield DuckDBEngine(con)


def _item_table(flags: argparse.Namespace, work: Path) -> features.ItemTable | None:
    """Reads the table of items, if there is one.

    Raises:
      UserError: it cannot be used, or a flag asks for what only a table has.
    """
    if flags.item_features is None:
        asked = {
            "--item-title": flags.item_title,
            "--feature-columns": flags.feature_columns,
            "--dense-features": flags.dense_features,
            "--feature-separator": flags.feature_separator,
            "--keep-items": flags.keep_items,
        }
        if unused := [flag for flag, value in asked.items() if value]:
            raise UserError(f"{unused[0]} needs a table of items; name it with --item-features")
        return None
    choices = features.Choices(
        item=getattr(flags, "item", "item_id"),
        title=flags.item_title,
        columns=flags.feature_columns,
        dense=tuple(flags.dense_features),
        separator=flags.feature_separator,
        skip=flags.on_bad_row == "skip",
    )
    return features.read_items(flags.item_features, choices, work)


def _print_left_out(found: files.Found, console: Console) -> None:
    for container, names in found.left_out.items():
        more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        shown = ", ".join(one_line(name, 60) for name in names[:5]) + more
        console.out(f"not read of {one_line(container)}: {shown}", style="yellow")


def print_steps(metadata: dict, console: Console) -> None:
    """Prints how many events, users and items each step left and removed."""
    table = Table(
        "", "events", "users", "items", "events removed", title=Text(one_line(metadata["name"]))
    )
    for column in table.columns[1:]:
        column.justify = "right"
    before = None
    for step in metadata["steps"]:
        counts = [step[key] for key in ("events", "users", "items")]
        removed = "" if before is None else f"{before - step['events']:,}"
        table.add_row(
            Text(one_line(step["step"])), *("" if n is None else f"{n:,}" for n in counts), removed
        )
        before = step["events"]
    console.print(table)
    for reason, count in metadata["bad_rows"].items():
        console.out(f"skipped {count:,}: {reason}")
    if found := metadata.get("item_features"):
        console.out(
            f"item features: {one_line(found['features'])}; {found['items']:,} of "
            f"{metadata['items']:,} items have a row in the table, and {found['unused']:,} of its "
            "rows are of no item"
        )
        for note in found["notes"]:
            console.out(f"item features: {note}")
        for reason, count in found["bad_rows"].items():
            console.out(f"item features: skipped {count:,}: {reason}")
